"""Client models: how item vectors become scores. They know nothing of federation."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from jaxtyping import Array, Float

from fedjax_rec.types import Params, PRNGKey


class Backbone(NamedTuple):
    """A client model.

    Attributes:
        init: key -> parameters keyed by role, without the item vectors.
        predict: (parameters, item vectors [n, width]) -> logits [n].
        width: of the item vectors it reads.
        private: the roles that belong to one user.
    """

    init: Callable[[PRNGKey], Params]
    predict: Callable[[Params, Float[Array, "n width"]], Float[Array, "n"]]
    width: int
    private: tuple[str, ...]
