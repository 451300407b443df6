"""A conditional diffusion model of item rows: it learns how warm rows are spread given the items' features, and makes
rows for items that nobody has touched.

    1 - abar_t = s [low + (t - 1) / (T - 1) (high - low)]                         Eq. 6, t = 1 .. T
    x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) noise                               Eq. 5
    L = E_t E_noise w_t |x^_0(x_t, t, m) - x_0|^2 / dim                           Eq. 14 (w_t = 1), Eq. 12 (w_t = SNR)
    x_{t-1} = c_t x^_0 + d_t x_t [+ sigma_t z]                                    Eqs. 10-11, Algorithm 2
    c_t = sqrt(abar_{t-1}) beta_t / (1 - abar_t),   d_t = sqrt(alpha_t) (1 - abar_{t-1}) / (1 - abar_t)
    K = V = [P_t(time), P_m(features)],   Q = W_q x_t                             Eqs. 16-17

Follows: MDiffFR, Section 4 and its released code, whose choices are settings. Steps are counted from 0 in the code:
index t - 1 of the formulas. The key projection has no bias, because a softmax does not see one.
"""

from __future__ import annotations

import dataclasses
import functools
import types
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from fedjax_rec.types import Params, PRNGKey, PyTree
from fedjax_rec.validate import between, one_of, positive

MAX_BETA = 0.999
TIME_PERIOD = 1e4
FUSIONS = ("attention", "mean", "concat")
OPTIMIZERS = ("sgd", "adam", "adamw")


class Schedule(NamedTuple):
    """The numbers of every step, float32 [steps]; index 0 is the last step of the sampling."""

    signal: Float[np.ndarray, "steps"]  # sqrt(abar)
    noise: Float[np.ndarray, "steps"]  # sqrt(1 - abar)
    on_clean: Float[np.ndarray, "steps"]  # c_t
    on_noisy: Float[np.ndarray, "steps"]  # d_t
    sigma: Float[np.ndarray, "steps"]  # of the posterior
    snr: Float[np.ndarray, "steps"]  # abar / (1 - abar)
    weight: Float[np.ndarray, "steps"]  # SNR(t - 1) - SNR(t), 1 at the first step


def linear_schedule(steps: int, scale: float, low: float, high: float, first_beta: float | None = None) -> Schedule:
    """Eq. 6 and what follows from it (Eqs. 10-12), worked out in float64.

    A beta is at most MAX_BETA, as in the released code. The weight has no factor 1/2 (Eq. 12 has): a constant.

    Args:
        first_beta: what the first step's beta is instead, the others staying as they are.
    """
    wanted = 1.0 - scale * np.linspace(low, high, steps)
    before = np.append(1.0, wanted[:-1])
    beta = np.minimum(1.0 - wanted / before, MAX_BETA)
    if first_beta is not None:
        beta[0] = first_beta
    kept = np.cumprod(1.0 - beta)
    before = np.append(1.0, kept[:-1])
    snr = kept / (1.0 - kept)
    numbers = (
        np.sqrt(kept),
        np.sqrt(1.0 - kept),
        np.sqrt(before) * beta / (1.0 - kept),
        np.sqrt(1.0 - beta) * (1.0 - before) / (1.0 - kept),
        np.sqrt(beta * (1.0 - before) / (1.0 - kept)),
        snr,
        np.append(1.0, snr[:-1] - snr[1:]),
    )
    return Schedule(*(x.astype(np.float32) for x in numbers))


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of a diffusion model.

    Attributes:
        steps, scale, low, high: T, s and the two bounds of Eq. 6.
        residual: x^_0 = sqrt(abar) x_t + sqrt(1 - abar) network, where x_t and the features also enter the network's
            sum and the network has residual blocks; else x_t is only the attention's query, as released.
        hidden: width of the residual network's blocks; the other one has the released widths, dim and dim / 2.
        heads, dropout: of the attention; of the normalised x_t.
        fusion: `attention` (Eqs. 16-17), or without it the `mean` or a map of the `concat`enation of time and features.
            Only the attention's query and the residual path let x_t in: with neither (or, without features, no residual
            path) what is made does not depend on the noise, and without features all rows are equal.
        weights: `uniform` (Eq. 14) or `snr` (Eq. 12) weights of the steps.
        optimizer, lr, weight_decay: of the training; weight decay is added to the gradient for sgd and adam.
        epochs, batch_size: passes over the warm rows per round, rows per step.
        ema: decay of the averaged weights that sample; 0 samples with the newest.
        drop_condition: share of training rows whose features are withheld, which classifier-free guidance needs.
        guidance_scale: x^_0 = x^_0(nothing) + scale (x^_0(features) - x^_0(nothing)); 1 is the plain conditional model.
        sampling_noise: add sigma_t z at every step but the last; Algorithm 2 does not.
        standardise: rows are brought to mean 0 and variance 1 in every dimension, so that they end in the prior.
    """

    steps: int = 10
    scale: float = 0.1
    low: float = 1e-4
    high: float = 0.02
    residual: bool = False
    hidden: int = 128
    heads: int = 4
    dropout: float = 0.1
    fusion: str = "attention"
    weights: str = "uniform"
    optimizer: str = "adam"
    lr: float = 1e-3
    weight_decay: float = 0.0
    epochs: int = 1
    batch_size: int = 256
    ema: float = 0.0
    drop_condition: float = 0.0
    guidance_scale: float = 1.0
    sampling_noise: bool = False
    standardise: bool = False

    def __post_init__(self):
        check(self)


def check(given: Any, names: Mapping[str, str] = types.MappingProxyType({})) -> None:
    """Refuses bad values of the Settings that `given` holds under their own names, or under those of `names`."""
    called = lambda name: names.get(name, name)
    value = lambda name: getattr(given, called(name))
    for name in ("steps", "hidden", "heads", "lr", "epochs", "batch_size"):
        positive(called(name), value(name))
    low, high = (value("scale") * value(bound) for bound in ("low", "high"))
    between(f"{called('scale')} * {called('low')}", low, 1e-9, 1.0)
    between(f"{called('scale')} * {called('high')}", high, low, 1.0 - 1e-9)
    for name in ("weight_decay", "guidance_scale"):
        positive(called(name), value(name), zero_allowed=True)
    for name in ("dropout", "ema", "drop_condition"):
        between(called(name), value(name), 0.0, 0.9999)
    one_of(called("fusion"), value("fusion"), FUSIONS)
    one_of(called("weights"), value("weights"), ("uniform", "snr"))
    one_of(called("optimizer"), value("optimizer"), OPTIMIZERS)
    if value("guidance_scale") != 1 and not value("drop_condition"):
        raise ValueError(
            f"guidance_scale={value('guidance_scale')} with drop_condition=0: the model has not learned what it makes "
            "without features; set drop_condition above 0"
        )


class Denoiser(nn.Module):
    """x^_0 from a noisy row, its step and its features."""

    width: int
    settings: Settings

    @nn.compact
    def __call__(
        self,
        noisy: Float[Array, "n width"],
        step: Int[Array, "n"],
        features: Float[Array, "n feat"],
        known: Float[Array, "n"],
        *,
        train: bool = False,
    ) -> Float[Array, "n width"]:
        """`known`: 1 where the features may be seen; elsewhere a learned vector stands for them."""
        s, width = self.settings, self.width
        dense = functools.partial(nn.Dense, kernel_init=nn.initializers.xavier_normal())
        time = nn.tanh(dense(width)(sinusoids(step)))
        if features.shape[1]:
            modality = nn.tanh(dense(width)(features))
            nothing = self.param("nothing", nn.initializers.zeros, (width,))
            conditions = jnp.stack([time, jnp.where(known[:, None] > 0, modality, nothing)], axis=1)
        else:
            conditions = time[:, None]
        query = nn.LayerNorm()(noisy)
        query = nn.Dropout(s.dropout)(query, deterministic=not train)
        fused = Fusion(width, s.heads, s.fusion)(query, conditions)
        if s.residual:
            hidden = dense(s.hidden)(noisy) + dense(s.hidden)(fused)
            if features.shape[1]:
                # the features also enter uncut: two tanh layers of the rows' width are a bottleneck
                hidden += dense(s.hidden)(jnp.where(known[:, None] > 0, features, 0.0))
            for _ in range(2):
                inner = nn.silu(dense(2 * s.hidden)(nn.LayerNorm()(hidden)))
                inner = nn.Dropout(s.dropout)(inner, deterministic=not train)
                hidden = hidden + dense(s.hidden)(inner)
            # what is left of x_t in x_0 when both have variance 1 (Karras et al. 2022), plus a correction
            kept = linear_schedule(s.steps, s.scale, s.low, s.high)
            signal, noise = (jnp.asarray(x)[step, None] for x in (kept.signal, kept.noise))
            return signal * noisy + noise * dense(width)(nn.LayerNorm()(hidden))
        hidden = nn.LayerNorm()(fused * (1.0 + self.param("gate", nn.initializers.constant(0.1), ())))
        for size in (max(width // 2, 1), width, max(width // 2, 1)):
            hidden = nn.tanh(dense(size)(hidden))
        return dense(width)(hidden)


class Fusion(nn.Module):
    """Attention of one query over a handful of conditions, or what stands for it in the ablation."""

    width: int
    heads: int
    mode: str

    @nn.compact
    def __call__(self, query: Float[Array, "n width"], conditions: Float[Array, "n tokens width"]):
        dense = functools.partial(nn.Dense, kernel_init=nn.initializers.xavier_normal())
        if self.mode == "mean":
            return conditions.mean(1)
        if self.mode == "concat":
            return dense(self.width)(conditions.reshape(conditions.shape[0], -1))
        tokens = nn.tanh(dense(self.width)(conditions))
        inner = -(-self.width // self.heads) * self.heads
        split = lambda x: x.reshape(*x.shape[:-1], self.heads, inner // self.heads)
        q, v = split(dense(inner)(query)), split(dense(inner)(tokens))
        k = split(dense(inner, use_bias=False)(tokens))
        share = jax.nn.softmax(jnp.einsum("nhd,nthd->nht", q, k) * (inner // self.heads) ** -0.5, axis=-1)
        return dense(self.width)(jnp.einsum("nht,nthd->nhd", share, v).reshape(query.shape[0], inner))


def sinusoids(step: Int[Array, "n"], width: int = 16) -> Float[Array, "n width"]:
    """Sines and cosines of the step number at falling frequencies."""
    frequency = TIME_PERIOD ** (-jnp.arange(width // 2) / (width // 2))
    angle = step[:, None] * frequency
    return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=1)


def noised(
    schedule: Schedule, clean: Float[Array, "n width"], step: Int[Array, "n"], noise: Float[Array, "n width"]
) -> Float[Array, "n width"]:
    """x_t of Eq. 5."""
    return jnp.asarray(schedule.signal)[step, None] * clean + jnp.asarray(schedule.noise)[step, None] * noise


def loss_of(
    predicted: Float[Array, "n width"], clean: Float[Array, "n width"], weight: Float[Array, "n"]
) -> Float[Array, ""]:
    """Mean over the rows of weight times squared error, the latter a mean over dimensions."""
    return (weight * ((predicted - clean) ** 2).mean(1)).mean()


def posterior_mean(
    schedule: Schedule, step: Int[Array, ""], predicted: Float[Array, "n width"], noisy: Float[Array, "n width"]
) -> Float[Array, "n width"]:
    """mu of Eq. 11."""
    return jnp.asarray(schedule.on_clean)[step] * predicted + jnp.asarray(schedule.on_noisy)[step] * noisy


@dataclasses.dataclass(frozen=True, eq=False)
class Diffusion:
    """A diffusion model over rows of `width` numbers given `feat` features (0: without guidance)."""

    settings: Settings
    width: int
    feat: int

    @functools.cached_property
    def schedule(self) -> Schedule:
        s = self.settings
        return linear_schedule(s.steps, s.scale, s.low, s.high)

    @functools.cached_property
    def denoiser(self) -> Denoiser:
        return Denoiser(self.width, self.settings)

    @functools.cached_property
    def optimizer(self) -> optax.GradientTransformation:
        s = self.settings
        if s.optimizer == "adamw":
            return optax.adamw(s.lr, weight_decay=s.weight_decay)
        plain = {"sgd": optax.sgd, "adam": optax.adam}[s.optimizer](s.lr)
        return optax.chain(optax.add_decayed_weights(s.weight_decay), plain) if s.weight_decay else plain

    def init(self, key: PRNGKey) -> dict[str, PyTree]:
        """State: network, optimiser, averaged weights, and the rows' mean and spread."""
        rows = jnp.zeros((1, self.width))
        params = self.denoiser.init(key, rows, jnp.zeros(1, jnp.int32), jnp.zeros((1, self.feat)), jnp.ones(1))
        return {
            "params": params,
            "optimizer": self.optimizer.init(params),
            "average": jax.tree.map(jnp.copy, params) if self.settings.ema else (),
            "steps": jnp.zeros((), jnp.int32),
            "mean": jnp.zeros(self.width),
            "std": jnp.ones(self.width),
        }

    def batch_loss(
        self,
        params: Params,
        key: PRNGKey,
        clean: Float[Array, "n width"],
        features: Float[Array, "n feat"],
        present: Float[Array, "n"],
    ) -> Float[Array, ""]:
        """Eq. 14 (or 12) on a batch: one step number and one noise draw per row. `present`: 0 for padding rows."""
        s = self.settings
        k_step, k_noise, k_known, k_dropout = jax.random.split(key, 4)
        count = clean.shape[0]
        step = jax.random.randint(k_step, (count,), 0, s.steps)
        noisy = noised(self.schedule, clean, step, jax.random.normal(k_noise, clean.shape))
        known = (jax.random.uniform(k_known, (count,)) >= s.drop_condition).astype(jnp.float32)
        predicted = self.denoiser.apply(params, noisy, step, features, known, train=True, rngs={"dropout": k_dropout})
        weight = jnp.asarray(self.schedule.weight)[step] if s.weights == "snr" else jnp.ones(count)
        return loss_of(predicted, clean, weight * present * count / jnp.maximum(present.sum(), 1.0))

    @functools.partial(jax.jit, static_argnums=0)
    def train(
        self, key: PRNGKey, state: dict[str, PyTree], rows: Float[Array, "n width"], features: Float[Array, "n feat"]
    ) -> dict[str, PyTree]:
        """`epochs` passes over the rows in random batches."""
        s, count = self.settings, rows.shape[0]
        batch = min(s.batch_size, count)
        batches = -(-count // batch)
        if s.standardise:
            state = {**state, "mean": rows.mean(0), "std": jnp.maximum(rows.std(0), 1e-6)}
        clean = (rows - state["mean"]) / state["std"]

        def step(held, drawn):
            params, optimizer, average, steps = held
            index, present, k = drawn
            grads = jax.grad(self.batch_loss)(params, k, clean[index], features[index], present)
            change, optimizer = self.optimizer.update(grads, optimizer, params)
            params = optax.apply_updates(params, change)
            if s.ema:
                # the average's first steps follow the weights, so that it does not remember the random start
                decay = jnp.minimum(s.ema, (1.0 + steps) / (10.0 + steps))
                average = jax.tree.map(lambda a, p: decay * a + (1 - decay) * p, average, params)
            return (params, optimizer, average, steps + 1), None

        def epoch(held, k):
            k_order, k_steps = jax.random.split(k)
            order = jnp.pad(jax.random.permutation(k_order, count), (0, batches * batch - count))
            present = (jnp.arange(batches * batch) < count).astype(jnp.float32)
            drawn = (order.reshape(batches, batch), present.reshape(batches, batch), jax.random.split(k_steps, batches))
            return jax.lax.scan(step, held, drawn)[0], None

        held = (state["params"], state["optimizer"], state["average"], state["steps"])
        held, _ = jax.lax.scan(epoch, held, jax.random.split(key, s.epochs))
        return {**state, **dict(zip(("params", "optimizer", "average", "steps"), held, strict=True))}

    def predict(
        self, params: Params, noisy: Float[Array, "n width"], step: Int[Array, ""], features: Float[Array, "n feat"]
    ) -> Float[Array, "n width"]:
        """x^_0 with classifier-free guidance."""
        s, count = self.settings, noisy.shape[0]
        steps = jnp.full(count, step)
        given = self.denoiser.apply(params, noisy, steps, features, jnp.ones(count))
        if s.guidance_scale == 1:
            return given
        free = self.denoiser.apply(params, noisy, steps, features, jnp.zeros(count))
        return free + s.guidance_scale * (given - free)

    @functools.partial(jax.jit, static_argnums=0)
    def sample(
        self, key: PRNGKey, state: dict[str, PyTree], features: Float[Array, "n feat"]
    ) -> Float[Array, "n width"]:
        """Rows for items with these features (Algorithm 2), from N(0, I)."""
        s, schedule = self.settings, self.schedule
        params = state["average"] if s.ema else state["params"]
        k_start, k_noise = jax.random.split(key)
        start = jax.random.normal(k_start, (features.shape[0], self.width))

        def backwards(noisy, step):
            noisy = posterior_mean(schedule, step, self.predict(params, noisy, step, features), noisy)
            if s.sampling_noise:  # sigma is 0 at the last step
                drawn = jax.random.normal(jax.random.fold_in(k_noise, step), noisy.shape)
                noisy = noisy + jnp.asarray(schedule.sigma)[step] * drawn
            return noisy, None

        made, _ = jax.lax.scan(backwards, start, jnp.arange(s.steps - 1, -1, -1))
        return made * state["std"] + state["mean"]
