"""One-line validators: each raises a ValueError that says what was given, what is expected, what to do; and how a
command says it."""

from __future__ import annotations

import difflib
import numbers
import sys
from collections.abc import Callable, Iterable, Sequence


def in_one_line(program: str, body: Callable[[], str | None]) -> int:
    """A command's exit code: 0, with what `body` returns printed; 2 for bad usage and input, one line on standard
    error."""
    try:
        said = body()
    except (OSError, ValueError) as error:
        print(f"{program}: {error}", file=sys.stderr)
        return 2
    if said is not None:
        print(said)
    return 0


def positive(name: str, value: int | float, *, zero_allowed: bool = False) -> None:
    if not (value > 0 or (zero_allowed and value == 0)):
        raise ValueError(f"{name}={value}: expected a number {'>= 0' if zero_allowed else '> 0'}")


def whole_number(name: str, value: int) -> None:
    if not isinstance(value, numbers.Integral) or value < 1:
        raise ValueError(f"{name}={value!r}: expected a whole number > 0")


def widths(name: str, values: Sequence[int]) -> None:
    """Layers of a network: at least one, none empty."""
    if not values or min(values) < 1:
        raise ValueError(f"{name}={values}: expected one width or more, each > 0, like 32,16")


def between(name: str, value: int | float, low: int | float, high: int | float) -> None:
    if not low <= value <= high:
        raise ValueError(f"{name}={value}: expected a number in [{low}, {high}]")


def one_of(name: str, value: str, allowed: Iterable[str]) -> None:
    allowed = tuple(allowed)
    if value not in allowed:
        raise ValueError(f"{name}={value!r}: expected one of {', '.join(allowed)}{nearest(value, allowed)}")


def nearest(value: str, allowed: Iterable[str]) -> str:
    """' (did you mean X?)' or nothing."""
    close = difflib.get_close_matches(str(value), list(allowed), n=1, cutoff=0.4)
    return f" (did you mean {close[0]}?)" if close else ""
