"""What the noise is worth: (epsilon, delta) at user level, by the Renyi accountant of dp-accounting (extra `privacy`).

A client sends `count` releases over a run. Two data sets that it might have change each by at most `sensitivity`:

    upload    2 clip, the distance of two clipped uploads; once in every round (and exchange) that it takes part in
    table     2 eta T_int E C (FedRKG, Eq. 14) for the first table that a guidance round releases: a sum of clipped
              steps. The paper takes intervals to begin at equal parameters; here they begin at what guidance left, of
              which the client's own table is the share beta: release r has 1 + beta + ... + beta^(r-1) times as much
    step      2 C, at every step of every round (and of the gate's training); what is released afterwards is covered

Steps are not amplified by mini-batches, as all data of a client may change. Two observers:

    server    sees who sends what: every release has its own client's noise (local differential privacy)
    sums      sees nothing but sums over the cohort: n clients' noise, and a cohort of n out of N drawn without
              replacement amplifies. Holds as long as the others do add theirs. Gaussian noise on uploads only: a
              client's next step depends on its own noise of the last one, which no sum shows

What leaves a client beside the noised values is listed as `unprotected`, and then no epsilon holds as a whole:
`epsilon` is infinite, and those of the values alone stay beside it.

Follows: FedRKG section 5.2 (moments accountant: Abadi et al. 2016; here Mironov 2017). Deviation: the paper's noise is
set against C, the distance of a gradient to zero; two data sets are 2 C apart. Which rounds a client takes part in, how
many steps it does and whether it has data at all count as public; so do settings tuned on the data.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from fedjax_rec import aggregate
from fedjax_rec.data.sampling import sizes
from fedjax_rec.experiment import Experiment
from fedjax_rec.method import Sampling
from fedjax_rec.methods import fedrkg
from fedjax_rec.privacy.mechanisms import DRAW, can_be_summed
from fedjax_rec.rounds import Engine
from fedjax_rec.validate import one_of, positive
from fedjax_rec.workdir import UsageError

# dp-accounting's own, and closer to 1 (its least is 1.01), where large epsilons are
ORDERS = (*(1 + np.geomspace(0.0101, 0.99, 25)), *range(2, 64), 80, 128, 256, 512, 1024)


class Release(NamedTuple):
    """A client's releases: `count` times noise of scale `noise` (gaussian: standard deviation) on a value of this
    sensitivity. Sums are those of `sampled` out of `population` clients, `rounds` times (0: as `count`); sampled=0 for
    what is not summed."""

    kind: str
    noise: float
    sensitivity: float
    count: int
    sampled: int = 0
    population: int = 0
    rounds: int = 0


class Plan(NamedTuple):
    """One mechanism of a run: its releases, and what it does not cover."""

    releases: tuple[Release, ...]
    unprotected: tuple[str, ...]


def library() -> Any:
    """dp-accounting.

    Raises:
        UsageError: if it is not installed.
    """
    try:
        import dp_accounting
        import dp_accounting.rdp
    except ImportError:
        raise UsageError(
            "epsilon needs dp-accounting, which is not installed: pip install 'fedjax_rec[privacy]', or run without "
            "dp_clip, where there is none to work out"
        ) from None
    return dp_accounting


def sensitivity_bound(lr: float, interval: int, epochs: int, clip: float, steps_per_epoch: int = 1) -> float:
    """2 eta T_int E C of FedRKG (Eqs. 10-14): how far apart two training paths of one interval can end.

    Args:
        lr: rate of the clipped gradients, eta.
        interval: rounds between two releases, T_int.
        epochs: local epochs of a round, E.
        clip: bound on the norm of a gradient, C.
        steps_per_epoch: gradients of an epoch; Eq. 14 has one.

    Raises:
        ValueError: for a number that is not positive.
    """
    given = {"lr": lr, "interval": interval, "epochs": epochs, "clip": clip, "steps_per_epoch": steps_per_epoch}
    for name, value in given.items():
        positive(name, value)
    return 2.0 * lr * interval * epochs * steps_per_epoch * clip


def epsilon(releases: tuple[Release, ...], delta: float, observer: str = "server") -> float:
    """Epsilon of all releases together; infinite without noise or without a bound.

    Args:
        delta: of (epsilon, delta).
        observer: `server` or `sums`, see the module docstring. Sums of Laplace noise have no accountant: infinite.

    Raises:
        ValueError: for a delta outside (0, 1), an unknown kind of noise or observer, or a sensitivity that is not
            positive.
    """
    one_of("observer", observer, ("server", "sums"))
    if not 0 < delta < 1:
        raise ValueError(f"delta={delta}: expected a number in (0, 1), like 1e-5")
    for r in releases:
        one_of("kind", r.kind, DRAW)
        positive("sensitivity", r.sensitivity)
    if not any(r.count for r in releases):
        return 0.0
    if any(r.count and not (r.noise > 0 and math.isfinite(r.sensitivity)) for r in releases):
        return math.inf
    if observer == "sums" and any(r.kind != "gaussian" or not r.sampled for r in releases):
        return math.inf
    dp = library()
    held = dp.rdp.RdpAccountant(ORDERS, dp.NeighboringRelation.REPLACE_ONE)
    for r in releases:
        multiplier = r.noise / r.sensitivity
        if r.kind == "laplace":
            event = dp.LaplaceDpEvent(multiplier)
        elif observer == "server":
            event = dp.GaussianDpEvent(multiplier)
        else:
            event = dp.GaussianDpEvent(multiplier * math.sqrt(r.sampled))
            if r.sampled < r.population:
                event = dp.SampledWithoutReplacementDpEvent(r.population, r.sampled, event)
        held.compose(event, r.rounds or r.count if observer == "sums" else r.count)
    worked_out = float(held.get_epsilon(delta))
    if all(r.kind == "laplace" for r in releases):  # pure, without any delta
        return min(worked_out, sum(r.count * r.sensitivity / r.noise for r in releases))
    return worked_out


def noise_for(releases: tuple[Release, ...], target: float, delta: float, observer: str = "server") -> float:
    """The noise with which all of these releases together cost `target`: `epsilon` the other way round.

    Args:
        releases: what is released; its own noise is not read.
        target: the epsilon asked for, > 0.
        delta, observer: as in `epsilon`.

    Raises:
        ValueError: if no noise earns it: nothing is released, without a bound, or the target is out of reach.
    """
    positive("target", target)
    cost = lambda noise: epsilon(tuple(r._replace(noise=noise) for r in releases), delta, observer)
    unit = max((r.sensitivity for r in releases if r.count), default=math.inf)
    if math.isfinite(unit) and cost(1e6 * unit) <= target <= cost(1e-6 * unit) < math.inf:
        import scipy.optimize  # a fifth of a second, which runs without privacy need not wait for

        off = lambda log_noise: math.log(max(cost(math.exp(log_noise)), 1e-300) / target)
        found = math.exp(scipy.optimize.brentq(off, math.log(1e-6 * unit), math.log(1e6 * unit), xtol=1e-4))
        if math.isclose(cost(found), target, rel_tol=0.01):
            return found
    raise ValueError(
        f"epsilon {target:g}: no noise earns it, as nothing is released, a sensitivity has no bound, or the accountant "
        "does not resolve so small (or large) a value; give one between 0.1 and 1e6"
    )


def most_steps(engine: Engine, sampling: Sampling) -> int:
    """Local steps of the client with the longest history in one pass of `sampling`."""
    most = 0
    for bucket in engine.clients.buckets:
        size = sizes(sampling, bucket.history.shape[1], engine.clients.num_items)
        longest = int(np.max(bucket.length, initial=0))
        most = max(most, sampling.local_epochs * max(-(-longest * (1 + sampling.negatives) // size.batch), 1))
    return most


def plans(ready: Experiment, rounds: int) -> dict[str, Plan]:
    """The mechanisms of a run of so many rounds, by name; {} for a run without any."""
    config, method, users = ready.config, ready.method, ready.split.num_users
    own, found = method.config, {}
    mechanism, noise = config.mechanism, getattr(method.config, "step_noise", 0.0)
    if not (mechanism or noise):
        return found
    taken = [ready.cohort_users(number) for number in range(rounds)]
    cohort = users if not taken or taken[0] is None else len(taken[0])
    count = rounds if cohort == users else int(np.bincount(np.concatenate(taken), minlength=users).max())
    guided = sum(method.exchange.due(number) for number in range(rounds)) if method.exchange else 0
    sends = ready.engine.bytes_per_client()["up_rows"] > 0
    if mechanism:
        releases, unprotected = [], []
        bound = 2.0 * mechanism.clip or math.inf
        if sends:
            summed = cohort if can_be_summed(method.aggregator) else 0
            releases.append(Release(mechanism.kind, mechanism.noise, bound, count, summed, users, rounds))
            if method.aggregator.weight is not aggregate.equal:
                unprotected.append("the clients' numbers of samples (their weights)")
            if mechanism.rows == "touched":
                unprotected.append("which rows an upload touches")
        if guided:
            bounds = [bound] * guided if mechanism.clip else _table_bounds(ready, guided)
            releases += [Release(mechanism.kind, mechanism.noise, b, 1, users, users) for b in bounds]
            if not mechanism.clip and math.isfinite(bounds[0]) and own.guidance == "ag":
                unprotected.append("what the gate has learned, which guidance works into the table")
        found["upload"] = Plan(tuple(releases), tuple(unprotected))
    if noise:
        steps = count * most_steps(ready.engine, method.sampling)
        if own.guidance == "ag":
            steps += guided * most_steps(ready.engine, method.exchange.sampling)
        told = ("the network that is averaged in every round",) if sends else ()
        release = Release("gaussian", noise, 2.0 * own.clip_norm, steps)
        found["step"] = Plan((release,), told)
    return found


def _table_bounds(ready: Experiment, releases: int) -> list[float]:
    """Sensitivities of FedRKG's tables, release by release, from the clipping of its steps; infinite without any."""
    own = ready.method.config
    if not (getattr(own, "clip_norm", 0.0) and own.optimizer == "sgd" and ready.config.dp_mechanism == "gaussian"):
        return [math.inf] * releases
    per_epoch = most_steps(ready.engine, ready.method.sampling) // own.local_epochs
    rate = fedrkg.item_rate(own, ready.split.num_users, ready.split.num_items)
    one = sensitivity_bound(rate, own.interval, own.local_epochs, own.clip_norm, per_epoch)
    kept = 0.0 if own.guidance == "global_only" else own.beta
    early = one / own.interval if own.delay else 0.0  # guidance one round late: a round more precedes the first
    return [one * sum(kept**age for age in range(r + 1)) + kept**r * early for r in range(releases)]


def report(ready: Experiment, rounds: int) -> dict[str, Any] | None:
    """What summary.json says under `privacy` after so many rounds; None for a run without a mechanism."""
    found = plans(ready, rounds)
    if not found:
        return None
    delta, said = ready.config.dp_delta, {}
    for name, plan in found.items():
        server = epsilon(plan.releases, delta)
        sums = epsilon(plan.releases, delta, "sums")
        sensitivities = [r.sensitivity for r in plan.releases if r.count]
        said[name] = {
            "kind": plan.releases[0].kind if plan.releases else ready.config.dp_mechanism,
            "noise": plan.releases[0].noise if plan.releases else ready.config.dp_noise,
            "releases": sum(r.count for r in plan.releases),
            "sensitivity": [min(sensitivities), max(sensitivities)] if sensitivities else [],
            "epsilon_of_values": {"server": server, "sums": sums},
            "unprotected": list(plan.unprotected),
        }
    covered = [one["epsilon_of_values"]["server"] for one in said.values() if not one["unprotected"]]
    return {
        "epsilon": min(covered, default=math.inf),
        "delta": delta,
        "adjacency": "all data of one client replaced",
        "accountant": "Renyi (dp-accounting)",
        "mechanisms": said,
    }


def check(ready: Experiment) -> None:
    """Refuses a run whose epsilon could not be worked out at its end.

    Raises:
        UsageError: see library.
    """
    releases = [r for plan in plans(ready, ready.config.rounds).values() for r in plan.releases]
    if any(r.noise > 0 and math.isfinite(r.sensitivity) for r in releases):
        library()


def describe(said: dict[str, Any]) -> list[str]:
    """Lines for people."""
    show = lambda value: "infinite" if value is None or not math.isfinite(value) else f"{value:.4g}"
    lines = [f"privacy: epsilon {show(said['epsilon'])} at delta {said['delta']:g} ({said['adjacency']})"]
    for name, one in said["mechanisms"].items():
        values = one["epsilon_of_values"]
        span = " to ".join(f"{value:.4g}" for value in sorted(set(one["sensitivity"])))
        lines.append(
            f"  {name}: {one['kind']} noise {one['noise']:g}, {one['releases']} releases of sensitivity {span or '-'}; "
            f"epsilon of the values {show(values['server'])} for the server, "
            f"{show(values['sums'])} for who sees sums alone"
        )
        lines += [f"  NOT COVERED: {what}" for what in one["unprotected"]]
    return lines
