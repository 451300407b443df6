"""Local differential privacy as a modifier: every client clips its upload and adds noise before it is sent.

    u_k <- u_k min(1, C / |u_k|)                          all roles of an upload together; C = `clip`, 0 does not clip
    gaussian   |.| = L2,   u_k <- u_k + N(0, s^2)         on every entry; s = `noise`, in the upload's own units
    laplace    |.| = L1,   u_k <- u_k + Laplace(0, s)     without a clip: the "noise intensity" of MDiffFR, Table 5

`rows` says which rows of an item table get noise:

    all       the client sends the whole table, as the papers' clients do (default)
    touched   the rows that its training moved alone. WHICH rows these are is then sent in the clear, and they are the
              client's items and negatives: no epsilon holds (accounting.py says so). A mean by row goes with this alone

Noise on all rows would cost clients x items x dim draws a round, where a round costs interactions. The server only ever
sees a sum, so where the aggregate is the plain mean, the sum of n clients' draws is drawn at once, exactly in
distribution: N(0, n s^2), and s (Gamma(n) - Gamma(n)) for Laplace, since Laplace is a difference of two exponentials.
Elsewhere (weights by size, uploads that are kept apart) every client draws its own noise and works on the whole
catalogue; `per_client=True` asks for this, as the oracle and for attacks on single uploads.

An exchange (FedRKG's tables) is clipped and noised alike, whole tables with one sum over all users.

Follows: MDiffFR section 6.7 (Laplace, not clipped); FedRKG section 5.2 (the noise on what is released; noise on every
step is `step_noise` of methods/fedrkg.py). Deviations: noise acts on what a method uploads, which is the change of
its tables and networks, not the tables (the same for the server, which knows what it sent; where tables are sent, as by
GPFedRec, their change against the common one is clipped); for IFedRec the change
without the pull, whose factor, a function of the number of steps, stays as it is; for EASE the history. Draws are
float32, whose gaps are an attack of their own (Mironov 2012): this is a simulator.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from fedjax_rec import aggregate
from fedjax_rec.method import Aggregator, Exchange, Method, Upload
from fedjax_rec.types import ITEM_ROLES, PRNGKey, PyTree
from fedjax_rec.validate import one_of, positive

STREAM = 0x6E6F6973  # of a key's noise: methods fold small numbers
DRAW = {"gaussian": jax.random.normal, "laplace": jax.random.laplace}


@dataclasses.dataclass(frozen=True)
class Mechanism:
    """Settings; see the module docstring.

    Attributes:
        kind: `gaussian` or `laplace`.
        clip: bound on an upload's norm, 0 for none.
        noise: standard deviation (gaussian) or scale (laplace) on every entry.
        rows: `all` or `touched`.
    """

    kind: str = "gaussian"
    clip: float = 0.0
    noise: float = 0.0
    rows: str = "all"

    def __post_init__(self):
        one_of("dp_mechanism", self.kind, DRAW)
        one_of("dp_rows", self.rows, ("all", "touched"))
        positive("dp_clip", self.clip, zero_allowed=True)
        positive("dp_noise", self.noise, zero_allowed=True)


def private(method: Method, mechanism: Mechanism, num_users: int, *, per_client: bool = False) -> Method:
    """`method` whose clients clip and noise what they send.

    Args:
        method: any method.
        mechanism: see Mechanism.
        num_users: who takes part in an exchange.
        per_client: every client draws its own noise, even where the sum of all can be drawn at once.

    Raises:
        ValueError: for a method with noise of its own on uploads, whose clients keep what they send, or whose server
            asks who moved a row; when it is traced, for one that sends ids.
    """
    if method.keeps_upload:
        raise ValueError(
            f"dp_mechanism={mechanism.kind} with method={method.name}: its clients go on from tables that they have "
            "sent, in which noise would add up; leave dp_mechanism out or choose another method"
        )
    if getattr(method.config, "noise_std", 0):
        raise ValueError(
            f"noise_std={method.config.noise_std:g} with dp_mechanism={mechanism.kind}: expected one kind of noise on "
            "uploads; leave one of both out"
        )
    noisy, dense = bool(mechanism.noise), mechanism.rows == "all"
    if noisy and dense and method.aggregator.by_row:
        raise ValueError(
            f"a mean by row with dp_mechanism={mechanism.kind}: noise moves every row of what a client sends, so that "
            "each would be the mean over all clients; set --set weighting=equal, or --dp_rows=touched"
        )
    at_once = noisy and dense and can_be_summed(method.aggregator) and not per_client

    def upload(key, shared, params, update, data):
        kept, sent = method.upload(key, shared, params, update, data)
        sent, public = _apart(sent, method.public)
        if any(not jnp.issubdtype(x.dtype, jnp.floating) for x in jax.tree.leaves(sent)):
            raise ValueError(
                f"dp_mechanism={mechanism.kind} with method={method.name}: its clients send item ids, on which noise "
                "makes no sense; leave dp_mechanism out or choose a method whose clients send numbers"
            )
        if mechanism.clip and method.known:
            change = jax.tree.map(jnp.subtract, sent, method.known(shared))
            within = clipped(change, mechanism, data.row_mask)
            # exactly what is sent where nothing is cut off
            sent = jax.tree.map(lambda whole, kept, was: whole + (kept - was), sent, within, change)
        elif mechanism.clip:
            sent = clipped(sent, mechanism, data.row_mask)
        if noisy and not at_once:
            added = client_noise(jax.random.fold_in(key, STREAM), mechanism, sent, data.rows)
            sent = jax.tree.map(jnp.add, sent, added)
        return kept, {**sent, **public} if public else sent

    def server_update(key, server, received):
        mean, public = _apart(received.value, method.public)
        # equal weights: their sum is the number of clients
        mean = with_mean_noise(jax.random.fold_in(key, STREAM), mechanism, mean, received.weight)
        mean = {**mean, **public} if public else mean
        return method.server_update(key, server, received._replace(value=mean))

    return method._replace(
        upload=upload,
        server_update=server_update if at_once else method.server_update,
        rows="all" if noisy and dense and not at_once else method.rows,
        exchange=method.exchange and _private_exchange(method.exchange, mechanism, num_users),
    )


def _apart(sent: Upload, public: tuple[str, ...]) -> tuple[Upload, Upload]:
    """What a mechanism acts on, and the public roles."""
    if not public:
        return sent, {}
    return {r: v for r, v in sent.items() if r not in public}, {r: sent[r] for r in public}


def _private_exchange(exchange: Exchange, mechanism: Mechanism, num_users: int) -> Exchange:
    def upload(client):
        sent = exchange.upload(client)
        return clipped(sent, mechanism) if mechanism.clip else sent

    def server_update(key, server, mean):
        if mechanism.noise:
            mean = with_mean_noise(jax.random.fold_in(key, STREAM), mechanism, mean, jnp.float32(num_users))
        return exchange.server_update(key, server, mean)

    return exchange._replace(upload=upload, server_update=server_update)


def can_be_summed(aggregator: Aggregator) -> bool:
    """Whether the server sees nothing of the uploads but their plain mean."""
    return aggregator.is_mean and aggregator.weight is aggregate.equal


def length(upload: PyTree, kind: str) -> Float[Array, ""]:
    """Norm of everything that is sent: L2 for gaussian, L1 for laplace."""
    leaves = jax.tree.leaves(upload)
    if kind == "laplace":
        return sum((jnp.abs(x).sum() for x in leaves), jnp.zeros(()))
    return jnp.sqrt(sum(((x * x).sum() for x in leaves), jnp.zeros(())))


def clipped(upload: Upload, mechanism: Mechanism, row_mask: Bool[Array, "rows"] | None = None) -> Upload:
    """The upload with a norm of at most `clip`.

    Args:
        row_mask: False for rows of item roles that are padding and not part of the upload.
    """
    if row_mask is not None:
        upload = {
            role: jax.tree.map(lambda x: _where_rows(row_mask, x), value) if role in ITEM_ROLES else value
            for role, value in upload.items()
        }
    factor = jnp.minimum(1.0, mechanism.clip / jnp.maximum(length(upload, mechanism.kind), 1e-30))
    return jax.tree.map(lambda x: x * factor, upload)


def client_noise(key: PRNGKey, mechanism: Mechanism, upload: Upload, rows: Int[Array, "rows"]) -> Upload:
    """One client's noise, in the shape of its upload. A row's draw depends on the key and the item alone."""
    noise = {}
    for place, (role, value) in enumerate(sorted(upload.items())):
        leaves, structure = jax.tree.flatten(value)
        keys = [jax.random.fold_in(jax.random.fold_in(key, place), n) for n in range(len(leaves))]
        if role in ITEM_ROLES:
            drawn = [_row_draws(k, mechanism, x, rows) for k, x in zip(keys, leaves, strict=True)]
            if mechanism.rows == "touched":
                moved = jnp.stack([(x != 0).any(axis=tuple(range(1, x.ndim))) for x in leaves]).any(0)
                drawn = [_where_rows(moved, x) for x in drawn]
        else:
            drawn = [mechanism.noise * DRAW[mechanism.kind](k, x.shape) for k, x in zip(keys, leaves, strict=True)]
        noise[role] = jax.tree.unflatten(structure, drawn)
    return noise


def _row_draws(key, mechanism: Mechanism, table: Float[Array, "rows ..."], rows: Int[Array, "rows"]):
    one = lambda item: DRAW[mechanism.kind](jax.random.fold_in(key, item), table.shape[1:])
    return mechanism.noise * jax.vmap(one)(rows)


def _where_rows(mask: Bool[Array, "rows"], table: Float[Array, "rows ..."]) -> Float[Array, "rows ..."]:
    return jnp.where(mask.reshape(-1, *(1,) * (table.ndim - 1)), table, 0.0)


def with_mean_noise(key: PRNGKey, mechanism: Mechanism, mean: PyTree, count: Float[Array, ""]) -> PyTree:
    """The mean of `count` uploads, each with its own noise, from the mean of the uploads without."""
    leaves, structure = jax.tree.flatten(mean)
    some = jnp.maximum(count, 1.0)
    noisy = []
    for place, x in enumerate(leaves):
        total = summed_noise(jax.random.fold_in(key, place), mechanism, some, x.shape)
        noisy.append(jnp.where(count > 0, x + total / some, x))
    return jax.tree.unflatten(structure, noisy)


def summed_noise(
    key: PRNGKey, mechanism: Mechanism, count: Float[Array, ""], shape: tuple[int, ...]
) -> Float[Array, "..."]:
    """The sum of `count` clients' draws, in distribution."""
    if mechanism.kind == "gaussian":
        return mechanism.noise * jnp.sqrt(count) * jax.random.normal(key, shape)
    k_plus, k_minus = jax.random.split(key)
    return mechanism.noise * (jax.random.gamma(k_plus, count, shape) - jax.random.gamma(k_minus, count, shape))


def describe(mechanism: Mechanism) -> str:
    """One line for people."""
    norm, size = {"gaussian": ("L2", "standard deviation"), "laplace": ("L1", "scale")}[mechanism.kind]
    bound = f"clipped to {norm} norm {mechanism.clip:g}" if mechanism.clip else "not clipped"
    return f"{mechanism.kind} noise of {size} {mechanism.noise:g} on {mechanism.rows} rows of every upload, {bound}"
