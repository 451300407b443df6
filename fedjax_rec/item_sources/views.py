"""Item views made by the server from item features and a trainable ID table, and the router that mixes them.

    F_j = g_j(V, C, D; gamma_j)                       server, FedVLR Eq. 2, FedMR Eq. 4
    w_u = softmax(phi_u({F_j}, r_u) / temperature)    client, FedVLR Eq. 3, FedMR Eq. 5
    F_u = sum_j w_uj F_j                              client, FedVLR Eq. 4, FedMR Eq. 6

Every modality (the ID table is one) is projected linearly to the shared width; an operator makes one view of the
projected modalities. A new operator is a module with an entry in OPERATORS, a new modality an entry of the features.

The router is a two-layer network over the mean of the concatenated views of the user's history; its softmax weights
the operators for one user (`user`). `item` adds the item's own views to that input, so that weights differ by item.
`batch_mean` is the released code: it never sees the history, but averages per-item weights over the batch at hand.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float

from fedjax_rec.types import Params
from fedjax_rec.validate import one_of

ID = "id"
ROUTERS = ("user", "item", "batch_mean")


class Sum(nn.Module):
    """Sum of the projected modalities; no parameters."""

    dim: int

    @nn.compact
    def __call__(self, parts):
        return sum(parts)


class MLP(nn.Module):
    """Two layers over the concatenated modalities, hidden width 2 dim."""

    dim: int

    @nn.compact
    def __call__(self, parts):
        return nn.Dense(self.dim)(nn.relu(nn.Dense(2 * self.dim)(jnp.concatenate(parts, -1))))


class Gate(nn.Module):
    """Every modality times its own sigmoid gate, then one linear layer over all of them. (The released code leaves
    the multiplication out and feeds the gates alone to the linear layer.)"""

    dim: int

    @nn.compact
    def __call__(self, parts):
        gated = [nn.sigmoid(nn.Dense(self.dim)(x)) * x for x in parts]
        return nn.Dense(self.dim)(jnp.concatenate(gated, -1))


HEADS = 4


class Attention(nn.Module):
    """Self-attention among an item's modalities, then one linear layer over all of them."""

    dim: int

    @nn.compact
    def __call__(self, parts):
        tokens = jnp.stack(parts, -2)
        mixed = nn.MultiHeadDotProductAttention(HEADS, qkv_features=self.dim)(tokens)
        return nn.Dense(self.dim)(mixed.reshape(*mixed.shape[:-2], -1))


OPERATORS: dict[str, type[nn.Module]] = {"sum": Sum, "mlp": MLP, "gate": Gate, "attention": Attention}


class Projected(nn.Module):
    """Views of the projected modalities, one per operator."""

    operators: Sequence[str]
    dim: int
    layer_norm: bool

    @nn.compact
    def __call__(self, modalities: Mapping[str, ArrayLike]):
        parts = []
        for name in sorted(modalities):
            part = nn.Dense(self.dim, name=f"project_{name}")(modalities[name])
            parts.append(nn.LayerNorm(name=f"norm_{name}")(part) if self.layer_norm else part)
        return jnp.stack([OPERATORS[o](self.dim, name=o)(parts) for o in self.operators], axis=-2)


class VBPR(nn.Module):
    """One view as VBPR has it (He and McAuley 2016): the ID vector beside a linear map of the features, half the
    width each."""

    dim: int

    @nn.compact
    def __call__(self, modalities: Mapping[str, ArrayLike]):
        content = jnp.concatenate([modalities[name] for name in sorted(modalities) if name != ID], -1)
        embedded = nn.Dense(self.dim // 2, use_bias=False, name="embed")(content)
        return jnp.concatenate([modalities[ID], embedded], -1)[..., None, :]


def fusion(operators: Sequence[str], dim: int, *, layer_norm: bool = False) -> nn.Module:
    """The module that makes views: {modality: [..., feat]} -> [..., views, dim]."""
    return VBPR(dim) if tuple(operators) == ("vbpr",) else Projected(tuple(operators), dim, layer_norm)


def fill_cold(table: Float[ArrayLike, "items dim"], warm: Bool[Array, "items"] | None, rule: str):
    """The ID table with the rows of items that training never touches set by `rule`.

    Raises:
        ValueError: for another rule than `zero` or the warm `mean`.
    """
    if warm is None:
        return table
    one_of("rule", rule, ("zero", "mean"))
    filled = jnp.zeros(()) if rule == "zero" else (table * warm[:, None]).sum(0) / warm.sum()
    return jnp.where(warm[:, None], table, filled)


class Router(nn.Module):
    """Logits over views from concatenated views (12,547 parameters for three views of width 64, as the papers')."""

    num_views: int
    hidden: int

    def setup(self):
        self.inner, self.outer = nn.Dense(self.hidden), nn.Dense(self.num_views)

    def __call__(self, x):
        return self.outer(nn.relu(self.inner(x)))

    def from_inner(self, z):
        """The same from what the first layer says, [hidden]."""
        return self.outer(nn.relu(z))


def router_weights(
    router: nn.Module,
    params: Params,
    views: Float[Array, "n views dim"],
    history: Float[Array, "views dim"],
    present: Float[Array, "n"],
    *,
    mode: str,
    temperature: float,
) -> Float[Array, "*n views"]:
    """Softmax weights: one vector for all items (`user`, `batch_mean`), or one for every item.

    Args:
        params: the router's.
        history: mean views of the user's training items.
        present: 1 for items that count in `batch_mean`.
        mode: one of ROUTERS.

    Raises:
        ValueError: for another mode.
    """
    one_of("mode", mode, ROUTERS)
    flat = views.reshape(views.shape[0], -1)
    if mode == "user":
        return nn.softmax(router.apply(params, history.reshape(-1)) / temperature)
    if mode == "item":
        return nn.softmax(router.apply(params, flat + history.reshape(-1)) / temperature)
    weights = nn.softmax(router.apply(params, flat) / temperature)
    return (weights * present[:, None]).sum(0) / jnp.maximum(present.sum(), 1.0)


@jax.custom_vjp
def mix(weights: Float[Array, "*n views"], views: Float[Array, "n views dim"]) -> Float[Array, "n dim"]:
    """The personalised item vectors."""
    # view by view: one sum over an inner axis takes twice the time with its gradient
    return sum(weights[..., v, None] * views[..., v, :] for v in range(views.shape[-2]))


def _mix_forward(weights, views):
    return mix(weights, views), (weights, views)


def _mix_backward(held, pulled):
    """As automatic differentiation has it; there every weight's sum walks through its view alone, at twice the time."""
    weights, views = held
    products = views * pulled[:, None, :]
    of_weights = products.sum(0).sum(-1) if weights.ndim == 1 else products.sum(-1)
    return of_weights, weights[..., None] * pulled[:, None, :]


mix.defvjp(_mix_forward, _mix_backward)


def pull_back(publish: Callable[[Params], Array], trainable: Params, cotangent: Float[Array, "items views dim"]):
    """The gradient of what the server trains, given the gradient of the views it published: one backward pass,
    whatever the number of clients."""
    _, backward = jax.vjp(publish, trainable)
    return backward(cotangent)[0]
