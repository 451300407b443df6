"""The contract between a federated method and the engine.

A method is written for ONE client on its working set of item rows; the engine draws the samples, gathers the
rows, maps the functions over clients, folds the uploads and keeps the clients' state. What crosses the network
is in the types: `Server.shared` goes down, an upload comes up, a client's dictionary and `Server.private` stay.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import jax
from flax import struct
from jaxtyping import Array, ArrayLike, Bool, Float, Int, Integer

from fedjax_rec.types import Params, PRNGKey, PyTree


@struct.dataclass
class Server:
    """What the server holds.

    Attributes:
        shared: all that clients may see, keyed by role (item tables, network weights, schedule values).
        private: never sent: server optimiser states, fusion and diffusion networks, item features.
    """

    shared: Params
    private: PyTree


class Batch(NamedTuple):
    """One local step's samples; `item` points into the rows of the client's tables."""

    item: Int[Array, "*steps batch"]
    label: Float[Array, "*steps batch"]  # 1 for a positive, 0 for a negative
    mask: Float[Array, "*steps batch"]  # 1 for a sample, 0 for padding


@runtime_checkable
class Samples(Protocol):
    """One client's samples of a round, in the order in which they are trained on."""

    most_steps: int

    def at(self, step: Int[Array, ""]) -> Batch:
        """The samples of one local step."""


@struct.dataclass
class LocalData:
    """One client's data in one round, padded to static sizes.

    `history` and the batches' `item` are indices into `rows`, so a method reads item vectors as `table[batch.item]`
    whether the table is the working set or the catalogue.
    """

    rows: Int[Array, "rows"]  # distinct item ids; padding = number of items
    row_mask: Bool[Array, "rows"]
    samples: Samples  # ask batch_at for a step's
    history: Int[Array, "history"]
    history_mask: Bool[Array, "history"]
    num_samples: Float[Array, ""]  # samples of one local epoch: positives and negatives
    num_steps: Integer[ArrayLike, ""]  # steps to run; what batch_at gives beyond them is padding
    round: Int[Array, ""]  # 0-based


Client = Params
"""A client's own state, kept between rounds. Without the `clients` axis here; the engine stacks it."""
Update = PyTree
Upload = Params
Info = dict[str, Array]
"""Scalars for the log; `loss` (mean over the client's samples of the round) is required."""
Mail = PyTree
"""The server's answers to single clients (leading clients axis), or ()."""


class Aggregate(NamedTuple):
    """What the server sees of a round: folded uploads, the sum of weights, and how many clients took part."""

    value: PyTree
    weight: Float[Array, ""]
    count: Float[Array, ""]


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How a client's local training data are drawn.

    Attributes:
        negatives: negatives per positive in each local epoch.
        batch_size: samples per local step; 0 puts a whole epoch into one step.
        local_epochs: passes over the client's data in a round.
        redraw: draw negatives anew every `round`, or every local `epoch`.
        draw: `stratified` (default; see data/sampling.py) or `independent` draws with replacement.
    """

    negatives: int = 4
    batch_size: int = 256
    local_epochs: int = 1
    redraw: Literal["round", "epoch"] = "round"
    draw: Literal["stratified", "independent"] = "stratified"


class Aggregator(NamedTuple):
    """A fold over uploads that streams over client blocks and devices.

    init:   (upload of one client as shapes, items, places) -> accumulator
    add:    (accumulator, uploads [block, ...], weights [block], rows [block, rows], places [block]) -> accumulator; a
            client's place, on its device, is the engine's affair
    merge:  (accumulator, mesh axis) -> accumulator summed over devices
    finish: (accumulator, weight, count) -> Aggregate
    weight: one client's weight from its data; padding clients weigh 0 whatever it says
    over_mail: uploads are written into the places of their senders' mail (see Method.init_mail), which they equal in
        shape: the accumulator is (mail, weights), stays spread over the devices in the order of the places, empty ones
        among them with weight 0, and `init` and `merge` are not called. The server then answers in place: clients x
        upload is held once, not twice.
    by_client: the accumulator's leaves, merged, lead with the clients' places: `finish` gets them in the order of user
        ids instead, [users, ...].
    is_mean: `finish` gives the sum of w_k upload_k over the sum of w_k and nothing else, so that noise on uploads may
        be drawn for all of them at once (privacy/mechanisms.py).
    by_row: asks which rows of an upload are not zero, so that noise on all of them would change what it does.
    """

    init: Callable[..., PyTree]
    add: Callable[..., PyTree]
    merge: Callable[[PyTree, str], PyTree]
    finish: Callable[..., Aggregate]
    weight: Callable[[LocalData], Float[Array, ""]]
    over_mail: bool = False
    by_client: bool = False
    is_mean: bool = False
    by_row: bool = False


class Exchange(NamedTuple):
    """A second pass over ALL clients in some rounds, in which whole tables travel: every client uploads, the server
    takes the mean, every client takes the answer in. Costs clients x items where a round costs interactions; the
    engine streams it in blocks.

    Attributes:
        due: whether round number r (0-based, a Python int) has one.
        at_start: before the round's local work instead of after it.
        upload: (client) -> upload over the catalogue.
        server_update: (key, Server, mean of the uploads over all users) -> Server.
        apply: (key, shared, client over the catalogue, data) -> (client, info); `data` are the client's samples of the
            round, its `rows` the working set among the catalogue.
        sampling: how `data` are drawn; with the method's own negatives and redraw=round these are the round's samples.
        roles: shared roles that travel in this pass only: a round's local work does not see them.
    """

    due: Callable[[int], bool]
    at_start: bool
    upload: Callable[[Client], Upload]
    server_update: Callable[[PRNGKey, Server, Upload], Server]
    apply: Callable[[PRNGKey, Params, Client, LocalData], tuple[Client, Info]]
    sampling: Sampling
    roles: tuple[str, ...] = ()


class Method(NamedTuple):
    """A federated method. Every function but the three server ones is written for one client.

    Attributes:
        name: as in METHODS.
        init_server: (key) -> Server.
        init_client: (key, shared) -> Client.
        publish: (key, Server) -> shared; at each round's start and before evaluation.
        download: (shared, mail, client, data) -> Params, the on-device model on the client's rows.
        local_update: (key, shared, params, data) -> (params, update, info).
        upload: (key, shared, params, update, data) -> (client, upload): what stays, what is sent.
        server_update: (key, Server, Aggregate) -> (Server, Mail), the answers in the order of user ids [users, ...], or
            of the uploads where the aggregator works over the mail; () answers nobody.
        score: (shared, params, data) -> logits [items], given params over the full catalogue.
        aggregator: how uploads are folded.
        sampling: how local data are drawn.
        evaluate_at: `post_aggregate` scores the freshly downloaded model; `post_local` lets every client run its
            local update on it first and scores what the client then holds (nothing of it is kept).
        client_init: clients start from their own key each (`random`) or from one key (`shared`).
        explain: (shared, params, data) -> what a client can say of itself, small arrays by name, given params over the
            full catalogue (a router's weights); {} by default.
        rows: `touched` restricts item roles to the working set; `all` hands every client the catalogue.
        config: the settings the method was built from, for the log.
        exchange: a dense pass over all clients in some rounds, or None.
        public: roles of an upload that tell no more than how many steps a client takes; a privacy mechanism leaves them
            as they are.
        known: (shared) -> what of an upload the server knows beforehand, where clients send tables and not their
            changes: a privacy mechanism clips the difference.
        scratch: bytes that the server's step takes beside its state.
        keeps_upload: clients go on from what they have sent, so that noise on it would stay.
        init_mail: (Server) -> one client's mail before the first round, or () where the server answers nobody. A
            `download` is given () for a user who was not there in training.
    """

    name: str
    init_server: Callable[[PRNGKey], Server]
    init_client: Callable[[PRNGKey, Params], Client]
    publish: Callable[[PRNGKey, Server], Params]
    download: Callable[[Params, Mail, Client, LocalData], Params]
    local_update: Callable[[PRNGKey, Params, Params, LocalData], tuple[Params, Update, Info]]
    upload: Callable[[PRNGKey, Params, Params, Update, LocalData], tuple[Client, Upload]]
    server_update: Callable[[PRNGKey, Server, Aggregate], tuple[Server, Mail]]
    score: Callable[[Params, Params, LocalData], Float[Array, "items"]]
    aggregator: Aggregator
    sampling: Sampling
    evaluate_at: Literal["post_aggregate", "post_local"] = "post_aggregate"
    rows: Literal["touched", "all"] = "touched"
    client_init: Literal["random", "shared"] = "random"
    config: Any = None
    explain: Callable[[Params, Params, LocalData], dict[str, Array]] = lambda shared, params, data: {}
    exchange: Exchange | None = None
    public: tuple[str, ...] = ()
    known: Callable[[Params], Upload] | None = None
    scratch: int = 0
    keeps_upload: bool = False
    init_mail: Callable[[Server], Mail] = lambda server: ()


@struct.dataclass
class Listed:
    """Samples given as arrays [steps, batch]."""

    batches: Batch

    @property
    def most_steps(self) -> int:
        return self.batches.item.shape[0]

    def at(self, step: Int[Array, ""]) -> Batch:
        return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, step, keepdims=False), self.batches)


def batch_at(data: LocalData, step: Int[Array, ""]) -> Batch:
    """The samples of one local step."""
    return data.samples.at(step)
