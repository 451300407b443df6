"""MF and NeuMF trained on a server that sees everybody's samples. NOT federated.

    mf      s_ui = p_u . q_i
    neumf   s_ui = h . [MLP([p_u ; q_i]) ; p'_u * q'_i]
    L       = mean over a mini-batch of BCE(s_ui, y_ui) + l2 (|p_u|^2 + |q_i|^2)

One round is one epoch: every client sends its training items with the negatives drawn for it in this round (by the
engine's sampler, so from where the protocol allows them), and the server goes once through all samples in random order
in mini-batches. It answers each user with the user's own vector, which is the user's mail.

Follows: Koren, Bell and Volinsky 2009 (the inner product) and He et al., Neural Collaborative Filtering, WWW 2017
(one table per branch, no pretraining), both with NCF's pointwise loss, sampled negatives and Adam.
Deviations: the random order is a random lattice (see epochs.py). Before the first round, and for a user who joins
later, the vector is the users' mean.

The optimiser steps on whole tables, so a mini-batch costs (users + items) dim. The server holds the samples as users x
the longest client's samples.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from fedjax_rec.backbones import Backbone
from fedjax_rec.backbones.mf import matrix_factorisation
from fedjax_rec.backbones.ncf import neural_cf
from fedjax_rec.central.epochs import answered_by_mail, in_batches, places
from fedjax_rec.central.pairwise import NO_EFFECT
from fedjax_rec.method import Batch, Method, Server
from fedjax_rec.roles import OPTIMIZERS, binary_cross_entropy, masked_mean
from fedjax_rec.sharing import LocalConfig, item_table
from fedjax_rec.types import Params, PRNGKey, PyTree
from fedjax_rec.validate import positive, widths


@dataclasses.dataclass(frozen=True)
class Config(LocalConfig):
    """Attributes: l2: weight of the squared lengths. user_init_std: standard deviation of user vectors at the start.
    lr, optimizer, batch_size: the server's. dim, init_std, negatives, draw: see LocalConfig, the rest of which has no
    effect and is refused."""

    lr: float = 0.002
    optimizer: str = "adam"
    l2: float = 1e-4
    user_init_std: float = 0.01

    def __post_init__(self):
        super().__post_init__()
        self.unused("centralised training", *NO_EFFECT)
        positive("batch_size", self.batch_size)
        for name in ("l2", "user_init_std"):
            positive(name, getattr(self, name), zero_allowed=True)
        if self.local_epochs != 1:
            raise ValueError(f"local_epochs={self.local_epochs}: expected 1, a round is one epoch; give more rounds")


@dataclasses.dataclass(frozen=True)
class NeuMFConfig(Config):
    """Attributes: layers: widths of the tower after its 2 dim inputs. Others: see Config."""

    layers: tuple[int, ...] = (32, 16, 8)

    def __post_init__(self):
        super().__post_init__()
        widths("layers", self.layers)


def mf(config: Config, num_users: int, num_items: int, name: str = "mf") -> Method:
    """Centralised matrix factorisation; see the module docstring."""
    backbone = matrix_factorisation(config.dim, bias=False, init_std=config.user_init_std)
    return _trained_on_the_server(config, backbone, num_users, num_items, name)


def neumf(config: NeuMFConfig, num_users: int, num_items: int, name: str = "neumf") -> Method:
    """Centralised NeuMF; see the module docstring."""
    backbone = neural_cf(config.dim, layers=config.layers, gmf=True, init_std=config.user_init_std)
    return _trained_on_the_server(config, backbone, num_users, num_items, name)


def epoch(
    key: PRNGKey,
    params: Params,
    state: PyTree,
    samples: Int[Array, "clients most"],
    count: Int[Array, "clients"],
    objective,
    optimizer: optax.GradientTransformation,
    batch_size: int,
) -> tuple[Params, PyTree]:
    """Every sample once, in mini-batches: (params, optimiser state).

    Args:
        samples, count: see everybodys_samples; client k's are the first count[k] of row k.
        objective: (params, users [batch], batch) -> scalar.
    """

    def step(carry, index, mask, number):
        params, state = carry
        user, place = places(count, index)
        coded = samples[user, place]
        batch = Batch(jnp.where(coded < 0, -1 - coded, coded), (coded < 0) * mask, mask)
        grads = jax.grad(objective)(params, user, batch)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return in_batches(key, count.sum(), batch_size, step, (params, state))


def batch_objective(backbone: Backbone, l2: float):
    """L of the module docstring: (params, users [batch], batch) -> scalar."""
    squares = lambda x: (x**2).sum(tuple(range(1, x.ndim)))

    def objective(params: Params, user: Int[Array, "batch"], batch: Batch) -> Float[Array, ""]:
        network = {role: value for role, value in params.items() if role not in ("user", "item")}
        mine, vectors = jax.tree.map(lambda x: x[user], params["user"]), params["item"][batch.item]
        predict = lambda one, vector: backbone.predict({**network, "user": one}, vector[None])[0]
        length = sum(map(squares, jax.tree.leaves(mine))) + squares(vectors)
        return binary_cross_entropy(jax.vmap(predict)(mine, vectors), batch) + l2 * masked_mean(length, batch.mask)

    return objective


def _trained_on_the_server(config: Config, backbone: Backbone, num_users: int, num_items: int, name: str) -> Method:
    optimizer = OPTIMIZERS[config.optimizer](config.lr)
    objective = batch_objective(backbone, config.l2)

    def as_server(params: Params, state: PyTree) -> Server:
        mean = jax.tree.map(lambda x: x.mean(0), params["user"])
        return Server({**params, "user": mean}, {"user": params["user"], "optimizer": state})

    def init_server(key):
        k_user, k_item, k_network = jax.random.split(key, 3)
        users = jax.vmap(lambda k: backbone.init(k)["user"])(jax.random.split(k_user, num_users))
        item = item_table(k_item, num_items, backbone.width, config.init_std)
        params = {**backbone.init(k_network), "user": users, "item": item}
        return as_server(params, optimizer.init(params))

    def server_update(key, server, received):
        samples, count = received.value
        params = {**server.shared, "user": server.private["user"]}
        params, state = epoch(
            key, params, server.private["optimizer"], samples, count, objective, optimizer, config.batch_size
        )
        return as_server(params, state), {"user": params["user"]}

    return answered_by_mail(name, config, init_server, server_update, backbone.predict)
