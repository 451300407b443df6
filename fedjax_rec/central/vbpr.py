"""VBPR: matrix factorisation whose item vectors have a part made of the items' features. NOT federated.

    p_u in R^2d,   q_i = [e_i ; W f_i],   f_i all modalities' features side by side
    L = mean of -log sigmoid(p_u . q_i - p_u . q_j) + l2 (|p_u|^2 + |q_i|^2 + |q_j|^2)

Follows: He and McAuley, VBPR: Visual Bayesian Personalized Ranking from Implicit Feedback, AAAI 2016, as the
multimodal papers have it (MMRec's code): both halves of width d, all modalities concatenated, no item bias.
Deviations: features are centred on the warm items' mean (`centre=false` leaves them). Mean squared lengths instead of
MMRec's norms of a batch's matrices. Items that training may not touch have e_i = 0.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_rec.central.pairwise import Model, PairConfig, bpr, learner, lengths, served
from fedjax_rec.item_sources import Catalogue, features_of
from fedjax_rec.item_sources.views import fill_cold
from fedjax_rec.method import Method
from fedjax_rec.sharing import item_table


@dataclasses.dataclass(frozen=True)
class Config(PairConfig):
    """Attributes: dim: width d of each half. centre: see the module docstring. Others: see PairConfig."""

    centre: bool = True


def vbpr(config: Config, num_users: int, num_items: int, name: str, catalogue: Catalogue) -> Method:
    """VBPR; see the module docstring."""
    return served(
        learner(model(config, num_users, num_items, name, catalogue), config), config, num_users, num_items, name
    )


def model(config: Config, num_users: int, num_items: int, name: str, catalogue: Catalogue) -> Model:
    features = features_of(catalogue, f"{name} reads", centre=config.centre)
    content = jnp.asarray(np.concatenate(list(features.values()), axis=1))
    warm = None if catalogue.warm is None else jnp.asarray(catalogue.warm)

    def init(key):
        k_user, k_item, k_map = jax.random.split(key, 3)
        return {
            "user": item_table(k_user, num_users, 2 * config.dim, config.init_std),
            "item": item_table(k_item, num_items, config.dim, config.init_std),
            "map": jax.nn.initializers.glorot_normal()(k_map, (content.shape[1], config.dim)),
        }

    def vectors(params, content, graph):
        items = fill_cold(params["item"], warm, "zero")
        return params["user"], jnp.concatenate([items, content @ params["map"]], axis=1)

    def loss(params, content, graph, triples, key):
        users, items = vectors(params, content, graph)
        return bpr(users, items, triples) + config.l2 * lengths(triples, users, items)

    return Model(init, content, loss, vectors)
