"""The README's Python examples run as written."""

from __future__ import annotations

import re
from pathlib import Path

import jax
import pytest

from fedjax_rec import methods, metrics, reference, rounds, run
from fedjax_rec.data import clients, splits, synthetic

README = Path(__file__).resolve().parents[1] / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)


@pytest.fixture(autouse=True)
def compiled_to_run():
    """With XLA's optimisations, which are worth their time where so many rounds are trained (30 s for 50)."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture
def entered():
    """What an example enters among the methods, metrics and rankers is taken out again."""
    registries = methods.METHODS, metrics.METRICS, reference.RANKERS
    before = [dict(registry) for registry in registries]
    yield
    for registry, held in zip(registries, before, strict=True):
        registry.clear()
        registry.update(held)


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.strip().splitlines()[0])
def test_example_runs(block, capsys, entered):
    namespace: dict = {}
    exec(compile(block, "README.md", "exec"), namespace)
    printed = [float(word) for word in capsys.readouterr().out.split() if re.fullmatch(r"[\d.]+", word)]
    assert all(0 < value < 1 for value in printed)
    assert printed or {"my_method", "engine", "rare_first"} & namespace.keys()


def test_the_new_method_of_the_readme_trains(entered):
    """The example method is a whole method: it beats popularity on the embedded data set."""
    namespace: dict = {}
    exec(next(block for block in BLOCKS if "def my_method" in block), namespace)
    split = splits.leave_one_out(synthetic.make().interactions)
    method = methods.build("my_method", split.num_users, split.num_items)
    engine = rounds.make_engine(method, clients.build(split, max_buckets=1))
    from fedjax_rec import evaluate

    evaluator = evaluate.make_evaluator(engine, split)
    key = run.jax.random.key(0)
    state = engine.init(key)
    for t in range(40):
        state, _ = engine.round(key, state, t)
    found = metrics.summarise(evaluator.ranks(key, state, 40).test, (10,))["HR@10"]
    by_count = reference.same_for_all(evaluator, reference.popularity_of(evaluator.split))
    popular = metrics.summarise(by_count.test, (10,))["HR@10"]
    assert found > popular


def test_the_new_method_of_the_readme_obeys_its_settings(entered, monkeypatch):
    """`optimizer` too, which it must hand on."""
    from fedjax_rec import roles

    asked, real = [], roles.local_sgd

    def local_sgd(loss, rates, **options):
        asked.append((rates, options))
        return real(loss, rates, **options)

    monkeypatch.setattr(roles, "local_sgd", local_sgd)
    exec(next(block for block in BLOCKS if "def my_method" in block), {})
    methods.build("my_method", 6, 5, optimizer="adam", lr=0.25)
    ((rates, options),) = asked
    assert options["optimizer"] == "adam" and rates["user"] == 0.25


def test_the_metric_and_the_ranker_of_the_readme_stand_with_the_others(entered):
    exec(next(block for block in BLOCKS if "rare_first" in block), {})
    reference.RANKERS["nothing"] = lambda evaluator, cohort: None
    config = run.RunConfig(rounds=2, eval_every=1, select_metric="RR@50", settings={"dim": 4}, devices=1)
    summary = run.train(config)
    said = summary["reference_rankers"]
    assert "nothing" not in said
    rare, chance, popular = (said[name]["test_seen"]["MRR"] for name in ("rare_first", "random", "popularity"))
    assert rare < chance < popular
    assert 0 < summary["valid"]["RR@50"] <= summary["valid"]["HR@50"]
    assert summary["valid"]["RR@50"] <= summary["valid"]["MRR"]
