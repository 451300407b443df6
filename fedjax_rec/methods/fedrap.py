"""FedRAP: every user adds a personal item table to the shared one, and keeps the two apart.

    score = w_u . (D_u[i] + C[i]) + b_u
    L_u   = BCE - lambda_t mean (D_u - C)^2 + mu_t mean |C|,   lambda_t = lambda tanh(t / 10), mu_t = mu tanh(t / 10)

D_u (`own_item`) and (w_u, b_u) stay and persist, C (`item`) is averaged with equal weights.

Follows: Li et al., ICLR 2024, Eqs. 3-6, with both annealed weights.
Deviations: the two regularisers are means over the rows of the batch, as in the released code: a mini-batch estimate
of the paper's sums over the tables, which keeps rows that a client never samples out of its work.
`regularise=table` takes the mean over the whole catalogue at every step instead. The released code's constant
weights (its annealing is dead code) are `anneal=False`; its decay 0.97 per round of the rates is `rate_decay`.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import optax

from fedjax_rec.backbones.linear import linear_head
from fedjax_rec.method import Method
from fedjax_rec.roles import (
    binary_cross_entropy,
    by_role,
    masked_mean,
    optax_step,
    run_steps,
    sgd_step,
)
from fedjax_rec.sharing import BY_CLIENT, LocalConfig, item_table, sharing_method
from fedjax_rec.validate import between, one_of, positive


@dataclasses.dataclass(frozen=True)
class Config(LocalConfig):
    """Attributes: independence: lambda. sparsity: mu. anneal: tanh(t / 10) on both.
    own_lr_scale: rate of the personal table relative to lr. own_init_std: its start.
    regularise: `batch` or `table`. rate_decay: factor on all rates per round. Others: see LocalConfig."""

    independence: float = 0.001
    sparsity: float = 0.001
    anneal: bool = True
    own_lr_scale: float = 0.2
    own_init_std: float = 0.0
    regularise: str = "batch"
    rate_decay: float = 1.0

    def __post_init__(self):
        super().__post_init__()
        one_of("regularise", self.regularise, ("batch", "table"))
        one_of("optimizer", self.optimizer, ("sgd",))
        positive("own_lr_scale", self.own_lr_scale, zero_allowed=True)
        positive("independence", self.independence, zero_allowed=True)
        positive("sparsity", self.sparsity, zero_allowed=True)
        between("rate_decay", self.rate_decay, 0.0, 1.0)
        if self.regularise == "table":
            one_of("weighting", self.weighting, BY_CLIENT)  # both penalties move every row


def fedrap(config: Config, num_users: int, num_items: int, name: str = "fedrap") -> Method:
    """FedRAP; see the module docstring."""
    head = linear_head(config.dim)
    rates = {
        "head": config.lr,
        "own_item": config.lr * config.own_lr_scale,
        "item": config.item_lr(num_users),
    }

    def regulariser(shared, own, mask, ramp):
        apart = masked_mean(((own - shared) ** 2).mean(-1), mask)
        sparse = masked_mean(jnp.abs(shared).mean(-1), mask)
        return ramp * (config.sparsity * sparse - config.independence * apart)

    def train(params, data):
        ramp = jnp.tanh(data.round / 10.0) if config.anneal else 1.0
        decay = config.rate_decay**data.round

        def loss(rest, vectors, batch):
            value = binary_cross_entropy(head.predict(rest, vectors["item"] + vectors["own_item"]), batch)
            return value + regulariser(vectors["item"], vectors["own_item"], batch.mask, ramp)

        step = sgd_step(loss, {role: rate * decay for role, rate in rates.items()})
        return run_steps(step, params, data)

    def init_private(key):
        k_head, k_item = jax.random.split(key)
        return {**head.init(k_head), "own_item": item_table(k_item, num_items, config.dim, config.own_init_std)}

    return sharing_method(
        name,
        init_shared=lambda key: {"item": item_table(key, num_items, config.dim, config.init_std)},
        init_private=init_private,
        train=train if config.regularise == "batch" else _train_on_table(head, rates, regulariser, config),
        score=lambda params: head.predict(params, params["item"] + params["own_item"]),
        config=config,
        rows="touched" if config.regularise == "batch" else "all",
    )


def _train_on_table(head, rates, regulariser, config):
    """Local training with both regularisers over every row of the catalogue."""

    def train(params, data):
        ramp = jnp.tanh(data.round / 10.0) if config.anneal else 1.0
        decay = config.rate_decay**data.round
        everything = jnp.ones(params["item"].shape[0])

        def objective(p, batch):
            vectors = p["item"][batch.item] + p["own_item"][batch.item]
            value = binary_cross_entropy(head.predict(p, vectors), batch)
            return value + regulariser(p["item"], p["own_item"], everything, ramp)

        optimizer = by_role({role: optax.sgd(rate * decay) for role, rate in rates.items()})
        init, step = optax_step(objective, optimizer)
        (params, _), value = run_steps(step, (params, init(params)), data)
        return params, value

    return train
