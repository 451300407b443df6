"""Federated matrix factorisation: the user vector stays on the client, the item table is averaged.

    p_u <- p_u - lr dL_u/dp_u      Q_u <- Q - lr_item dL_u/dQ      Q <- Q + sum_u w_u (Q_u - Q) / sum_u w_u

with L_u the mean binary cross-entropy of sigmoid(p_u . q_i [+ b_u]) on the user's positives and sampled negatives, plus
l2 (|p_u|^2 + |q_i|^2) as in FCF's objective.

Follows: Ammad-ud-din et al. 2019 (FCF: the user factor is private, item factors are shared), Chai et al. 2020
(FedMF, without its encryption), McMahan et al. 2017 (FedAvg: clients weigh by their data), all three as the
multimodal papers use them: a pointwise loss on implicit feedback. The three names are one method with presets:

    fcf     equal weights, no user bias
    fedmf   equal weights, user bias
    fedavg  weights by data size, user bias

With `weighting=by_row` row i moves by the mean of Q_ui - Q_i over the clients that moved it.

Deviations: FCF's closed-form user solution and its gradient-only uploads are replaced by local SGD. The released
code's other habits are settings: `client_init=shared`, `item_lr_scale`.
"""

from __future__ import annotations

import dataclasses

from fedjax_rec.backbones.mf import matrix_factorisation
from fedjax_rec.method import Method
from fedjax_rec.roles import binary_cross_entropy, local_sgd, masked_mean
from fedjax_rec.sharing import LocalConfig, item_table, sharing_method
from fedjax_rec.validate import positive


@dataclasses.dataclass(frozen=True)
class Config(LocalConfig):
    """Attributes: user_bias: adds b_u to every score of a user. user_init_std: standard deviation of user vectors at
    the start. l2: weight of the squared lengths of the vectors that a sample reads. Others: see LocalConfig."""

    user_bias: bool = True
    user_init_std: float = 0.01
    l2: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        for name in ("user_init_std", "l2"):
            positive(name, getattr(self, name), zero_allowed=True)


PRESETS = {
    "fcf": Config(user_bias=False, weighting="equal"),
    "fedmf": Config(user_bias=True, weighting="equal"),
    "fedavg": Config(user_bias=True, weighting="by_size"),
}


def fedmf(config: Config, num_users: int, num_items: int, name: str = "fedmf") -> Method:
    """Federated matrix factorisation; see the module docstring."""
    backbone = matrix_factorisation(config.dim, bias=config.user_bias, init_std=config.user_init_std)

    def loss(params, vectors, batch):
        value = binary_cross_entropy(backbone.predict(params, vectors["item"]), batch)
        if not config.l2:
            return value
        length = (params["user"]["vector"] ** 2).sum() + (vectors["item"] ** 2).sum(-1)
        return value + config.l2 * masked_mean(length, batch.mask)

    return sharing_method(
        name,
        init_shared=lambda key: {"item": item_table(key, num_items, backbone.width, config.init_std)},
        init_private=backbone.init,
        train=local_sgd(loss, {"user": config.lr, "item": config.item_lr(num_users)}, optimizer=config.optimizer),
        score=lambda params: backbone.predict(params, params["item"]),
        config=config,
    )
