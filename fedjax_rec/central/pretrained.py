"""Two phases of one run: matrix factorisation, then networks that learn from it while it stays frozen. NOT federated.

    rounds 1 .. pretrain   the teacher: BPR-MF with vectors p_u, q_i, by Adam; q_i = 0 for items training may not touch
    rounds after           the method's own networks, which read p, q and the items' features

What is served is the method's own from the start, so that before its phase the networks are as they were drawn:
rounds up to `pretrain` are no result, and a run's patience has to be longer.

Batch normalisation sees the samples of a batch and not its padding; its running statistics are part of the state, and
scoring uses them. As in TensorFlow, which the released codes are in, 0.001 is added to variances.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from fedjax_rec.central.pairwise import Learner, Model, PairConfig, Seen, bpr, learner, lengths
from fedjax_rec.item_sources import Catalogue
from fedjax_rec.item_sources.cold import conditions, some_cold
from fedjax_rec.sharing import item_table
from fedjax_rec.types import Params, PRNGKey, PyTree
from fedjax_rec.validate import positive

EPSILON = 1e-3


@dataclasses.dataclass(frozen=True)
class TaughtConfig(PairConfig):
    """Settings of every method of this shape.

    Attributes:
        pretrain: rounds of the teacher.
        teacher_lr, teacher_l2: its rate, and the weight of its squared lengths (PairConfig's l2).
        condition_dim: principal components of the features that networks read, 0 for all.
        dim: width of the teacher's vectors and of every layer. init_std: of the teacher's vectors at the start.
        lr, optimizer, rate_decay, l2: of the networks. Others: see PairConfig.
    """

    batch_size: int = 1024
    pretrain: int = 20
    teacher_lr: float = 0.005
    teacher_l2: float = 1e-4
    condition_dim: int = 300

    def __post_init__(self):
        super().__post_init__()
        for name in ("pretrain", "teacher_lr"):
            positive(name, getattr(self, name))
        for name in ("teacher_l2", "condition_dim"):
            positive(name, getattr(self, name), zero_allowed=True)


class Phase(NamedTuple):
    """What learns from the teacher, whose vectors are given as users [users, dim] and items [items, dim].

    Attributes:
        init: (key) -> state.
        epoch: (key, state, users, items, seen, 0-based round of this phase) -> state.
        vectors: (state, users, items) -> (users, items) whose inner products are the scores.
    """

    init: Callable[[PRNGKey], PyTree]
    epoch: Callable[[PRNGKey, PyTree, Array, Array, Seen, Int[Array, ""]], PyTree]
    vectors: Callable[[PyTree, Array, Array], tuple[Array, Array]]


class Items(NamedTuple):
    """What is known of the items: `content` as networks read it [items, feat], `cold` [items, 1]."""

    content: Float[Array, "items feat"]
    cold: Array


def items_of(config: TaughtConfig, catalogue: Catalogue, name: str) -> Items:
    """ValueError where there are no features or no cold items."""
    content = jnp.asarray(conditions(catalogue, name, config.condition_dim, whiten=True))
    _, cold = some_cold(catalogue, name, "mf")
    return Items(content, jnp.zeros((len(content), 1), bool).at[cold].set(True))


def taught(phase: Phase, config: TaughtConfig, num_users: int, items: Items) -> Learner:
    """The teacher's rounds, and then the phase's."""

    def init_teacher(key):
        k_user, k_item = jax.random.split(key)
        table = lambda k, count: item_table(k, count, config.dim, config.init_std)
        return {"user": table(k_user, num_users), "item": table(k_item, len(items.cold))}

    def vectors(params, cold, graph):
        return params["user"], jnp.where(cold, 0.0, params["item"])

    def loss(params, cold, graph, triples, key):
        users, items = vectors(params, cold, graph)
        return bpr(users, items, triples) + config.teacher_l2 * lengths(triples, users, items)

    settings = dataclasses.replace(config, lr=config.teacher_lr, optimizer="adam", rate_decay=1.0)
    teacher = learner(Model(init_teacher, items.cold, loss, vectors), settings)

    def init(key):
        k_teacher, k_own = jax.random.split(key)
        return {"teacher": teacher.init(k_teacher), "own": phase.init(k_own)}

    def epoch(key, state, seen, round_):
        def own():
            read = teacher.vectors(state["teacher"], seen)
            return {**state, "own": phase.epoch(key, state["own"], *read, seen, round_ - config.pretrain)}

        first = lambda: {**state, "teacher": teacher.epoch(key, state["teacher"], seen, round_)}
        return jax.lax.cond(round_ < config.pretrain, first, own)

    return Learner(
        init, epoch, lambda state, seen: phase.vectors(state["own"], *teacher.vectors(state["teacher"], seen))
    )


class Tower(nn.Module):
    """Linear, batch normalisation, tanh, dropout, linear; all of one width. `whiten` normalises the input first."""

    width: int
    momentum: float = 0.99
    dropout: float = 0.0
    whiten: bool = False
    kernel: nn.initializers.Initializer = nn.initializers.truncated_normal(0.01)

    @nn.compact
    def __call__(
        self, x: Float[Array, "n feat"], mask: Float[Array, "n"] | None = None, *, train: bool = False
    ) -> Float[Array, "n width"]:
        there = None if mask is None else mask[:, None] > 0
        norm = lambda scale: nn.BatchNorm(not train, momentum=self.momentum, epsilon=EPSILON, use_scale=scale)
        if self.whiten:
            x = norm(False)(x, mask=there)
        x = nn.tanh(norm(True)(nn.Dense(self.width, kernel_init=self.kernel)(x), mask=there))
        x = nn.Dropout(self.dropout)(x, deterministic=not train)
        return nn.Dense(self.width, kernel_init=self.kernel)(x)


class Towers(nn.Module):
    """One for users and one for items, of which there may be several to a user: [first of all users, second ...]."""

    user: nn.Module
    item: nn.Module

    def __call__(self, users, items, mask: Float[Array, "users"] | None = None, *, train: bool = False):
        of_items = None if mask is None else jnp.tile(mask, len(items) // len(users))
        return self.user(users, mask, train=train), self.item(items, of_items, train=train)


class Trained(NamedTuple):
    """A network in training: parameters, running statistics, optimiser state."""

    params: Params
    statistics: PyTree
    optimizer: PyTree

    @property
    def variables(self) -> PyTree:
        return {"params": self.params, "batch_stats": self.statistics}


def untrained(variables: PyTree, optimizer: optax.GradientTransformation) -> Trained:
    """At the start, from what a module's `init` gives."""
    return Trained(variables["params"], variables["batch_stats"], optimizer.init(variables["params"]))


def descend(
    optimizer: optax.GradientTransformation,
    loss: Callable,
    network: Trained,
    mask: Float[Array, "batch"],
    scale: Float[Array, ""] | float = 1.0,
) -> Trained:
    """One step on `loss(parameters, statistics) -> (scalar, statistics)`; `scale` multiplies the rate. A batch without
    any sample changes nothing (it has no mean and no variance)."""
    grads, statistics = jax.grad(loss, has_aux=True)(network.params, network.statistics)
    updates, state = optimizer.update(grads, network.optimizer, network.params)
    params = optax.apply_updates(network.params, jax.tree.map(lambda u: scale * u, updates))
    moved = Trained(params, statistics, state)
    return jax.tree.map(lambda new, old: jnp.where(mask.any(), new, old), moved, network)


def squares(params: Params, *names: str) -> Float[Array, ""]:
    """Sum of the squares of linear layers' `names`: kernel, bias."""
    found = jax.tree_util.tree_leaves_with_path(params)
    wanted = (x for path, x in found if path[-1].key in names and "BatchNorm" not in jax.tree_util.keystr(path))
    return sum((x**2).sum() for x in wanted)
