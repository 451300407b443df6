"""A run in the hands of a program: train it or load it, recommend, export embeddings, fold in a new user.

    feedback = load("ml-100k", "DATA")
    run = fit(RunConfig(method="pfedrec", rounds=50), feedback, leave_one_out(feedback), workdir="runs/a")
    run = load_run("runs/a")

The model is the one after the last round that was run (what the newest checkpoint holds), not the one of the selected
round: stop at a round with `rounds` or `patience` to serve that one. Everything here works on one device, however many
the run was trained on.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Hashable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from fedjax_rec import folding
from fedjax_rec.client_step import record_at
from fedjax_rec.data import readers, splits
from fedjax_rec.data.clients import deal, row_offsets
from fedjax_rec.data.features import Features
from fedjax_rec.data.interactions import DataError, Filters, Interactions
from fedjax_rec.data.sampling import epoch_steps
from fedjax_rec.data.splits import TIE_RULES, Split
from fedjax_rec.evaluate import client_model
from fedjax_rec.experiment import Experiment, RunConfig, given_features, load_data, prepare
from fedjax_rec.layout import AXIS
from fedjax_rec.precision import in_float32
from fedjax_rec.rounds import Engine, State, publish
from fedjax_rec.run import check_same_data, config_of, restore, train_state
from fedjax_rec.types import ITEM_ROLES, Params, PyTree
from fedjax_rec.validate import nearest, whole_number
from fedjax_rec.workdir import UsageError, read_json, write_npz

USERS_AT_ONCE = 4096


class Recommendations(NamedTuple):
    """Best first: raw item ids [k], and the method's scores of them [k] (logits: only their order means anything)."""

    items: np.ndarray
    scores: np.ndarray


class Embeddings(NamedTuple):
    """What the model knows, keyed by role (`item`, `user/vector`).

    item_ids [items] and user_ids [users] are raw ids; every array of `items` has a leading items axis, every array
    of `users` a leading users axis.
    """

    item_ids: np.ndarray
    items: dict[str, np.ndarray]
    user_ids: np.ndarray
    users: dict[str, np.ndarray]


def fit(
    config: RunConfig,
    interactions: Interactions | None = None,
    split: Split | None = None,
    features: Mapping[str, Features] | None = None,
    *,
    workdir: str | os.PathLike | None = None,
    progress: bool = False,
) -> Run:
    """Trains `config` and returns the run with its model.

    Args:
        config: what to run. Where `interactions` are given they replace its data set, filters and split.
        interactions: of `load` or `from_frame`; None loads what `config` names.
        split: of `leave_one_out`, `given` or `cold_items`; None splits as `config` says.
        features: item features by modality, for methods that read them; they replace those of the data set.
        workdir: see run.train; a stopped run goes on from it.
        progress: show a progress bar.

    Raises:
        as run.train; UsageError also for a split without its interactions.
    """
    data = None
    if interactions is not None:
        config, data = _about(config, interactions, split, features)
    else:
        _no_split_alone(split)
        if features:
            rest = {name: path for name, path in config.features.items() if name not in features}
            config = dataclasses.replace(config, features=rest)
            *loaded, own = load_data(config)
            data = (*loaded, {**own, **features})
    summary, ready, state = train_state(config, workdir, data=data, progress=progress)
    return _one_device(ready, state, ready.engine.clients.slots, summary["rounds"], summary)


def load_run(
    workdir: str | os.PathLike,
    interactions: Interactions | None = None,
    split: Split | None = None,
    features: Mapping[str, Features] | None = None,
    *,
    data_dir: str | os.PathLike | None = None,
) -> Run:
    """A run from its workdir: configuration, data, and the model of its newest checkpoint.

    Args:
        workdir: of a run of launch.py, `fit` or `train`.
        interactions, split, features: the data, as handed to `fit`; None reads them again as the run did. `features`
            alone stand for those of `--features` (where files have moved).
        data_dir: where the data folders are now, if they have moved.

    Raises:
        UsageError: there is no run or no checkpoint, or the data are not those of the run.
    """
    folder = Path(workdir)
    config = config_of(folder)
    trained_on = config.devices
    config = dataclasses.replace(config, devices=1)
    if data_dir is not None:
        config = dataclasses.replace(config, data_dir=os.fspath(data_dir))
    there = config if features is None else dataclasses.replace(config, features={})
    if interactions is not None:
        data = _about(there, interactions, split, features)[1]
    else:
        _no_split_alone(split)
        try:
            interactions, split, own = load_data(there)
        except DataError as error:
            where = "data_dir or features, or " if not readers.is_path(config.dataset) else ""
            raise UsageError(
                f"{folder}: its data cannot be read again ({error}); give {where}the data themselves: "
                "load_run(workdir, interactions, split)"
            ) from None
        data = interactions, split, {**own, **(features or {})}
    missing = sorted(set(config.features) - set(data[2]))
    if missing:
        raise UsageError(f"{folder}: the run had features named {', '.join(missing)}; give load_run the same")
    ready = prepare(config, data)
    check_same_data(folder, ready, "give load_run those of the run")
    lengths = np.diff(row_offsets(ready.split.train.user, ready.split.num_users))
    most = -(-ready.split.num_users // trained_on) * trained_on
    shapes = ready.engine.shapes(ready.key)
    resized = lambda x: jax.ShapeDtypeStruct((most, *x.shape[1:]), x.dtype, sharding=x.sharding)
    saved = shapes.replace(clients=jax.tree.map(resized, shapes.clients), mail=jax.tree.map(resized, shapes.mail))
    done, state = restore(folder, ready, saved)
    path = folder / "summary.json"
    summary = read_json(path) if path.exists() else None
    return _one_device(ready, state, deal(lengths, trained_on), done, summary)


def _no_split_alone(split: Split | None) -> None:
    if split is not None:
        raise UsageError("a split without its interactions: give both, or neither")


def _about(config: RunConfig, interactions: Interactions, split: Split | None, features: Mapping | None):
    """(config that names the given data, so that load_run finds them again where they have a name; data)."""
    if split is None:
        split = splits.make(
            interactions, config.split, seed=config.split_seed, data_dir=config.data_dir, ties=config.ties
        )
    known = readers.DATASETS.get(interactions.name)
    default = dataclasses.asdict(known.filters if known else Filters())
    used = dataclasses.asdict(interactions.filters)
    ties = next((rule for rule, said in TIE_RULES.items() if said == split.tie_rule), config.ties)
    own = RunConfig(split=config.split)  # what is not said is as the given split has it
    unsaid = [name for name in ("ks", "select_metric") if getattr(config, name) == getattr(own, name)]
    config = dataclasses.replace(
        config,
        dataset=interactions.name,
        split=split.name,
        **dict.fromkeys(unsaid if split.name != config.split else ()),
        ties=ties,
        filters={name: value for name, value in used.items() if value != default[name]},
    )
    return config, (interactions, split, {**given_features(config, interactions), **(features or {})})


def _one_device(ready: Experiment, state: State, slots: np.ndarray, done: int, summary: dict | None) -> Run:
    """The run with its model on one device, given the users' slots of its state; there they are the users' indices."""
    if ready.engine.mesh.size > 1:
        data = (ready.interactions, ready.split, ready.features)
        ready = prepare(dataclasses.replace(ready.config, devices=1), data)
    mesh = ready.engine.mesh
    by_user = lambda tree: jax.device_put(jax.tree.map(lambda x: x[slots], tree), NamedSharding(mesh, P(AXIS)))
    server = jax.device_put(state.server, NamedSharding(mesh, P()))
    return Run(ready, State(server, by_user(state.clients), by_user(state.mail)), done, summary)


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
    """A trained run.

    Attributes:
        experiment: its configuration, data, method, engine and evaluator, on one device.
        state: its model.
        round: rounds that the model has seen.
        summary: summary.json; None where the run is not finished.
    """

    experiment: Experiment
    state: State
    round: int
    summary: dict[str, Any] | None

    def __repr__(self) -> str:
        config, split = self.config, self.experiment.split
        return (
            f"Run({config.method} on {config.dataset}, {split.num_users:,} users, {split.num_items:,} items, "
            f"seed {config.seed}, round {self.round})"
        )

    @property
    def config(self) -> RunConfig:
        return self.experiment.config

    @functools.cached_property
    def shared(self) -> Params:
        """What the server shows its clients now, in arrays of its own."""
        shared = publish(self.experiment.engine, self.experiment.key, self.state.server, self.round)
        return jax.tree.map(jnp.copy, shared)

    def scores(self, user: Any) -> np.ndarray:
        """Scores of the catalogue [items] for one user (raw id), in the order of `experiment.interactions.item_ids`.

        The evaluator's own scoring: for a method that is judged after a local update (`post_local`) the user runs
        that update first.

        Raises:
            UsageError: an unknown user.
        """
        index = _index_of("user", [user], self._user_index)[0]
        places = [np.flatnonzero(bucket.user == index) for bucket in self.experiment.engine.clients.buckets]
        b = next(b for b, place in enumerate(places) if len(place))
        return np.asarray(self._ask("score", b, places[b]))[0]

    def explain(self) -> dict[str, np.ndarray]:
        """What every client can say of itself, [users, ...] by name, users in the order of
        `experiment.interactions.user_ids`: the routers' weights over views, for the multimodal methods."""
        buckets = self.experiment.engine.clients.buckets
        said, users = [], []
        for b, bucket in enumerate(buckets):
            held = np.flatnonzero(bucket.user < self.experiment.split.num_users)
            for first in range(0, len(held), USERS_AT_ONCE):
                some = held[first : first + USERS_AT_ONCE]
                said.append(self._ask("explain", b, some))
                users.append(np.asarray(bucket.user)[some])
        order = np.argsort(np.concatenate(users))
        return jax.tree.map(lambda *parts: np.concatenate(parts)[order], *said)

    def _ask(self, what: str, b: int, positions: np.ndarray):
        """A function of the method, `score` or `explain`, for the clients at some positions of bucket b."""
        engine = self.experiment.engine
        replicated = (self.experiment.key, jnp.asarray(self.round, jnp.int32), self.shared)
        sharded = (self.state.clients, self.state.mail)
        at = jnp.asarray(positions, jnp.int32)
        return _asked(engine, what, b, replicated, sharded, engine.buckets[b], engine.pool, at)

    def recommend(self, user: Any, k: int = 10, *, exclude_seen: bool = True) -> Recommendations:
        """The k best items for a user, by raw ids.

        Args:
            user: raw id, of the type that the data has.
            k: how many; fewer come back where fewer compete.
            exclude_seen: leave out the user's training and validation items and, under a cold-item split, what is no
                test item, as the test ranking does: place r of a full list is what the evaluation calls rank r.
        """
        whole_number("k", k)
        return self.top(self.scores(user), self._competing(user) if exclude_seen else None, k)

    def top(self, scores: np.ndarray, competing: np.ndarray | None, k: int) -> Recommendations:
        """The k best of the competing items (bool [items]; None: all), by raw ids."""
        order = np.argsort(-scores, kind="stable")
        chosen = (order if competing is None else order[competing[order]])[:k]
        return Recommendations(self.experiment.interactions.item_ids[chosen], scores[chosen])

    def _competing(self, user: Any) -> np.ndarray:
        index, split = self._user_index[user], self.experiment.split
        competing = self.candidates.copy()
        competing[split.train.item[split.train.user == index]] = False
        if split.candidates is None and self.experiment.protocol.mask_valid_at_test:
            competing[split.valid.item[split.valid.user == index]] = False
        return competing

    @property
    def candidates(self) -> np.ndarray:
        """Items that compete in the test ranking, bool [items]."""
        split = self.experiment.split
        return np.ones(split.num_items, bool) if split.candidates is None else split.candidates["test"]

    def embeddings(self, *, client_tables: bool = False) -> Embeddings:
        """Item tables and user vectors, as they are on the server and on the clients (before any `post_local` update).

        Args:
            client_tables: also the item tables that every client keeps (FedRAP): [users, items, dim], so large.
        """
        data = self.experiment.interactions
        tables = {role: value for role, value in self.shared.items() if role in ITEM_ROLES}
        answers = self.state.mail if isinstance(self.state.mail, dict) else {}  # of server-trained models the vectors
        held = {**answers, **self.state.clients}
        kept = {r: v for r, v in held.items() if client_tables or r not in ITEM_ROLES}
        return Embeddings(data.item_ids, _flat(tables), data.user_ids, _flat(kept))

    def export_embeddings(self, path: str | os.PathLike, *, client_tables: bool = False) -> None:
        """Writes `embeddings` as an .npz with the keys item_ids, user_ids, items/<role> and users/<role>."""
        said = self.embeddings(client_tables=client_tables)
        named = {f"items/{role}": value for role, value in said.items.items()}
        named |= {f"users/{role}": value for role, value in said.users.items()}
        write_npz(Path(path), {"item_ids": said.item_ids, "user_ids": said.user_ids, **named})

    def fold_in(self, items: Any, *, rounds: int | None = None) -> folding.NewUser:
        """A user who was not in the training data, given by what they took; see folding.NewUser.

        Args:
            items: raw item ids, at least one, each in the catalogue.
            rounds: local updates to run (default: as many as the run had rounds).

        Raises:
            UsageError: no item, or one that the catalogue does not have; a method whose users' vectors the server
                trains.
        """
        whole_number("rounds", self.round if rounds is None else rounds)
        if isinstance(items, str) or not isinstance(items, Iterable):  # a string is a sequence too, of letters
            raise UsageError(f"items {items!r}: expected a list of item ids, like [{items!r}]")
        index = _index_of("item", list(items), self._item_index)
        config, mail = self.experiment.config, self.state.mail
        if isinstance(mail, dict) and "user" in mail:
            raise UsageError(
                f"fold_in: the server trains the users' vectors of {config.method}, and a new client's own training "
                "makes none; train again with this user's items"
            )
        return folding.fold_in(self, np.unique(index), self.round if rounds is None else rounds)

    @functools.cached_property
    def _user_index(self) -> dict[Any, int]:
        return {raw: i for i, raw in enumerate(self.experiment.interactions.user_ids.tolist())}

    @functools.cached_property
    def _item_index(self) -> dict[Any, int]:
        return {raw: i for i, raw in enumerate(self.experiment.interactions.item_ids.tolist())}


def _index_of(kind: str, raw: list, index: dict[Any, int]) -> np.ndarray:
    """Indices of raw ids [n]."""
    if not raw:
        raise UsageError(f"no {kind} given, expected at least one {kind} id like {next(iter(index))!r}")
    for one in raw:
        if not isinstance(one, Hashable) or one not in index:
            near = nearest(one, map(str, index)) if isinstance(one, str) else ""
            examples = ", ".join(map(repr, list(index)[:3]))
            raise UsageError(
                f"{kind} {one!r} is not in the data: expected one of its {len(index)} {kind} ids, like {examples}{near}"
            )
    return np.array([index[one] for one in raw])


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
@in_float32
def _asked(engine: Engine, what: str, b: int, replicated, sharded, bucket, pool, positions):
    """What the method says of the clients at `positions` [n] of bucket b, one after the other."""
    engine, spec = dataclasses.replace(engine, pool=pool), engine.clients

    def one(position):
        several = record_at(bucket, position[None], spec.num_users, spec.num_items, spec.pool_size)
        record = jax.tree.map(lambda x: x[0], several)
        steps = epoch_steps(engine.method.sampling, engine.sizes[b], record.length)
        model = client_model(engine, replicated, sharded, record.user, record, engine.sizes[b], steps)
        return getattr(engine.method, what)(*model)

    return jax.lax.map(one, positions)


def _flat(tree: PyTree) -> dict[str, np.ndarray]:
    """Arrays by their path, like user/vector."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf) for path, leaf in leaves}
