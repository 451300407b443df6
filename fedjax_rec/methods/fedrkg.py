"""FedRKG: a client keeps its item table and, every few rounds, is guided by the mean of all tables.

Between guidance rounds a client trains its own table P_u (`own_item`), user vector and score function alone. In round
t = T_int, 2 T_int, ... (counted from 1), after local training (FedRKG, Algorithm 1):

    P_g  <- 1/n sum_u P_u                                                every row, every user
    g_ui  = sigmoid(W_u . [P_ui : P_gi : P_ui - P_gi] + b_u)             Eq. 5
    (W_u, b_u) <- SGD on L_rec(beta P_u + (1 - beta) G_u), all else fixed    Eqs. 7-8, `gate_epochs` passes
    P_ui <- beta P_ui + (1 - beta) G_ui,    G_ui = 2 g_ui P_gi           Eqs. 4, 6, 9: all items

`guidance` chooses the variant:

    ag             as above (Adaptive Guidance)
    kg             G = P_g (Knowledge Guidance, Eq. 3; "w/o AG")
    global_only    P_u <- P_g ("w/ GIE": replacement every T_int rounds; with T_int = 1 this is the backbone's method)
    personal_only  no guidance ("w/ PIE")
    local_only     no guidance, and no shared network either

Follows: Personalized Federated Recommendation with Knowledge Guidance, section 4 and Algorithm 1. beta is what is
kept of the client's own table: beta = 1 is `personal_only`, and kg with beta = 0 is `global_only`. The gate starts at
zero, so that 2 g = 1 and the first adaptive guidance starts from the plain one.

Deviations: the items' rate is lr x item_lr_scale x clients as everywhere here (the paper has one rate). Losses are
means over a batch (Eq. 2 writes sums). The fedmf backbone has a user bias unless `user_bias=False`; fedncf's network
stays on the client (section 3) unless `scorer=shared`. A guidance round trains the gate on the samples of that round.
`server_optimizer` acts on the change of P_g: sgd with rate 1 is the paper's mean.

`preset=released` is the released code: steps clipped to norm 1 over all parameters (the gate's as well), item rate
lr x items x 80, shared normal(0, 1) start, the linear score function with a bias under the name fedmf, and guidance
one round late: the mean of round t is applied at the start of round t + 1 (counted from 0), with that round's samples.
Its rate decay (0.99 a round on Amazon-Video) is `rate_decay`. Not reproduced: it stops the gate's epochs early where
the loss changes by less than 1e-4.

Local differential privacy (section 5.2) mixes two mechanisms, which are apart here:

    step     `step_noise`: grad <- clip(grad, clip_norm) + N(0, step_noise^2), at every local step, on every row of the
             table, and on the gate at each of its steps. Whatever is released later is covered
    upload   `--dp_mechanism=gaussian --dp_noise=s`: N(0, s^2) once on the table that a guidance round releases. The
             clipped steps bound what it can tell: |P_u - P_u'| <= 2 eta T_int E C (Eqs. 10-14)

What either is worth: privacy/accounting.py. The released code has neither.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from fedjax_rec import aggregate
from fedjax_rec.backbones import Backbone
from fedjax_rec.backbones.linear import linear_head
from fedjax_rec.backbones.mf import matrix_factorisation
from fedjax_rec.backbones.ncf import neural_cf
from fedjax_rec.method import Exchange, Method, Server
from fedjax_rec.methods.over import no_other_backbones_settings
from fedjax_rec.roles import (
    Loss,
    binary_cross_entropy,
    by_role,
    difference,
    gradient_noise,
    local_sgd,
    masked_mean,
    on_tables,
    optax_step,
    restrict,
    run_steps,
    sgd_step,
)
from fedjax_rec.sharing import BY_CLIENT, SERVER_OPTIMIZERS, LocalConfig, item_table, step_by_change
from fedjax_rec.types import Params
from fedjax_rec.validate import between, one_of, positive, widths

BACKBONES = ("fedmf", "fedncf", "pfedrec")
GUIDANCE = ("ag", "kg", "global_only", "personal_only", "local_only")


@dataclasses.dataclass(frozen=True)
class Config(LocalConfig):
    """Attributes:
    backbone: `fedmf`, `fedncf` or `pfedrec`.
    guidance: see the module docstring.
    beta: share of its own table that a client keeps in a guidance round.
    interval: rounds from one guidance to the next.
    gate_lr, gate_epochs: the gate's rate, and its passes over the client's samples in a guidance round.
    delay: guidance at the start of the round after, as in the released code.
    clip_norm: clips each step's gradient over all parameters; 0 does not.
    step_noise: standard deviation of the noise on the clipped gradients of the table and the gate; 0 for none. Clients
        then work on the whole table.
    rate_decay: factor on all rates but the gate's per round.
    scorer: fedncf's network is `local`, or `shared` and averaged every round.
    preset: `paper` or `released`: the defaults of the other settings, see PRESETS.
    rate_by_items: the table's rate is lr * item_lr_scale * items, not clients, as in the released code.
    user_model: fedmf's user is a `vector`, or a `linear` layer with its usual start, as in the released code.
    user_bias: of fedmf; user_init_std: of fedmf and fedncf; layers, branches, network_lr_scale: of fedncf.
    weighting: of the shared network; P_g is the plain mean.
    Others: see LocalConfig.
    """

    backbone: str = "fedmf"
    guidance: str = "ag"
    beta: float = 0.99
    interval: int = 100
    gate_lr: float = 1e-4
    gate_epochs: int = 5
    delay: bool = False
    clip_norm: float = 0.0
    step_noise: float = 0.0
    rate_decay: float = 1.0
    scorer: str = "local"
    preset: str = "paper"
    rate_by_items: bool = False
    user_model: str = "vector"
    user_bias: bool = True
    user_init_std: float = 0.01
    layers: tuple[int, ...] = (32,)
    branches: str = "mlp"
    network_lr_scale: float = 1.0

    def __post_init__(self):
        super().__post_init__()
        one_of("backbone", self.backbone, BACKBONES)
        one_of("guidance", self.guidance, GUIDANCE)
        one_of("scorer", self.scorer, ("local", "shared"))
        one_of("user_model", self.user_model, ("vector", "linear"))
        one_of("preset", self.preset, ("paper", "released"))
        one_of("branches", self.branches, ("mlp", "neumf"))
        between("beta", self.beta, 0.0, 1.0)
        between("rate_decay", self.rate_decay, 0.0, 1.0)
        for name in ("interval", "gate_epochs", "network_lr_scale"):
            positive(name, getattr(self, name))
        widths("layers", self.layers)
        for name in ("gate_lr", "clip_norm", "step_noise", "user_init_std"):
            positive(name, getattr(self, name), zero_allowed=True)
        if self.backbone == "pfedrec":
            one_of("optimizer", self.optimizer, ("sgd",))
        # P_g is the plain mean, and rows travel in guidance rounds alone
        averages_network = self.backbone == "fedncf" and self.scorer == "shared"
        one_of("weighting", self.weighting, BY_CLIENT if averages_network else ("equal",))
        if self.step_noise:
            one_of("optimizer", self.optimizer, ("sgd",))
            if not self.clip_norm:
                raise ValueError(
                    f"step_noise={self.step_noise:g}: expected clip_norm > 0, the bound on gradients that the noise "
                    "is to hide; set clip_norm"
                )
        no_other_backbones_settings(self)


PRESETS = {
    "paper": Config(),
    "released": Config(
        preset="released",
        lr=0.1,
        clip_norm=1.0,
        delay=True,
        client_init="shared",
        init_std=1.0,
        item_lr_scale=80.0,
        rate_by_items=True,
        user_model="linear",
    ),
}


def gate_values(gate: Params, own: Float[Array, "rows dim"], guide: Float[Array, "rows dim"]) -> Float[Array, "rows"]:
    """g_ui of one client (Eq. 5)."""
    w_own, w_guide, w_apart = jnp.split(gate["weight"], 3)
    return jax.nn.sigmoid(own @ w_own + guide @ w_guide + (own - guide) @ w_apart + gate["bias"])


def guided(
    own: Float[Array, "rows dim"], guide: Float[Array, "rows dim"], beta: float, gate: Params | None = None
) -> Float[Array, "rows dim"]:
    """A client's rows after guidance: Eq. 3, or Eq. 6 with a gate."""
    strength = 1.0 if gate is None else 2.0 * gate_values(gate, own, guide)[:, None]
    return beta * own + (1.0 - beta) * strength * guide


def is_guidance_round(config: Config, round_: int) -> bool:
    """Whether there is guidance in a round (0-based): at its end, or with `delay` at its start."""
    if config.delay:
        return round_ > 1 and (round_ - 1) % config.interval == 0
    return (round_ + 1) % config.interval == 0


def item_rate(config: Config, num_users: int, num_items: int) -> float:
    """Rate of the table."""
    return config.item_lr(num_items if config.rate_by_items else num_users)


def fedrkg(config: Config, num_users: int, num_items: int, name: str = "fedrkg") -> Method:
    """FedRKG; see the module docstring."""
    item_lr = item_rate(config, num_users, num_items)
    backbone = _backbone(config)
    sends_network = config.backbone == "fedncf" and config.scorer == "shared" and config.guidance != "local_only"
    averaged = ("network",) if sends_network else ()
    rates = {"user": config.lr, "head": config.lr, "network": config.lr * config.network_lr_scale}
    roles = tuple(jax.eval_shape(backbone.init, jax.eval_shape(lambda: jax.random.key(0))))
    rates = {**{role: rates[role] for role in roles}, "own_item": item_lr}
    private = (*(role for role in roles if role not in averaged), "own_item")
    adaptive = config.guidance == "ag"
    optimizer = SERVER_OPTIMIZERS[config.server_optimizer](config.server_lr)

    def init_server(key) -> Server:
        if config.backbone == "fedncf":
            key, k_network = jax.random.split(key)
        shared = {"guide": item_table(key, num_items, backbone.width, config.init_std)}
        if averaged:
            shared["network"] = backbone.init(k_network)["network"]
        return Server(shared, {role: optimizer.init(value) for role, value in shared.items()})

    def init_client(key, shared):
        own = backbone.init(key)
        client = {**{role: own[role] for role in private if role in own}, "own_item": shared["guide"]}
        # W_u = 0 and b_u = 0: the first gate is 1/2 everywhere
        gate = {"weight": jnp.zeros(3 * backbone.width), "bias": jnp.zeros(())}
        return {**client, "gate": gate} if adaptive else client

    def loss(params, vectors, batch):
        return binary_cross_entropy(backbone.predict(params, vectors["own_item"]), batch)

    def noise_of(role, key):
        return {role: gradient_noise(key, config.step_noise)} if config.step_noise else {}

    def local_update(key, shared, params, data):
        now = {role: rate * config.rate_decay**data.round for role, rate in rates.items()}
        noise = noise_of("own_item", key)
        if config.backbone == "pfedrec":
            train = _head_then_items(loss, now, config.clip_norm, noise)
        else:
            train = local_sgd(loss, now, optimizer=config.optimizer, clip_norm=config.clip_norm or None, noise=noise)
        after, value = train(params, data)
        return after, difference(after, params, averaged), {"loss": value}

    def stepped(server: Server, change: Params) -> Server:
        """The server's optimisers applied to the mean change of some roles."""
        shared, states = dict(server.shared), dict(server.private)
        for role, value in change.items():
            shared[role], states[role] = step_by_change(optimizer, value, states[role], shared[role])
        return Server(shared, states)

    def new_guide(key, server, mean):
        return stepped(server, {"guide": mean["guide"] - server.shared["guide"]})

    def gate_loss(params, vectors, batch):
        fused = guided(vectors["own_item"], vectors["guide"], config.beta, params["gate"])
        return binary_cross_entropy(backbone.predict(params, fused), batch)

    def guide(key, shared, client, data):
        own, table = client["own_item"], shared["guide"]
        if config.guidance == "global_only":
            return {**client, "own_item": table}, {}
        if not adaptive:
            return {**client, "own_item": guided(own, table, config.beta)}, {}
        model = restrict({**client, "guide": table, **{role: shared[role] for role in averaged}}, data.rows)
        moving = {"gate": config.gate_lr}
        if config.clip_norm:
            # the released code's norm runs over the frozen parameters too
            moving = {**dict.fromkeys(rates, 0.0), **moving}
        train = local_sgd(gate_loss, moving, clip_norm=config.clip_norm or None, noise=noise_of("gate", key))
        trained, value = train(model, data)
        gate = trained["gate"]
        after = {**client, "gate": gate, "own_item": guided(own, table, config.beta, gate)}
        return after, {"gate_loss": value, "gate": gate_values(gate, own, table).mean()}

    def explain(shared, params, data):
        if not adaptive:
            return {}
        values = gate_values(params["gate"], params["own_item"], shared["guide"])
        of_history = masked_mean(values[data.history], data.history_mask.astype(jnp.float32))
        return {"gate": values.mean(), "gate_of_history": of_history}

    exchange = Exchange(
        due=lambda round_: is_guidance_round(config, round_),
        at_start=config.delay,
        upload=lambda client: {"guide": client["own_item"]},
        server_update=new_guide,
        apply=guide,
        sampling=dataclasses.replace(config.sampling(), local_epochs=config.gate_epochs, redraw="round"),
        roles=("guide",),
    )
    return Method(
        name=name,
        init_server=init_server,
        init_client=init_client,
        publish=lambda key, server: server.shared,
        download=lambda shared, mail, client, data: {**client, **{role: shared[role] for role in averaged}},
        local_update=local_update,
        upload=lambda key, shared, params, update, data: (
            {role: value for role, value in params.items() if role not in averaged},
            update,
        ),
        server_update=lambda key, server, received: (stepped(server, received.value), ()),
        score=lambda shared, params, data: backbone.predict(params, params["own_item"]),
        aggregator=aggregate.mean_of(config.weighting),
        sampling=config.sampling(),
        evaluate_at=config.evaluate_at,
        rows="all" if config.step_noise else "touched",
        client_init=config.client_init,
        config=config,
        explain=explain,
        exchange=None if config.guidance in ("personal_only", "local_only") else exchange,
    )


def _backbone(config: Config) -> Backbone:
    if config.backbone == "fedncf":
        gmf = config.branches == "neumf"
        return neural_cf(config.dim, layers=config.layers, gmf=gmf, init_std=config.user_init_std)
    if config.backbone == "pfedrec" or config.user_model == "linear":
        return linear_head(config.dim)
    return matrix_factorisation(config.dim, bias=config.user_bias, init_std=config.user_init_std)


def _head_then_items(loss: Loss, rates, clip_norm: float, noise):
    """Local training of PFedRec's client: each batch moves the head, then the items."""
    parts = [_one_role(loss, role, rates[role], clip_norm, noise.get(role)) for role in ("head", "own_item")]
    (init_head, tune_head), (init_items, tune_items) = parts

    def step(carry, batch):
        params, of_head, of_items = carry
        (params, of_head), _ = tune_head((params, of_head), batch)
        (params, of_items), value = tune_items((params, of_items), batch)
        return (params, of_head, of_items), value

    def train(params, data):
        (params, *_), value = run_steps(step, (params, init_head(params), init_items(params)), data)
        return params, value

    return train


def _one_role(loss: Loss, role: str, rate, clip_norm: float, noise):
    """(init, step) of SGD on one role, its gradient clipped (and then noised) where clip_norm is not 0."""
    if clip_norm:
        parts = [optax.clip_by_global_norm(clip_norm), *([noise] if noise else []), optax.sgd(rate)]
        return optax_step(on_tables(loss), by_role({role: optax.chain(*parts)}))
    plain = sgd_step(loss, {role: rate})

    def step(carry, batch):
        params, value = plain(carry[0], batch)
        return (params, ()), value

    return lambda params: (), step
