"""IFedRec: a network on the server predicts item rows from features, and clients are pulled towards its predictions.

    g = A_phi(m)                                                       the attribute network, over all items
    client, every batch:  E <- E - rate d/dE [BCE + reg mean (E - g)^2]   the mean is over warm items x dim
    E <- mean of the clients' tables;   phi <- Adam step on mean (A_phi(m) - E)^2 over warm items
    cold i: E_i = A_phi(m_i)

    ipfedrec   over PFedRec: the head steps first, then the table (on a new forward pass)
    ifedncf    over FedNCF (MLP tower): one joint step; user vector and tower stay on the client, only rows are shared

The pull moves every row of the table, touched or not, by a common factor: with p = 2 reg rate / (warm items x dim)
and a = 1 - p, t steps without a gradient give g + a^t (E - g). A client therefore holds E_t = g + a^t (E_0 - g) + R_t
with R <- a R - rate dBCE/dE, where R is zero outside the rows it has sampled, and sends R and a^t: the exact update
at the cost of the touched rows. The released rate is lr x warm items x eta, so that p = 2 reg lr eta / dim. Above 1 a
pull overshoots.

Follows: Zhang et al., WWW 2024, and its released code (A_phi = tanh of one linear layer, one full-batch Adam step a
round, local rate lr_eta). Deviations: the released IFedNCF's user rate, 79 lr, is `user_lr_scale`; features are
principal components of warm items, brought to variance 1; items nobody may touch are outside the mean.
"""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from fedjax_rec.backbones.linear import linear_head
from fedjax_rec.backbones.ncf import neural_cf
from fedjax_rec.item_sources import Catalogue
from fedjax_rec.item_sources.cold import ID, conditions, warm_and_cold
from fedjax_rec.method import Method, Server
from fedjax_rec.roles import IN_BOUNDS, batch_rows, binary_cross_entropy, run_steps
from fedjax_rec.sharing import BY_CLIENT, LocalConfig, item_table, sharing_method
from fedjax_rec.validate import one_of, positive, widths

GUIDE, PULL = "guide", "pull"


@dataclasses.dataclass(frozen=True)
class Config(LocalConfig):
    """Settings of IFedRec; those of LocalConfig besides.

    Attributes:
        reg: weight of the pull.
        eta: the items' local rate is lr x warm items x eta, as released; 0 takes lr x item_lr_scale x clients instead.
        condition_dim: principal components of the features, 0 for all.
        attribute_hidden: width of a hidden ReLU layer of A_phi, 0 for none.
        attribute_lr, attribute_steps: full-batch Adam steps on A_phi per round.
        layers: widths of ifedncf's tower.
        user_lr_scale, user_init_std: rate of its user vector relative to lr, and its start.
    """

    dim: int = 64
    lr: float = 0.1
    negatives: int = 5
    init_std: float = 1.0
    client_init: str = "shared"
    reg: float = 3.2
    eta: float = 80.0
    condition_dim: int = 300
    attribute_hidden: int = 0
    attribute_lr: float = 5e-3
    attribute_steps: int = 1
    layers: tuple[int, ...] = (64,)
    user_lr_scale: float = 79.0
    user_init_std: float = 1.0

    def __post_init__(self):
        super().__post_init__()
        one_of("optimizer", self.optimizer, ("sgd",))
        one_of("server_optimizer", self.server_optimizer, ("sgd",))
        one_of("weighting", self.weighting, BY_CLIENT)  # the pull moves all rows of everybody
        one_of("evaluate_at", self.evaluate_at, ("post_aggregate",))  # the pull moves rows that evaluation leaves out
        widths("layers", self.layers)
        for name in ("attribute_lr", "attribute_steps", "user_lr_scale"):
            positive(name, getattr(self, name))
        for name in ("reg", "eta", "condition_dim", "attribute_hidden", "user_init_std"):
            positive(name, getattr(self, name), zero_allowed=True)
        if self.eta:
            check_pull(self, self.eta)

    @property
    def rate_counts_clients(self) -> bool:
        return not self.eta


def check_pull(config: Config, eta: float) -> None:
    """Refuses a pull that overshoots."""
    strength = 2 * config.reg * config.lr * eta / config.dim
    if strength > 1 + 1e-6:
        raise ValueError(
            f"reg={config.reg:g}: the stability limit is 2*reg*lr*eta/dim <= 1, and here it is {strength:.3g} "
            f"(lr={config.lr:g}, eta={eta:g}, dim={config.dim}): every batch would overshoot the predicted rows; "
            f"set reg to at most {config.dim / (2 * config.lr * eta):.3g}"
        )


PRESETS = {
    "ipfedrec": Config(),
    "ifedncf": Config(lr=0.5, reg=0.32),
}


class AttributeNet(nn.Module):
    """A_phi: features -> rows in (-1, 1)."""

    width: int
    hidden: int

    @nn.compact
    def __call__(self, features: Float[Array, "items feat"]) -> Float[Array, "items width"]:
        if self.hidden:
            features = nn.relu(nn.Dense(self.hidden)(features))
        return jnp.tanh(nn.Dense(self.width)(features))


def ifedrec(config: Config, num_users: int, num_items: int, name: str, catalogue: Catalogue) -> Method:
    """IPFedRec or IFedNCF; see the module docstring."""
    features = jnp.asarray(conditions(catalogue, name, config.condition_dim, whiten=True))
    warm, cold = (jnp.asarray(index) for index in warm_and_cold(catalogue))
    eta = config.eta or config.item_lr_scale * num_users / len(warm)
    check_pull(config, eta)
    rate = config.lr * len(warm) * eta
    keep = 1.0 - 2.0 * config.reg * rate / (len(warm) * config.dim)
    network = AttributeNet(config.dim, config.attribute_hidden)
    adam = optax.adam(config.attribute_lr)
    head_first = name != "ifedncf"
    if head_first:
        backbone = linear_head(config.dim)
        rates = {"head": config.lr}
    else:
        backbone = neural_cf(config.dim, layers=config.layers, gmf=False, init_std=config.user_init_std)
        rates = {"user": config.lr * config.user_lr_scale, "network": config.lr}
    plain = sharing_method(
        name,
        init_shared=lambda key: {ID: item_table(key, num_items, config.dim, config.init_std)},
        init_private=backbone.init,
        train=lambda params, data: (params, jnp.zeros(())),
        score=lambda params: backbone.predict(params, params[ID]),
        config=config,
    )

    def objective(mine, vectors, batch):
        return binary_cross_entropy(backbone.predict(mine, vectors), batch)

    def init_server(key) -> Server:
        k_shared, k_network = jax.random.split(key)
        inner = plain.init_server(k_shared)
        params = network.init(k_network, features[:1])
        return Server(inner.shared, {"network": params, "adam": adam.init(params)})

    def publish(key, server):
        guide = network.apply(server.private["network"], features)
        table = server.shared[ID].at[cold].set(guide[cold])
        return {ID: table, GUIDE: guide, PULL: jnp.float32(keep)}

    def local_update(key, shared, params, data):
        guide, start = shared[GUIDE], params[ID]

        def step(held, batch):
            mine, moved, kept = held
            there = batch.mask.sum() > 0
            rows, towards, residual = batch_rows((start, guide, moved), batch)
            vectors = towards + kept * (rows - towards) + residual
            value, (grads, row_grads) = jax.value_and_grad(objective, argnums=(0, 1))(mine, vectors, batch)
            stepped = {r: jax.tree.map(lambda p, g, c=rates[r]: p - c * g, mine[r], grads[r]) for r in mine}
            if head_first:
                row_grads = jax.grad(objective, argnums=1)(stepped, vectors, batch)
            factor = jnp.where(there, keep, 1.0)
            # padding samples have no gradient, so nothing else needs the mask
            return (
                stepped,
                (factor * moved).at[batch.item].add(-rate * row_grads, mode=IN_BOUNDS),
                kept * factor,
            ), value

        mine = {role: params[role] for role in rates}
        held = (mine, jnp.zeros_like(start), jnp.ones(()))
        (mine, moved, kept), loss = run_steps(step, held, data)
        after = {**mine, ID: guide + kept * (start - guide) + moved}
        return after, {ID: moved, PULL: kept - 1.0}, {"loss": loss}

    def server_update(key, server, received):
        params, state = server.private["network"], server.private["adam"]
        towards = network.apply(params, features)
        table, sent = server.shared[ID], received.value
        table = table + config.server_lr * (sent[ID] + sent[PULL] * (table - towards))

        def distance(p):
            return ((network.apply(p, features[warm]) - table[warm]) ** 2).mean()

        def step(held, _):
            change, moments = adam.update(jax.grad(distance)(held[0]), held[1], held[0])
            return (optax.apply_updates(held[0], change), moments), None

        (params, state), _ = jax.lax.scan(step, (params, state), length=config.attribute_steps)
        return Server({ID: table}, {"network": params, "adam": state}), ()

    return plain._replace(
        init_server=init_server,
        publish=publish,
        local_update=local_update,
        server_update=server_update,
        # noise on a factor of the whole table would multiply it, round by round
        public=(PULL,),
    )
