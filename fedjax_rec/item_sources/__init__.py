"""Item sources: where item vectors come from when they are more than a table that clients train."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float


class Catalogue(NamedTuple):
    """What the server knows of the items besides interactions.

    Attributes:
        features: modality -> [items, feat].
        warm: bool [items], items that training may touch; None where all are.
    """

    features: Mapping[str, Float[np.ndarray, "items _"]]
    warm: Bool[np.ndarray, "items"] | None = None


def need_features(catalogue: Catalogue, who: str) -> None:
    """That there are features.

    Args:
        who: the method and what it does with them, for the message.

    Raises:
        ValueError: there are none.
    """
    if not catalogue.features:
        raise ValueError(
            f"{who} item features and the data set has none: give some as --features=image=FILE.npz (README, Item "
            "features), or choose another --dataset or an ID-based --method"
        )
