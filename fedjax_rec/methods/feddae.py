"""FedDAE: two variational autoencoders' encoders, one private and one shared, weighed by a private gate.

    x_u    binary vector of the history, divided by its length; dropout while training
    (mu_l, var_l) = private encoder(x_u)      (mu_g, var_g) = shared encoder(x_u)      (a, b) = softmax gate(x_u)
    mu = a mu_l + b mu_g     var = a^2 var_l + b^2 var_g     z = mu + sqrt(var) eps
    L_u = - sum_{i in history} log softmax(decoder(z))_i + beta_t KL(N(mu, var) || N(0, 1))
    beta_t = beta tanh(t / 10)

The private encoder and the gate stay, the shared encoder and the decoder are averaged. No negatives are drawn for the
loss: the softmax runs over the whole catalogue, so every client holds all rows of the decoder (`rows="all"`).
Scores are the decoder's logits at z = mu without dropout.

Follows: Li et al., AAAI 2025 (FedDAE), with the layer types of its released code (called FedMAE there).
Deviations: a client takes `local_epochs` full-history steps of a local optimiser made anew each round and uploads what
they changed; the release adds up gradients that it never zeroes and steps on the server. The release's beta is
`beta_schedule=released` (tanh(t / 10) multiplies the stored beta starting with t = 0: beta in the first round, 0 ever
after). In the release, private encoders are written into a temporary dictionary and lost, so that what it evaluates is
a global model; here they persist. `encoders=shared` leaves the private encoder out (as the release does in effect),
`encoders=private` the shared one. Layers are small by default ((768, 512) and dim 256 in the release).

First layers. Only the rows of a user's own history ever get a gradient in his encoder and his gate, so only these are
kept: [history_rows, width] per client, one row per item of the history in its order, instead of [items, width]. A
row's start is an independent draw, which is in distribution what the full table has. `history_rows` must hold the
longest history (padded to its bucket); a longer one is refused with the number to set.
`negatives`, `batch_size`, `redraw` and `draw` have no effect.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from fedjax_rec.method import LocalData, Method, Sampling
from fedjax_rec.roles import OPTIMIZERS, by_role, difference
from fedjax_rec.sharing import BY_CLIENT, LocalConfig, item_table, sharing_method
from fedjax_rec.types import Params, PRNGKey
from fedjax_rec.validate import between, one_of, positive, widths


@dataclasses.dataclass(frozen=True)
class Config(LocalConfig):
    """Settings of FedDAE; those of LocalConfig besides.

    Attributes:
        dim: width of the latent z. local_epochs: full-history steps in a round.
        lr: of all roles; item_lr_scale multiplies it for the first and last layers (there is no factor `clients`).
        layers: hidden widths, from the items inwards; the decoder mirrors them.
        gate_width: hidden width of the gate.
        dropout: of x and of the gate's hidden layer.
        beta: weight of KL. beta_schedule: `paper`, `released` or `constant`.
        encoders: `both`, `shared` or `private`.
        history_rows: see First layers above; never more than the catalogue.
    """

    lr: float = 0.003
    item_lr_scale: float = 1.0
    optimizer: str = "adam"
    local_epochs: int = 5
    negatives: int = 1
    batch_size: int = 0
    layers: tuple[int, ...] = (64,)
    gate_width: int = 16
    dropout: float = 0.5
    beta: float = 0.2
    beta_schedule: str = "paper"
    encoders: str = "both"
    history_rows: int = 1024

    def __post_init__(self):
        super().__post_init__()
        one_of("beta_schedule", self.beta_schedule, ("paper", "released", "constant"))
        one_of("encoders", self.encoders, ("both", "shared", "private"))
        one_of("client_init", self.client_init, ("random",))
        one_of("weighting", self.weighting, BY_CLIENT)  # the softmax moves every row of the decoder
        between("dropout", self.dropout, 0.0, 0.99)
        positive("beta", self.beta, zero_allowed=True)
        for name in ("gate_width", "history_rows"):
            positive(name, getattr(self, name))
        widths("layers", self.layers)

    @property
    def rate_counts_clients(self) -> bool:
        return False

    def sampling(self) -> Sampling:
        # histories alone: nothing is drawn, and one pass whatever the number of steps on the history
        return Sampling(0, self.batch_size, 1, "round", self.draw)


def beta_at(config: Config, round_: Array) -> Array:
    """Weight of KL in a 0-based round."""
    if config.beta_schedule == "constant":
        return jnp.float32(config.beta)
    if config.beta_schedule == "released":
        return jnp.where(round_ == 0, config.beta, 0.0)
    return config.beta * jnp.tanh(round_ / 10.0)


def _dense(key: PRNGKey, widths: Sequence[int]) -> list[dict[str, Array]]:
    """Layers of the given widths, Glorot uniform, without bias at the start."""
    init = jax.nn.initializers.glorot_uniform()
    keys = jax.random.split(key, max(len(widths) - 1, 1))
    return [
        {"kernel": init(k, (a, b)), "bias": jnp.zeros(b)}
        for k, a, b in zip(keys, widths[:-1], widths[1:], strict=False)
    ]


def _apply(layers: list[dict[str, Array]], x: Float[Array, "feat"]) -> Float[Array, "out"]:
    """Layers with tanh between them, none after the last."""
    for number, layer in enumerate(layers):
        x = (jnp.tanh(x) if number else x) @ layer["kernel"] + layer["bias"]
    return x


def _encoder(key: PRNGKey, config: Config) -> Params:
    """An encoder behind its first layer: that layer's bias, and the rest."""
    return {"bias": jnp.zeros(config.layers[0]), "rest": _dense(key, (*config.layers, 2 * config.dim))}


def _encode(encoder: Params, hidden: Float[Array, "width"]) -> tuple[Float[Array, "dim"], Float[Array, "dim"]]:
    """(mean, variance), from the sum of the first layer's rows."""
    mean, log_variance = jnp.split(_apply(encoder["rest"], jnp.tanh(hidden + encoder["bias"])), 2)
    return mean, jnp.exp(log_variance)


def _keep(key: PRNGKey, rate: float, names: Array) -> Float[Array, "n"]:
    """Inverted dropout. Drawn by name (item id, unit), so that padding and buckets leave it alone."""
    draw = jax.vmap(lambda name: jax.random.uniform(jax.random.fold_in(key, name)))(names)
    return (draw >= rate) / (1.0 - rate)


def posterior(
    params: Params, data: LocalData, config: Config, key: PRNGKey | None = None
) -> tuple[Float[Array, "dim"], Float[Array, "dim"], Float[Array, "2"]]:
    """(mean, variance, gate's weights of the private and the shared encoder); with a key, under dropout."""
    mask = data.history_mask.astype(jnp.float32)
    x = mask / jnp.sqrt(jnp.maximum(mask.sum(), 1.0))
    drop = key is not None and config.dropout > 0
    if drop:
        k_input, k_gate = jax.random.split(key)
        x = x * _keep(k_input, config.dropout, data.rows[data.history])
    length = x.shape[0]
    shared_mean, shared_var = _encode(params["encoder"], x @ params["item"]["input"][data.history])
    if config.encoders == "shared":
        return shared_mean, shared_var, jnp.array([0.0, 1.0])
    own = params["own_encoder"]
    own_mean, own_var = _encode(own, x @ own["rows"][:length])
    if config.encoders == "private":
        return own_mean, own_var, jnp.array([1.0, 0.0])
    gate = params["gate"]
    hidden = jax.nn.relu(x @ gate["rows"][:length] + gate["bias"])
    if drop:
        hidden = hidden * _keep(k_gate, config.dropout, jnp.arange(config.gate_width))
    weights = jax.nn.softmax(_apply(gate["out"], hidden))
    mean = weights[0] * own_mean + weights[1] * shared_mean
    return mean, weights[0] ** 2 * own_var + weights[1] ** 2 * shared_var, weights


def decode(params: Params, latent: Float[Array, "dim"]) -> Float[Array, "items"]:
    """Logits of the catalogue."""
    hidden = jnp.tanh(_apply(params["decoder"], latent))
    return params["item"]["output"] @ hidden + params["item"]["output_bias"]


def objective(params: Params, data: LocalData, config: Config, key: PRNGKey) -> Float[Array, ""]:
    """L_u of one step."""
    k_drop, k_noise = jax.random.split(key)
    mean, variance, _ = posterior(params, data, config, k_drop)
    latent = mean + jnp.sqrt(variance) * jax.random.normal(k_noise, mean.shape)
    log_chance = jax.nn.log_softmax(decode(params, latent))[data.history]
    likelihood = (log_chance * data.history_mask).sum()
    divergence = 0.5 * (variance + mean**2 - 1.0 - jnp.log(variance)).sum()
    # a client without history must not be pulled towards the prior
    return jnp.where(data.history_mask.any(), beta_at(config, data.round) * divergence - likelihood, 0.0)


def feddae(config: Config, num_users: int, num_items: int, name: str = "feddae") -> Method:
    """FedDAE; see the module docstring."""
    width, held = config.layers[0], min(config.history_rows, num_items)
    shared_roles = ("item", "encoder", "decoder")
    transform = by_role(
        {
            **{role: OPTIMIZERS[config.optimizer](config.lr) for role in ("encoder", "decoder", "own_encoder", "gate")},
            "item": OPTIMIZERS[config.optimizer](config.lr * config.item_lr_scale),
        }
    )

    def init_shared(key):
        k_input, k_output, k_encoder, k_decoder = jax.random.split(key, 4)
        item = {
            "input": item_table(k_input, num_items, width, config.init_std),
            "output": item_table(k_output, num_items, width, config.init_std),
            "output_bias": jnp.zeros(num_items),
        }
        decoder = _dense(k_decoder, (config.dim, *reversed(config.layers)))
        return {"item": item, "encoder": _encoder(k_encoder, config), "decoder": decoder}

    def init_private(key):
        k_rows, k_encoder, k_gate, k_out = jax.random.split(key, 4)
        own = {**_encoder(k_encoder, config), "rows": item_table(k_rows, held, width, config.init_std)}
        gate = {
            "rows": item_table(k_gate, held, config.gate_width, config.init_std),
            "bias": jnp.zeros(config.gate_width),
            "out": _dense(k_out, (config.gate_width, 2)),
        }
        return {"own_encoder": own, "gate": gate}

    method = sharing_method(
        name,
        init_shared=init_shared,
        init_private=init_private,
        train=lambda params, data: (params, jnp.zeros(())),  # replaced below: training draws noise
        score=lambda params: params["item"]["output_bias"],  # likewise: scoring reads the history
        config=config,
        rows="all",
    )

    def check(data):
        if data.history.shape[0] > held:
            raise ValueError(
                f"history_rows={config.history_rows}: histories of up to {data.history.shape[0]} items (padded); "
                f"set history_rows={data.history.shape[0]}"
            )

    def local_update(key, shared, params, data):
        check(data)

        def step(number, carry):
            params, state, total = carry
            value, grads = jax.value_and_grad(objective)(params, data, config, jax.random.fold_in(key, number))
            updates, state = transform.update(grads, state, params)
            return optax.apply_updates(params, updates), state, total + value

        start = (params, transform.init(params), jnp.zeros(()))
        after, _, total = jax.lax.fori_loop(0, config.local_epochs, step, start)
        positives = jnp.maximum(data.history_mask.sum(), 1)
        info = {"loss": total / (config.local_epochs * positives)}
        return after, difference(after, params, shared_roles), info

    def score(shared, params, data):
        check(data)
        mean, _, _ = posterior(params, data, config)
        return decode(params, mean)

    def explain(shared, params, data):
        return {"gate": posterior(params, data, config)[2]}

    return method._replace(local_update=local_update, score=score, explain=explain)
