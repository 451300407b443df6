"""The plain methods under a modifier: their settings as one flat configuration, and how to build the one named."""

from __future__ import annotations

import dataclasses

from fedjax_rec.method import Method
from fedjax_rec.methods import fedmf, fedncf, pfedrec
from fedjax_rec.sharing import LocalConfig
from fedjax_rec.validate import one_of, positive, widths

BACKBONES = {
    "fedmf": (fedmf.fedmf, fedmf.Config),
    "fedncf": (fedncf.fedncf, fedncf.Config),
    "pfedrec": (pfedrec.pfedrec, pfedrec.Config),
}

SETTING_OF = {
    "user_bias": ("fedmf",),
    "user_init_std": ("fedmf", "fedavg", "fcf", "fedncf"),
    **dict.fromkeys(("layers", "branches", "network_lr_scale"), ("fedncf",)),
    **dict.fromkeys(("independence", "sparsity", "anneal", "own_lr_scale", "own_init_std"), ("fedrap",)),
}
"""The backbones that read a setting."""


def no_other_backbones_settings(config: LocalConfig) -> None:
    """Refuses settings that the chosen backbone does not read, unless they are left at their defaults."""
    for name, backbones in SETTING_OF.items():
        if hasattr(config, name) and config.backbone not in backbones:
            config.unused(f"backbone={config.backbone}", name)


@dataclasses.dataclass(frozen=True)
class OverConfig(LocalConfig):
    """Settings of a method over a plain one.

    Attributes:
        backbone: one of BACKBONES.
        user_bias, user_init_std, layers, branches, network_lr_scale: of the backbones, see fedmf and fedncf.
    """

    backbone: str = "pfedrec"
    user_bias: bool = True
    user_init_std: float = 0.01
    layers: tuple[int, ...] = (64, 32, 16)
    branches: str = "neumf"
    network_lr_scale: float = 1.0

    def __post_init__(self):
        super().__post_init__()
        one_of("backbone", self.backbone, BACKBONES)
        one_of("branches", self.branches, ("mlp", "neumf"))
        widths("layers", self.layers)
        positive("network_lr_scale", self.network_lr_scale)
        positive("user_init_std", self.user_init_std, zero_allowed=True)
        if self.backbone == "pfedrec":
            one_of("optimizer", self.optimizer, ("sgd",))
        no_other_backbones_settings(self)

    @property
    def width(self) -> int:
        """Of the shared item rows."""
        return 2 * self.dim if self.backbone == "fedncf" and self.branches == "neumf" else self.dim


def plain_method(config: OverConfig, num_users: int, num_items: int, name: str) -> Method:
    """The backbone as a method of its own, called `name` and with `config` for the log."""
    build, settings = BACKBONES[config.backbone]
    shared = {f.name for f in dataclasses.fields(settings)} & {f.name for f in dataclasses.fields(config)}
    own = settings(**{field: getattr(config, field) for field in shared - {"preset"}})
    return build(own, num_users, num_items, name=name)._replace(config=config)
