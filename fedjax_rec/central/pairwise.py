"""Models with a vector for every user and item, trained on a server that sees everybody's histories. NOT federated.

    score_ui = p_u . q_i

One round is one epoch: every client sends its training items with the negatives drawn for it in this round (by the
engine's sampler, so from where the protocol allows them). The server goes once through all training pairs in random
order, each with one random negative of the same user's, and answers each user with the user's own vector, which is the
user's mail. What the vectors are made of, and what is minimised, is the model's: see the files beside this one.

Models that propagate over the graph of users and items hold it as a dense matrix, users x items floats: one product
per layer on any device. They know the histories of the clients that took part in the round, so they want all of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from fedjax_rec.central.epochs import answered_by_mail, in_batches, places
from fedjax_rec.method import Method, Server
from fedjax_rec.roles import OPTIMIZERS, masked_mean
from fedjax_rec.sharing import LocalConfig
from fedjax_rec.types import Params, PRNGKey, PyTree
from fedjax_rec.validate import positive

NO_EFFECT = (
    "item_lr_scale", "server_optimizer", "server_lr", "redraw", "weighting", "evaluate_at", "client_init"
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class PairConfig(LocalConfig):
    """Settings of every model of this shape.

    Attributes:
        l2: weight of the squared lengths of what a sample reads.
        rate_decay: factor of the rate from one round to the next.
        lr, optimizer, batch_size: the server's. dim, init_std (of user and item vectors), negatives (how many a pair's
            negative is chosen from), draw: see LocalConfig, the rest of which has no effect and is refused.
    """

    dim: int = 64
    lr: float = 0.001
    optimizer: str = "adam"
    batch_size: int = 2048
    negatives: int = 1
    init_std: float = 0.1
    l2: float = 1e-4
    rate_decay: float = 1.0

    def __post_init__(self):
        super().__post_init__()
        self.unused("centralised training", *NO_EFFECT)
        positive("batch_size", self.batch_size)
        positive("rate_decay", self.rate_decay)
        positive("l2", self.l2, zero_allowed=True)
        if self.local_epochs != 1:
            raise ValueError(f"local_epochs={self.local_epochs}: expected 1, a round is one epoch; give more rounds")


class Seen(NamedTuple):
    """What the server received of a round: see epochs.everybodys_samples; of each client's samples the first `length`
    are its training items. Absent clients have none."""

    samples: Int[Array, "users most"]
    count: Int[Array, "users"]
    length: Int[Array, "users"]


class Triples(NamedTuple):
    """A mini-batch of users, with a training item and a negative for each."""

    user: Int[Array, "batch"]
    positive: Int[Array, "batch"]
    negative: Int[Array, "batch"]
    mask: Float[Array, "batch"]


class Learner(NamedTuple):
    """What the server trains.

    Attributes:
        init: (key) -> state.
        epoch: (key, state, seen, 0-based round) -> state.
        vectors: (state, seen) -> (users [users, width], items [items, width]).
    """

    init: Callable[[PRNGKey], PyTree]
    epoch: Callable[[PRNGKey, PyTree, Seen, Int[Array, ""]], PyTree]
    vectors: Callable[[PyTree, Seen], tuple[Array, Array]]


class Model(NamedTuple):
    """A model that is trained on triples alone, by one optimiser.

    Attributes:
        init: (key) -> parameters.
        frozen: what is read and not trained (features), any tree of arrays.
        loss: (parameters, frozen, graph, triples, key) -> scalar.
        vectors: (parameters, frozen, graph) -> (users, items), see Learner.
        graph: (seen) -> the graph that vectors are made with, () without one.
        thin: (key, graph) -> the graph that an epoch is trained with.
    """

    init: Callable[[PRNGKey], Params]
    frozen: PyTree
    loss: Callable[[Params, PyTree, PyTree, Triples, PRNGKey], Float[Array, ""]]
    vectors: Callable[[Params, PyTree, PyTree], tuple[Array, Array]]
    graph: Callable[[Seen], PyTree] = lambda seen: ()
    thin: Callable[[PRNGKey, PyTree], PyTree] = lambda key, graph: graph


def in_use(seen: Seen) -> Array:
    """Bool [users, most]: which places of `samples` hold one."""
    return jnp.arange(seen.samples.shape[1]) < seen.count[:, None]


def interactions(seen: Seen, num_items: int) -> Float[Array, "users items"]:
    """1 for each training item of each user."""
    item = jnp.where((seen.samples < 0) & in_use(seen), -1 - seen.samples, num_items)
    users = seen.samples.shape[0]
    return jnp.zeros((users, num_items)).at[jnp.arange(users)[:, None], item].set(1.0, mode="drop")


def normalised(matrix: Float[Array, "n m"]) -> Float[Array, "n m"]:
    """D_n^-1/2 A D_m^-1/2 with the row and column sums D; 0 for rows and columns without any."""
    inverse_root = lambda degree: jnp.where(degree > 0, jax.lax.rsqrt(jnp.maximum(degree, 1e-12)), 0.0)
    return inverse_root(matrix.sum(1))[:, None] * matrix * inverse_root(matrix.sum(0))


def propagate(graph: Float[Array, "users items"], users: Array, items: Array, layers: int) -> tuple[Array, Array]:
    """LightGCN (He et al. 2020): the mean over 0..layers steps of (A items, A^T users)."""
    sums = users, items
    for _ in range(layers):
        users, items = graph @ items, graph.T @ users
        sums = sums[0] + users, sums[1] + items
    return sums[0] / (layers + 1), sums[1] / (layers + 1)


def triples_at(key: PRNGKey, seen: Seen, index: Int[Array, "batch"], mask: Float[Array, "batch"]) -> Triples:
    """Training pairs number `index` (running through the users' items), each with one of its user's negatives."""
    user, place = places(seen.length, index)
    drawn = seen.count[user] - seen.length[user]
    pick = seen.length[user] + (jax.random.bits(key, index.shape, jnp.uint32) % jnp.maximum(drawn, 1)).astype(jnp.int32)
    negative = seen.samples[user, jnp.minimum(pick, seen.samples.shape[1] - 1)]
    return Triples(user, -1 - seen.samples[user, place], jnp.where(drawn > 0, negative, 0), mask * (drawn > 0))


def over_triples(key: PRNGKey, seen: Seen, batch_size: int, step: Callable, carry: PyTree) -> PyTree:
    """Folds `step(carry, triples, key)` over one pass through all training pairs."""
    k_order, k_steps = jax.random.split(key)

    def one(carry, index, mask, number):
        k_negative, k_step = jax.random.split(jax.random.fold_in(k_steps, number))
        return step(carry, triples_at(k_negative, seen, index, mask), k_step)

    return in_batches(k_order, seen.length.sum(), batch_size, one, carry)


def bpr(users: Array, items: Array, triples: Triples) -> Float[Array, ""]:
    """Mean of -log sigmoid(score of the positive - score of the negative), Rendle et al. 2009."""
    apart = items[triples.positive] - items[triples.negative]
    return masked_mean(jax.nn.softplus(-(users[triples.user] * apart).sum(-1)), triples.mask)


def lengths(triples: Triples, users: Array, items: Array) -> Float[Array, ""]:
    """Mean over a batch of |p_u|^2 + |q_i|^2 + |q_j|^2."""
    read = users[triples.user], items[triples.positive], items[triples.negative]
    return masked_mean(sum((x**2).sum(-1) for x in read), triples.mask)


def optimiser_step(optimizer: optax.GradientTransformation, loss: Callable, scale: Float[Array, ""] | float = 1.0):
    """step((parameters, optimiser state), triples, key) for `loss(parameters, triples, key)`; `scale` multiplies the
    rate."""

    def step(carry, triples: Triples, key: PRNGKey):
        params, state = carry
        updates, state = optimizer.update(jax.grad(loss)(params, triples, key), state, params)
        return optax.apply_updates(params, jax.tree.map(lambda u: scale * u, updates)), state

    return step


def learner(model: Model, config: PairConfig) -> Learner:
    """A model and its optimiser; the rate follows `rate_decay`."""
    optimizer = OPTIMIZERS[config.optimizer](config.lr)

    def init(key):
        params = model.init(key)
        return {"params": params, "optimizer": optimizer.init(params), "frozen": model.frozen}

    def epoch(key, state, seen, round_):
        k_thin, k_epoch = jax.random.split(key)
        graph = model.thin(k_thin, model.graph(seen))
        loss = lambda params, triples, k: model.loss(params, state["frozen"], graph, triples, k)
        step = optimiser_step(optimizer, loss, config.rate_decay ** round_.astype(jnp.float32))
        held = state["params"], state["optimizer"]
        params, trained = over_triples(k_epoch, seen, config.batch_size, step, held)
        return {**state, "params": params, "optimizer": trained}

    return Learner(init, epoch, lambda state, seen: model.vectors(state["params"], state["frozen"], model.graph(seen)))


GRAPH_COPIES = 7  # of the dense matrix that an epoch over a graph holds at once (6.6 measured, BM3 on ML-1M)


def graph_bytes(num_users: int, num_items: int) -> int:
    """What an epoch over the dense graph of users and items takes beside the model."""
    return GRAPH_COPIES * 4 * num_users * num_items


def served(learner: Learner, config: PairConfig, num_users: int, num_items: int, name: str) -> Method:
    """The method whose server trains `learner` and gives every user its vector. Before the first round, and for a user
    who joins later, that is the users' mean."""
    nothing = Seen(jnp.zeros((num_users, 1), jnp.int32), *(jnp.zeros(num_users, jnp.int32) for _ in range(2)))

    def as_server(state, seen, round_) -> Server:
        users, items = learner.vectors(state, seen)
        return Server({"item": items, "user": users.mean(0)}, {"state": state, "user": users, "round": round_})

    def init_server(key):
        return as_server(learner.init(key), nothing, jnp.zeros((), jnp.int32))

    def server_update(key, server, received):
        samples, count = received.value
        seen = Seen(samples, count, jnp.zeros_like(count))
        seen = seen._replace(length=((samples < 0) & in_use(seen)).sum(1, dtype=jnp.int32))
        round_ = server.private["round"]
        made = as_server(learner.epoch(key, server.private["state"], seen, round_), seen, round_ + 1)
        # a round in which nobody took part leaves everything as it is
        somebody = seen.length.sum() > 0
        server = jax.tree.map(lambda new, old: jnp.where(somebody, new, old), made, server)
        return server, {"user": server.private["user"]}

    return answered_by_mail(name, config, init_server, server_update, lambda params, items: items @ params["user"])
