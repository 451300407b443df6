"""Heater: a mixture of experts makes item vectors from content, and is mixed with pre-trained ones at random.

    q'_i = tanh(sum_k g_ik tanh(W_k m_i + b_k)),  g_i = tanh(G m_i + c)        the mixture of experts
    r_i  = q'_i with chance `randomised`, else q_i                             anew for each sample
    s_ui = tower_U(p_u) . tower_I(r_i),  tower = linear, batch norm, tanh, linear
    L    = mean (s_ui - y_ui)^2 + alpha sum |q'_i - q_i|^2 + l2 sum |W|^2      y = 1, or 0 for the negatives

p, q are BPR-MF's vectors (see pretrained.py), standardised column by column and cut at +-5 and +-1; m whitened
features. Scores of warm items read q_i, of cold ones q'_i.

Follows: Zhu et al., Recommendation for New Users and New Items via Randomized Training and Mixture-of-Experts
Transformation, SIGIR 2020, and its released code where only items have content (its CiteULike): tanh gates, widths
all alike, squared weights and biases of all linear layers, a rate that falls by `rate_decay` every `decay_every`
epochs. All of a user's samples of the round are trained on: with negatives=5, one positive to five uniform negatives.
Deviations: a sample is randomised by its own draw, where the release takes exactly half of a batch. q is standardised
by the warm items' mean and spread alone. The release draws negatives also from the user's own items.
"""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from fedjax_rec.central.epochs import in_batches, places
from fedjax_rec.central.pairwise import served
from fedjax_rec.central.pretrained import (
    Phase,
    TaughtConfig,
    Tower,
    Towers,
    descend,
    items_of,
    squares,
    taught,
    untrained,
)
from fedjax_rec.item_sources import Catalogue
from fedjax_rec.method import Method
from fedjax_rec.roles import OPTIMIZERS, masked_mean
from fedjax_rec.validate import between, positive

USER_CUT, ITEM_CUT = 5.0, 1.0


@dataclasses.dataclass(frozen=True)
class Config(TaughtConfig):
    """Attributes: randomised, alpha, l2: see the module docstring. experts: their number. rate_decay: factor of the
    rate every `decay_every` rounds of the networks. Others: see TaughtConfig."""

    lr: float = 0.005
    optimizer: str = "momentum"
    negatives: int = 5
    rate_decay: float = 0.8
    decay_every: int = 10
    experts: int = 5
    randomised: float = 0.5
    alpha: float = 1e-4

    def __post_init__(self):
        super().__post_init__()
        between("randomised", self.randomised, 0.0, 1.0)
        positive("alpha", self.alpha, zero_allowed=True)
        for name in ("decay_every", "experts"):
            positive(name, getattr(self, name))


class Mixture(nn.Module):
    """q' of content."""

    width: int
    experts: int

    @nn.compact
    def __call__(self, content: Float[Array, "n feat"]) -> Float[Array, "n width"]:
        dense = lambda size, name: nn.Dense(size, kernel_init=nn.initializers.truncated_normal(0.01), name=name)
        gates = nn.tanh(dense(self.experts, "gate")(content))
        made = nn.tanh(dense(self.experts * self.width, "experts")(content))
        return nn.tanh(jnp.einsum("nk,nkd->nd", gates, made.reshape(-1, self.experts, self.width)))


class Network(nn.Module):
    """The towers' vectors of users and items, and q'."""

    width: int
    experts: int

    def setup(self):
        self.mixture = Mixture(self.width, self.experts)
        self.towers = Towers(Tower(self.width, momentum=0.9), Tower(self.width, momentum=0.9))

    def __call__(self, users, items, content, made: Bool[Array, "n"], mask=None, *, train: bool = False):
        """`made`: whose vector is made from content."""
        from_content = self.mixture(content)
        read = jnp.where(made[:, None], from_content, items)
        return *self.towers(users, read, mask, train=train), from_content

    def of_users(self, users):
        return self.towers.user(users)

    def of_items(self, items, content, made: Bool[Array, "n"]):
        return self.towers.item(jnp.where(made[:, None], self.mixture(content), items))


def standardised(values: Float[Array, "n dim"], known: Bool[Array, "n 1"], cut: float) -> Float[Array, "n dim"]:
    """Every column less its mean over the known rows, over its spread there, at most `cut`; other rows are 0."""
    count = jnp.maximum(known.sum(), 1)
    centred = values - (values * known).sum(0) / count
    spread = jnp.sqrt((centred**2 * known).sum(0) / count)
    return jnp.clip(centred / jnp.maximum(spread, 1e-12), -cut, cut) * known


def loss_of(config: Config, params, statistics, batch, key):
    """(L, running statistics) of (users, items, content, labels, mask)."""
    users, items, content, label, mask = batch
    made = jax.random.uniform(key, mask.shape) < config.randomised
    (u, v, from_content), moved = Network(config.dim, config.experts).apply(
        {"params": params, "batch_stats": statistics},
        users,
        items,
        content,
        made,
        mask,
        train=True,
        mutable=["batch_stats"],
    )
    error = masked_mean(((u * v).sum(1) - label) ** 2, mask)
    apart = (((from_content - items) ** 2).sum(1) * mask).sum()
    return error + config.alpha * apart + config.l2 * squares(params, "kernel", "bias"), moved["batch_stats"]


def heater(config: Config, num_users: int, num_items: int, name: str, catalogue: Catalogue) -> Method:
    """Heater; see the module docstring."""
    items = items_of(config, catalogue, name)
    network, optimizer = Network(config.dim, config.experts), OPTIMIZERS[config.optimizer](config.lr)

    def init(key):
        row = jnp.zeros((1, config.dim))
        variables = network.init(key, row, row, items.content[:1], jnp.zeros(1, bool))
        return {"network": untrained(variables, optimizer), "items": items}

    def standard(known, users, vectors):
        everybody = jnp.ones((num_users, 1), bool)
        return standardised(users, everybody, USER_CUT), standardised(vectors, ~known.cold, ITEM_CUT)

    def epoch(key, state, users, vectors, seen, since):
        k_order, k_random = jax.random.split(key)
        known = state["items"]
        users, vectors = standard(known, users, vectors)
        scale = config.rate_decay ** (since // config.decay_every).astype(jnp.float32)

        def step(trained, index, mask, number):
            user, place = places(seen.count, index)
            coded = seen.samples[user, place]
            item = jnp.where(coded < 0, -1 - coded, coded)
            batch = users[user], vectors[item], known.content[item], (coded < 0).astype(jnp.float32), mask
            k = jax.random.fold_in(k_random, number)
            return descend(optimizer, lambda p, s: loss_of(config, p, s, batch, k), trained, mask, scale)

        return {**state, "network": in_batches(k_order, seen.count.sum(), config.batch_size, step, state["network"])}

    def vectors_of(state, users, vectors):
        known, variables = state["items"], state["network"].variables
        users, vectors = standard(known, users, vectors)
        made = network.apply(variables, vectors, known.content, known.cold[:, 0], method="of_items")
        return network.apply(variables, users, method="of_users"), made

    return served(taught(Phase(init, epoch, vectors_of), config, num_users, items), config, num_users, num_items, name)
