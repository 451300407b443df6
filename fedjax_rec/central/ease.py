"""EASE: a linear item-to-item model in closed form, the strong classical anchor. NOT federated: histories are sent.

    P = (X^T X + l2 I)^-1,   B_ij = -P_ij / P_jj  (i != j),  B_jj = 0,   score_u = x_u B

with X [users, items] the training interactions: the minimiser of |X - X B|^2 + l2 |B|^2 with a zero diagonal.

Follows: Steck, Embarrassingly Shallow Autoencoders for Sparse Data, WWW 2019.
Deviations: none. One round in which everybody takes part is the whole training; further rounds compute the same again.
Its log has loss 0: nothing is trained in steps. Needs items x items floats on the server.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from fedjax_rec.aggregate import equal
from fedjax_rec.method import Aggregate, Aggregator, LocalData, Method, Server
from fedjax_rec.sharing import LocalConfig
from fedjax_rec.validate import positive


@dataclasses.dataclass(frozen=True)
class Config(LocalConfig):
    """Attributes: l2: ridge weight. LocalConfig's have no effect, and are refused."""

    l2: float = 500.0

    def __post_init__(self):
        super().__post_init__()
        self.unused("ease", *(field.name for field in dataclasses.fields(LocalConfig)))
        positive("l2", self.l2)


def item_weights(products: Float[Array, "items items"], l2: float) -> Float[Array, "items items"]:
    """B from X^T X."""
    items = products.shape[0]
    # positive definite: the triangular solves of Cholesky lose less in float32 than an LU inverse
    factor = jax.scipy.linalg.cho_factor(products + l2 * jnp.eye(items))
    inverse = jax.scipy.linalg.cho_solve(factor, jnp.eye(items))
    return jnp.where(jnp.eye(items, dtype=bool), 0.0, -inverse / jnp.diagonal(inverse)[None, :])


def multi_hot(data: LocalData, num_items: int) -> Float[Array, "items"]:
    """1 for each item of a client's history."""
    item = jnp.where(data.history_mask, data.rows[data.history], num_items)
    return jnp.zeros(num_items).at[item].set(1.0, mode="drop")


def ease(config: Config, num_users: int, num_items: int, name: str = "ease") -> Method:
    """EASE; see the module docstring."""

    def server_update(key, server, received):
        fitted = item_weights(received.value, config.l2)
        return Server({"weights": jnp.where(received.count > 0, fitted, server.shared["weights"])}, ()), ()

    gram = Aggregator(
        init=lambda upload, items, clients: jnp.zeros((num_items, num_items)),
        add=lambda total, uploads, weights, rows, clients: (
            total + (uploads["history"] * weights[:, None]).T @ uploads["history"]
        ),
        merge=lambda total, axis: jax.lax.psum(total, axis),
        finish=lambda total, weight, count: Aggregate(total, weight, count),
        weight=equal,
    )
    return Method(
        name=name,
        init_server=lambda key: Server({"weights": jnp.zeros((num_items, num_items))}, ()),
        init_client=lambda key, shared: {},
        publish=lambda key, server: server.shared,
        download=lambda shared, mail, client, data: {},
        local_update=lambda key, shared, params, data: (params, (), {"loss": jnp.zeros(())}),
        upload=lambda key, shared, params, update, data: ({}, {"history": multi_hot(data, num_items)}),
        server_update=server_update,
        score=lambda shared, params, data: multi_hot(data, num_items) @ shared["weights"],
        aggregator=gram,
        sampling=dataclasses.replace(config.sampling(), negatives=0),
        config=config,
    )
