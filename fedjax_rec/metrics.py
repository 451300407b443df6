"""Metrics as functions of the ranks of held-out items. Host side, NumPy.

A rank is 1 + (candidates scored higher) + (ties) / 2, the mean over all orders of the ties. A hit at k is rank <= k,
so a constant score earns the rank that chance has in the mean, and no hits in the upper half of the list.
Ranks come as [users, targets], NaN where a user has fewer targets.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from scipy.special import stdtrit

WORST_SHARE = 0.1
NDCGS = ("correct", "released")


def _discounts(k: int) -> np.ndarray:
    return 1.0 / np.log2(np.arange(2, k + 2))


def _ideal(targets: np.ndarray, k: int) -> np.ndarray:
    """The largest DCG@k with so many targets."""
    return np.cumsum(_discounts(k))[np.clip(targets, 1, k) - 1]


def _ndcg(hits: np.ndarray, targets: np.ndarray, k: int) -> np.ndarray:
    return np.where(hits <= k, 1.0 / np.log2(np.minimum(hits, k) + 1.0), 0.0).sum(1) / _ideal(targets, k)


METRICS: dict[str, Callable[[np.ndarray, np.ndarray, int], np.ndarray]] = {
    "HR": lambda hits, targets, k: (hits <= k).any(1).astype(float),
    "Recall": lambda hits, targets, k: (hits <= k).sum(1) / np.maximum(targets, 1),
    "Precision": lambda hits, targets, k: (hits <= k).sum(1) / k,
    "NDCG": _ndcg,
}
"""Metrics at a cut-off: name -> function of (ranks of the k best targets [users, <= k], ascending, inf where there are
fewer; number of targets [users]; k) to values [users]. One that is added here is recorded with the others and
may select rounds."""


def per_client(
    ranks: np.ndarray, ks: tuple[int, ...], ndcg: str = "correct", candidates: int | None = None
) -> dict[str, np.ndarray]:
    """Every metric for every client, [users]; NaN for a client without targets.

    HR@k: any hit. Recall@k: hits / targets. Precision@k: hits / k. NDCG@k: sum of 1 / log2(rank + 1) over hits,
    over its largest possible value. MRR: 1 / best rank. Those of METRICS besides. Where only so many `candidates`
    compete, a list is no longer than that: k is the smaller of both.

    `ndcg="released"` adds NDCG_released@k, what the evaluators released with IFedRec and MDiffFR call NDCG: they take
    the k items in the order of their ids, not of their ranks. Ids are shuffled here, so this is its mean over all
    orders. It falls with k even for a perfect ranking, and serves to compare with those papers alone.
    """
    known = ~np.isnan(ranks)
    targets = known.sum(1)
    nan_where_empty = lambda x: np.where(targets > 0, x, np.nan)
    ascending = np.sort(np.where(known, ranks, np.inf), axis=1)
    values = {}
    for k in ks:
        length = min(k, candidates or k)
        best = ascending[:, :length]  # tied targets can share a rank <= k, but a list holds only k of them
        for name, metric in METRICS.items():
            values[f"{name}@{k}"] = nan_where_empty(metric(best, targets, length))
        if ndcg == "released":
            hits = (best <= length).sum(1)
            values[f"NDCG_released@{k}"] = nan_where_empty(hits * _discounts(length).mean() / _ideal(targets, length))
    values["MRR"] = nan_where_empty(1.0 / ascending.min(1, initial=np.inf))
    return values


def read(values: Mapping[str, Any], name: str) -> Any:
    """A metric by name; names joined by `+` (`Recall@20+Recall@50`) give the sum."""
    return sum(values[part] for part in name.split("+"))


def summarise(
    ranks: np.ndarray, ks: tuple[int, ...], ndcg: str = "correct", candidates: int | None = None
) -> dict[str, float]:
    """Means of per_client over the clients with targets, with their number under `clients`."""
    values = per_client(ranks, ks, ndcg, candidates)
    counted = ~np.isnan(values["MRR"])
    count = int(counted.sum())
    means = {name: float(v[counted].sum() / count) if count else float("nan") for name, v in values.items()}
    return {**means, "clients": count}


def worst_decile(ranks: np.ndarray) -> float:
    """Mean MRR of the tenth of the clients that is served worst."""
    values = per_client(ranks, ())["MRR"]
    values = np.sort(values[~np.isnan(values)])
    if not len(values):
        return float("nan")
    return float(values[: max(int(np.ceil(len(values) * WORST_SHARE)), 1)].mean())


def beyond_accuracy(recommended: np.ndarray, popularity: np.ndarray, k: int) -> dict[str, float]:
    """What the top-k lists look like as a whole.

    Args:
        recommended: [items] how many clients got the item in their top k.
        popularity: [items] training interactions.

    Returns:
        Coverage@k: share of the catalogue that anybody was recommended. PopularityBias@k: mean popularity of a
        recommended item over mean popularity of a training interaction (1: as popular as what people take).
    """
    lists, taken = recommended.sum(), popularity.sum()
    mean_recommended = (recommended * popularity).sum() / max(lists, 1)
    mean_taken = (popularity.astype(float) ** 2).sum() / max(taken, 1)
    return {
        f"Coverage@{k}": float((recommended > 0).mean()),
        f"PopularityBias@{k}": float(mean_recommended / max(mean_taken, 1e-12)),
    }


def paired_difference(a: np.ndarray, b: np.ndarray) -> tuple[float, float, float]:
    """Mean of a - b with its 95 % interval (low, high), for other clients and other seeds.

    The variance is that of the mean over clients, paired, plus what seeds add to it: a two-way analysis of variance of
    clients and seeds, both random (of the differences where both sides have the same number of seeds, else of each
    side). Quantiles are Student's at Satterthwaite's degrees of freedom. Of one seed the spread over seeds is not
    known, and the interval is about clients alone.

    Args:
        a, b: one metric by client, [users] or [seeds, users]; clients with NaN in either are left out.
    """
    a, b = np.atleast_2d(a), np.atleast_2d(b)
    known = np.isfinite(a).all(0) & np.isfinite(b).all(0)
    clients = int(known.sum())
    if clients < 2:
        return float("nan"), float("nan"), float("nan")
    a, b = (x[:, known].astype(np.float64) for x in (a, b))
    difference = a.mean(0) - b.mean(0)
    of_clients = difference.var(ddof=1) / clients
    parts = [(of_clients, of_clients**2 / (clients - 1))]
    parts += [_seeds_add(x) for x in ([a - b] if len(a) == len(b) else [a, b]) if len(x) > 1]
    variance, uncertain = (sum(column) for column in zip(*parts, strict=True))
    mean = float(difference.mean())
    if not variance:
        return mean, mean, mean
    half = float(stdtrit(variance**2 / uncertain, 0.975) * np.sqrt(variance))
    return mean, mean - half, mean + half


def _seeds_add(values: np.ndarray) -> tuple[float, float]:
    """Variance of the mean of [seeds, clients] that is the seeds' own: what their means vary by beyond the noise of
    single clients and seeds, which the variance over clients has already. And half the variance of this estimate,
    a difference of two mean squares."""
    seeds, clients = values.shape
    means = values.mean(1, keepdims=True)
    rest = values - means - values.mean(0) + values.mean()
    between = float(means.var(ddof=1)) / seeds
    noise = float((rest**2).sum()) / ((seeds - 1) * (clients - 1)) / (seeds * clients)
    return max(between - noise, 0.0), between**2 / (seeds - 1) + noise**2 / ((seeds - 1) * (clients - 1))
