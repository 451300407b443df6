"""FedVLR, FedMR and their multimodal baselines: item views made by the server, mixed by a private router.

    F_j = g_j(V, C, D; gamma_j)            the server publishes views (see item_sources/views.py)
    client, A local epochs with F fixed:   theta_u, phi_u <- SGD;   G_u <- G_u + dL_u/dF on the rows it touches
    G = sum_u alpha_u G_u                  sum of alpha_u is 1
    (D, gamma) <- (D, gamma) - rate * (dF / d(D, gamma))^T G        one backward pass on the server

Follows: Li et al., FedVLR, Eqs. 2-5 and Algorithm 1, and FedMR, Eqs. 4-7 and Algorithm 1, which it renames. Since F is
linear in its cotangent, summing the clients' cotangents and pulling them back once equals Algorithm 1's sum of
per-client gradients of D and gamma.

    fedvlr      router over Sum, MLP and Gate
    fedmr       the same algorithm under the name of the earlier paper: the papers' equations differ in symbols alone.
                Their code differs (FedVLR's has LayerNorm after projections, `layer_norm=True`, and dropout 0.1 where
                FedMR's has 0.5), and so do their tables of parameters (below)
    mlp_fusion  one MLP view, no router ("+MLP")
    fedvbpr     ID vector beside a linear map of the features; clients train copies ("+VBPR")

Deviations: one rate for everything is the papers'; here D steps by lr * item_lr_scale * clients and gamma by lr *
fusion_lr_scale, because a row's few clients are a small part of the mean. fedvbpr keeps the backbone's pointwise
loss, so that only the fusion differs; `loss=bpr` is the released one. `update=parameters` is the released code:
clients train copies of D and gamma, which the server averages; where a round has one local step, the two are the same
step, and `gradients` is much the faster for fedvbpr, whose clients else train a map of all features. The code's broken
gate, double softmax, zeroed images (FedMR) and per-batch layers are not reproduced, but for `router=batch_mean`. The L2
weight acts on D and gamma (no released model uses it).

Noise on what clients send: a normal draw of deviation s on the cotangent G is, after the pull back, noise of covariance
s^2 J^T J on the gradients of D and gamma, J = dF / d(D, gamma); a row of D gets s^2 sum over views of the squared
Jacobian of its own views. It is not white, and its size is the operators'.

Parameters of a client on KU, as the papers count: 120,132 are the views received, head and router (FedVLR; 155,972 with
FedRAP's table), 455,620 a client that trains copies (FedMR). FedMR's 564,292 is FedNCF with every user's vector counted
on one client, which no client here holds.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fedjax_rec import aggregate
from fedjax_rec.backbones.fused import BACKBONES, fused_backbone
from fedjax_rec.item_sources import Catalogue, features_of, views
from fedjax_rec.item_sources.views import ID
from fedjax_rec.method import Method, Server
from fedjax_rec.methods.fusion_client import LOSSES, ClientSide, history_mean
from fedjax_rec.methods.over import no_other_backbones_settings
from fedjax_rec.roles import by_role
from fedjax_rec.sharing import SERVER_OPTIMIZERS, LocalConfig, item_table, step_by_change
from fedjax_rec.validate import one_of, positive, widths

ABLATIONS = ("keep", "drop", "random")
# gamma's gradients are means over clients and small: the usual eps of 1e-3 on servers would undo their scaling
FUSION_OPTIMIZERS = {**SERVER_OPTIMIZERS, "adam": lambda rate: optax.adam(rate, b1=0.9, b2=0.99)}


@dataclasses.dataclass(frozen=True)
class Config(LocalConfig):
    """Settings of the multimodal methods; those of LocalConfig besides.

    Attributes:
        backbone: one of fedavg, fcf, fedncf, pfedrec, fedrap.
        operators: names in views.OPERATORS; one alone needs no router (Sum, MLP and Gate alone are the papers'
            ablations of Mix).
        id_dim: width of the trainable ID table D before its projection to `dim`.
        update: `gradients` (Algorithm 1) or `parameters`.
        router, temperature, router_lr_scale: see views.router_weights; rate of the router relative to lr.
        fusion_lr_scale: rate of gamma relative to lr.
        fusion_optimizer: the server's optimiser of gamma (`adam` is the released code's); "" takes server_optimizer,
            which steps D.
        layer_norm: after every projection, as the FedVLR code at hand has it.
        centre: features are centred on their mean over the items that training may touch.
        visual, text, ids: each modality `keep`, `drop` (zeros) or `random` (a fixed normal draw of the same scale).
        loss: `pointwise` cross-entropy, or `bpr` over the pairs of a batch.
        noise_std: standard deviation of Gaussian noise on every client's upload, drawn once on the server with the
            variance of the weighted mean. noise_on: `gradients` of D and gamma, as in the papers' tables, or the
            `views` cotangents that are really sent; FedNCF's shared table and network get it either way.
        l2: weight decay of D and gamma, under update=gradients; D's is no mean over clients, so that the factor
            `clients` of its rate does not act on it.
        weighting: of uploads, `backbone` for FedAvg's by size and the others' equal ones.
        cold_ids: ID rows of items that training never touches: `zero` or the `mean` of the others.
        user_init_std, layers, branches, network_lr_scale, independence, sparsity, anneal, own_lr_scale,
            own_init_std: of the backbones, see fedmf, fedncf and fedrap.
    """

    dim: int = 64
    lr: float = 0.5
    item_lr_scale: float = 1.0
    negatives: int = 1
    batch_size: int = 2048
    local_epochs: int = 5
    redraw: str = "epoch"
    backbone: str = "fedavg"
    operators: tuple[str, ...] = ("sum", "mlp", "gate")
    id_dim: int = 512
    update: str = "gradients"
    router: str = "user"
    temperature: float = 1.0
    router_lr_scale: float = 1.0
    fusion_lr_scale: float = 1.0
    fusion_optimizer: str = ""
    layer_norm: bool = False
    centre: bool = True
    visual: str = "keep"
    text: str = "keep"
    ids: str = "keep"
    loss: str = "pointwise"
    noise_std: float = 0.0
    noise_on: str = "gradients"
    l2: float = 0.0
    cold_ids: str = "zero"
    user_init_std: float = 0.01
    layers: tuple[int, ...] = (64, 32, 16)
    branches: str = "neumf"
    network_lr_scale: float = 1.0
    independence: float = 0.001
    sparsity: float = 0.001
    anneal: bool = True
    own_lr_scale: float = 0.2
    own_init_std: float = 0.0
    weighting: str = "backbone"

    WEIGHTINGS = ("backbone", "equal", "by_size")

    def __post_init__(self):
        super().__post_init__()
        one_of("backbone", self.backbone, BACKBONES)
        one_of("optimizer", self.optimizer, ("sgd",))
        one_of("fusion_optimizer", self.fusion_optimizer, ("", *FUSION_OPTIMIZERS))
        one_of("update", self.update, ("gradients", "parameters"))
        one_of("router", self.router, views.ROUTERS)
        one_of("noise_on", self.noise_on, ("gradients", "views"))
        one_of("loss", self.loss, LOSSES)
        one_of("cold_ids", self.cold_ids, ("zero", "mean"))
        one_of("branches", self.branches, ("mlp", "neumf"))
        widths("layers", self.layers)
        if self.operators != ("vbpr",):
            if not self.operators or len(set(self.operators)) < len(self.operators):
                raise ValueError(f"operators={','.join(self.operators)}: expected one or more, each once")
            for operator in self.operators:
                one_of("operators", operator, views.OPERATORS)
        elif self.dim % 2:
            raise ValueError(f"dim={self.dim}: expected an even width, half of which is fedvbpr's ID vector")
        elif self.layer_norm:
            raise ValueError("layer_norm=True: fedvbpr has no projections to normalise; leave it out")
        if "attention" in self.operators and self.dim % views.HEADS:
            raise ValueError(f"dim={self.dim}: expected a multiple of the {views.HEADS} heads of operators=attention")
        for name in ("visual", "text", "ids"):
            one_of(name, getattr(self, name), ABLATIONS)
        for name in ("id_dim", "temperature", "fusion_lr_scale", "router_lr_scale", "network_lr_scale"):
            positive(name, getattr(self, name))
        for name in (
            "noise_std", "l2", "user_init_std", "independence", "sparsity", "own_lr_scale", "own_init_std"
        ):  # fmt: skip
            positive(name, getattr(self, name), zero_allowed=True)
        if self.update == "parameters" and self.l2:
            raise ValueError(f"l2={self.l2:g} with update=parameters: clients train copies without it; leave it out")
        if self.noise_on == "views" and not self.noise_std:
            raise ValueError("noise_on=views without noise: give noise_std, its standard deviation, too")
        if self.update == "parameters" and self.noise_on == "views":
            raise ValueError("noise_on=views with update=parameters: no views are sent; set noise_on=gradients")
        if self.update == "parameters" and self.fusion_optimizer:
            raise ValueError(
                f"fusion_optimizer={self.fusion_optimizer} with update=parameters: the server averages copies of "
                "gamma; leave one of both out"
            )
        if self.operators == ("vbpr",) and self.id_dim != self.dim // 2:
            raise ValueError(f"id_dim={self.id_dim}: fedvbpr's ID vectors are half as wide as dim={self.dim}")
        no_other_backbones_settings(self)


PRESETS = {
    "fedvlr": Config(),
    "fedmr": Config(),
    "mlp_fusion": Config(operators=("mlp",)),
    "fedvbpr": Config(operators=("vbpr",), id_dim=32, update="parameters"),
}
MODALITY_OF = {"image": "visual", "visual": "visual", "text": "text"}
"""The setting that keeps, drops or randomises a modality."""


def ablated_features(config: Config, catalogue: Catalogue) -> dict[str, np.ndarray]:
    """The frozen features as the settings want them, float32 [items, feat] by modality.

    Raises:
        ValueError: without any features, without those that a setting names, or where nothing is left of the items.
    """
    rng = np.random.default_rng(0)
    found = features_of(catalogue, "this method fuses", centre=config.centre)
    there = {MODALITY_OF.get(name) for name in found}
    for name in ("visual", "text"):
        if getattr(config, name) != "keep" and name not in there:
            raise ValueError(
                f"{name}={getattr(config, name)}: the data set has no such features, only {', '.join(found)}; leave it "
                "out, or give some with --features"
            )
    rules = {name: getattr(config, MODALITY_OF.get(name, ""), "keep") for name in found}
    if {config.ids, *rules.values()} == {"drop"}:
        raise ValueError(f"ids=drop with {', '.join(found)} dropped too: nothing tells items apart; keep one of them")
    for name, values in found.items():
        rule = rules[name]
        if rule == "random":
            found[name] = values.std() * rng.standard_normal(values.shape).astype(np.float32)
        elif rule == "drop":
            found[name] = np.zeros_like(values)
    return found


def multimodal(config: Config, num_users: int, num_items: int, name: str, catalogue: Catalogue) -> Method:
    """Any of the four methods; see the module docstring."""
    features = {k: jnp.asarray(v) for k, v in ablated_features(config, catalogue).items()}
    warm = None if catalogue.warm is None else jnp.asarray(catalogue.warm)
    backbone = fused_backbone(config.backbone, num_items, config)
    module = views.fusion(config.operators, config.dim, layer_norm=config.layer_norm)
    if config.weighting == "backbone":
        config = dataclasses.replace(config, weighting=backbone.weighting)
    counts = aggregate.WEIGHTS[config.weighting]
    averaging = SERVER_OPTIMIZERS[config.server_optimizer](config.server_lr)
    client = ClientSide(config, backbone, num_users)
    optimizer = _server_optimizer(config, num_users)

    def init_trainable(key):
        k_id, k_operators = jax.random.split(key)
        table = jnp.zeros((num_items, config.id_dim))
        if config.ids != "drop":
            std = 1.0 / np.sqrt(config.id_dim) if config.ids == "random" else config.init_std
            table = item_table(k_id, num_items, config.id_dim, std)
        example = {ID: table[:1], **{m: f[:1] for m, f in features.items()}}
        return {ID: table, "operators": module.init(k_operators, example)}

    def fuse(trainable, features):
        table = views.fill_cold(trainable[ID], warm, config.cold_ids)
        return module.apply(trainable["operators"], {ID: table, **features})

    def init_server(key):
        k_shared, k_trainable = jax.random.split(key)
        shared, trainable = backbone.init_shared(k_shared), init_trainable(k_trainable)
        if config.update == "parameters":
            copied = {**shared, "fusion": trainable["operators"], "guide": {ID: trainable[ID]}}
            shared = {**copied, "guide": {**copied["guide"], **features}}
            return Server(shared=shared, private={"averaging": averaging.init(copied)})
        private = {
            "trainable": trainable,
            "optimizer": optimizer.init(trainable),
            "averaging": averaging.init(shared),
            "features": features,
        }
        return Server(shared=shared, private=private)

    def publish(key, server):
        if config.update == "parameters":
            guide = server.shared["guide"]
            table = views.fill_cold(guide[ID], warm, config.cold_ids)
            return {**server.shared, "guide": {**guide, ID: table}}
        return {**server.shared, "views": fuse(server.private["trainable"], server.private["features"])}

    def local_update(key, shared, params, data):
        if config.update == "parameters":
            return client.train_copies(params, data, module)
        return client.train(params, data)

    def upload(key, shared, params, update, data):
        kept = {role: params[role] for role in params if role not in shared}
        # squared weights tell the server the variance of a weighted mean of noise
        return kept, {**update, "weight": counts(data)} if config.noise_std else update

    def server_update(key, server, received):
        sent = dict(received.value)
        variance = sent.pop("weight", 0.0) / jnp.maximum(received.weight, 1e-12)  # sum of alpha_u^2
        scale = config.noise_std * jnp.sqrt(variance)
        if config.update == "parameters":
            sent["guide"] = {ID: sent["guide"][ID]}  # features have no change
            if config.noise_std:
                noisy = _noisy(key, sent, scale)
                # a table that nobody trains stays
                sent = noisy if config.ids == "keep" else {**noisy, "guide": sent["guide"]}
            guide = server.shared["guide"]
            moving = {**{role: server.shared[role] for role in sent}, "guide": {ID: guide[ID]}}
            moved, state = step_by_change(averaging, sent, server.private["averaging"], moving)
            return Server({**server.shared, **moved, "guide": {**guide, **moved["guide"]}}, {"averaging": state}), ()
        cotangent = sent.pop("views")
        if config.noise_std:
            sent = _noisy(jax.random.fold_in(key, 1), sent, scale)
        if config.noise_std and config.noise_on == "views":
            cotangent = cotangent + scale * jax.random.normal(key, cotangent.shape)
        trainable = server.private["trainable"]
        grads = views.pull_back(lambda t: fuse(t, server.private["features"]), trainable, cotangent)
        if config.noise_std and config.noise_on == "gradients":
            grads = _noisy(key, grads, scale)
        decay = {ID: config.l2 / _clients_in_rate(config, num_users), "operators": config.l2}
        grads = {r: jax.tree.map(lambda g, p, r=r: g + decay[r] * p, grads[r], trainable[r]) for r in grads}
        step, state = optimizer.update(grads, server.private["optimizer"], trainable)
        shared, averaged = step_by_change(averaging, sent, server.private["averaging"], server.shared)
        trainable = optax.apply_updates(trainable, step)
        private = {**server.private, "trainable": trainable, "optimizer": state, "averaging": averaged}
        return Server(shared, private), ()

    def views_of(params):
        if config.update == "parameters":
            return module.apply(params["fusion"], params["guide"])
        return params["views"]

    def score(shared, params, data):
        made = views_of(params)
        return client.logits({**params, "views": made}, data, made)

    def explain(shared, params, data):
        """The router's weight of every operator, mean over the catalogue; nothing where one view needs no router."""
        if len(config.operators) == 1:
            return {}
        made = views_of(params)
        weights = client.weights(params, made, history_mean(made, data), jnp.ones(num_items))
        return {"router": weights if weights.ndim == 1 else weights.mean(0)}

    return Method(
        name=name,
        init_server=init_server,
        init_client=lambda key, shared: client.init(key, len(config.operators)),
        publish=publish,
        download=lambda shared, mail, mine, data: {**shared, **mine},
        local_update=local_update,
        upload=upload,
        server_update=server_update,
        score=score,
        aggregator=aggregate.mean_of(config.weighting),
        sampling=config.sampling(),
        evaluate_at=config.evaluate_at,
        client_init=config.client_init,
        config=config,
        explain=explain,
    )


def _clients_in_rate(config: Config, num_users: int) -> int:
    """The factor of D's rate that undoes the mean over clients; adaptive optimisers see gradients of any scale."""
    return 1 if config.server_optimizer == "adam" else num_users


def _server_optimizer(config: Config, num_users: int) -> optax.GradientTransformation:
    """Steps D and gamma."""
    make = SERVER_OPTIMIZERS[config.server_optimizer]
    make_fusion = FUSION_OPTIMIZERS[config.fusion_optimizer] if config.fusion_optimizer else make
    id_rate = config.lr * config.item_lr_scale * _clients_in_rate(config, num_users) * config.server_lr
    frozen = optax.set_to_zero()
    return by_role(
        {
            ID: make(id_rate) if config.ids == "keep" else frozen,
            "operators": make_fusion(config.lr * config.fusion_lr_scale * config.server_lr),
        }
    )


def _noisy(key, tree, scale):
    leaves, shape = jax.tree.flatten(tree)
    keys = jax.random.split(key, len(leaves))
    drawn = [x + scale * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(shape, drawn)
