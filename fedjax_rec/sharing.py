"""The common shape of a federated recommender: some roles are shared and averaged, the rest stays.

download  shared roles replace the client's, private ones are the client's own
upload    what local training changed in the shared roles
server    theta <- theta + server optimiser(weighted mean of the changes)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import ClassVar

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from fedjax_rec import aggregate
from fedjax_rec.method import Aggregator, LocalData, Method, Sampling, Server
from fedjax_rec.roles import difference
from fedjax_rec.types import Params, PRNGKey, PyTree
from fedjax_rec.validate import one_of, positive

BY_CLIENT = ("equal", "by_size")
"""Weightings of whole clients: where a client moves every row, or rates count other things than clients."""


@dataclasses.dataclass(frozen=True)
class LocalConfig:
    """Settings that every method of this shape has.

    Attributes:
        dim: embedding width.
        lr: local learning rate of the private roles and networks.
        item_lr_scale: the item table's local rate is lr * item_lr_scale * clients. The factor `clients` undoes
            the server's mean, of which a row's few clients are only a small part, so that one setting serves
            data sets of any size. It is all clients also where few take part: a round then moves items by as much in
            the mean, in fewer and larger steps, and cohorts below a hundredth want a smaller scale. Adam's steps have
            the size of their rate: there the factor is left out, and server_lr undoes the mean. It is left out with
            weighting=by_row, too.
        optimizer: local optimiser, a name in roles.OPTIMIZERS, made anew each round.
        server_optimizer, server_lr: applied to the mean change (Reddi et al. 2021); sgd with rate 1 is averaging.
        init_std: standard deviation of item vectors at the start.
        negatives, batch_size, local_epochs, redraw, draw: see Sampling.
        weighting: clients count `equal` or `by_size`; or `by_row`, where each row of an item table is averaged over the
            clients that moved it alone, so that the item rate has no factor `clients` (see aggregate.per_row_mean).
        evaluate_at: see Method.
        client_init: private roles start from each client's own draw (`random`) or from one draw (`shared`).
    """

    dim: int = 32
    lr: float = 2.0
    item_lr_scale: float = 0.2
    optimizer: str = "sgd"
    server_optimizer: str = "sgd"
    server_lr: float = 1.0
    init_std: float = 0.01
    negatives: int = 4
    batch_size: int = 256
    local_epochs: int = 1
    redraw: str = "round"
    draw: str = "stratified"
    weighting: str = "equal"
    evaluate_at: str = "post_aggregate"
    client_init: str = "random"

    WEIGHTINGS: ClassVar[tuple[str, ...]] = (*BY_CLIENT, "by_row")

    def __post_init__(self):
        for name in ("dim", "lr", "item_lr_scale", "server_lr", "negatives", "local_epochs"):
            positive(name, getattr(self, name))
        positive("batch_size", self.batch_size, zero_allowed=True)
        positive("init_std", self.init_std, zero_allowed=True)
        one_of("redraw", self.redraw, ("round", "epoch"))
        one_of("draw", self.draw, ("stratified", "independent"))
        one_of("optimizer", self.optimizer, ("sgd", "momentum", "adam"))
        one_of("server_optimizer", self.server_optimizer, tuple(SERVER_OPTIMIZERS))
        one_of("weighting", self.weighting, self.WEIGHTINGS)
        one_of("evaluate_at", self.evaluate_at, ("post_aggregate", "post_local"))
        one_of("client_init", self.client_init, ("random", "shared"))

    def unused(self, method: str, *names: str) -> None:
        """Refuses settings that have no effect on a method, unless they are left at their defaults."""
        default = {field.name: field.default for field in dataclasses.fields(self)}
        for name in names:
            if getattr(self, name) != default[name]:
                raise ValueError(f"{name}={getattr(self, name)}: has no effect on {method}; leave it out")

    def only_averages(self, method: str) -> None:
        """Refuses what a method has no use for whose server averages the tables of clients that train by SGD."""
        for name, only in (("optimizer", "sgd"), ("server_optimizer", "sgd"), ("weighting", "equal")):
            one_of(name, getattr(self, name), (only,))
        if self.server_lr != 1.0:
            raise ValueError(f"server_lr={self.server_lr}: expected 1, the server of {method} averages")

    def sampling(self) -> Sampling:
        return Sampling(self.negatives, self.batch_size, self.local_epochs, self.redraw, self.draw)

    @property
    def rate_counts_clients(self) -> bool:
        """Whether the items' local rate has the factor `clients`."""
        return self.optimizer != "adam" and self.weighting != "by_row"

    def item_lr(self, num_users: int) -> float:
        return self.lr * self.item_lr_scale * (num_users if self.rate_counts_clients else 1)


SERVER_OPTIMIZERS: dict[str, Callable[[float], optax.GradientTransformation]] = {
    "sgd": optax.sgd,
    "momentum": lambda rate: optax.sgd(rate, momentum=0.9),
    "adam": lambda rate: optax.adam(rate, b1=0.9, b2=0.99, eps=1e-3),
}


def item_table(key: PRNGKey, num_items: int, width: int, std: float) -> Float[Array, "items width"]:
    """A table of normal entries; with std 0 of zeros, without drawing any."""
    return std * jax.random.normal(key, (num_items, width)) if std else jnp.zeros((num_items, width))


def step_by_change(optimizer: optax.GradientTransformation, change: PyTree, state: PyTree, values: PyTree):
    """(values, state) after the server's optimiser took the clients' mean change, negated, for a gradient."""
    step, state = optimizer.update(jax.tree.map(jnp.negative, change), state, values)
    return optax.apply_updates(values, step), state


def sharing_method(
    name: str,
    *,
    init_shared: Callable[[PRNGKey], Params],
    init_private: Callable[[PRNGKey], Params],
    train: Callable[[Params, LocalData], tuple[Params, Float[Array, ""]]],
    score: Callable[[Params], Float[Array, "items"]],
    config: LocalConfig,
    aggregator: Aggregator | None = None,
    rows: str = "touched",
) -> Method:
    """Builds a Method from what is shared, what is private, how a client trains and how it scores.

    Args:
        init_shared: key -> shared roles (the item table over the catalogue among them).
        init_private: key -> one client's private roles.
        train: (params, data) -> (params, mean loss); params hold shared and private roles.
        score: params over the catalogue -> logits [items].
        config: see LocalConfig.
        aggregator: default: mean of the changes, weighted as config.weighting says; another one weighs by itself.
        rows: see Method.

    Raises:
        ValueError: an aggregator beside weighting=by_row, which has its own and takes other rates.
    """
    if aggregator is not None and config.weighting == "by_row":
        raise ValueError("weighting=by_row with an aggregator: expected one of both; leave aggregator out")
    optimizer = SERVER_OPTIMIZERS[config.server_optimizer](config.server_lr)
    key_spec = jax.eval_shape(lambda: jax.random.key(0))
    shared_roles = tuple(jax.eval_shape(init_shared, key_spec))
    private_roles = tuple(jax.eval_shape(init_private, key_spec))

    def init_server(key) -> Server:
        shared = init_shared(key)
        return Server(shared=shared, private=optimizer.init(shared))

    def init_client(key, shared):
        return init_private(key)

    def download(shared, mail, client, data):
        return {**{role: shared[role] for role in shared_roles}, **client}

    def local_update(key, shared, params, data):
        after, loss = train(params, data)
        return after, difference(after, params, shared_roles), {"loss": loss}

    def upload(key, shared, params, update, data):
        return {role: params[role] for role in private_roles}, update

    def server_update(key, server, received):
        return Server(*step_by_change(optimizer, received.value, server.private, server.shared)), ()

    return Method(
        name=name,
        init_server=init_server,
        init_client=init_client,
        publish=lambda key, server: server.shared,
        download=download,
        local_update=local_update,
        upload=upload,
        server_update=server_update,
        score=lambda shared, params, data: score(params),
        aggregator=aggregator or aggregate.mean_of(config.weighting),
        sampling=config.sampling(),
        evaluate_at=config.evaluate_at,
        rows=rows,
        client_init=config.client_init,
        config=config,
    )
