"""What --mode=benchmark measures."""

from __future__ import annotations

import time

import numpy as np

from fedjax_rec import benchmark, run
from fedjax_rec.data import splits, synthetic
from fedjax_rec.run import RunConfig


def ready(**changes):
    made = synthetic.make(40, 60, min_history=5, median_history=8, max_history=20)
    data = made.interactions, splits.leave_one_out(made.interactions), made.features
    return run.prepare(RunConfig(settings={"dim": 4}, devices=1, max_buckets=1, **changes), data)


def test_the_plain_loop_goes_over_the_cohort_alone(monkeypatch):
    """As many clients train as take part in the round it is compared with."""
    trained, round_ = [], benchmark._numpy_round

    def counted(rng, table, heads, *rest):
        before = heads.copy()
        round_(rng, table, heads, *rest)
        trained.append(np.flatnonzero((heads != before).any(1)))

    monkeypatch.setattr(benchmark, "_numpy_round", counted)
    monkeypatch.setattr(benchmark, "COPY_BYTES", 2**12)
    for share, count in ((0.1, 4), (0, 40)):
        one = ready(clients_per_round=share)
        data = one.interactions, one.split, one.features
        trained.clear()
        assert benchmark.run(one.config, rounds=1, data=data)["numpy_loop_round_s"] > 0
        assert all(len(users) == count for users in trained)
        if share:
            assert np.array_equal(trained[0], one.cohort_users(1))


def test_phases_are_timed_after_a_pass_that_compiles(monkeypatch):
    one, publish, passes = ready(), benchmark.publish, []

    def slow_at_first(*arguments):
        passes.append(arguments[-1])
        time.sleep(2.0 if len(passes) == 1 else 0)
        return publish(*arguments)

    monkeypatch.setattr(benchmark, "publish", slow_at_first)
    phases, _ = benchmark._phases(one, one.engine.init(one.key), 1)
    assert len(passes) == 2 and phases["publish"] < 1.0


def test_an_exchange_is_timed_apart_from_the_rounds(monkeypatch):
    """Rounds 1 to 4 of an interval of 2 hold two guidance rounds; a method without any says so."""
    monkeypatch.setattr(benchmark, "COPY_BYTES", 2**12)
    made = synthetic.make(40, 60, min_history=5, median_history=8, max_history=20)
    data = made.interactions, splits.leave_one_out(made.interactions), made.features
    settings = {"dim": 4, "interval": 2}
    config = RunConfig(method="fedrkg", settings=settings, devices=1, max_buckets=1)
    result = benchmark.run(config, rounds=4, data=data)
    assert result["exchange_s"]["median"] > 0 and result["exchange_s"]["rounds_due"] == 2
    assert "in 2 of the timed rounds" in benchmark.table(result)
    assert benchmark._exchange(ready(), None, 1) == (None, None)
