"""ALDI: towers over content (the student) are aligned with what matrix factorisation (the teacher) says of warm items.

    s_ui = f_U(p_u) . g_i,  g_i = f_I(m_i),   t_ui = p_u . q_i         f = linear, batch norm, tanh, linear
    L = mean softplus(s_uj - s_ui)                                       supervised
      + alpha mean w_i BCE(s_ui - s_uj, sigmoid(t_ui - t_uj))            ranking
      + beta  mean w_i BCE(g_i . g_i - g_i . g~, sigmoid(q_i . q_i - q_i . q~))   identification
      + gamma mean (|t_ui - s_ui| + |t_uj - s_uj|)                       rating distribution
      + l2 / 2 sum |W|^2

over triples (user u, positive i, negative j); g~ and q~ are means over the batch's negatives. w_i is 1, or with
`tws` tanh(M f_i / (users / items)), at most tanh(M), with f_i the sum over i's users of 1 / (number of the user's
items). p, q are BPR-MF's vectors (see pretrained.py), m whitened features. Scores are t_ui of warm items and s_ui of
cold ones.

Follows: Huang et al., Aligning Distillation For Cold-Start Item Recommendation, CIKM 2023, and its released code.
Deviations: all widths are `dim` (200 there). `users / items` counts those with training data, and f_i those of the
round.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from fedjax_rec.central.pairwise import Seen, Triples, in_use, over_triples, served
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
from fedjax_rec.validate import positive


@dataclasses.dataclass(frozen=True)
class Config(TaughtConfig):
    """Attributes: alpha, beta, gamma, l2, tws: see the module docstring. tws_limit: M. Others: see TaughtConfig."""

    alpha: float = 0.9
    beta: float = 0.05
    gamma: float = 0.1
    tws: bool = False
    tws_limit: float = 4.0

    def __post_init__(self):
        super().__post_init__()
        for name in ("alpha", "beta", "gamma"):
            positive(name, getattr(self, name), zero_allowed=True)
        positive("tws_limit", self.tws_limit)
        if not self.tws:
            self.unused("tws=false", "tws_limit")


def frequencies(seen: Seen, num_items: int) -> Float[Array, "items"]:
    """f of the module docstring."""
    item = jnp.where((seen.samples < 0) & in_use(seen), -1 - seen.samples, num_items)
    share = jnp.broadcast_to(1.0 / jnp.maximum(seen.length, 1)[:, None], item.shape)
    return jnp.zeros(num_items).at[item].add(share, mode="drop")


def item_weights(config: Config, seen: Seen, num_items: int) -> Float[Array, "items"]:
    """w of the module docstring."""
    if not config.tws:
        return jnp.ones(num_items)
    frequency, limit = frequencies(seen, num_items), config.tws_limit
    expected = (seen.length > 0).sum() / jnp.maximum((frequency > 0).sum(), 1)
    return jnp.clip(jnp.tanh(limit / jnp.maximum(expected, 1e-12) * frequency), 0.0, jnp.tanh(limit))


def cross_entropy(logits: Float[Array, "n"], targets: Float[Array, "n"]) -> Float[Array, "n"]:
    return jax.nn.softplus(logits) - targets * logits


def objective(config: Config, student, teacher, weight: Float[Array, "batch"], mask: Float[Array, "batch"]):
    """L without l2. `student`, `teacher`: vectors of (users, positives, negatives), each [batch, dim]."""

    def said(users, positives, negatives):
        among = (negatives * mask[:, None]).sum(0) / jnp.maximum(mask.sum(), 1.0)
        return (users * positives).sum(1), (users * negatives).sum(1), (positives * (positives - among)).sum(1)

    (s_i, s_j, s_apart), (t_i, t_j, t_apart) = said(*student), said(*teacher)
    supervised = jax.nn.softplus(s_j - s_i)
    ranking = weight * cross_entropy(s_i - s_j, jax.nn.sigmoid(t_i - t_j))
    identification = weight * cross_entropy(s_apart, jax.nn.sigmoid(t_apart))
    distribution = jnp.abs(t_i - s_i) + jnp.abs(t_j - s_j)
    total = supervised + config.alpha * ranking + config.beta * identification + config.gamma * distribution
    return masked_mean(total, mask)


def aldi(config: Config, num_users: int, num_items: int, name: str, catalogue: Catalogue) -> Method:
    """ALDI; see the module docstring."""
    items = items_of(config, catalogue, name)
    towers, optimizer = Towers(Tower(config.dim), Tower(config.dim)), OPTIMIZERS[config.optimizer](config.lr)

    def init(key):
        variables = towers.init(key, jnp.zeros((1, config.dim)), items.content[:1])
        return {"network": untrained(variables, optimizer), "items": items}

    def epoch(key, state, users, vectors, seen, since):
        content, weights = state["items"].content, item_weights(config, seen, num_items)
        scale = config.rate_decay ** since.astype(jnp.float32)

        def step(trained, triples: Triples, key):
            user, positive, negative, mask = triples
            teacher = users[user], vectors[positive], vectors[negative]

            def loss(params, statistics):
                (p, g), moved = towers.apply(
                    {"params": params, "batch_stats": statistics},
                    teacher[0],
                    content[jnp.concatenate([positive, negative])],
                    mask,
                    train=True,
                    mutable=["batch_stats"],
                )
                total = objective(config, (p, *jnp.split(g, 2)), teacher, weights[positive], mask)
                return total + config.l2 / 2 * squares(params, "kernel", "bias"), moved["batch_stats"]

            return descend(optimizer, loss, trained, mask, scale)

        return {**state, "network": over_triples(key, seen, config.batch_size, step, state["network"])}

    def vectors_of(state, users, vectors):
        own, made = towers.apply(state["network"].variables, users, state["items"].content)
        cold = state["items"].cold
        # the teacher's half of an item or the student's
        halves = jnp.where(cold, 0.0, vectors), jnp.where(cold, made, 0.0)
        return jnp.concatenate([users, own], axis=1), jnp.concatenate(halves, axis=1)

    return served(taught(Phase(init, epoch, vectors_of), config, num_users, items), config, num_users, num_items, name)
