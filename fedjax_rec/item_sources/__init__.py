"""Item sources: where item vectors come from when they are more than a table that clients train."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from fedjax_rec.data.features import Features


class Catalogue(NamedTuple):
    """What the server knows of the items besides interactions.

    Attributes:
        features: modality -> [items, feat].
        warm: bool [items], items that training may touch; None where all are.
        present: modality -> bool [items], items whose row is their own and not the mean of the others; one that is not
            named has all.
    """

    features: Mapping[str, Float[np.ndarray, "items _"]]
    warm: Bool[np.ndarray, "items"] | None = None
    present: Mapping[str, Bool[np.ndarray, "items"]] = MappingProxyType({})


def catalogue_of(features: Mapping[str, Features], warm: Bool[np.ndarray, "items"] | None) -> Catalogue:
    """The catalogue of a data set's features."""
    values = {name: feature.values for name, feature in features.items()}
    return Catalogue(values, warm, {name: feature.present for name, feature in features.items()})


def features_of(catalogue: Catalogue, who: str, *, centre: bool) -> dict[str, Float[np.ndarray, "items _"]]:
    """Every modality's features, float32; with `centre` less their mean over the items that training may touch. Rows
    that are not present are that mean then, exactly: what is left of another mean would be a direction of their own.

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
    found = {}
    for name in sorted(catalogue.features):
        values = found[name] = np.asarray(catalogue.features[name], np.float32)
        if centre:
            present, known = own_rows(catalogue, name)
            found[name] = np.where(present[:, None], values - values[known].mean(0), np.float32(0.0))
    return found


def own_rows(catalogue: Catalogue, modality: str) -> tuple[Bool[np.ndarray, "items"], Bool[np.ndarray, "items"]]:
    """The items that have features of their own, and those of them that training may touch (or all, if it may touch
    none of them)."""
    items = len(catalogue.features[modality])
    present = np.asarray(catalogue.present.get(modality, np.ones(items, bool)), bool)
    known = present if catalogue.warm is None else present & np.asarray(catalogue.warm, bool)
    return present, known if known.any() else present


def directions(rows: Float[np.ndarray, "items feat"]) -> Float[np.ndarray, "items feat"]:
    """Each row scaled to length 1; one that is rounding about 0 beside the others has no direction and is 0."""
    length = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.where(length > 1e-6 * length.max(), rows / np.maximum(length, 1e-30), 0.0).astype(np.float32)
