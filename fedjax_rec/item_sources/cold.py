"""Rows for items that nobody has touched, made by the server from features: a modifier of a method.

    E_i              warm items: as the clients' training and the server's mean make it
    E_i = make(m_i)  cold items: made by the server from features m_i, in what it publishes

Candidates of a cold-item split are scored by the clients' own parts with these rows. The rows of cold items in the
server's table are never read.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from fedjax_rec.item_sources import Catalogue, directions, features_of, own_rows
from fedjax_rec.method import Method, Server
from fedjax_rec.types import PRNGKey, PyTree

ID = "item"
WARM_PER_COMPONENT = 8
RANK = 1e-6
"""Components of less than this share of the largest one's variance are rounding, or directions no warm item has."""


class RowMaker(NamedTuple):
    """How the server makes rows.

    Attributes:
        init: (key) -> state, kept in Server.private.
        learn: (key, state, warm rows, 0-based round) -> state, after each round's aggregation.
        make: (key, state, warm rows) -> rows of the cold items, in the items' order.
    """

    init: Callable[[PRNGKey], PyTree]
    learn: Callable[..., PyTree]
    make: Callable[..., Float[Array, "cold width"]]


def with_cold_rows(method: Method, maker: RowMaker, catalogue: Catalogue) -> Method:
    """`method` (whose shared table has the role `item`) with the rows of cold items made by the server."""
    warm, cold = (jnp.asarray(index) for index in warm_and_cold(catalogue))

    def init_server(key) -> Server:
        k_method, k_maker = jax.random.split(key)
        inner = method.init_server(k_method)
        held = {"method": inner.private, "maker": maker.init(k_maker), "round": jnp.zeros((), jnp.int32)}
        return Server(shared=inner.shared, private=held)

    def publish(key, server):
        shared = method.publish(key, Server(server.shared, server.private["method"]))
        made = maker.make(jax.random.fold_in(key, 1), server.private["maker"], shared[ID][warm])
        return {**shared, ID: shared[ID].at[cold].set(made)}

    def server_update(key, server, received):
        inner, mail = method.server_update(key, Server(server.shared, server.private["method"]), received)
        round_ = server.private["round"]
        learned = maker.learn(jax.random.fold_in(key, 1), server.private["maker"], inner.shared[ID][warm], round_)
        return Server(inner.shared, {"method": inner.private, "maker": learned, "round": round_ + 1}), mail

    return method._replace(init_server=init_server, publish=publish, server_update=server_update)


def warm_and_cold(catalogue: Catalogue) -> tuple[np.ndarray, np.ndarray]:
    """Ids of the items that training may touch, and of the others."""
    items = len(next(iter(catalogue.features.values())))
    warm = np.ones(items, bool) if catalogue.warm is None else catalogue.warm
    return np.flatnonzero(warm).astype(np.int32), np.flatnonzero(~warm).astype(np.int32)


def some_cold(catalogue: Catalogue, name: str, backbone: str) -> tuple[np.ndarray, np.ndarray]:
    """`warm_and_cold` for a method that is its backbone and nothing more without cold items.

    Raises:
        ValueError: without any.
    """
    warm, cold = warm_and_cold(catalogue)
    if not len(cold):
        raise ValueError(
            f"{name} makes vectors of cold items, and this split has none: set --split=cold_items, or choose "
            f"--method={backbone}"
        )
    return warm, cold


def side_by_side(catalogue: Catalogue, name: str) -> Float[np.ndarray, "items feat"]:
    """All modalities, each row of each modality scaled to length 1; one that is not present is the mean of those that
    are and that training may touch.

    Raises:
        ValueError: without any features.
    """
    parts = []
    for modality, values in features_of(catalogue, f"{name} makes rows from", centre=False).items():
        unit = directions(values)
        present, known = own_rows(catalogue, modality)
        parts.append(np.where(present[:, None], unit, _mean(unit[known])))
    return np.concatenate(parts, axis=1)


def _mean(rows: Float[np.ndarray, "rows feat"]) -> Float[np.ndarray, "feat"]:
    """The mean row to float32's last digit, so that taking it from a row that is the mean leaves rounding alone."""
    return rows.mean(0, dtype=np.float64).astype(np.float32)


def conditions(catalogue: Catalogue, name: str, width: int, *, whiten: bool = False) -> Float[np.ndarray, "items feat"]:
    """Features as a network reads them: centred, cut to `width` principal components (0: all features), of size 1.

    Mean, components and scale are those of the warm items alone.

    Args:
        width: number of components.
        whiten: every component has variance 1 (entries are cut at +-5); else the entries have so on average. There
            are then at most warm items / WARM_PER_COMPONENT components.
    """
    warm, _ = warm_and_cold(catalogue) if catalogue.features else ((), ())
    values = side_by_side(catalogue, name)
    values = values - _mean(values[warm])
    if width or whiten:
        size, axes = np.linalg.eigh(values[warm].T @ values[warm] / len(warm))
        width = width or len(size)
        if whiten:
            # The variance that few items have in a small component is far below that of other items, and divided by it
            # these are noise or saturate. Large catalogues (citeulike-a: 13,584 for 300) keep all they ask for.
            width = max(min(width, len(warm) // WARM_PER_COMPONENT, int((size > RANK * size.max()).sum())), 1)
        kept = np.argsort(-size)[:width]
        # the sign of an axis is the library's choice: fix it
        axes = axes[:, kept] * np.sign(axes[np.abs(axes[:, kept]).argmax(0), kept])
        values = values @ axes
    if whiten:
        return np.clip(values / np.maximum(values[warm].std(0), 1e-6), -5.0, 5.0).astype(np.float32)
    return (values / max(values[warm].std(), 1e-12)).astype(np.float32)


def largest(values: Float[np.ndarray, "rows n"], k: int) -> np.ndarray:
    """Places [rows, k] of the k largest of each row, the largest first; of equal ones those that come first, on every
    machine."""
    least = -np.partition(-values, k - 1, axis=1)[:, k - 1]
    found = [np.flatnonzero(row >= low) for row, low in zip(values, least, strict=True)]
    return np.stack([ids[np.argsort(-row[ids], kind="stable")[:k]] for ids, row in zip(found, values, strict=True)])


def nearest_warm(
    content: Float[np.ndarray, "items feat"], warm: np.ndarray, of: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray]:
    """(places among the warm items [of, k], weights [of, k]): the k warm items nearest to each of the items `of` by the
    cosine of their features, nearest first, itself left out, with weights proportional to it (equal where no cosine is
    positive, as for an item of which nothing is known)."""
    unit = directions(content)
    k = min(k, len(warm) - int(np.isin(of, warm).any()))
    places, weights = np.zeros((len(of), k), np.int32), np.zeros((len(of), k), np.float32)
    of_warm = unit[warm].T
    for start in range(0, len(of), 512):  # a block of similarities at a time
        block = of[start : start + 512]
        similar = np.where(block[:, None] == warm, -np.inf, unit[block] @ of_warm)
        best = largest(similar, k)
        value = np.maximum(np.take_along_axis(similar, best, 1), 0.0) + 1e-9
        places[start : start + 512], weights[start : start + 512] = best, value / value.sum(1, keepdims=True)
    return places, weights


def neighbour_means(
    content: Float[np.ndarray, "items feat"], warm: np.ndarray, of: np.ndarray, *ks: int
) -> Callable[[Float[Array, "warm width"]], Float[Array, "of means_width"]]:
    """A function of the warm rows: for each of `ks` the weighted mean row of the k warm items nearest to each of the
    items `of`, side by side."""
    places, similar = nearest_warm(content, warm, of, max(ks))
    first = np.arange(places.shape[1]) < np.asarray(ks)[:, None]
    weights = similar[:, None] * first
    weights = jnp.asarray(weights / weights.sum(-1, keepdims=True), jnp.float32)
    places = jnp.asarray(places)

    def means(rows):
        # in blocks: the rows of all neighbours at once would be k times the catalogue
        of_one = lambda told: (told[1] @ rows[told[0]]).reshape(-1)
        return jax.lax.map(of_one, (places, weights), batch_size=1024)

    return means


def ridge_map(content: Float[np.ndarray, "items feat"], warm: np.ndarray, l2: float) -> Float[np.ndarray, "feat warm"]:
    """P such that P @ (warm rows) is the ridge regression of rows on features, l2 relative to the features' mean
    energy."""
    x = content[warm].astype(np.float64)
    gram = x.T @ x
    ridge = l2 * np.trace(gram) / len(gram)
    return np.linalg.solve(gram + ridge * np.eye(len(gram)), x.T).astype(np.float32)
