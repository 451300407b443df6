"""FedNCF: neural collaborative filtering with a private user vector; item table and network are averaged.

Follows: Perifanis and Efraimidis 2022 (FedAvg variant: users keep their profile, the item profile and the network
weights are shared) with the pointwise binary cross-entropy of He et al. 2017.

`branches=mlp` is the MLP tower alone (FedRKG's and IFedRec's baseline); `branches=neumf` puts the GMF branch
beside it (FedVLR's and FedMR's).

Deviations: the released multimodal code uploads every user's vector table; here a user vector stays at home.
`network_lr_scale` multiplies lr for the shared network, whose updates all clients average over.
"""

from __future__ import annotations

import dataclasses

import jax

from fedjax_rec.backbones.ncf import neural_cf
from fedjax_rec.method import Method
from fedjax_rec.roles import binary_cross_entropy, local_sgd
from fedjax_rec.sharing import LocalConfig, item_table, sharing_method
from fedjax_rec.validate import one_of, positive, widths


@dataclasses.dataclass(frozen=True)
class Config(LocalConfig):
    """Attributes: layers: widths of the tower after its 2 dim inputs. branches: `mlp` or `neumf`.
    network_lr_scale: rate of the network relative to lr. user_init_std: standard deviation of user vectors at the
    start. Others: see LocalConfig."""

    layers: tuple[int, ...] = (64, 32, 16)
    branches: str = "neumf"
    network_lr_scale: float = 1.0
    lr: float = 0.8
    item_lr_scale: float = 1.0
    user_init_std: float = 0.01

    def __post_init__(self):
        super().__post_init__()
        one_of("branches", self.branches, ("mlp", "neumf"))
        positive("network_lr_scale", self.network_lr_scale)
        positive("user_init_std", self.user_init_std, zero_allowed=True)
        widths("layers", self.layers)


def fedncf(config: Config, num_users: int, num_items: int, name: str = "fedncf") -> Method:
    """FedNCF; see the module docstring."""
    backbone = neural_cf(
        config.dim, layers=config.layers, gmf=config.branches == "neumf", init_std=config.user_init_std
    )

    def loss(params, vectors, batch):
        return binary_cross_entropy(backbone.predict(params, vectors["item"]), batch)

    rates = {
        "user": config.lr,
        "network": config.lr * config.network_lr_scale,
        "item": config.item_lr(num_users),
    }

    def init_shared(key):
        k_item, k_network = jax.random.split(key)
        item = item_table(k_item, num_items, backbone.width, config.init_std)
        return {"item": item, "network": backbone.init(k_network)["network"]}

    return sharing_method(
        name,
        init_shared=init_shared,
        init_private=lambda key: {"user": backbone.init(key)["user"]},
        train=local_sgd(loss, rates, optimizer=config.optimizer),
        score=lambda params: backbone.predict(params, params["item"]),
        config=config,
    )
