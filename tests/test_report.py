"""The result table: what stands in it."""

from __future__ import annotations

import numpy as np
import pytest

from fedjax_rec import metrics, report

ONE = np.array([[3.0], [12.0], [40.0], [np.nan]])
TWO = np.array([[3.0, 30.0], [12.0, 15.0], [40.0, np.nan], [np.nan, np.nan]])


def summary(ranks=ONE, **changes) -> dict:
    parts = dict.fromkeys(("test", "test_seen", "test_unseen"), metrics.summarise(ranks, (10, 20)))
    told = {"method": "fedmf", "dataset": "tiny", "split": "leave_one_out", "protocol": "honest", "ranking": "full"}
    more = {"seed": 0, "best_round": 2, "leaks": [], "reference_rankers": {"popularity": parts}}
    return {**told, **more, **parts, "select_metric": "NDCG@10", **changes}


def head(said: dict) -> list[str]:
    return report.table(said).splitlines()[2].split()


def test_hits_and_ndcg_are_shown():
    shown = ["HR@10", "NDCG@10", "HR@20", "NDCG@20", "seen", "HR@10", "unseen", "HR@10"]
    assert head(summary()) == shown
    recorded_earlier = summary()
    del recorded_earlier["select_metric"]
    assert head(recorded_earlier) == shown
    assert "MRR 0.1" in report.table(summary())
    assert head(summary(ranks=np.full((2, 1), np.nan))) == shown  # nobody has a target


@pytest.mark.parametrize(
    ("select_metric", "added"),
    [
        ("MRR", ["MRR"]),
        ("Recall@20+Precision@10", ["Precision@10", "Recall@20"]),
        ("HR@10+NDCG@20", []),
        ("RR@20", ["RR@20"]),
    ],
)
def test_what_the_round_was_selected_by_is_shown_of_every_ranker(select_metric, added, monkeypatch):
    monkeypatch.setitem(metrics.METRICS, "RR", lambda ranks, targets, k: (ranks[:, 0] <= k) / ranks[:, 0])
    said = summary(select_metric=select_metric)
    columns = head(said)
    assert [name for name in columns if name in added] == added
    assert len(columns) == 8 + len(added) and columns[-1] == "HR@10"
    table = report.table(said)
    values = [f"{said['test'][name]:.4f}" for name in added]
    assert all(value in line for line in table.splitlines()[4:6] for value in values)
    assert ("MRR 0.1" in table) == (select_metric != "MRR")


def test_recall_is_shown_where_users_have_several_targets():
    assert head(summary(split="given"))[:2] == ["HR@10", "NDCG@10"]
    assert head(summary(TWO, split="given"))[:3] == ["HR@10", "Recall@10", "NDCG@10"]
    cold = head(summary(TWO, split="cold_items", select_metric="HR@10"))
    assert cold[:3] == ["HR@10", "Recall@10", "NDCG@10"] and cold[-1] == "Recall@10"
