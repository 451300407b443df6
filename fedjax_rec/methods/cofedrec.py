"""CoFedRec: clients keep their item tables, and in every round one group of users that are alike shares its mean.

    client   every batch takes PFedRec's two steps, first the score function (w_u, b_u), then the item table P_u, on
             BCE(w_u . p_ui + b_u) + reg T(P_u)
             T(P) = tau / tau_0 mean_i [log sum_{a != i} exp(z_i.z_a / tau) - mean_{p in C(i), p != i} z_i.z_p / tau]
             with z_i = p_i / |p_i| and C(i) the items in i's cluster: supervised contrast over the whole catalogue
    server   clusters of items: k-means of the mean of the uploaded tables; sent down, used from the next round on
             a random participant a and a random cluster C:   s_u = sum_{i in C} cos(p_ui, p_ai)
             group G: participants in order of falling s_u up to the elbow (farthest from the chord of the curve)
             P_u <- mean over G of P_v  for u in G;  everybody else keeps P_u

A client's table is its mail: uploads are written over it and the group's mean over the members', so that clients x
items x dim is held once. There is no contrast in the first round, when no clusters are known.

Follows: He, Liu, Keung and He, Co-clustering for Federated Recommender System, WWW 2024, by its abstract and released
code; the text of the paper was not at hand. Over PFedRec only (the paper has more backbones).
Deviations: an item that is alone in its cluster has nothing to be pulled to and adds 0. k-means runs a fixed number
of steps from one k-means++ start; the cluster is drawn among those that hold items; a client without samples is in no
group. The score function's step ignores the contrast, whose gradient there is zero. The released start and item rate
(N(0, 1), lr x items x 80) are `preset=released`. A table is never averaged over everybody, so its rate is lr x
own_lr_scale and item_lr_scale has no effect. The mean table is published as well, for users who join later.

Cost: the contrast takes 3 items^2 dim products at every local step, in blocks of anchors without an items x items
array. `cofedrec_anchors` is OUR VARIANT for larger catalogues, not the paper's: it draws contrast_items anchors i at
every step instead (each against all items), an unbiased estimate of the same gradient at 3 contrast_items items dim.
It has no published protocol.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from fedjax_rec import aggregate
from fedjax_rec.backbones.linear import linear_head
from fedjax_rec.method import Method, Server
from fedjax_rec.roles import binary_cross_entropy, run_steps, sgd_step
from fedjax_rec.server import clusters
from fedjax_rec.sharing import LocalConfig, item_table
from fedjax_rec.types import PRNGKey
from fedjax_rec.validate import between, one_of, positive

ANCHORS_AT_ONCE = 64


@dataclasses.dataclass(frozen=True)
class Config(LocalConfig):
    """Attributes:
    item_clusters: clusters of the k-means. kmeans_iterations: its steps.
    reg: weight of the contrast. temperature, base_temperature: tau and tau_0.
    own_lr_scale: rate of the item table relative to lr.
    rate_by_items: the rate of the item table is lr * own_lr_scale * items, as in the released code.
    preset: `paper`, or `released` for the released code's rates and start, see PRESETS.
    Others: see LocalConfig; the server averages (server_optimizer, server_lr and weighting stay as they are).
    """

    local_epochs: int = 2
    client_init: str = "shared"
    item_clusters: int = 30
    kmeans_iterations: int = 50
    reg: float = 0.005
    temperature: float = 0.1
    base_temperature: float = 0.5
    own_lr_scale: float = 20.0
    rate_by_items: bool = False
    preset: str = "paper"

    def __post_init__(self):
        super().__post_init__()
        one_of("preset", self.preset, ("paper", "released"))
        self.only_averages("cofedrec")
        for name in ("item_clusters", "kmeans_iterations", "temperature", "base_temperature", "own_lr_scale"):
            positive(name, getattr(self, name))
        positive("reg", self.reg, zero_allowed=True)


@dataclasses.dataclass(frozen=True)
class AnchorsConfig(Config):
    """Attributes: contrast_items: anchors drawn at every step. Others: see Config."""

    contrast_items: int = 64


RELEASED = {"preset": "released", "lr": 0.1, "rate_by_items": True, "own_lr_scale": 80.0, "init_std": 1.0}
PRESETS = {"paper": Config(), "released": Config(**RELEASED)}
ANCHORS_PRESETS = {"paper": AnchorsConfig(), "released": AnchorsConfig(**RELEASED)}


def directions(table: Float[Array, "items dim"]) -> Float[Array, "items dim"]:
    """Rows scaled to length 1. A row of zeros has no direction: it stays, and gets no gradient."""
    square = (table**2).sum(-1, keepdims=True)
    there = square > 1e-24
    return jnp.where(there, table * jax.lax.rsqrt(jnp.where(there, square, 1.0)), 0.0)


def contrast(
    table: Float[Array, "items dim"],
    labels: Int[Array, "items"],
    anchors: Int[Array, "anchors"],
    temperature: float,
    num_clusters: int,
) -> tuple[Float[Array, ""], Float[Array, "items dim"]]:
    """T of the module docstring with tau_0 = tau, as a mean over `anchors`, and its gradient.

    The positives are a product with the sum over the anchor's cluster. The logarithm needs all pairs: a block of
    anchors is differentiated as soon as its row sums are complete, so that one block of pairs exists at a time.
    """
    items, count = table.shape[0], anchors.shape[0]
    size = jnp.zeros(num_clusters).at[labels].add(1.0)[labels]  # of each item's cluster
    unit, back = jax.vjp(directions, table)
    weights = jnp.where(size[anchors] > 1, 1.0 / count, 0.0)

    def attraction(unit):
        cluster_sum = jnp.zeros((num_clusters, unit.shape[1])).at[labels].add(unit)
        own = unit[anchors]
        products = (own * (cluster_sum[labels[anchors]] - own)).sum(-1) / jnp.maximum(size[anchors] - 1, 1)
        return (weights * products).sum() / temperature

    width = min(ANCHORS_AT_ONCE, count)
    blocks = -(-count // width)
    padded = jnp.pad(anchors, (0, blocks * width - count)).reshape(blocks, width)
    shares = jnp.pad(weights, (0, blocks * width - count)).reshape(blocks, width)

    def repulsion(unit, some, share):
        pairs = unit[some] @ unit.T / temperature
        others = jnp.where(jnp.arange(items) == some[:, None], jnp.finfo(pairs.dtype).min, pairs)
        return (share * jax.nn.logsumexp(others, axis=1)).sum()

    def one_block(i, carry):
        value, grad = jax.value_and_grad(repulsion)(unit, padded[i], shares[i])
        return carry[0] + value, carry[1] + grad

    pull, pull_grad = jax.value_and_grad(attraction)(unit)
    value, grad = jax.lax.fori_loop(0, blocks, one_block, (-pull, -pull_grad))
    return value, back(grad)[0]


def cofedrec_anchors(config: AnchorsConfig, num_users: int, num_items: int, name: str = "cofedrec_anchors") -> Method:
    """CoFedRec with a contrast of sampled items; see the module docstring."""
    between("contrast_items", config.contrast_items, 1, num_items)
    draw = lambda key: jax.random.randint(key, (config.contrast_items,), 0, num_items)
    return cofedrec(config, num_users, num_items, name, draw)


def cofedrec(
    config: Config,
    num_users: int,
    num_items: int,
    name: str = "cofedrec",
    anchors: Callable[[PRNGKey], Int[Array, "anchors"]] | None = None,
) -> Method:
    """CoFedRec; see the module docstring. `anchors`: the items that a step contrasts with all; None: every item."""
    between("item_clusters", config.item_clusters, 1, num_items)
    item_lr = config.lr * config.own_lr_scale
    if config.rate_by_items:
        item_lr *= num_items
    backbone = linear_head(config.dim)
    strength = config.reg * config.temperature / config.base_temperature

    def loss(params, vectors, batch):
        return binary_cross_entropy(backbone.predict(params, vectors["item"]), batch)

    tune_head = sgd_step(loss, {"head": config.lr})
    tune_items = sgd_step(loss, {"item": item_lr})

    def contrast_of(key, table, labels):
        some = jnp.arange(num_items) if anchors is None else anchors(key)
        return contrast(table, labels, some, config.temperature, config.item_clusters)

    def local_update(key, shared, params, data):
        labels = shared["clusters"]

        def step(carry, batch):
            params, number = carry
            there = batch.mask.sum() > 0
            params, _ = tune_head(params, batch)
            after, value = tune_items(params, batch)
            if strength:
                apart, grad = jax.lax.cond(
                    labels[0] >= 0,
                    lambda: contrast_of(jax.random.fold_in(key, number), params["item"], labels),
                    lambda: (jnp.zeros(()), jnp.zeros_like(params["item"])),
                )
                # a step without samples changes nothing
                rate = jnp.where(there, item_lr * strength, 0.0)
                after, value = {**after, "item": after["item"] - rate * grad}, value + strength * apart
            # steps without samples, of which a block's longest history makes some, are not counted
            return (after, number + there), value

        (after, _), value = run_steps(step, (params, jnp.int32(0)), data)
        return after, {"item": after["item"]}, {"loss": value}

    def server_update(key, server, received):
        tables, present = received.value[0]["item"], received.value[1] > 0
        k_items, k_anchor, k_cluster = jax.random.split(key, 3)
        anybody = present.any()
        mean = jnp.tensordot(present.astype(tables.dtype), tables, 1) / jnp.maximum(present.sum(), 1)
        labels = clusters.kmeans(k_items, mean, config.item_clusters, config.kmeans_iterations)
        anchor, draws = clusters.draw_among(k_anchor, present)
        chosen, _ = clusters.draw_among(k_cluster, jnp.zeros(config.item_clusters, bool).at[labels].set(True))
        similarity = clusters.similarity_to(tables, anchor, labels == chosen)
        group = clusters.similar_group(similarity, present, draws)
        shared = {
            "item": jnp.where(anybody, mean, server.shared["item"]),
            "clusters": jnp.where(anybody, labels, server.shared["clusters"]),
        }
        return Server(shared, ()), {"item": clusters.share_mean(tables, group)}

    return Method(
        name=name,
        init_server=lambda key: Server(
            {
                "item": item_table(key, num_items, config.dim, config.init_std),
                "clusters": jnp.full(num_items, -1, jnp.int32),  # none known
            },
            (),
        ),
        init_client=lambda key, shared: backbone.init(key),
        publish=lambda key, server: server.shared,
        # a user who joins after training has no table yet
        download=lambda shared, mail, client, data: {**client, "item": mail["item"] if mail else shared["item"]},
        local_update=local_update,
        upload=lambda key, shared, params, update, data: ({"head": params["head"]}, update),
        server_update=server_update,
        score=lambda shared, params, data: backbone.predict(params, params["item"]),
        # 0 for a client without samples
        aggregator=aggregate.stacked_over_mail(lambda data: jnp.minimum(data.num_samples, 1.0)),
        sampling=config.sampling(),
        evaluate_at=config.evaluate_at,
        rows="all",
        client_init=config.client_init,
        config=config,
        keeps_upload=True,
        init_mail=lambda server: {"item": server.shared["item"]},
    )
