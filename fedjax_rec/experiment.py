"""A run made ready: its configuration, data, method, engine and evaluator."""

from __future__ import annotations

import dataclasses
import hashlib
import numbers
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from fedjax_rec import metrics
from fedjax_rec.checkpoint import KEEP
from fedjax_rec.data import clients as clients_module
from fedjax_rec.data import features as features_module
from fedjax_rec.data import readers, splits, synthetic
from fedjax_rec.data.features import Features
from fedjax_rec.data.interactions import Filters, Interactions
from fedjax_rec.data.splits import Split
from fedjax_rec.evaluate import Evaluator, make_evaluator
from fedjax_rec.item_sources import catalogue_of
from fedjax_rec.item_sources.views import ID
from fedjax_rec.method import Method
from fedjax_rec.methods import METHODS, assemble, check_name, make_config
from fedjax_rec.privacy import mechanisms
from fedjax_rec.protocols import Protocol, describe, protocol
from fedjax_rec.rounds import Cohort, Engine, make_engine
from fedjax_rec.system import available_bytes, device_name, spare_maps
from fedjax_rec.validate import between, one_of, positive
from fedjax_rec.workdir import UsageError

LARGEST_WEIGHT = 100  # of a client's step on a cohort's mean: at 1,000 the defaults of fedmf and pfedrec diverged
EVAL_CLIENTS_SEED = 2**20
Whole, Number = int | np.integer, float | np.floating  # what a caller may give; held as int and float
Place = str | os.PathLike

CUT_OFFS = {"cold_items": (20, 50, 100)}
"""Those of splits where they are not 10 and 50."""


def default_selection(split: str, ks: Sequence[int]) -> str:
    """The metric that selects a round where none is given."""
    return "+".join(f"Recall@{k}" for k in ks) if split == "cold_items" else "NDCG@10"


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """Everything that decides what a run computes. Field names are those of the command line's flags.

    Attributes:
        method, settings: a name in METHODS and replacements for its settings.
        dataset, data_dir: what data/readers.py loads.
        features: modality -> .npz of the encoders, in place of the data set's own or beside them.
        split, split_seed, ties: see data/splits.py.
        filters: replacements for the data set's default filters (see data/interactions.Filters).
        filmtrust_time: `item` or `position`, see data/readers.py.
        protocol: honest or published.
        ranking: full, or sampled_99.
        rounds, seed: length and randomness of the run.
        clients_per_round: a whole number, a share (1.0 is everybody, and becomes 0), or 0 for everybody.
        eval_every: rounds between evaluations; the last round is always evaluated.
        eval_clients: evaluate only so many clients (drawn once, whatever the seed), 0 for all.
        ks: cut-offs of the metrics; None: 10 and 50, on cold items 20, 50 and 100, and those of select_metric.
        ndcg: correct, or released to have NDCG_released@k beside it (see metrics.per_client).
        select_metric: the validation metric that selects the round; names joined by `+` select by their sum. None:
            NDCG@10, on cold items the sum of the recalls at `ks` (the protocol of IFedRec and MDiffFR).
        patience: stop after so many rounds without a better validation result, 0 for never.
        checkpoint_every: rounds between checkpoints, 0 for only at the end and when stopped.
        block_size, max_buckets, devices: how the engine lays out clients; part of the run's identity because they
            order its sums. devices=0 takes all there are, max_buckets=0 as many as are worth their compilation.
        dp_mechanism: `none`, or what clients do to their uploads: `gaussian` or `laplace` noise.
        dp_clip, dp_noise, dp_rows: see privacy/mechanisms.Mechanism.
        dp_delta: of the (epsilon, delta) that is reported.
    """

    method: str = "fedmf"
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    dataset: Place = "synthetic"
    data_dir: Place | None = None
    features: Mapping[str, Place] = dataclasses.field(default_factory=dict)
    split: str = "leave_one_out"
    split_seed: Whole = 0
    ties: str = "later_row"
    filters: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    filmtrust_time: str = "item"
    protocol: str = "honest"
    ranking: str = "full"
    rounds: Whole = 100
    seed: Whole = 0
    clients_per_round: Whole | Number = 0
    eval_every: Whole = 10
    eval_clients: Whole = 0
    ks: Sequence[int] | np.ndarray | None = None
    ndcg: str = "correct"
    select_metric: str | None = None
    patience: Whole = 0
    checkpoint_every: Whole = 100
    block_size: Whole = 0
    max_buckets: Whole = 0
    devices: Whole = 0
    dp_mechanism: str = "none"
    dp_clip: Number = 0.0
    dp_noise: Number = 0.0
    dp_rows: str = "all"
    dp_delta: Number = 1e-5

    def __post_init__(self):
        check_name(self.method)
        one_of("split", self.split, ("leave_one_out", "given", "cold_items"))
        one_of("protocol", self.protocol, ("honest", "published"))
        one_of("ranking", self.ranking, ("full", "sampled_99"))
        one_of("ndcg", self.ndcg, metrics.NDCGS)
        if self.ks is None:
            named = map(int, re.findall(r"@(\d+)", self.select_metric or ""))
            object.__setattr__(self, "ks", tuple(sorted({*CUT_OFFS.get(self.split, (10, 50)), *named})))
        if isinstance(self.ks, int | str) or not len(self.ks):
            raise ValueError(f"ks={self.ks!r}: expected one cut-off or more, like (10, 50); --k=10,50")
        for name in ("rounds", "seed", "split_seed", "eval_every", "eval_clients", "patience", "checkpoint_every"):
            _number(name, getattr(self, name), numbers.Integral, "a whole number")
        layout = "block_size", "max_buckets", "devices"
        for name in layout:
            _number(name, getattr(self, name), numbers.Integral, "a whole number")
        for k in self.ks:
            _number("ks", k, numbers.Integral, "whole numbers")
        for name in ("clients_per_round", "dp_clip", "dp_noise", "dp_delta"):
            _number(name, getattr(self, name), numbers.Real, "a finite number")
        self._in_plain_types()
        for name in ("rounds", "eval_every"):
            positive(name, getattr(self, name))
        for name in ("clients_per_round", "eval_clients", "patience", "checkpoint_every", *layout):
            positive(name, getattr(self, name), zero_allowed=True)
        for name in self.features:
            if name in ("", ID):
                raise ValueError(
                    f"features: a modality named {name!r}; expected a name like image or text ('{ID}' is the table "
                    "that training makes); give --features=text=FILE.npz"
                )
        for k in self.ks:
            positive("ks", k)
        if self.select_metric is None:
            object.__setattr__(self, "select_metric", default_selection(self.split, self.ks))
        for part in self.select_metric.split("+"):
            one_of("select_metric", part, metrics.per_client(np.ones((1, 1)), *self.judged))
        for name in ("seed", "split_seed"):
            between(name, getattr(self, name), 0, 2**31 - 1)
        if self.split_seed and self.split != "cold_items":
            raise ValueError(f"split_seed={self.split_seed}: split={self.split} draws nothing; leave it out")
        one_of("dp_mechanism", self.dp_mechanism, ("none", *mechanisms.DRAW))
        positive("dp_delta", self.dp_delta)
        if self.dp_delta >= 1:
            raise ValueError(f"dp_delta={self.dp_delta}: expected a number in (0, 1), like 1e-5")
        if self.mechanism is None and (self.dp_clip or self.dp_noise or self.dp_rows != "all"):
            raise ValueError(
                f"dp_clip={self.dp_clip:g}, dp_noise={self.dp_noise:g}, dp_rows={self.dp_rows}: they do nothing with "
                "dp_mechanism=none; set dp_mechanism to gaussian or laplace"
            )
        if self.clients_per_round > 1 and self.clients_per_round != int(self.clients_per_round):
            raise ValueError(f"clients_per_round={self.clients_per_round}: expected a whole number or a share below 1")
        if self.clients_per_round == 1 and not isinstance(self.clients_per_round, numbers.Integral):
            # a workdir's comparison cannot tell it from 1, which earlier versions recorded as 1.0
            object.__setattr__(self, "clients_per_round", 0)

    @property
    def judged(self) -> tuple[tuple[int, ...], str]:
        """What metrics.per_client wants beside the ranks."""
        return tuple(self.ks), self.ndcg

    def _in_plain_types(self) -> None:
        """Paths as text and NumPy's numbers as Python's: config.json holds the configuration."""
        plain = {"ks": tuple(map(int, self.ks)), "dataset": os.fspath(self.dataset)}
        if self.data_dir is not None:
            plain["data_dir"] = os.fspath(self.data_dir)
        plain["features"] = {name: os.fspath(path) for name, path in self.features.items()}
        scalar = lambda value: value.item() if isinstance(value, np.generic) else value
        plain["settings"] = {name: scalar(value) for name, value in self.settings.items()}
        for field in dataclasses.fields(self):
            if isinstance(value := getattr(self, field.name), np.generic):
                plain[field.name] = value.item()
        for name, value in plain.items():
            object.__setattr__(self, name, value)

    @property
    def mechanism(self) -> mechanisms.Mechanism | None:
        """What clients do to their uploads, if anything."""
        if self.dp_mechanism == "none":
            return None
        return mechanisms.Mechanism(self.dp_mechanism, self.dp_clip, self.dp_noise, self.dp_rows)

    def recorded(self) -> dict[str, Any]:
        """As it stands in config.json: later settings (features, ndcg, dp) only where they differ from their defaults,
        so that runs without any are recorded as they were before there were such settings."""
        default = {field.name: field.default for field in dataclasses.fields(self) if field.name.startswith("dp_")}
        default |= {"features": {}, "ndcg": "correct"}
        said = dataclasses.asdict(self)
        return {name: value for name, value in said.items() if name not in default or value != default[name]}


def _number(name: str, value: Any, kind: type, expected: str) -> None:
    if not isinstance(value, kind) or not np.isfinite(value):
        raise ValueError(f"{name}={value!r}: expected {expected}")


@dataclasses.dataclass(frozen=True, eq=False)
class Experiment:
    """A run made ready: data, method, engine, evaluator."""

    config: RunConfig
    interactions: Interactions
    split: Split
    features: dict[str, Features]
    protocol: Protocol
    method: Method
    engine: Engine
    evaluator: Evaluator
    key: jax.Array
    eval_cohort: Cohort | None

    def with_seed(self, seed: int) -> Experiment:
        """The same run from another seed. Nothing compiled depends on the seed, so that both compile once."""
        return dataclasses.replace(self, config=dataclasses.replace(self.config, seed=seed), key=jax.random.key(seed))

    def cohort_users(self, round_: int) -> np.ndarray | None:
        """User ids of a round's cohort, drawn from (seed, round) alone; None for everybody."""
        count = cohort_size(self.config.clients_per_round, self.split.num_users)
        if count == self.split.num_users:
            return None
        rng = np.random.default_rng([self.config.seed, round_])
        return np.sort(rng.choice(self.split.num_users, count, replace=False))


def cohort_size(clients_per_round: int | float, num_users: int) -> int:
    """Clients in a round.

    Raises:
        UsageError: for a cohort larger than the population.
    """
    if clients_per_round == 0:
        return num_users
    share = clients_per_round <= 1 and not isinstance(clients_per_round, numbers.Integral)
    count = max(round(clients_per_round * num_users), 1) if share else int(clients_per_round)
    if count > num_users:
        raise UsageError(f"--clients_per_round={count}: the data set has {num_users} users; give at most that")
    return count


def load_data(config: RunConfig) -> tuple[Interactions, Split, dict[str, Features]]:
    """Reads, filters and splits the data set, with the features its folder offers and those of config.features."""
    if config.dataset == "synthetic" and not config.filters:
        made = synthetic.make()
        interactions, features = made.interactions, made.features
    else:
        interactions = readers.load(
            config.dataset, config.data_dir, filters=filters_of(config), filmtrust_time=config.filmtrust_time
        )
        known_features = config.dataset in features_module.FEATURES and config.data_dir
        features = (
            features_module.load_features(config.dataset, config.data_dir, interactions) if known_features else {}
        )
    features = {**features, **given_features(config, interactions)}
    split = splits.make(interactions, config.split, seed=config.split_seed, data_dir=config.data_dir, ties=config.ties)
    return interactions, split, features


def filters_of(config: RunConfig) -> Filters:
    """The data set's own filters, with those of config.filters in their place."""
    known = readers.DATASETS.get(config.dataset)
    return dataclasses.replace(known.filters if known else Filters(), **config.filters)


def given_features(config: RunConfig, interactions: Interactions) -> dict[str, Features]:
    """The features of config.features, joined to the items."""
    return {name: features_module.load_npz(path, interactions.item_ids) for name, path in config.features.items()}


def features_hash(config: RunConfig, features: Mapping[str, Features]) -> dict[str, str]:
    """What is in the features of config.features as they were joined to the items, by modality."""
    return {name: _digest(features[name]) for name in sorted(config.features)}


def content_hash(config: RunConfig, features: Mapping[str, Features]) -> dict[str, str]:
    """The same of all features, wherever they are from, in one entry; none for a method that reads no features."""
    if not features or not METHODS[config.method].reads_items:
        return {}
    every = "".join(f"{name}:{_digest(features[name])} " for name in sorted(features))
    return {"content_hash": hashlib.sha256(every.encode()).hexdigest()[:16]}


def _digest(feature: Features) -> str:
    return hashlib.sha256(feature.values.tobytes() + feature.present.tobytes()).hexdigest()[:16]


def data_hash(interactions: Interactions, split: Split) -> str:
    """What a run is about: raw ids, the pairs of every part and who competes, whatever file they came from."""
    digest = hashlib.sha256()
    parts = *split.train, *split.valid, *split.test, *(split.candidates or {}).values()
    for array in (interactions.user_ids.astype(str), interactions.item_ids.astype(str), *parts):
        digest.update(f"{array.dtype}{array.shape}".encode() + array.tobytes())
    return digest.hexdigest()[:16]


def _check_together(interactions: Interactions, split: Split, features: Mapping[str, Any]) -> None:
    """That data which a program hands over belong together; read from files they always do."""
    users, items = interactions.num_users, interactions.num_items
    if (split.num_users, split.num_items) != (users, items):
        raise UsageError(
            f"the split has {split.num_users} users and {split.num_items} items, expected the {users} and {items} of "
            "the interactions; split these interactions"
        )
    for name, feature in features.items():
        if not isinstance(feature, Features):
            raise UsageError(
                f"features named {name}: found {type(feature).__name__}, expected Features; make them with align or "
                "load_npz of fedjax_rec.data.features"
            )
        if feature.values.shape[:1] != (items,) or not np.isfinite(feature.values).all():
            raise UsageError(
                f"features named {name}: values of shape {list(feature.values.shape)}, expected finite numbers "
                f"[{items}, feat]; make them with align or load_npz of fedjax_rec.data.features"
            )


def prepare(config: RunConfig, data: tuple | None = None) -> Experiment:
    """Builds everything a run needs.

    Args:
        config: what to run.
        data: (interactions, split, features) to use instead of loading them.
    """
    spare_maps()
    interactions, split, features = data or load_data(config)
    _check_together(interactions, split, features)
    chosen = protocol(config.protocol, config.method)
    forced = {k: v for k, v in (("draw", chosen.draw), ("redraw", chosen.redraw)) if v is not None}
    for name, value in forced.items():
        if config.settings.get(name, value) != value:
            raise UsageError(
                f"--set {name}={config.settings[name]}: protocol=published of {config.method} is {name}={value}; leave "
                "one of both out"
            )
    settings = make_config(config.method, {**forced, **config.settings})
    warm = None if split.candidates is None else np.asarray(split.candidates["train"], bool)
    if METHODS[config.method].everybody and cohort_size(config.clients_per_round, split.num_users) < split.num_users:
        raise UsageError(
            f"--clients_per_round={config.clients_per_round}: {config.method} knows the histories of a round's clients "
            "alone, and wants all of them in every round; leave it out"
        )
    catalogue = catalogue_of(features, warm)
    method = assemble(config.method, settings, split.num_users, split.num_items, catalogue)
    if config.mechanism:
        method = mechanisms.private(method, config.mechanism, split.num_users)
    devices = config.devices or len(jax.devices())
    if devices > len(jax.devices()):
        # what was trained on several is also judged on so many
        raise UsageError(
            f"--devices={devices}: only {len(jax.devices())} are there; give at most that, or 0 for all; a CPU makes "
            f"them with JAX_PLATFORMS=cpu and --cpu_devices={devices}"
        )
    population = clients_module.build(
        split, negative_pool=chosen.negative_pool, num_devices=devices, max_buckets=config.max_buckets
    )
    cohort = cohort_size(config.clients_per_round, split.num_users)
    engine = make_engine(method, population, block_size=config.block_size, cohort=cohort)
    evaluator = make_evaluator(engine, split, protocol=chosen, sampled=config.ranking == "sampled_99")
    eval_cohort = None
    if 0 < config.eval_clients < split.num_users:
        # whatever the seed, and fewer among more: runs are compared client by client
        order = np.random.default_rng(EVAL_CLIENTS_SEED).permutation(split.num_users)
        eval_cohort = engine.cohort(order[: config.eval_clients])
    key = jax.random.key(config.seed)
    return Experiment(config, interactions, split, features, chosen, method, engine, evaluator, key, eval_cohort)


def check_memory(engine: Engine) -> dict[str, int]:
    """The estimate of Engine.memory_bytes.

    Raises:
        UsageError: if it does not fit, with a setting that does.
    """
    need, have = engine.memory_bytes(), available_bytes(engine.mesh.devices.tolist())
    if have is None or need["total"] <= have:
        return need
    detail = ", ".join(f"{name} {bytes_ / 2**30:.2f}" for name, bytes_ in need.items() if name != "total")
    raise UsageError(
        f"the run needs about {need['total'] / 2**30:.2f} GiB ({detail}) and {have / 2**30:.2f} GiB are free: "
        f"{_fitting_setting(engine, need, have)}"
    )


def _fitting_setting(engine: Engine, need: dict[str, int], have: int) -> str:
    """Fewer clients at once if that is enough, else narrower embeddings, else more machine."""
    block = max(engine.block)
    while block > 1:
        block //= 2
        smaller = tuple(min(block, n) for n in engine.per_device())  # what the flag gives
        if dataclasses.replace(engine, block=smaller).memory_bytes()["total"] <= have:
            return f"set --block_size={block}"
    # everything but the data is proportional to the width, or nearly
    dim = int(getattr(engine.method.config, "dim", 1) * (have - need["data"]) / (need["total"] - need["data"]) * 0.9)
    return f"set --set dim={dim}" if dim >= 1 else "use more devices, or --filter the data"


def identity(ready: Experiment) -> dict[str, Any]:
    """Everything a workdir's results depend on: the configuration with every default and layout resolved."""
    given = {"features_hash": features_hash(ready.config, ready.features)} if ready.config.features else {}
    return {
        **ready.config.recorded(),
        **given,
        **content_hash(ready.config, ready.features),
        "data_hash": data_hash(ready.interactions, ready.split),
        "settings": dataclasses.asdict(ready.method.config),
        "devices": ready.engine.mesh.size,
        "block_sizes": list(ready.engine.block),
    }


def cohort_lines(ready: Experiment) -> list[str]:
    """How many take part in a round, if not everybody, and what that does to the item rate."""
    users = ready.split.num_users
    count = cohort_size(ready.config.clients_per_round, users)
    if count == users:
        return []
    said = f"cohort         {count:,} of {users:,} clients a round"
    config = ready.method.config
    averaged = ready.method.aggregator.is_mean and ready.engine.bytes_per_client()["up"] > 0
    if averaged and getattr(config, "rate_counts_clients", False) and users > LARGEST_WEIGHT * count:
        # the items' local rate is times all clients, the mean over those who took part
        said += (
            f", whose steps on items count {users / count:,.0f} times; if the loss grows: "
            f"--set item_lr_scale={config.item_lr_scale * LARGEST_WEIGHT * count / users:.3g}"
        )
    return [said]


def exchange_lines(ready: Experiment) -> list[str]:
    """A word on a method whose exchanges would all come after the last round."""
    exchange, rounds = ready.method.exchange, ready.config.rounds
    if exchange is None or any(map(exchange.due, range(rounds))):
        return []
    return [
        f"guidance       none in {rounds} rounds: clients learn alone; give more --rounds or a smaller --set interval"
    ]


def introduction(ready: Experiment) -> str:
    """What a person should know before a run: data, protocol, sizes."""
    sent = ready.engine.bytes_per_client()
    need = ready.engine.memory_bytes()
    saved = (need["clients"] + need["mail"] + need["server"] / ready.engine.mesh.size) / 2**20
    dense = f", {sent['exchange_up']:,} each way more in a guidance round" if "exchange_up" in sent else ""
    buckets = ", ".join(
        f"{b.user.shape[0]} clients of up to {b.history.shape[1]} items (blocks of {n})"
        for b, n in zip(ready.engine.clients.buckets, ready.engine.block, strict=True)
    )
    return "\n".join(
        [
            splits.describe(ready.interactions, ready.split),
            *(f"features       {name}: {ready.features[name].source}" for name in ready.config.features),
            f"padding        {ready.engine.clients.padding_fraction:.1%} of history slots; {buckets}",
            *cohort_lines(ready),
            *exchange_lines(ready),
            f"bytes          down {sent['down']:,} up {sent['up']:,} per client and round (full tables){dense}",
            f"memory         about {need['total'] / 2**20:,.0f} MiB on {ready.engine.mesh.size} x {device_name()}",
            f"disk           about {saved:,.0f} MiB a checkpoint of a workdir; {KEEP} are kept",
            describe(ready.protocol),
            *(["privacy        " + mechanisms.describe(mechanism)] if (mechanism := ready.config.mechanism) else []),
        ]
    )
