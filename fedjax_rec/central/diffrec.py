"""CS_DiffRec: a diffusion model of whole interaction histories. NOT federated: histories are sent.

    x_0  binary vector of a user's history over all items;  x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) noise
    x^_0 = linear, tanh, linear of [dropout(x_t), linear(time)]              the denoiser, hidden widths `layers`
    L    = mean over users of w_t mean over items (x^_0 - x_0)^2 / (T p_t),  w_t = SNR(t - 1) - SNR(t), w_1 = 1
    p_t  in proportion to the root mean square of the last 10 losses of step t, uniform until every t has 10
    scores: from x_S (or x_0 itself where sampling_steps = 0) the T posterior means, x_{t-1} = c_t x^_0(x_t) + d_t x_t

The server trains on everybody's histories in mini-batches of users, one round being one epoch, and sends the network;
every client scores its own history. The log's loss is that of the epoch before.

Follows: Wang et al., Diffusion Recommender Model, SIGIR 2023 (DiffRec), and its released code: x_0 is predicted, linear
variances (see server/diffusion.py) whose first beta is 1e-5, AdamW.
"CS_DiffRec" is a row of the MDiffFR paper, of which nothing is said but that it is adapted to cold items.
`cold=literal` is the model as it is: cold items are zeros in every x_0, which it learns, so expect chance among them.
`cold=content` is OUR adaptation: a cold item's score is the mean score of the `neighbours` warm items nearest to it in
features, weighted by the cosine. On a split without cold items both are DiffRec.
Deviations: with sampling_steps > 0 a client's noise is drawn once and kept. Users without a history are left out.
"""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from fedjax_rec.central.ease import multi_hot
from fedjax_rec.central.epochs import all_samples, everybodys_samples, in_batches
from fedjax_rec.central.pairwise import Seen, interactions
from fedjax_rec.item_sources import Catalogue
from fedjax_rec.item_sources.cold import conditions, nearest_warm, warm_and_cold
from fedjax_rec.method import Method, Sampling, Server
from fedjax_rec.roles import masked_mean
from fedjax_rec.server.diffusion import linear_schedule, noised, posterior_mean, sinusoids
from fedjax_rec.sharing import LocalConfig
from fedjax_rec.validate import between, one_of, positive, widths

TIME_WIDTH, REMEMBERED, UNIFORM_SHARE, FIRST_BETA = 10, 10, 1e-3, 1e-5


@dataclasses.dataclass(frozen=True)
class Config(LocalConfig):
    """Settings of DiffRec; of LocalConfig's only lr and batch_size (users), the rest is refused.

    Attributes:
        layers: hidden widths, from the items inwards; the way back mirrors them.
        dropout: of x_t while training. weight_decay: AdamW's.
        steps, noise_scale, noise_low, noise_high: T, and the variances' scale and bounds.
        sampling_steps: S, at most T. cold, neighbours: see the module docstring.
    """

    lr: float = 0.001
    optimizer: str = "adam"
    batch_size: int = 400
    layers: tuple[int, ...] = (1000,)
    dropout: float = 0.5
    weight_decay: float = 0.0
    steps: int = 5
    noise_scale: float = 0.01
    noise_low: float = 0.001
    noise_high: float = 0.01
    sampling_steps: int = 0
    cold: str = "literal"
    neighbours: int = 20

    def __post_init__(self):
        super().__post_init__()
        known = (field.name for field in dataclasses.fields(LocalConfig))
        self.unused("cs_diffrec", *(name for name in known if name not in ("lr", "batch_size")))
        one_of("cold", self.cold, ("literal", "content"))
        if self.cold == "literal":
            self.unused("cold=literal", "neighbours")
        widths("layers", self.layers)
        for name in ("batch_size", "steps", "neighbours"):
            positive(name, getattr(self, name))
        positive("weight_decay", self.weight_decay, zero_allowed=True)
        between("dropout", self.dropout, 0.0, 0.99)
        between("sampling_steps", self.sampling_steps, 0, self.steps)
        between("noise_scale * noise_low", self.noise_scale * self.noise_low, 1e-9, 1.0)
        between(
            "noise_scale * noise_high",
            self.noise_scale * self.noise_high,
            self.noise_scale * self.noise_low,
            1.0 - 1e-9,
        )

    def sampling(self) -> Sampling:
        return Sampling(negatives=0, batch_size=0)


class Denoiser(nn.Module):
    """x^_0."""

    items: int
    layers: tuple[int, ...]
    dropout: float

    @nn.compact
    def __call__(
        self, noisy: Float[Array, "n items"], step: Int[Array, "n"], *, train: bool = False
    ) -> Float[Array, "n items"]:
        dense = lambda size: nn.Dense(
            size, kernel_init=nn.initializers.glorot_normal(), bias_init=nn.initializers.normal(1e-3)
        )
        time = dense(TIME_WIDTH)(sinusoids(step, TIME_WIDTH))
        hidden = jnp.concatenate([nn.Dropout(self.dropout)(noisy, deterministic=not train), time], axis=1)
        for size in (*self.layers, *self.layers[-2::-1]):
            hidden = nn.tanh(dense(size)(hidden))
        return dense(self.items)(hidden)


def chances(losses: Float[Array, "steps remembered"], count: Int[Array, "steps"]) -> Float[Array, "steps"]:
    """p_t."""
    uniform = jnp.full(len(losses), 1.0 / len(losses))
    size = jnp.sqrt((losses**2).mean(1))
    found = (1.0 - UNIFORM_SHARE) * size / jnp.maximum(size.sum(), 1e-30) + UNIFORM_SHARE * uniform
    return jnp.where((count >= REMEMBERED).all(), found, uniform)


def remember(
    losses: Float[Array, "steps remembered"],
    count: Int[Array, "steps"],
    step: Int[Array, "batch"],
    new: Float[Array, "batch"],
    mask: Float[Array, "batch"],
) -> tuple[Float[Array, "steps remembered"], Int[Array, "steps"]]:
    """The last losses of every step after a batch's, the newest last, and how many there are."""
    mine = (step == jnp.arange(len(losses))[:, None]) & (mask > 0)
    arrived = mine.sum(1)
    later = jnp.cumsum(mine[:, ::-1], axis=1)[:, ::-1] - mine
    old = jnp.take_along_axis(
        jnp.pad(losses, ((0, 0), (0, REMEMBERED))),
        jnp.minimum(jnp.arange(REMEMBERED) + arrived[:, None], 2 * REMEMBERED - 1),
        axis=1,
    )
    place = jnp.where(mine & (later < REMEMBERED), REMEMBERED - 1 - later, REMEMBERED)
    held = old.at[jnp.arange(len(losses))[:, None], place].set(jnp.broadcast_to(new, mine.shape), mode="drop")
    return held, jnp.minimum(count + arrived, REMEMBERED)


def loss_of(
    made: Float[Array, "n items"],
    clean: Float[Array, "n items"],
    weight: Float[Array, "n"],
    chance: Float[Array, "n"],
    mask: Float[Array, "n"],
) -> tuple[Float[Array, ""], Float[Array, "n"]]:
    """(L, what is remembered of each row); `chance`: T p_t."""
    each = weight * ((made - clean) ** 2).mean(1)
    return masked_mean(each / chance, mask), each


def diffrec(config: Config, num_users: int, num_items: int, name: str, catalogue: Catalogue) -> Method:
    """DiffRec; see the module docstring."""
    schedule = linear_schedule(config.steps, config.noise_scale, config.noise_low, config.noise_high, FIRST_BETA)
    denoiser = Denoiser(num_items, config.layers, config.dropout)
    optimizer = optax.adamw(config.lr, weight_decay=config.weight_decay)
    from_content = None
    if config.cold == "content" and catalogue.warm is not None and not catalogue.warm.all():
        warm, cold = warm_and_cold(catalogue)
        places, weights = nearest_warm(conditions(catalogue, name, 0), warm, cold, config.neighbours)
        from_content = cold, jnp.asarray(warm[places]), jnp.asarray(weights)

    def init_server(key):
        params = denoiser.init(key, jnp.zeros((1, num_items)), jnp.zeros(1, jnp.int32))["params"]
        private = {
            "optimizer": optimizer.init(params),
            "losses": jnp.zeros((config.steps, REMEMBERED)),
            "count": jnp.zeros(config.steps, jnp.int32),
        }
        return Server({"network": params, "loss": jnp.zeros(())}, private)

    def server_update(key, server, received):
        samples, count = received.value
        k_order, k_batches = jax.random.split(key)
        weight = jnp.asarray(schedule.weight)
        # users with a history first
        users = jnp.argsort(count == 0, stable=True)
        total = (count > 0).sum(dtype=jnp.int32)

        def step(carry, index, mask, number):
            params, private, sum_of_losses = carry
            k_step, k_noise, k_dropout = jax.random.split(jax.random.fold_in(k_batches, number), 3)
            mine = Seen(samples[users[index]], count[users[index]], count[users[index]])
            clean = interactions(mine, num_items)
            chance = chances(private["losses"], private["count"])
            t = jax.random.categorical(k_step, jnp.log(chance), shape=mask.shape)
            noisy = noised(schedule, clean, t, jax.random.normal(k_noise, clean.shape))

            def loss(params):
                made = denoiser.apply({"params": params}, noisy, t, train=True, rngs={"dropout": k_dropout})
                return loss_of(made, clean, weight[t], chance[t] * config.steps, mask)

            (value, each), grads = jax.value_and_grad(loss, has_aux=True)(params)
            updates, optimizer_state = optimizer.update(grads, private["optimizer"], params)
            losses, counted = remember(private["losses"], private["count"], t, each, mask)
            private = {"optimizer": optimizer_state, "losses": losses, "count": counted}
            return optax.apply_updates(params, updates), private, sum_of_losses + value * mask.sum()

        start = server.shared["network"], server.private, jnp.zeros(())
        params, private, loss = in_batches(k_order, total, config.batch_size, step, start)
        loss = jnp.where(total > 0, loss / jnp.maximum(total, 1), server.shared["loss"])
        return Server({"network": params, "loss": loss}, private), ()

    def score(shared, params, data):
        x = multi_hot(data, num_items)[None]
        if config.sampling_steps:
            last = jnp.full(1, config.sampling_steps - 1)
            x = noised(schedule, x, last, jax.random.normal(jax.random.key(params["noise"]), x.shape))

        def backwards(k, x):
            t = config.steps - 1 - k
            return posterior_mean(schedule, t, denoiser.apply({"params": shared["network"]}, x, t[None]), x)

        scores = jax.lax.fori_loop(0, config.steps, backwards, x)[0]
        if from_content is None:
            return scores
        cold, near, weights = from_content
        return scores.at[cold].set((scores[near] * weights).sum(1))

    noise = lambda key: {"noise": jax.random.bits(key)} if config.sampling_steps else {}
    return Method(
        name=name,
        init_server=init_server,
        init_client=lambda key, shared: noise(key),
        publish=lambda key, server: server.shared,
        download=lambda shared, mail, client, data: client,
        local_update=lambda key, shared, params, data: (params, all_samples(data), {"loss": shared["loss"]}),
        upload=lambda key, shared, params, update, data: (params, update),
        server_update=server_update,
        score=score,
        aggregator=everybodys_samples(),
        sampling=config.sampling(),
        config=config,
    )
