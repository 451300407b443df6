"""Two towers: a vector for every user beside a network of the items' features, trained by contrast. NOT federated.

    p_u free,   q_i = W_2 dropout(relu(W_1 f_i + c)) + d,   f_i all modalities' features side by side
    s_ui = cos(p_u, q_i) / tau
    L    = mean over a batch of pairs (u, i) of -log softmax_j s_uj at j = i + l2 (|W_1|^2 + |W_2|^2)

j runs over the batch's items, but for those that are i again or another of u's. Items have nothing of their own: cold
ones are scored as warm ones are. The ranking is by the cosine, which is the same.

Follows: the in-batch softmax of two-tower retrieval (Yi et al., Sampling-Bias-Corrected Neural Modeling for Large
Corpus Item Recommendations, RecSys 2019), users by id. Deviations: no correction for how often an item is drawn, and
no features of users. The negatives that clients draw are not used.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_rec.central.content import MASKED, affine, affine_map, dropped, unit
from fedjax_rec.central.pairwise import Model, PairConfig, learner, served
from fedjax_rec.item_sources import Catalogue, features_of
from fedjax_rec.method import Method
from fedjax_rec.roles import masked_mean
from fedjax_rec.sharing import item_table
from fedjax_rec.validate import between, positive


@dataclasses.dataclass(frozen=True)
class Config(PairConfig):
    """Attributes: hidden: width of the items' hidden layer. temperature, dropout, l2: see the module docstring.
    centre: features less their mean over the items that training may touch. Others: see PairConfig."""

    hidden: int = 256
    temperature: float = 0.1
    dropout: float = 0.3
    l2: float = 0.0
    centre: bool = True

    def __post_init__(self):
        super().__post_init__()
        for name in ("hidden", "temperature"):
            positive(name, getattr(self, name))
        between("dropout", self.dropout, 0.0, 1.0)


def two_tower(config: Config, num_users: int, num_items: int, name: str, catalogue: Catalogue) -> Method:
    """Two towers; see the module docstring."""
    made = model(config, num_users, num_items, name, catalogue)
    return served(learner(made, config), config, num_users, num_items, name)


def model(config: Config, num_users: int, num_items: int, name: str, catalogue: Catalogue) -> Model:
    features = features_of(catalogue, f"{name} reads", centre=config.centre)
    content = jnp.asarray(np.concatenate(list(features.values()), axis=1))

    def init(key):
        k_user, k_first, k_second = jax.random.split(key, 3)
        return {
            "user": item_table(k_user, num_users, config.dim, config.init_std),
            "first": affine_map(k_first, content.shape[1], config.hidden),
            "second": affine_map(k_second, config.hidden, config.dim),
        }

    def vectors(params, content, graph):
        hidden = jax.nn.relu(affine(params["first"], content))
        return unit(params["user"]), unit(affine(params["second"], hidden))

    def loss(params, content, graph, triples, key):
        hidden = jax.nn.relu(affine(params["first"], content[triples.positive]))
        items = unit(affine(params["second"], dropped(key, hidden, config.dropout)))
        users = unit(params["user"][triples.user])
        also_liked = triples.user[:, None] == triples.user
        also_liked |= triples.positive[:, None] == triples.positive
        own = jnp.eye(triples.mask.shape[0], dtype=bool)
        compete = own | (~also_liked & (triples.mask > 0))
        logits = jnp.where(compete, users @ items.T / config.temperature, MASKED)
        error = masked_mean(jax.nn.logsumexp(logits, axis=1) - jnp.diagonal(logits), triples.mask)
        return error + config.l2 * sum((params[layer]["kernel"] ** 2).sum() for layer in ("first", "second"))

    return Model(init, content, loss, vectors)
