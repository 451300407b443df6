"""CS_FCF and CS_FedNCF: plain federated methods whose cold rows come from content after the fact (our adaptation).

    knn     E_i = sum_j w_ij E_j over the k warm items j nearest in content, w_ij proportional to the cosine of
                                   features from which the warm items' mean is taken
    map     E_i = b + m_i W, the ridge regression of the warm rows on their features, solved anew in every round
    random  E_i drawn with the warm rows' mean and spread: the control that knows nothing of the item

Source: the MDiffFR paper compares with "CS_FCF" and "CS_FedNCF" and says only that they are adapted. The choice of
these three is ours. The clients train FCF (fedmf without bias) or FedNCF and never hear of features, so that what
IFedRec's and MDiffFR's server models add can be told apart from what content gives to any table.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from fedjax_rec.item_sources import Catalogue
from fedjax_rec.item_sources.cold import (
    RowMaker,
    conditions,
    neighbour_means,
    ridge_map,
    some_cold,
    with_cold_rows,
)
from fedjax_rec.method import Method
from fedjax_rec.methods.over import OverConfig, plain_method
from fedjax_rec.validate import one_of, positive


@dataclasses.dataclass(frozen=True)
class Config(OverConfig):
    """Attributes: cold: `knn`, `map` or `random`. neighbours: k. ridge: weight of the map's penalty, relative to the
    features' mean energy. Others: OverConfig."""

    dim: int = 64
    negatives: int = 5
    cold: str = "knn"
    neighbours: int = 10
    ridge: float = 1.0

    def __post_init__(self):
        super().__post_init__()
        one_of("cold", self.cold, ("knn", "map", "random"))
        positive("neighbours", self.neighbours)
        positive("ridge", self.ridge, zero_allowed=True)


PRESETS = {
    "cs_fcf": Config(backbone="fedmf", user_bias=False),
    "cs_fedncf": Config(backbone="fedncf", branches="mlp", lr=0.8, item_lr_scale=1.0),
}


def content_cold(config: Config, num_users: int, num_items: int, name: str, catalogue: Catalogue) -> Method:
    """CS_FCF or CS_FedNCF; see the module docstring."""
    content = conditions(catalogue, name, 0)
    warm, cold = some_cold(catalogue, name, config.backbone)
    if config.cold == "knn":
        means = neighbour_means(content, warm, cold, config.neighbours)
        make = lambda key, state, rows: means(rows)
    elif config.cold == "map":
        # the features are centred: the mean row is the intercept, which has no penalty
        fit, told = jnp.asarray(ridge_map(content, warm, config.ridge)), jnp.asarray(content[cold])
        make = lambda key, state, rows: rows.mean(0) + told @ (fit @ rows)
    else:
        make = lambda key, state, rows: rows.mean(0) + rows.std(0) * jax.random.normal(key, (len(cold), config.width))
    maker = RowMaker(lambda key: (), lambda key, state, rows, round_: (), make)
    return with_cold_rows(plain_method(config, num_users, num_items, name), maker, catalogue)
