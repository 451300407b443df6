"""The five client models of the multimodal papers, over a mixed item vector instead of a row of one table."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from fedjax_rec.backbones.linear import linear_head
from fedjax_rec.backbones.mf import matrix_factorisation
from fedjax_rec.backbones.ncf import neural_cf
from fedjax_rec.roles import masked_mean
from fedjax_rec.sharing import item_table
from fedjax_rec.types import Params, PRNGKey

BACKBONES = ("fedavg", "fcf", "fedncf", "pfedrec", "fedrap")


class Fused(NamedTuple):
    """A client model over mixed item vectors.

    Attributes:
        init_shared: key -> roles that are averaged as they are (FedNCF's item table and network), often none.
        init_private: key -> one client's roles.
        predict: (params, item-role vectors [n, width] keyed by role, mixed [n, dim]) -> logits [n].
        regulariser: (vectors, mixed, mask [n], 0-based round) -> scalar added to the loss.
        private_first: the private roles step before the gradient of the views is taken (PFedRec).
        weighting: `equal` or `by_size`.
        linear: where the logits are mixed @ vector + bias and there is no regulariser: one client's roles -> (vector
            [dim], bias []); else None.
    """

    init_shared: Callable[[PRNGKey], Params]
    init_private: Callable[[PRNGKey], Params]
    predict: Callable[[Params, Params, Float[Array, "n dim"]], Float[Array, "n"]]
    regulariser: Callable[..., Float[Array, ""]]
    private_first: bool
    weighting: str
    linear: Callable[[Params], tuple[Float[Array, "dim"], Float[Array, ""]]] | None = None


def fused_backbone(name: str, num_items: int, config) -> Fused:
    """One of BACKBONES over mixed vectors of width config.dim.

    FedAvg and FCF are a user vector and a bias; PFedRec is a head that steps first; FedRAP adds its personal table to
    the mixed vector after the router, so that it never reaches the server; FedNCF adds the mixed vector to the item
    vectors of both its branches.
    """
    none = lambda key: {}
    free = lambda vectors, mixed, mask, round_: jnp.zeros(())
    if name in ("fedavg", "fcf"):
        model = matrix_factorisation(config.dim, bias=True, init_std=config.user_init_std)
        plain = lambda params, vectors, mixed: model.predict(params, mixed)
        linear = lambda params: (params["user"]["vector"], params["user"]["bias"])
        return Fused(none, model.init, plain, free, False, "by_size" if name == "fedavg" else "equal", linear)
    if name == "pfedrec":
        head = linear_head(config.dim)
        plain = lambda params, vectors, mixed: head.predict(params, mixed)
        linear = lambda params: (params["head"]["weight"], params["head"]["bias"])
        return Fused(none, head.init, plain, free, True, "equal", linear)
    if name == "fedrap":
        return _fedrap(num_items, config)
    return _fedncf(num_items, config)


def _fedrap(num_items: int, config) -> Fused:
    head = linear_head(config.dim)

    def init_private(key):
        k_head, k_item = jax.random.split(key)
        return {**head.init(k_head), "own_item": item_table(k_item, num_items, config.dim, config.own_init_std)}

    def regulariser(vectors, mixed, mask, round_):
        ramp = jnp.tanh(round_ / 10.0) if config.anneal else 1.0
        apart = masked_mean(((vectors["own_item"] - mixed) ** 2).mean(-1), mask)
        return ramp * (config.sparsity * masked_mean(jnp.abs(mixed).mean(-1), mask) - config.independence * apart)

    predict = lambda params, vectors, mixed: head.predict(params, mixed + vectors["own_item"])
    return Fused(lambda key: {}, init_private, predict, regulariser, False, "equal")


def _fedncf(num_items: int, config) -> Fused:
    model = neural_cf(config.dim, layers=config.layers, gmf=config.branches == "neumf", init_std=config.user_init_std)
    repeats = model.width // config.dim

    def init_shared(key):
        k_item, k_network = jax.random.split(key)
        item = item_table(k_item, num_items, model.width, config.init_std)
        return {"item": item, "network": model.init(k_network)["network"]}

    return Fused(
        init_shared,
        lambda key: {"user": model.init(key)["user"]},
        lambda params, vectors, mixed: model.predict(params, vectors["item"] + jnp.tile(mixed, (1, repeats))),
        lambda vectors, mixed, mask, round_: jnp.zeros(()),
        False,
        "equal",
    )
