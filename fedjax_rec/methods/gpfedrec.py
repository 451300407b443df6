"""GPFedRec: the server links users with similar item tables and answers each with the mean of its neighbours' tables.

    client   P_u <- C;  SGD on  BCE(MLP_u([e_u : P_ui])) + reg mean (P_u - R_u)^2,  e_u and MLP_u private
    server   S_uv = cos(P_u, P_v) of the flattened tables
             N(u) = {v : S_uv > threshold mean(S)}        equal weights A_uv = 1 / |N(u)|; itself where there is none
             R    = A^layers P                            each client's answer (its mail)
             C    = mean over users of R_u                what everybody starts from

A user is served by what it has tuned itself (`evaluate_at=post_local`), as in the released code.

Follows: Zhang et al., GPFedRec, KDD 2024, as its released code has the details.
Deviations: the released code takes the cosine DISTANCE for the similarity, which links a user with the least similar
ones: `affinity=distance`. Users who did not take part in a round are in nobody's neighbourhood, keep their answer
and do not count in C (the code needs everybody). Rates are LocalConfig's; the released ones (users' lr x 80, items'
lr x items x 80) are not preset, nor is the Laplace noise on uploads.

`gpfedrec_anchors` is OUR VARIANT for larger catalogues, not the paper's: S is worked out from the rows of
`anchor_items` items alone, drawn anew in every round (the same for all users), at users^2 anchor_items dim instead of
users^2 items dim. Mixing the tables over the graph costs users^2 items dim as before.

The regulariser reaches every row, so clients train on the whole catalogue, and clients x items x dim is held once:
uploads take the mail's places and the server answers in place (aggregate.stacked_over_mail, server/graph.py).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from fedjax_rec import aggregate
from fedjax_rec.backbones.ncf import neural_cf
from fedjax_rec.method import Method, Server
from fedjax_rec.roles import binary_cross_entropy, run_steps, sgd_step
from fedjax_rec.server import graph
from fedjax_rec.sharing import LocalConfig, item_table
from fedjax_rec.types import PRNGKey
from fedjax_rec.validate import between, one_of, positive, widths


@dataclasses.dataclass(frozen=True)
class Config(LocalConfig):
    """Attributes:
    reg: weight of the distance to the answer of the server.
    affinity: `similarity`, or the released code's `distance`.
    threshold: neighbours are nearer than this times the mean.
    message_layers: how often tables are mixed over the graph.
    layers: widths of a client's tower. network_lr_scale: its rate relative to lr.
    user_init_std: standard deviation of user vectors at the start.
    Others: see LocalConfig; the server averages (server_optimizer, server_lr and weighting stay as they are).
    """

    evaluate_at: str = "post_local"
    reg: float = 1.0
    affinity: str = "similarity"
    threshold: float = 1.0
    message_layers: int = 1
    layers: tuple[int, ...] = (32, 16, 8)
    network_lr_scale: float = 1.0
    user_init_std: float = 0.01

    def __post_init__(self):
        super().__post_init__()
        one_of("affinity", self.affinity, ("similarity", "distance"))
        self.only_averages("gpfedrec")
        for name in ("threshold", "message_layers", "network_lr_scale"):
            positive(name, getattr(self, name))
        for name in ("reg", "user_init_std"):
            positive(name, getattr(self, name), zero_allowed=True)
        widths("layers", self.layers)


@dataclasses.dataclass(frozen=True)
class AnchorsConfig(Config):
    """Attributes: anchor_items: items drawn per round that users are compared by. Others: see Config."""

    anchor_items: int = 64


def similarity_by_anchors(
    key: PRNGKey, tables: Float[Array, "users items dim"], count: int
) -> Float[Array, "users users"]:
    """Cosine similarity of the users' rows of `count` different random items."""
    anchors = jax.random.choice(key, tables.shape[1], (count,), replace=False)
    return graph.cosine(tables[:, anchors])


def gpfedrec_anchors(config: AnchorsConfig, num_users: int, num_items: int, name: str = "gpfedrec_anchors") -> Method:
    """GPFedRec with users compared by sampled items; see the module docstring."""
    between("anchor_items", config.anchor_items, 1, num_items)
    compare = lambda key, tables: similarity_by_anchors(key, tables, config.anchor_items)
    return gpfedrec(config, num_users, num_items, name, compare)


def gpfedrec(
    config: Config,
    num_users: int,
    num_items: int,
    name: str = "gpfedrec",
    compare: Callable[..., Float[Array, "users users"]] = lambda key, tables: graph.cosine(tables),
) -> Method:
    """GPFedRec; see the module docstring. `compare`: (key, tables) -> similarity of all pairs of users."""
    backbone = neural_cf(config.dim, layers=config.layers, gmf=False, init_std=config.user_init_std)
    item_lr = config.item_lr(num_users)

    def loss(params, vectors, batch):
        return binary_cross_entropy(backbone.predict(params, vectors["item"]), batch)

    learn = sgd_step(loss, {"user": config.lr, "network": config.lr * config.network_lr_scale, "item": item_lr})

    def step(params, batch):
        apart = params["item"] - params["guide"]
        after, value = learn(params, batch)
        # the regulariser's gradient at the same point, for every row; a step without samples changes nothing
        pull = jnp.where(batch.mask.sum() > 0, item_lr * config.reg * 2.0 / apart.size, 0.0)
        return {**after, "item": after["item"] - pull * apart}, value + config.reg * (apart**2).mean()

    def init_server(key):
        return Server({"item": item_table(key, num_items, config.dim, config.init_std)}, ())

    def download(shared, mail, client, data):
        # a user who joins after training has had no answer yet
        return {**client, "item": shared["item"], "guide": mail["item"] if mail else shared["item"]}

    def local_update(key, shared, params, data):
        after, value = run_steps(step, params, data)
        return after, {"item": after["item"]}, {"loss": value}

    def server_update(key, server, received):
        (tables, present), count = received.value, received.count
        takes_part = present > 0
        similarity = compare(key, tables["item"])
        affinity = similarity if config.affinity == "similarity" else 1.0 - similarity
        weights = graph.neighbours(affinity, takes_part, config.threshold)
        answers = graph.pass_messages(weights, tables["item"], config.message_layers)
        mean = jnp.tensordot(takes_part.astype(answers.dtype), answers, 1) / jnp.maximum(count, 1)
        common = jnp.where(count > 0, mean, server.shared["item"])
        return Server({"item": common}, ()), {"item": answers}

    return Method(
        name=name,
        init_server=init_server,
        init_client=lambda key, shared: backbone.init(key),
        publish=lambda key, server: server.shared,
        download=download,
        local_update=local_update,
        upload=lambda key, shared, params, update, data: (
            {"user": params["user"], "network": params["network"]},
            update,
        ),
        server_update=server_update,
        score=lambda shared, params, data: backbone.predict(params, params["item"]),
        aggregator=aggregate.stacked_over_mail(),
        sampling=config.sampling(),
        evaluate_at=config.evaluate_at,
        rows="all",
        client_init=config.client_init,
        config=config,
        known=lambda shared: {"item": shared["item"]},
        init_mail=lambda server: {"item": server.shared["item"]},
    )
