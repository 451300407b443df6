"""The plain methods under a modifier: their settings as one flat configuration, and how to build the one named."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

from fedjax_rec.method import Method
from fedjax_rec.methods import fedmf, fedncf, fedrap, pfedrec
from fedjax_rec.sharing import LocalConfig
from fedjax_rec.validate import one_of, positive, widths


class Plain(NamedTuple):
    """A plain method: how it is built, its settings, and those that make it what it is."""

    build: Callable[..., Method]
    settings: type[LocalConfig]
    fixed: dict[str, Any]


def _preset(name: str) -> Plain:
    chosen, default = (dataclasses.asdict(config) for config in (fedmf.PRESETS[name], fedmf.Config()))
    return Plain(fedmf.fedmf, fedmf.Config, {k: v for k, v in chosen.items() if v != default[k]})


BACKBONES = {
    **{name: _preset(name) for name in ("fcf", "fedavg", "fedmf")},
    "fedncf": Plain(fedncf.fedncf, fedncf.Config, {}),
    "fedrap": Plain(fedrap.fedrap, fedrap.Config, {}),
    "pfedrec": Plain(pfedrec.pfedrec, pfedrec.Config, {}),
}

SETTING_OF = {
    "user_bias": ("fedmf", "fedavg", "fcf"),
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
        backbone: one of OVER.
        user_bias, user_init_std, layers, branches, network_lr_scale: of the backbones, see fedmf and fedncf.
    """

    backbone: str = "pfedrec"
    user_bias: bool = True
    user_init_std: float = 0.01
    layers: tuple[int, ...] = (64, 32, 16)
    branches: str = "neumf"
    network_lr_scale: float = 1.0

    OVER: ClassVar[tuple[str, ...]] = ("fedmf", "fedncf", "pfedrec")

    def __post_init__(self):
        super().__post_init__()
        one_of("backbone", self.backbone, self.OVER)
        one_of("branches", self.branches, ("mlp", "neumf"))
        widths("layers", self.layers)
        positive("network_lr_scale", self.network_lr_scale)
        positive("user_init_std", self.user_init_std, zero_allowed=True)
        if self.backbone in ("pfedrec", "fedrap"):
            one_of("optimizer", self.optimizer, ("sgd",))
        no_other_backbones_settings(self)
        for name, value in BACKBONES[self.backbone].fixed.items():
            if getattr(self, name) != value:
                self.unused(f"backbone={self.backbone}", name)
            object.__setattr__(self, name, value)  # what is recorded is what is trained

    @property
    def width(self) -> int:
        """Of the shared item rows."""
        return 2 * self.dim if self.backbone == "fedncf" and self.branches == "neumf" else self.dim


def plain_method(config: OverConfig, num_users: int, num_items: int, name: str) -> Method:
    """The backbone as a method of its own, called `name` and with `config` for the log."""
    plain = BACKBONES[config.backbone]
    shared = {f.name for f in dataclasses.fields(plain.settings)} & {f.name for f in dataclasses.fields(config)}
    given = {field: getattr(config, field) for field in shared - {"preset"}}
    return plain.build(plain.settings(**given), num_users, num_items, name=name)._replace(config=config)
