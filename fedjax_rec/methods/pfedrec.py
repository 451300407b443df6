"""PFedRec: a personal score function per user over an item table that is averaged, then tuned on the client.

Dual personalisation (Zhang et al., IJCAI 2023, Algorithm 1): every batch takes two steps,

    (w_u, b_u) <- (w_u, b_u) - lr dL/d(w_u, b_u)        first the score function,
    Q_u        <- Q_u - lr_item dL'/dQ_u                then the item table, on a new forward pass L',

with L the mean binary cross-entropy of sigmoid(w_u . q_i + b_u); the server averages the tables with equal
weights, the score function never leaves the client. A user is served by the table it has tuned itself
(`evaluate_at=post_local`).

Follows: the paper, whose score function is one linear layer in its released code.
Deviations: the released item rate lr x items x 80 is `preset=released` here (with its shared start), because under
honest negatives one such step writes the sampled negatives off for good.
"""

from __future__ import annotations

import dataclasses

from fedjax_rec.backbones.linear import linear_head
from fedjax_rec.method import Method
from fedjax_rec.roles import binary_cross_entropy, run_steps, sgd_step
from fedjax_rec.sharing import BY_CLIENT, LocalConfig, item_table, sharing_method
from fedjax_rec.validate import one_of


@dataclasses.dataclass(frozen=True)
class Config(LocalConfig):
    """Attributes: preset: `paper`, or `released` for the released code's rates and start (its batches 256 and
    negatives 4 are the defaults), see PRESETS. rate_by_items: the table's rate is lr * item_lr_scale * items, not
    clients. Others: LocalConfig. A small item_lr_scale keeps the tuning on the client gentle, server_lr makes up for it
    in the shared table."""

    evaluate_at: str = "post_local"
    item_lr_scale: float = 0.02
    server_lr: float = 10.0
    client_init: str = "shared"
    preset: str = "paper"
    rate_by_items: bool = False

    def __post_init__(self):
        super().__post_init__()
        one_of("preset", self.preset, ("paper", "released"))
        one_of("optimizer", self.optimizer, ("sgd",))
        if self.rate_by_items:
            one_of("weighting", self.weighting, BY_CLIENT)  # the items stand for the clients that by_row leaves out


PRESETS = {
    "paper": Config(),
    "released": Config(preset="released", lr=0.1, rate_by_items=True, item_lr_scale=80.0, init_std=1.0, server_lr=1.0),
}


def pfedrec(config: Config, num_users: int, num_items: int, name: str = "pfedrec") -> Method:
    """PFedRec; see the module docstring."""
    item_lr = config.item_lr(num_items if config.rate_by_items else num_users)
    backbone = linear_head(config.dim)

    def loss(params, vectors, batch):
        return binary_cross_entropy(backbone.predict(params, vectors["item"]), batch)

    tune_head = sgd_step(loss, {"head": config.lr})
    tune_items = sgd_step(loss, {"item": item_lr})

    def step(params, batch):
        params, _ = tune_head(params, batch)
        return tune_items(params, batch)

    return sharing_method(
        name,
        init_shared=lambda key: {"item": item_table(key, num_items, config.dim, config.init_std)},
        init_private=backbone.init,
        train=lambda params, data: run_steps(step, params, data),
        score=lambda params: backbone.predict(params, params["item"]),
        config=config,
    )
