"""All methods by name, and how to build one from settings."""

from __future__ import annotations

import dataclasses
import numbers
import types
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from fedjax_rec.central import aldi, bm3, diffrec, ease, gar, heater, mgcn, pgl, pointwise, two_tower, vbpr
from fedjax_rec.item_sources import Catalogue
from fedjax_rec.method import Method
from fedjax_rec.methods import (
    cofedrec,
    content_cold,
    feddae,
    fedmf,
    fedncf,
    fedrap,
    fedrkg,
    fusion,
    gpfedrec,
    ifedrec,
    mdifffr,
    pfedrec,
    plgc,
)
from fedjax_rec.sharing import LocalConfig
from fedjax_rec.validate import nearest, one_of


class Entry(NamedTuple):
    """build: (config, num_users, num_items, name[, catalogue]) -> Method; config: its settings with their defaults;
    reads_items: whether it takes the catalogue's features; central: whether the server sees histories (no federated
    method); everybody: whether all clients must be in every round; presets: defaults by the value of its setting
    `preset`."""

    build: Callable[..., Method]
    config: LocalConfig
    reads_items: bool = False
    central: bool = False
    everybody: bool = False
    presets: Mapping[str, LocalConfig] = types.MappingProxyType({})


METHODS: dict[str, Entry] = {
    "fedavg": Entry(fedmf.fedmf, fedmf.PRESETS["fedavg"]),
    "fcf": Entry(fedmf.fedmf, fedmf.PRESETS["fcf"]),
    "fedmf": Entry(fedmf.fedmf, fedmf.PRESETS["fedmf"]),
    "fedncf": Entry(fedncf.fedncf, fedncf.Config()),
    "pfedrec": Entry(pfedrec.pfedrec, pfedrec.Config(), presets=pfedrec.PRESETS),
    "fedrap": Entry(fedrap.fedrap, fedrap.Config()),
    "fedrkg": Entry(fedrkg.fedrkg, fedrkg.Config(), presets=fedrkg.PRESETS),
    "gpfedrec": Entry(gpfedrec.gpfedrec, gpfedrec.Config()),
    "gpfedrec_anchors": Entry(gpfedrec.gpfedrec_anchors, gpfedrec.AnchorsConfig()),
    "cofedrec": Entry(cofedrec.cofedrec, cofedrec.Config(), presets=cofedrec.PRESETS),
    "cofedrec_anchors": Entry(cofedrec.cofedrec_anchors, cofedrec.AnchorsConfig(), presets=cofedrec.ANCHORS_PRESETS),
    "mf": Entry(pointwise.mf, pointwise.Config(), central=True),
    "neumf": Entry(pointwise.neumf, pointwise.NeuMFConfig(), central=True),
    "ease": Entry(ease.ease, ease.Config(), central=True, everybody=True),
    "vbpr": Entry(vbpr.vbpr, vbpr.Config(), reads_items=True, central=True),
    "two_tower": Entry(two_tower.two_tower, two_tower.Config(), reads_items=True, central=True),
    "bm3": Entry(bm3.bm3, bm3.Config(), reads_items=True, central=True, everybody=True),
    "mgcn": Entry(mgcn.mgcn, mgcn.Config(), reads_items=True, central=True, everybody=True),
    "pgl": Entry(pgl.pgl, pgl.Config(), reads_items=True, central=True, everybody=True),
    "heater": Entry(heater.heater, heater.Config(), reads_items=True, central=True),
    "gar": Entry(gar.gar, gar.Config(), reads_items=True, central=True),
    "aldi": Entry(aldi.aldi, aldi.Config(), reads_items=True, central=True),
    "cs_diffrec": Entry(diffrec.diffrec, diffrec.Config(), reads_items=True, central=True),
    "plgc": Entry(plgc.plgc, plgc.Config()),
    "feddae": Entry(feddae.feddae, feddae.Config()),
    **{name: Entry(fusion.multimodal, config, reads_items=True) for name, config in fusion.PRESETS.items()},
    "mdifffr": Entry(mdifffr.mdifffr, mdifffr.Config(), reads_items=True, presets=mdifffr.PRESETS),
    "light_mdifffr": Entry(mdifffr.mdifffr, mdifffr.LIGHT["paper"], reads_items=True, presets=mdifffr.LIGHT),
    **{name: Entry(ifedrec.ifedrec, config, reads_items=True) for name, config in ifedrec.PRESETS.items()},
    **{name: Entry(content_cold.content_cold, c, reads_items=True) for name, c in content_cold.PRESETS.items()},
}
ALIASES = {"mdiffr": "mdifffr", "light_mdiffr": "light_mdifffr"}
"""Other spellings."""
METHODS |= {alias: METHODS[name] for alias, name in ALIASES.items()}


def check_name(name: str) -> None:
    """That there is such a method; ValueError lists those that are, each once."""
    if name not in METHODS:
        one_of("method", name, (known for known in METHODS if known not in ALIASES))


def make_config(name: str, settings: Mapping[str, Any]) -> LocalConfig:
    """The method's configuration with `settings` (strings or values) replacing defaults.

    Raises:
        ValueError: for an unknown method or setting (naming the nearest known one) or a value of the wrong type.
    """
    check_name(name)
    entry = METHODS[name]
    default = entry.presets.get(settings.get("preset"), entry.config)
    known = {field.name: getattr(default, field.name) for field in dataclasses.fields(default)}
    for setting in settings:
        if setting not in known:
            raise ValueError(
                f"--set {setting}: {name} has no such setting{nearest(setting, known)}; "
                f"it has {', '.join(sorted(known))}"
            )
    coerced = {k: _coerce(k, v, known[k]) for k, v in settings.items()}
    return dataclasses.replace(default, **coerced)


def build(name: str, num_users: int, num_items: int, catalogue: Catalogue | None = None, **settings: Any) -> Method:
    """A method by name: `build("pfedrec", users, items, lr=0.05)`. Methods that fuse item features need the
    catalogue."""
    return assemble(name, make_config(name, settings), num_users, num_items, catalogue or Catalogue({}))


def assemble(name: str, config: LocalConfig, num_users: int, num_items: int, catalogue: Catalogue) -> Method:
    """A method from its finished configuration."""
    entry = METHODS[name]
    if entry.reads_items:
        return entry.build(config, num_users, num_items, name, catalogue)
    return entry.build(config, num_users, num_items, name=name)


def _coerce(name: str, value: Any, default: Any) -> Any:
    """A value given as text, as the type of the setting's default."""
    if not isinstance(value, str):
        return _checked(name, value, default)
    try:
        if isinstance(default, bool):
            return {"true": True, "1": True, "false": False, "0": False}[value.lower()]
        if isinstance(default, tuple):
            parts = [part.strip(" '\"") for part in value.replace("(", "").replace(")", "").split(",") if part]
            return tuple(map(type(default[0]) if default else str, parts))
        return type(default)(value)
    except (KeyError, ValueError):
        raise _wrong(name, value, default) from None


def _checked(name: str, value: Any, default: Any) -> Any:
    """A value given from Python, as the type of the setting's default."""
    number = isinstance(value, numbers.Real) and not isinstance(value, bool | np.bool_)
    if isinstance(default, bool) and isinstance(value, bool | np.bool_):
        return bool(value)
    if isinstance(default, int) and not isinstance(default, bool) and number and float(value).is_integer():
        return int(value)
    if isinstance(default, float) and number:
        return float(value)
    if isinstance(default, tuple):
        if isinstance(value, list | tuple):
            return tuple(value)
        return (_checked(name, value, default[0]),)
    raise _wrong(name, value, default)


def _wrong(name: str, value: Any, default: Any) -> ValueError:
    expected = {bool: "true or false", int: "an integer", float: "a number", tuple: "values a,b,c"}
    return ValueError(f"--set {name}={value}: expected {expected.get(type(default), 'text')}, like {default}")
