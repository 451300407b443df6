"""Settings given to a method: their types, and what has no effect."""

from __future__ import annotations

import numpy as np
import pytest

from fedjax_rec import aggregate, methods
from fedjax_rec.sharing import LocalConfig, sharing_method


def test_settings_without_effect_are_refused():
    with pytest.raises(ValueError, match=r"lr=0.5: has no effect on ease; leave it out"):
        methods.make_config("ease", {"lr": 0.5})
    with pytest.raises(ValueError, match=r"evaluate_at='post_local': expected one of post_aggregate"):
        methods.make_config("ipfedrec", {"evaluate_at": "post_local"})
    with pytest.raises(ValueError, match=r"server_lr=2.0: has no effect on centralised training"):
        methods.make_config("neumf", {"server_lr": 2.0})


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("plgc", {"backbone": "pfedrec", "user_init_std": 0.1}),
        ("fedrkg", {"backbone": "fedmf", "layers": (8, 4)}),
        ("mdifffr", {"backbone": "pfedrec", "branches": "mlp"}),
        ("mdifffr", {"backbone": "fedmf", "sparsity": 0.1}),
        ("mdifffr", {"backbone": "fedavg", "weighting": "by_row"}),
        ("fedvlr", {"backbone": "fcf", "independence": 0.1}),
        ("fedvlr", {"backbone": "fedrap", "network_lr_scale": 2.0}),
        ("fedvlr", {"backbone": "pfedrec", "user_init_std": 0.1}),
    ],
    ids=str,
)
def test_settings_of_another_backbone_are_refused(method, settings):
    name = next(name for name in settings if name != "backbone")
    with pytest.raises(ValueError, match=rf"{name}=.*: has no effect on backbone={settings['backbone']}"):
        methods.make_config(method, settings)


@pytest.mark.parametrize(
    ("method", "setting", "message"),
    [
        ("fedmf", {"dim": 32.5}, "dim=32.5: expected an integer"),
        ("fedmf", {"dim": float("inf")}, "dim=inf: expected an integer"),
        ("ifedncf", {"layers": (0,)}, "expected one width or more"),
        ("fedmf", {"lr": True}, "lr=True: expected a number"),
        ("fedmf", {"optimizer": 3}, "optimizer=3: expected text"),
        ("fedncf", {"layers": 8.5}, "layers=8.5: expected an integer"),
        ("fedrap", {"anneal": 1}, "anneal=1: expected true or false"),
    ],
)
def test_settings_of_another_type_are_refused(method, setting, message):
    with pytest.raises(ValueError, match=message):
        methods.make_config(method, setting)


def test_one_value_stands_for_a_list_of_one():
    assert methods.make_config("fedncf", {"layers": 8}).layers == methods.make_config("fedncf", {"layers": "8"}).layers


def test_settings_may_be_numpys():
    said = methods.make_config("fedncf", {"dim": np.int64(8), "lr": np.float32(0.5), "layers": [4, 2]})
    assert (said.dim, said.lr, said.layers) == (8, 0.5, (4, 2)) and type(said.dim) is int


@pytest.mark.parametrize("other", [{"optimizer": "adam"}, {"weighting": "by_row"}])
def test_item_rates_count_the_clients_only_where_a_mean_over_all_undoes_it(other):
    settings = {"lr": 0.1, "item_lr_scale": 0.5}
    assert methods.make_config("fedmf", settings).item_lr(300) == pytest.approx(15.0)
    assert methods.make_config("fedmf", {**settings, **other}).item_lr(300) == pytest.approx(0.05)


TAKE_BY_ROW = {"fedavg", "fcf", "fedmf", "fedncf", "pfedrec", "fedrap", "plgc"}
OVER_THEM = {"mdifffr", "light_mdifffr", "mdiffr", "light_mdiffr", "cs_fcf", "cs_fedncf"}


@pytest.mark.parametrize("method", methods.METHODS)
def test_weighting_by_row_is_taken_where_it_means_something(method):
    if method in TAKE_BY_ROW | OVER_THEM:
        assert methods.make_config(method, {"weighting": "by_row"}).weighting == "by_row"
    else:
        with pytest.raises(ValueError, match="weighting"):
            methods.make_config(method, {"weighting": "by_row"})


@pytest.mark.parametrize(
    "method, settings",
    [
        ("fedrkg", {"backbone": "fedncf", "scorer": "shared"}),
        ("fedrap", {"regularise": "table"}),
        ("pfedrec", {"rate_by_items": True}),
        ("pfedrec", {"preset": "released"}),
    ],
)
def test_weighting_by_row_is_refused_beside_what_it_undoes(method, settings):
    with pytest.raises(ValueError, match=r"weighting='by_row': expected"):
        methods.make_config(method, {"weighting": "by_row", **settings})


def test_weighting_by_row_brings_its_own_aggregator():
    with pytest.raises(ValueError, match="weighting=by_row with an aggregator"):
        sharing_method(
            "mine", init_shared=dict, init_private=dict, train=dict, score=dict,
            config=LocalConfig(weighting="by_row"), aggregator=aggregate.weighted_mean(),
        )  # fmt: skip


def test_what_makes_a_backbone_what_it_is_is_recorded():
    assert methods.make_config("mdifffr", {"backbone": "fcf"}).user_bias is False
    fedavg = methods.make_config("mdifffr", {"backbone": "fedavg", "weighting": "by_size"})
    assert fedavg == methods.make_config("mdifffr", {"backbone": "fedavg"}) and fedavg.weighting == "by_size"
    assert methods.make_config("mdifffr", {"backbone": "fedmf"}).weighting == "equal"
