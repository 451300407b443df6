"""PGL: vectors of content, trained on the principal part of the graph of users and items. NOT federated.

    q_i = [unit(W_m f_m + b_m) for each modality m],   p_u as wide
    users, items = LightGCN(p, q) over the graph A,    items + S^item_layers q
    S = sum_m weight_m S_m                             S_m: 1/k for the k nearest items by cosine, itself among them
    L = BPR + contrast_weight / 2 (InfoNCE of two dropouts of the batch's users + of its positives)

The server trains on a sub-graph of A, drawn anew every round, and serves the vectors of the whole of A.

    local    floor(keep x edges) edges without replacement, in proportion to their weights in A, normalised again
    global   the `rank` largest singular values and vectors of A, entries below 0.001 in size left out
    global_released   the first quarter of these vectors; the k-th value times the k-th of the last quarter

Follows: Yu et al., Mind Individual Information! Principal Graph Learning for Multimedia Recommendation, AAAI 2025, of
which the abstract and the released code were at hand: what is said here of the sub-graphs is the code's, but for
`global`, the truncated decomposition. Items have no vectors of their own: any item with features is scored.
Deviations: `rank` counts singular values of users x items, each of which the code's square matrix has twice (its 64).
The features are frozen (`train_features=true`: as released) and centred on the warm items' mean (`centre=false` leaves
them); negative cosines are no edges, and items that training may not touch are nobody else's neighbours. image_weight,
1 - image_weight are the weights where the modalities are image and text; otherwise all weigh the same.

A global sub-graph costs a singular value decomposition of the dense matrix in each round.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from fedjax_rec.central.content import (
    ContentConfig,
    affine,
    affine_map,
    content_of,
    dropped,
    info_nce,
    knn_graph,
    read,
    unit,
)
from fedjax_rec.central.pairwise import Model, bpr, graph_bytes, interactions, learner, normalised, propagate, served
from fedjax_rec.item_sources import Catalogue
from fedjax_rec.method import Method
from fedjax_rec.sharing import item_table
from fedjax_rec.types import PRNGKey
from fedjax_rec.validate import between, one_of, positive

SMALLEST = 1e-3


@dataclasses.dataclass(frozen=True)
class Config(ContentConfig):
    """Attributes: mode, keep, rank, item_layers, image_weight, contrast_weight: see the module docstring. neighbours:
    the k of S. dropout, temperature: of the contrast. dim: of one modality. l2 has no effect and is refused. Others:
    see ContentConfig."""

    lr: float = 0.01
    l2: float = 0.0
    rate_decay: float = 0.96 ** (1 / 50)
    mode: str = "local"
    keep: float = 0.3
    rank: int = 32
    neighbours: int = 10
    item_layers: int = 1
    image_weight: float = 0.1
    contrast_weight: float = 0.0
    dropout: float = 0.2
    temperature: float = 0.2

    def __post_init__(self):
        super().__post_init__()
        self.unused("pgl", "l2")
        one_of("mode", self.mode, ("local", "global", "global_released"))
        for name in ("keep", "rank", "neighbours", "item_layers", "temperature"):
            positive(name, getattr(self, name))
        for name in ("keep", "image_weight"):
            between(name, getattr(self, name), 0.0, 1.0)
        between("dropout", self.dropout, 0.0, 0.99)
        positive("contrast_weight", self.contrast_weight, zero_allowed=True)
        if not self.contrast_weight:
            self.unused("contrast_weight=0", "dropout", "temperature")
        self.unused(f"mode={self.mode}", "rank" if self.mode == "local" else "keep")


def pgl(config: Config, num_users: int, num_items: int, name: str, catalogue: Catalogue) -> Method:
    """PGL; see the module docstring."""
    trained = learner(model(config, num_users, num_items, name, catalogue), config)
    return served(trained, config, num_users, num_items, name)._replace(scratch=graph_bytes(num_users, num_items))


def model(config: Config, num_users: int, num_items: int, name: str, catalogue: Catalogue) -> Model:
    features, trained, frozen = content_of(catalogue, config, name)
    if set(features) == {"image", "text"}:
        weight = {"image": config.image_weight, "text": 1.0 - config.image_weight}
    else:
        config.unused(
            f"{name} where the features are {', '.join(features)} (it weighs image against text)", "image_weight"
        )
        weight = {m: 1.0 / len(features) for m in features}
    nearest = {m: knn_graph(x, config.neighbours, catalogue.warm, weighted=False) for m, x in features.items()}

    def init(key):
        k_user, *k_maps = jax.random.split(key, 1 + len(features))
        maps = {m: affine_map(k, features[m].shape[1], config.dim) for k, m in zip(k_maps, features, strict=True)}
        user = item_table(k_user, num_users, len(features) * config.dim, config.init_std)
        return {"user": user, "map": maps, "features": trained}

    def vectors(params, frozen, graph):
        content = {**frozen["features"], **params["features"]}
        own = jnp.concatenate([unit(affine(params["map"][m], x)) for m, x in sorted(content.items())], axis=1)
        near = own
        for _ in range(config.item_layers):
            near = sum(weight[m] * read(frozen["nearest"][m], near) for m in weight)
        users, items = propagate(graph, params["user"], own, config.layers)
        return users, items + near

    def loss(params, frozen, graph, triples, key):
        users, items = vectors(params, frozen, graph)
        total = bpr(users, items, triples)
        if config.contrast_weight:
            views = lambda k, x: [dropped(one, x, config.dropout) for one in jax.random.split(k)]
            for k, x in zip(jax.random.split(key), (users[triples.user], items[triples.positive]), strict=True):
                total += config.contrast_weight / 2 * info_nce(*views(k, x), triples.mask, config.temperature)
        return total

    graph = lambda seen: normalised(interactions(seen, num_items))
    return Model(
        init, {"features": frozen, "nearest": nearest}, loss, vectors, graph, lambda key, g: sub_graph(key, g, config)
    )


def sub_graph(key: PRNGKey, graph: Float[Array, "users items"], config: Config) -> Float[Array, "users items"]:
    """The principal part of a normalised graph; see the module docstring."""
    if config.mode == "local":
        return normalised(some_edges(key, graph, config.keep))
    left, value, right = jnp.linalg.svd(graph, full_matrices=False)
    rank = min(config.rank, len(value))
    if config.mode == "global_released":
        quarter = max(rank // 4, 1)
        value, rank = value[:quarter] * value[rank - quarter : rank], quarter
    low = (left[:, :rank] * value[:rank]) @ right[:rank]
    return jnp.where(jnp.abs(low) >= SMALLEST, low, 0.0)


def some_edges(key: PRNGKey, graph: Float[Array, "users items"], keep: float) -> Float[Array, "users items"]:
    """1 for each of floor(keep x edges) edges, drawn without replacement in proportion to their weights: those that are
    largest in log weight + Gumbel noise."""
    edge = graph > 0
    drawn = jnp.log(jnp.where(edge, graph, 1.0)) + jax.random.gumbel(key, graph.shape)
    order = jnp.argsort(-jnp.where(edge, drawn, -jnp.inf), axis=None)
    kept = jnp.arange(order.size) < jnp.floor(keep * edge.sum())
    return jnp.zeros(order.size).at[order].set(kept.astype(jnp.float32)).reshape(graph.shape)
