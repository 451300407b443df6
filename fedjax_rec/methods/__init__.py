"""All methods by name, and how to build one from settings."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from fedjax_rec.method import Method
from fedjax_rec.methods import fedmf, fedncf, fedrap, pfedrec
from fedjax_rec.sharing import LocalConfig
from fedjax_rec.validate import nearest, one_of


class Entry(NamedTuple):
    """build: (config, num_users, num_items, name) -> Method; config: its settings with their defaults."""

    build: Callable[..., Method]
    config: LocalConfig


METHODS: dict[str, Entry] = {
    "fedavg": Entry(fedmf.fedmf, fedmf.PRESETS["fedavg"]),
    "fcf": Entry(fedmf.fedmf, fedmf.PRESETS["fcf"]),
    "fedmf": Entry(fedmf.fedmf, fedmf.PRESETS["fedmf"]),
    "fedncf": Entry(fedncf.fedncf, fedncf.Config()),
    "pfedrec": Entry(pfedrec.pfedrec, pfedrec.Config()),
    "fedrap": Entry(fedrap.fedrap, fedrap.Config()),
}


def make_config(name: str, settings: Mapping[str, Any]) -> LocalConfig:
    """The method's configuration with `settings` (strings or values) replacing defaults.

    Raises:
        ValueError: for an unknown method or setting (naming the nearest known one) or a value of the wrong type.
    """
    one_of("method", name, METHODS)
    default = METHODS[name].config
    known = {field.name: getattr(default, field.name) for field in dataclasses.fields(default)}
    for setting in settings:
        if setting not in known:
            raise ValueError(
                f"--set {setting}: {name} has no such setting{nearest(setting, known)}; "
                f"it has {', '.join(sorted(known))}"
            )
    coerced = {k: _coerce(k, v, known[k]) for k, v in settings.items()}
    return dataclasses.replace(default, **coerced)


def build(name: str, num_users: int, num_items: int, **settings: Any) -> Method:
    """A method by name: `build("pfedrec", users, items, lr=0.05)`."""
    return METHODS[name].build(make_config(name, settings), num_users, num_items, name=name)


def _coerce(name: str, value: Any, default: Any) -> Any:
    """A value given as text, as the type of the setting's default."""
    if not isinstance(value, str):
        return type(default)(value) if isinstance(default, float | tuple) else value
    try:
        if isinstance(default, bool):
            return {"true": True, "1": True, "false": False, "0": False}[value.lower()]
        if isinstance(default, tuple):
            return tuple(int(part) for part in value.replace("(", "").replace(")", "").split(",") if part)
        return type(default)(value)
    except (KeyError, ValueError):
        expected = {bool: "true or false", int: "an integer", float: "a number", tuple: "integers a,b,c"}
        raise ValueError(
            f"--set {name}={value}: expected {expected.get(type(default), 'text')}, like {default}"
        ) from None
