"""MGCN: vectors from the graph of users and items, and from one graph of items for each modality. NOT federated.

    content  c = LightGCN(p, e)                                      `layers` steps over the graph A of users and items
    purified x_m = e * sigmoid(W2_m (W1_m f_m + b1_m) + b2_m)        each modality m
    view     v_m = (A S_m x_m, S_m x_m)                              users, items; `item_layers` steps over S_m
    common   v = sum_m a_m v_m,  a = softmax_m(w . tanh(W v_m + b))
    side     s = (v + sum_m sigmoid(W3_m c + b3_m) * (v_m - v)) / (modalities + 1)
    vectors  c + s
    L = BPR + l2 (|p_u|^2 + |q_i|^2 + |q_j|^2) of these vectors
        + contrast_weight (InfoNCE of s and c over the batch's users + over its positives)

S_m is the graph of the `neighbours` nearest items by cosine, the item itself among them (see content.knn_graph).

Follows: Yu et al., Multi-View Graph Convolutional Network for Multimedia Recommendation, ACM MM 2023, and its released
code where the paper leaves it open (the fuser's sum over modalities + 1, InfoNCE within the batch).
Deviations: the features are frozen (`train_features=true`: as released) and centred on the warm items' mean
(`centre=false` leaves them); negative cosines are no edges. Tables start normal with `init_std`. Items that training
may not touch have e_i = 0 and read the warm items that are nearest: they are scored by what these have learned.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from fedjax_rec.central.content import ContentConfig, affine, affine_map, content_of, info_nce, knn_graph, read
from fedjax_rec.central.pairwise import (
    Model,
    bpr,
    graph_bytes,
    interactions,
    learner,
    lengths,
    normalised,
    propagate,
    served,
)
from fedjax_rec.item_sources import Catalogue
from fedjax_rec.item_sources.views import fill_cold
from fedjax_rec.method import Method
from fedjax_rec.sharing import item_table
from fedjax_rec.validate import positive


@dataclasses.dataclass(frozen=True)
class Config(ContentConfig):
    """Attributes: neighbours, item_layers, contrast_weight: see the module docstring. temperature: of InfoNCE. l2: half
    of the released code's weight, which counts half of the squares. Others: see ContentConfig."""

    lr: float = 0.003
    l2: float = 5e-5
    rate_decay: float = 0.96 ** (1 / 50)
    neighbours: int = 10
    item_layers: int = 1
    contrast_weight: float = 0.01
    temperature: float = 0.2

    def __post_init__(self):
        super().__post_init__()
        for name in ("neighbours", "item_layers", "temperature"):
            positive(name, getattr(self, name))
        positive("contrast_weight", self.contrast_weight, zero_allowed=True)
        if not self.contrast_weight:
            self.unused("contrast_weight=0", "temperature")


def mgcn(config: Config, num_users: int, num_items: int, name: str, catalogue: Catalogue) -> Method:
    """MGCN; see the module docstring."""
    trained = learner(model(config, num_users, num_items, name, catalogue), config)
    return served(trained, config, num_users, num_items, name)._replace(scratch=graph_bytes(num_users, num_items))


def model(config: Config, num_users: int, num_items: int, name: str, catalogue: Catalogue) -> Model:
    features, trained, frozen = content_of(catalogue, config, name)
    nearest = {m: knn_graph(x, config.neighbours, catalogue.warm, weighted=True) for m, x in features.items()}
    warm = None if catalogue.warm is None else jnp.asarray(catalogue.warm)
    dim = config.dim

    def init(key):
        k_user, k_item, k_query, k_weight, *k_modality = jax.random.split(key, 4 + len(features))

        def of_modality(key, width):
            k_map, k_purifier, k_preference = jax.random.split(key, 3)
            return {
                "map": affine_map(k_map, width, dim),
                "purifier": affine_map(k_purifier, dim, dim),
                "preference": affine_map(k_preference, dim, dim),
            }

        return {
            "user": item_table(k_user, num_users, dim, config.init_std),
            "item": item_table(k_item, num_items, dim, config.init_std),
            "query": affine_map(k_query, dim, dim),
            "query_weight": jax.nn.initializers.glorot_normal()(k_weight, (dim, 1)),
            "modality": {m: of_modality(k, x.shape[1]) for k, (m, x) in zip(k_modality, features.items(), strict=True)},
            "features": trained,
        }

    def views(params, frozen, graph):
        """(content, side), each of users and items below one another."""
        item = fill_cold(params["item"], warm, "zero")
        content = jnp.concatenate(propagate(graph, params["user"], item, config.layers))
        found, preferred = [], []
        for m, x in ({**frozen["features"], **params["features"]}).items():
            layers = params["modality"][m]
            purified = item * jax.nn.sigmoid(affine(layers["purifier"], affine(layers["map"], x)))
            for _ in range(config.item_layers):
                purified = read(frozen["nearest"][m], purified)
            found.append(jnp.concatenate([graph @ purified, purified]))
            preferred.append(jax.nn.sigmoid(affine(layers["preference"], content)))
        found, preferred = jnp.stack(found), jnp.stack(preferred)
        attention = jax.nn.softmax(jnp.tanh(affine(params["query"], found)) @ params["query_weight"], axis=0)
        common = (attention * found).sum(0)
        return content, (common + (preferred * (found - common)).sum(0)) / (len(found) + 1)

    def vectors(params, frozen, graph):
        content, side = views(params, frozen, graph)
        return (content + side)[:num_users], (content + side)[num_users:]

    def loss(params, frozen, graph, triples, key):
        content, side = views(params, frozen, graph)
        users, items = (content + side)[:num_users], (content + side)[num_users:]
        total = bpr(users, items, triples) + config.l2 * lengths(triples, users, items)
        if config.contrast_weight:
            for row in (triples.user, num_users + triples.positive):
                agreement = info_nce(side[row], content[row], triples.mask, config.temperature)
                total += config.contrast_weight * agreement
        return total

    graph = lambda seen: normalised(interactions(seen, num_items))
    return Model(init, {"features": frozen, "nearest": nearest}, loss, vectors, graph)
