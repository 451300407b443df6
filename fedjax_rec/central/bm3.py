"""BM3: bootstrapped vectors of users and items, told by each other and by the items' features. NOT federated.

    h_u, h_i = LightGCN(p, e),  h_i + e_i         L layers over the graph of users and items
    h_m = W_m f_m + b_m                           each modality m
    q(h) = W h + b                                one predictor for all of them
    t(h) = dropout(h), without gradient           the targets
    C(a, b) = 1 - cos(q(a), t(b))

    L = mean over training pairs (u, i) of
        C(h_u, h_i) + C(h_i, h_u) + content_weight sum_m [C(h_m, h_i) + C(h_m, h_m)] + l2 (|h_u|^2 + |h_i|^2)
    score_ui = q(h_u) . q(h_i)

Follows: Zhou et al., Bootstrap Latent Representations for Multi-modal Recommendation, WWW 2023; the graph without self
loops, as in the released code. The loss has no negatives.
Deviations: content_weight is 1 as in the paper's sum (released: 2). The features are frozen (`train_features=true`: as
released) and centred on the warm items' mean (`centre=false` leaves them). Mean squared lengths of what a batch reads
instead of the norms of whole tables over the number of items. Dropout anew for every sample. Tables start normal with
`init_std`. Items that training may not touch have e_i = 0, so they all have the same score: the features shape the
vectors of items in training and are not read afterwards.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from fedjax_rec.central.content import ContentConfig, affine, affine_map, content_of, dropped, unit
from fedjax_rec.central.pairwise import Model, graph_bytes, interactions, learner, normalised, propagate, served
from fedjax_rec.item_sources import Catalogue
from fedjax_rec.item_sources.views import fill_cold
from fedjax_rec.method import Method
from fedjax_rec.roles import masked_mean
from fedjax_rec.sharing import item_table
from fedjax_rec.validate import between, positive


@dataclasses.dataclass(frozen=True)
class Config(ContentConfig):
    """Attributes: dropout: of the targets. content_weight: see the module docstring. negatives, draw have no effect and
    are refused. Others: see ContentConfig."""

    lr: float = 0.01
    layers: int = 1
    dropout: float = 0.3
    content_weight: float = 1.0

    def __post_init__(self):
        super().__post_init__()
        self.unused("bm3, whose loss has no negatives", "negatives", "draw")
        between("dropout", self.dropout, 0.0, 0.99)
        positive("content_weight", self.content_weight, zero_allowed=True)


def bm3(config: Config, num_users: int, num_items: int, name: str, catalogue: Catalogue) -> Method:
    """BM3; see the module docstring."""
    trained = learner(model(config, num_users, num_items, name, catalogue), config)
    return served(trained, config, num_users, num_items, name)._replace(scratch=graph_bytes(num_users, num_items))


def model(config: Config, num_users: int, num_items: int, name: str, catalogue: Catalogue) -> Model:
    features, trained, frozen = content_of(catalogue, config, name)
    warm = None if catalogue.warm is None else jnp.asarray(catalogue.warm)

    def init(key):
        k_user, k_item, k_predictor, *k_maps = jax.random.split(key, 3 + len(features))
        maps = {m: affine_map(k, features[m].shape[1], config.dim) for k, m in zip(k_maps, features, strict=True)}
        return {
            "user": item_table(k_user, num_users, config.dim, config.init_std),
            "item": item_table(k_item, num_items, config.dim, config.init_std),
            "predictor": affine_map(k_predictor, config.dim, config.dim),
            "map": maps,
            "features": trained,
        }

    def hidden(params, graph):
        own = fill_cold(params["item"], warm, "zero")
        users, items = propagate(graph, params["user"], own, config.layers)
        return users, items + own

    def vectors(params, frozen, graph):
        users, items = hidden(params, graph)
        return affine(params["predictor"], users), affine(params["predictor"], items)

    def loss(params, frozen, graph, triples, key):
        users, items = hidden(params, graph)
        user, item = users[triples.user], items[triples.positive]
        content = {**frozen, **params["features"]}
        h = [user, item, *(affine(params["map"][m], x[triples.positive]) for m, x in content.items())]
        said = [unit(affine(params["predictor"], x)) for x in h]
        keys = jax.random.split(key, len(h))
        target = [unit(jax.lax.stop_gradient(dropped(k, x, config.dropout))) for k, x in zip(keys, h, strict=True)]
        apart = lambda a, b: 1.0 - (said[a] * target[b]).sum(-1)
        of_content = sum(apart(m, 1) + apart(m, m) for m in range(2, len(h)))
        lengths = (user**2).sum(-1) + (item**2).sum(-1)
        each = apart(0, 1) + apart(1, 0) + config.content_weight * of_content + config.l2 * lengths
        return masked_mean(each, triples.mask)

    graph = lambda seen: normalised(interactions(seen, num_items))
    return Model(init, frozen, loss, vectors, graph)
