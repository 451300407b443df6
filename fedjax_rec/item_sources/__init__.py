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


def features_of(catalogue: Catalogue, who: str, *, centre: bool) -> dict[str, Float[np.ndarray, "items _"]]:
    """Every modality's features, float32; with `centre` less their mean over the items that training may touch.

    Raises:
        ValueError: there are none.
    """
    need_features(catalogue, who)
    warm = slice(None) if catalogue.warm is None else catalogue.warm
    found = {name: np.asarray(catalogue.features[name], np.float32) for name in sorted(catalogue.features)}
    return {name: values - values[warm].mean(0) if centre else values for name, values in found.items()}
