"""PLGC: a client's own item table beside the frozen global one, mixed by a coefficient from the tangent kernel.

**This is our reading of the abstract** of Shen, Mi, Zhao, J. Shen and Qian (arXiv 2508.19591): equations, settings and
results of the paper were not at hand. What the abstract names, and what stands for it here:

    "frozen global item embedding table in local devices"
        E^G (`item`) comes down every round and gets no gradient; E^L (`own_item`) trains on the client
    "Neural Tangent Kernel strategy that dynamically balances local and global information"
        kappa(E) = mean over S_u of ||j_i - mean j||^2,   j_i = d logit / d (last layer) at row i of E
        lambda_u = clip(mean over u's rounds of kappa(E^L) / (kappa(E^L) + kappa(E^G)))
    "optimizes personalized representations during forward inference"
        e_i = lambda_u E^L_i + (1 - lambda_u) E^G_i,   score = f(w_u, e_i)
    "contrastive objective function to reduce redundancy by dissolving dependencies between dimensions"
        L = BCE + gamma / dim * [ sum_k (1 - C_kk)^2 + mu sum_{k != l} C_kl^2 ],   C = Z^A^T Z^B / n,
        columns of Z^A = E^L, Z^B = E^G standardised over the batch's n items (Zbontar et al. 2021)

S_u are the rated items and this round's negatives. For a linear scorer j_i is the row itself, so kappa is exactly the
trace of the centred kernel of the score function (its bias left out); under FedNCF's network it is the kernel of the
output layer, or with `kernel=network` that of all its weights and the user's vector. The rule is a port of LG-Mix
(Jiang et al., ICLR 2024), which mixes updates instead of forward passes; that PLGC's rule is its relative is our
inference. lambda is worked out once a round, from the tables with which the round begins, and without gradient; at a
client's first round E^L = E^G and lambda = 1/2.

`table=persistent` (default) keeps E^L on the client from its start as a copy of E^G; the upload is what training
changed in E^L, so with equal weights, full participation and server_lr 1 the server's E^G is the mean of the clients'
tables. `table=replaced` sets E^L to E^G every round: the kernel rule then always says 1/2, and `mixing=constant
coefficient=1 contrast_weight=0` is the backbone itself. The default server_lr of 10, with an item rate as much smaller,
is PFedRec's: own tables then move gently and E^G ten mean changes at once, so that its rows are the larger ones and
lambda falls for that reason too; `server_lr=1` is the plain mean. The other shared roles (FedNCF's network) are
averaged as in the backbone. The order of updates is the backbone's too: over PFedRec the head steps first.

Limits: the rule prefers the table with the larger rows, so an own table that runs away gets lambda -> 1
(`normalise=True` divides each table by the root mean square of its rows). A batch of n items gives C at most rank
n - 1, so the second sum cannot fall below dim^2 / (n - 1) - dim; batches below 8 samples skip the term. A client holds
two tables, twice the backbone's memory; persistent tables are clients x items x dim in the simulator.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from fedjax_rec import spectrum
from fedjax_rec.backbones import Backbone
from fedjax_rec.backbones.linear import linear_head
from fedjax_rec.backbones.mf import matrix_factorisation
from fedjax_rec.backbones.ncf import neural_cf
from fedjax_rec.method import LocalData, Method, batch_at
from fedjax_rec.methods.over import no_other_backbones_settings
from fedjax_rec.roles import binary_cross_entropy, difference, local_sgd, run_steps, sgd_step
from fedjax_rec.sharing import LocalConfig, item_table, sharing_method
from fedjax_rec.types import Params
from fedjax_rec.validate import between, one_of, positive, widths

BACKBONES = ("fedmf", "fedncf", "pfedrec")
SMALLEST_BATCH = 8  # samples below which correlations between columns say nothing
TINY = 1e-12  # under the root of a column's variance


@dataclasses.dataclass(frozen=True)
class Config(LocalConfig):
    """Settings of PLGC; those of LocalConfig besides, where item_lr_scale is the rate of E^L.

    Attributes:
        backbone: fedmf, fedncf or pfedrec.
        table: E^L is `persistent`, or `replaced` by E^G every round.
        mixing: lambda from the `kernel`, or `constant`.
        coefficient: the constant lambda.
        lambda_min, lambda_max: clip of the kernel's lambda; a constant one is not clipped.
        kernel: gradients of the logit in the `last_layer`, or in the whole `network` with the user's vector (the
            same thing but for fedncf).
        centre: centred features (LG-Mix), else the plain trace.
        top_eigenvalues: kappa is the sum of so many largest eigenvalues; 0 for all, the trace.
        probability: the kernel of sigmoid(logit) instead of the logit: row i counts p_i (1 - p_i).
        normalise: tables are divided by the root mean square of their rows first.
        contrast_weight: gamma. contrast_off_diagonal: mu.
        contrast: Z^A is the `local` or the `mixed` table; `self` takes Z^A = Z^B = E^L (only decorrelates).
        user_bias: of fedmf; user_init_std: of fedmf and fedncf; layers, branches, network_lr_scale: see fedncf.
    """

    item_lr_scale: float = 0.02
    server_lr: float = 10.0
    backbone: str = "pfedrec"
    table: str = "persistent"
    mixing: str = "kernel"
    coefficient: float = 0.5
    lambda_min: float = 0.05
    lambda_max: float = 0.95
    kernel: str = "last_layer"
    centre: bool = True
    top_eigenvalues: int = 0
    probability: bool = False
    normalise: bool = False
    contrast_weight: float = 0.01
    contrast_off_diagonal: float = 0.005
    contrast: str = "local"
    user_init_std: float = 0.01
    user_bias: bool = True
    layers: tuple[int, ...] = (64, 32, 16)
    branches: str = "neumf"
    network_lr_scale: float = 1.0

    def __post_init__(self):
        super().__post_init__()
        one_of("backbone", self.backbone, BACKBONES)
        one_of("table", self.table, ("persistent", "replaced"))
        one_of("mixing", self.mixing, ("kernel", "constant"))
        one_of("kernel", self.kernel, ("last_layer", "network"))
        one_of("contrast", self.contrast, ("local", "mixed", "self"))
        one_of("branches", self.branches, ("mlp", "neumf"))
        between("coefficient", self.coefficient, 0.0, 1.0)
        between("lambda_min", self.lambda_min, 0.0, self.lambda_max)
        between("lambda_max", self.lambda_max, self.lambda_min, 1.0)
        for name in ("top_eigenvalues", "contrast_weight", "contrast_off_diagonal", "user_init_std"):
            positive(name, getattr(self, name), zero_allowed=True)
        positive("network_lr_scale", self.network_lr_scale)
        widths("layers", self.layers)
        if self.backbone == "pfedrec":
            one_of("optimizer", self.optimizer, ("sgd",))
        if self.top_eigenvalues and self.kernel == "network" and self.backbone == "fedncf":
            raise ValueError(
                f"top_eigenvalues={self.top_eigenvalues} with kernel=network: one eigenvalue problem of the size of "
                "the network per client and round; set kernel=last_layer or top_eigenvalues=0"
            )
        no_other_backbones_settings(self)


class Client(NamedTuple):
    """A backbone as PLGC needs it. `rates` of its roles without the tables; `last_layer` cuts the parameters that the
    kernel differentiates to the output layer."""

    model: Backbone
    rates: dict[str, float]
    shared: tuple[str, ...]
    last_layer: Callable[[Params], Params]
    head_first: bool = False


def _client(config: Config) -> Client:
    if config.backbone == "fedmf":
        model = matrix_factorisation(config.dim, bias=config.user_bias, init_std=config.user_init_std)
        return Client(model, {"user": config.lr}, (), lambda weights: weights)
    if config.backbone == "pfedrec":
        return Client(linear_head(config.dim), {"head": config.lr}, (), lambda weights: weights, head_first=True)
    gmf = config.branches == "neumf"
    model = neural_cf(config.dim, layers=config.layers, gmf=gmf, init_std=config.user_init_std)
    rates = {"user": config.lr, "network": config.lr * config.network_lr_scale}
    # the output layer is linear in the last hidden features: its gradient is them
    return Client(model, rates, ("network",), lambda weights: {"network": {"output": weights["network"]["output"]}})


def mix(coefficient, local: Float[Array, "n dim"], frozen: Float[Array, "n dim"]) -> Float[Array, "n dim"]:
    """lambda local + (1 - lambda) frozen, without gradient into `frozen`."""
    return coefficient * local + (1.0 - coefficient) * jax.lax.stop_gradient(frozen)


def contrast(
    a: Float[Array, "n dim"], b: Float[Array, "n dim"], mask: Float[Array, "n"], off_diagonal: float
) -> Float[Array, ""]:
    """Redundancy-reducing feature-wise contrast of two views of the same items, per dimension."""
    count = mask.sum()
    some = jnp.maximum(count, 1.0)

    def standardise(x):
        centred = (x - mask @ x / some) * mask[:, None]
        return centred * jax.lax.rsqrt((centred**2).sum(0) / some + TINY)

    correlation = standardise(a).T @ standardise(b) / some
    diagonal = jnp.diagonal(correlation)
    value = ((1.0 - diagonal) ** 2).sum() + off_diagonal * ((correlation**2).sum() - (diagonal**2).sum())
    return jnp.where(count >= SMALLEST_BATCH, value / a.shape[1], 0.0)


def spread(
    features: Float[Array, "rows feat"], mask: Float[Array, "rows"], *, centre: bool = True, top: int = 0
) -> Float[Array, ""]:
    """kappa: trace of the kernel of the features' rows in `mask`, per row; or the sum of its `top` eigenvalues."""
    count = jnp.maximum(mask.sum(), 1.0)
    if centre:
        features = features - mask @ features / count
    features = features * mask[:, None]
    if not top:
        return (features**2).sum() / count
    return jnp.linalg.eigvalsh(features.T @ features / count)[-top:].sum()


def touched(data: LocalData) -> Float[Array, "rows"]:
    """1 for the rows of the round's samples: rated items and negatives. The working set itself may be the catalogue."""

    def mark(step, seen):
        batch = batch_at(data, step)
        return seen.at[batch.item].max(batch.mask)

    return jax.lax.fori_loop(0, data.num_steps, mark, jnp.zeros(data.rows.shape[0]))


def tangent_features(
    client: Client, params: Params, table: Float[Array, "rows dim"], config: Config
) -> Float[Array, "rows feat"]:
    """d logit / d weights at every row of a table, weights laid out as one vector; the last layer's bias left out."""
    weights = {role: params[role] for role in client.rates}
    moving = weights if config.kernel == "network" else client.last_layer(weights)

    def output(moving, row):
        held = {
            role: {**value, **moving.get(role, {})} if isinstance(value, dict) else moving.get(role, value)
            for role, value in weights.items()
        }
        logit = client.model.predict(held, row[None])[0]
        return jax.nn.sigmoid(logit) if config.probability else logit

    gradients = jax.tree_util.tree_leaves_with_path(jax.vmap(jax.grad(output), (None, 0))(moving, table))
    if config.kernel == "last_layer" or config.backbone != "fedncf":
        # a bias of the output has the same gradient whatever the table
        gradients = [(path, x) for path, x in gradients if path[-1].key != "bias"]
    return jnp.concatenate([x.reshape(table.shape[0], -1) for _, x in gradients], axis=1)


def kernel_coefficient(client: Client, params: Params, data: LocalData, config: Config) -> Float[Array, ""]:
    """kappa(E^L) / (kappa(E^L) + kappa(E^G)); 1/2 where both are 0."""
    mask = touched(data)

    def kappa(table):
        if config.normalise:
            square = mask @ (table**2).sum(1) / jnp.maximum(mask.sum(), 1.0)
            table = table * jax.lax.rsqrt(square + TINY)
        features = tangent_features(client, params, table, config)
        return spread(features, mask, centre=config.centre, top=config.top_eigenvalues)

    # in one computation, so that equal tables give equal sums to the last bit
    local, frozen = jax.vmap(kappa)(jnp.stack([params["own_item"], params["item"]]))
    total = local + frozen
    return jnp.where(total > 0, local / jnp.where(total > 0, total, 1.0), 0.5)


def coefficient(params: Params, config: Config) -> float | Float[Array, ""]:
    """The lambda that a client's state stands for: the clipped mean over its rounds, 1/2 before the first."""
    if config.mixing == "constant":
        return config.coefficient
    held = params["mixing"]
    mean = jnp.where(held["rounds"] > 0, held["sum"] / jnp.maximum(held["rounds"], 1.0), 0.5)
    return jnp.clip(mean, config.lambda_min, config.lambda_max)


def _training(client: Client, config: Config, num_users: int):
    """(params, data) -> (params, mean loss): the backbone's own training, on mixed vectors."""
    rates = {**client.rates, "own_item": config.item_lr(num_users)}

    def loss(rest, vectors, batch):
        local, frozen = vectors["own_item"], jax.lax.stop_gradient(vectors["item"])
        mixed = mix(coefficient(rest, config), local, frozen)
        value = binary_cross_entropy(client.model.predict(rest, mixed), batch)
        if config.contrast_weight:
            a = mixed if config.contrast == "mixed" else local
            b = local if config.contrast == "self" else frozen
            value += config.contrast_weight * contrast(a, b, batch.mask, config.contrast_off_diagonal)
        return value

    if not client.head_first:
        return local_sgd(loss, rates, optimizer=config.optimizer)
    first = sgd_step(loss, client.rates)
    then = sgd_step(loss, {"own_item": rates["own_item"]})
    return lambda params, data: run_steps(lambda p, batch: then(first(p, batch)[0], batch), params, data)


def plgc(config: Config, num_users: int, num_items: int, name: str = "plgc") -> Method:
    """PLGC over one of BACKBONES; see the module docstring."""
    client = _client(config)
    train = _training(client, config, num_users)
    persistent = config.table == "persistent"

    def init_shared(key):
        if not client.shared:
            return {"item": item_table(key, num_items, client.model.width, config.init_std)}
        k_item, k_rest = jax.random.split(key)
        rest = client.model.init(k_rest)
        item = item_table(k_item, num_items, client.model.width, config.init_std)
        return {"item": item, **{role: rest[role] for role in client.shared}}

    def init_private(key):
        own = {role: value for role, value in client.model.init(key).items() if role not in client.shared}
        return (
            own if config.mixing == "constant" else {**own, "mixing": {"sum": jnp.zeros(()), "rounds": jnp.zeros(())}}
        )

    method = sharing_method(
        name,
        init_shared=init_shared,
        init_private=init_private,
        train=train,
        score=lambda params: client.model.predict(
            params, mix(coefficient(params, config), params["own_item"], params["item"])
        ),
        config=config,
    )

    def init_client(key, shared):
        return {**init_private(key), "own_item": shared["item"]} if persistent else init_private(key)

    def download(shared, mail, own, data):
        params = method.download(shared, mail, own, data)
        return params if persistent else {**params, "own_item": shared["item"]}

    def local_update(key, shared, params, data):
        if config.mixing == "kernel":
            has_data = (data.num_samples > 0).astype(jnp.float32)
            now = kernel_coefficient(client, params, data, config)
            held = params["mixing"]
            held = {"sum": held["sum"] + has_data * now, "rounds": held["rounds"] + has_data}
            params = {**params, "mixing": held}
        after, loss = train(params, data)
        update = {"item": after["own_item"] - params["own_item"], **difference(after, params, client.shared)}
        return after, update, {"loss": loss, "mixing": jnp.asarray(coefficient(params, config), jnp.float32)}

    def upload(key, shared, params, update, data):
        own, sent = method.upload(key, shared, params, update, data)
        return ({**own, "own_item": params["own_item"]} if persistent else own), sent

    def explain(shared, params, data):
        weight = coefficient(params, config)
        tables = {
            "global": params["item"],
            "local": params["own_item"],
            "mixed": mix(weight, params["own_item"], params["item"]),
        }
        said = {"mixing": jnp.asarray(weight, jnp.float32)}
        for kind, table in tables.items():
            said[f"spectrum_{kind}"] = spectrum.singular_spectrum(table)
            said[f"effective_rank_{kind}"] = spectrum.effective_rank(said[f"spectrum_{kind}"])
            said[f"redundancy_{kind}"] = spectrum.redundancy(table)
        return said

    return method._replace(
        init_client=init_client, download=download, local_update=local_update, upload=upload, explain=explain
    )
