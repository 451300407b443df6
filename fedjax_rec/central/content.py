"""What models that read item features have in common: maps of the features, views that agree, a graph of items."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from fedjax_rec.central.pairwise import PairConfig
from fedjax_rec.item_sources import Catalogue, directions, features_of
from fedjax_rec.item_sources.cold import largest
from fedjax_rec.roles import masked_mean
from fedjax_rec.types import Params, PRNGKey
from fedjax_rec.validate import positive

MASKED = -1e9
"""A logit that counts for nothing; infinity would make gradients that are no numbers."""


@dataclasses.dataclass(frozen=True)
class ContentConfig(PairConfig):
    """Attributes:
    layers: steps over the graph of users and items.
    centre: features less their mean over the items that training may touch.
    train_features: the features themselves are trained too, as the released codes do.
    Others: see PairConfig.
    """

    layers: int = 2
    centre: bool = True
    train_features: bool = False

    def __post_init__(self):
        super().__post_init__()
        positive("layers", self.layers)


class Content(NamedTuple):
    """All modalities' features, and which of them are trained and which frozen (all or none): see ContentConfig."""

    features: dict[str, Float[Array, "items _"]]
    trained: dict[str, Float[Array, "items _"]]
    frozen: dict[str, Float[Array, "items _"]]


def content_of(catalogue: Catalogue, config: ContentConfig, name: str) -> Content:
    """The catalogue's features for a model.

    Raises:
        ValueError: there are none.
    """
    found = features_of(catalogue, f"{name} reads", centre=config.centre)
    features = {modality: jnp.asarray(values) for modality, values in found.items()}
    return Content(features, features, {}) if config.train_features else Content(features, {}, features)


class Neighbours(NamedTuple):
    """A graph of items by its rows: whom each item reads, with which weight."""

    item: Int[Array, "items k"]
    weight: Float[Array, "items k"]


def affine_map(key: PRNGKey, width_in: int, width_out: int) -> Params:
    """A linear layer, Glorot's normal at the start, without bias."""
    kernel = jax.nn.initializers.glorot_normal()(key, (width_in, width_out))
    return {"kernel": kernel, "bias": jnp.zeros(width_out)}


def affine(params: Mapping, x: Float[Array, "*n width"]) -> Float[Array, "*n out"]:
    return x @ params["kernel"] + params["bias"]


def unit(x: Float[Array, "*n width"]) -> Float[Array, "*n width"]:
    """Each vector divided by its length; one of zeros stays so, and has no gradient."""
    square = (x**2).sum(-1, keepdims=True)
    some = square > 1e-12
    return jnp.where(some, x * jax.lax.rsqrt(jnp.where(some, square, 1.0)), 0.0)


def dropped(key: PRNGKey, x: Float[Array, "*n"], rate: float) -> Float[Array, "*n"]:
    """Entries set to 0 with probability `rate`, the others scaled up by what is lost."""
    return jnp.where(jax.random.bernoulli(key, 1.0 - rate, x.shape), x / (1.0 - rate), 0.0)


def info_nce(
    one: Float[Array, "batch width"],
    other: Float[Array, "batch width"],
    mask: Float[Array, "batch"],
    temperature: float,
) -> Float[Array, ""]:
    """Mean over the batch of -log softmax_c(cos(one_b, other_c) / temperature) at c = b, van den Oord et al. 2018."""
    one, other = unit(one), unit(other)
    logits = jnp.where(mask > 0, one @ other.T / temperature, MASKED)
    own = (one * other).sum(-1) / temperature
    return masked_mean(jax.nn.logsumexp(logits, axis=1) - own, mask)


def knn_graph(
    features: Float[Array, "items _"], k: int, warm: Bool[np.ndarray, "items"] | None, *, weighted: bool
) -> Neighbours:
    """The k items nearest to each by the cosine of their features, itself the first of them, as D^-1/2 S D^-1/2.

    S_ij is the cosine (without `weighted` 1) where it is positive, S_ii = 1, D the sums of the rows. Of items that
    training may not touch, each is read by itself alone: they have nothing that was learned to pass on.
    """
    pointing = directions(np.asarray(features))
    items = len(pointing)
    closed = np.zeros(items, bool) if warm is None else ~np.asarray(warm)
    k = min(k, items - int(closed.sum()))
    nearest, edge = np.zeros((items, k), np.int32), np.zeros((items, k), np.float32)
    for start in range(0, items, 512):  # a block of similarities at a time
        block = np.arange(start, min(start + 512, items))
        similar = np.where(closed, -np.inf, pointing[block] @ pointing.T)
        similar[np.arange(len(block)), block] = np.inf
        nearest[block] = largest(similar, k)
        cosine = np.clip(np.take_along_axis(similar, nearest[block], 1), 0.0, 1.0)
        edge[block] = cosine if weighted else cosine > 0
    root = np.sqrt(edge.sum(1))
    return Neighbours(jnp.asarray(nearest), jnp.asarray(edge / (root[:, None] * root[nearest])))


def read(graph: Neighbours, table: Float[Array, "items width"]) -> Float[Array, "items width"]:
    """One step over a graph of items."""
    return jnp.einsum("ik,ikw->iw", graph.weight, table[graph.item])
