"""What a client computes over server-made item views: routing, scores, and local training (see fusion.py)."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from fedjax_rec.backbones.fused import Fused
from fedjax_rec.item_sources import views
from fedjax_rec.item_sources.views import ID
from fedjax_rec.method import Batch, LocalData, batch_at
from fedjax_rec.roles import (
    IN_BOUNDS,
    batch_rows,
    bayesian_personalised_ranking,
    binary_cross_entropy,
    difference,
    item_roles,
    other_roles,
)
from fedjax_rec.types import PyTree

if TYPE_CHECKING:
    from fedjax_rec.methods.fusion import Config

LOSSES = {"pointwise": binary_cross_entropy, "bpr": bayesian_personalised_ranking}
MOST_ROWS = 6  # by how many times rows may outnumber a batch where steps walk through all rows: about level there


@dataclasses.dataclass(frozen=True)
class ClientSide:
    """What one client computes: routing, scores, local training."""

    config: Config
    backbone: Fused
    num_users: int

    @property
    def router(self):
        return views.Router(len(self.config.operators), self.config.dim)

    def init(self, key, num_views: int):
        k_model, k_router = jax.random.split(key)
        mine = self.backbone.init_private(k_model)
        if num_views == 1:
            return mine
        return {**mine, "router": self.router.init(k_router, jnp.zeros(num_views * self.config.dim))}

    def weights(self, params, made, history, present):
        """Softmax weights of the views `made`: [views], or [n, views] where every item has its own."""
        if made.shape[1] == 1:
            return jnp.ones(1)
        c = self.config
        return views.router_weights(
            self.router, params["router"], made, history, present, mode=c.router, temperature=c.temperature
        )

    def logits(self, params, data: LocalData, made):
        """Scores of the catalogue."""
        weights = self.weights(params, made, history_mean(made, data), jnp.ones(made.shape[0]))
        return self.backbone.predict(params, item_roles(params), views.mix(weights, made))

    def loss(self, weights, rest, vectors, made, batch: Batch, round_):
        mixed = views.mix(weights, made)
        value = LOSSES[self.config.loss](self.backbone.predict(rest, vectors, mixed), batch)
        return value + self.backbone.regulariser(vectors, mixed, batch.mask, round_)

    def rates(self):
        c = self.config
        return {
            "user": c.lr, "head": c.lr, "router": c.lr * c.router_lr_scale, "network": c.lr * c.network_lr_scale,
            "own_item": c.lr * c.own_lr_scale, "item": c.item_lr(self.num_users),
        }  # fmt: skip

    def train(self, params, data: LocalData):
        """Local epochs with the views fixed: (params, update, info); the update holds the views' cotangent."""
        few_rows = data.rows.shape[0] <= MOST_ROWS * batch_at(data, jnp.int32(0)).item.shape[0]
        if self.backbone.linear and few_rows and (self.config.router == "user" or params["views"].shape[1] == 1):
            return self._train_linear(params, data)
        return self._train_any(params, data)

    def _train_linear(self, params, data: LocalData):
        """`train` where a score is a product of the item's views with one array, the user's weights of views times
        the user's vector: the gradient by the views is then that array times a number for every row. Steps keep both
        factors, the router's input adds one more pair, and the cotangent is one matrix product at the end. Nothing
        of the views is gathered or added up in a step."""
        made, rates = params["views"], self.rates()
        flat = made.reshape(made.shape[0], -1)
        in_history = jnp.zeros(made.shape[0]).at[data.history].add(_history_share(data), mode=IN_BOUNDS)
        routing = self.routing(params, (in_history @ flat).reshape(made.shape[1:]), rates["router"])

        def look(rest, now, batch):
            """(loss, its gradients by `rest` and by `now`, the factors of that by the views)."""
            (vector, bias), to_rest = jax.vjp(self.backbone.linear, rest)
            weights, to_now = jax.vjp(lambda now: routing.weights(now, None, None), now)
            entry = jnp.outer(weights, vector).reshape(-1)
            logits = (flat @ entry + bias).at[batch.item].get(mode=IN_BOUNDS)
            value, of_logits = jax.value_and_grad(LOSSES[self.config.loss])(logits, batch)
            of_row = jnp.zeros(made.shape[0]).at[batch.item].add(of_logits, mode=IN_BOUNDS)
            pulled = (of_row @ flat).reshape(made.shape[1:])
            of_rest = to_rest((weights @ pulled, of_logits.sum()))[0]
            return value, of_rest, to_now(pulled @ vector)[0], (of_row, entry)

        def step(t, carry):
            rest, routed, held, total = carry
            batch = batch_at(data, t)
            value, of_rest, of_now, factors = look(rest, routed.now, batch)
            rest = _stepped(rest, of_rest, rates)
            moved = routing.step(routed, of_now)
            if self.backbone.private_first:  # see _train_any
                _, _, of_now, factors = look(rest, moved.now, batch)
                routed = moved
            moved = routing.pull(moved, routed, of_now)
            held = jax.tree.map(lambda held, new: held.at[t].set(new), held, factors)
            samples = batch.mask.sum()
            return rest, moved, held, total + jnp.stack([value * samples, samples])

        start = {role: value for role, value in params.items() if role not in ("views", "router")}
        steps = data.samples.most_steps
        held = tuple(jnp.zeros((steps, n)) for n in flat.shape)
        after, routed, (of_rows, entries), total = jax.lax.fori_loop(
            0, data.num_steps, step, (start, routing.start, held, jnp.zeros(2))
        )
        router, of_history = routing.finish(routed)
        of_rows = jnp.concatenate([of_rows, in_history[None]])
        entries = jnp.concatenate([entries, of_history.reshape(1, -1)])
        update = {"views": (of_rows.T @ entries).reshape(made.shape)}
        return {**after, **router}, update, {"loss": total[0] / jnp.maximum(total[1], 1.0)}

    def _train_any(self, params, data: LocalData):
        made, rates = params["views"], self.rates()
        routing = self.routing(params, history_mean(made, data), rates["router"])
        start = {role: value for role, value in params.items() if role not in ("views", "router")}

        def step(t, carry):
            params, routed, pulled, total = carry
            batch = batch_at(data, t)
            rest, tables = other_roles(params), item_roles(params)
            vectors, mine = batch_rows(tables, batch), batch_rows(made, batch)

            def objective(rest, routed, vectors, mine):
                weights = routing.weights(routed, mine, batch.mask)
                return self.loss(weights, rest, vectors, mine, batch, data.round)

            value, grads = jax.value_and_grad(objective, argnums=(0, 1, 2, 3))(rest, routed.now, vectors, mine)
            rest = _stepped(rest, grads[0], rates)
            tables = {r: tables[r].at[batch.item].add(-rates[r] * grads[2][r], mode=IN_BOUNDS) for r in tables}
            moved, of_routing, of_views = routing.step(routed, grads[1]), grads[1], grads[3]
            if self.backbone.private_first:
                # the views' gradient at the parameters after the step, else (Eq. 6) at those of its start
                at = (rest, moved.now, batch_rows(tables, batch), mine)
                of_routing, of_views = jax.grad(objective, argnums=(1, 3))(*at)
                routed = moved
            moved = routing.pull(moved, routed, of_routing)
            pulled = pulled.at[batch.item].add(of_views, mode=IN_BOUNDS)
            samples = batch.mask.sum()
            return {**rest, **tables}, moved, pulled, total + jnp.stack([value * samples, samples])

        carry = (start, routing.start, jnp.zeros_like(made), jnp.zeros(2))
        after, routed, pulled, total = jax.lax.fori_loop(0, data.num_steps, step, carry)
        router, of_history = routing.finish(routed)
        pulled = pulled.at[data.history].add(_spread(of_history, data), mode=IN_BOUNDS)
        roles = tuple(role for role in ("item", "network") if role in after)
        update = {**difference(after, params, roles), "views": pulled}
        return {**after, **router}, update, {"loss": total[0] / jnp.maximum(total[1], 1.0)}

    def routing(self, params, history, rate):
        if history.shape[0] == 1:
            return _NoRouting(history)
        if self.config.router == "user":
            return _UserRouting(self.router, self.config.temperature, rate, params["router"], history)
        return _FullRouting(self, rate, params["router"], history)

    def train_copies(self, params, data: LocalData, module):
        """Local epochs in which D and gamma move too: (params, update, info)."""
        rates = {
            **self.rates(),
            "fusion": self.config.lr * self.config.fusion_lr_scale,
            ID: self.config.item_lr(self.num_users) if self.config.ids == "keep" else 0.0,
        }

        def step(t, carry):
            params, total = carry
            batch = batch_at(data, t)
            rest, tables = other_roles(params), item_roles(params)
            vectors = batch_rows(tables, batch)
            of_history = jax.tree.map(lambda x: x[data.history], tables["guide"])

            def objective(rest, vectors, history_ids):
                made = module.apply(rest["fusion"], vectors["guide"])
                seen = module.apply(rest["fusion"], {**of_history, ID: history_ids})
                weights = self.weights(rest, made, _mean_over_history(seen, data), batch.mask)
                return self.loss(weights, rest, vectors, made, batch, data.round)

            value, grads = jax.value_and_grad(objective, argnums=(0, 1, 2))(rest, vectors, of_history[ID])
            after = _stepped(rest, grads[0], rates)
            if self.backbone.private_first:  # gamma and D step by their gradient at the private roles after the step
                at = {**after, "fusion": rest["fusion"]}
                grads = jax.grad(objective, argnums=(0, 1, 2))(at, vectors, of_history[ID])
                after["fusion"] = _stepped(rest, grads[0], rates)["fusion"]
            moved = {r: tables[r].at[batch.item].add(-rates[r] * grads[1][r]) for r in tables if r != "guide"}
            ids = tables["guide"][ID].at[batch.item].add(-rates[ID] * grads[1]["guide"][ID])
            ids = ids.at[data.history].add(-rates[ID] * grads[2])
            samples = batch.mask.sum()
            new = {**after, **moved, "guide": {**tables["guide"], ID: ids}}
            return new, total + jnp.stack([value * samples, samples])

        after, total = jax.lax.fori_loop(0, data.num_steps, step, (params, jnp.zeros(2)))
        roles = tuple(role for role in ("item", "network", "fusion") if role in after)
        change = {ID: after["guide"][ID] - params["guide"][ID]}
        update = {**difference(after, params, roles), "guide": change}
        return after, update, {"loss": total[0] / jnp.maximum(total[1], 1.0)}


class _Routed(NamedTuple):
    """A router in the middle of local training: what it trains, and what adds up over the steps."""

    now: PyTree
    sums: PyTree


class _NoRouting(NamedTuple):
    """One view: nothing to weigh."""

    history: Array
    start: _Routed = _Routed((), ())

    def weights(self, now, mine, present):
        return jnp.ones(1)

    def step(self, routed, grads):
        return routed

    def pull(self, moved, at, grads):
        return moved

    def finish(self, routed):
        return {}, jnp.zeros_like(self.history)


class _FullRouting(NamedTuple):
    """A router that sees items: its parameters and the history's mean views go through every step."""

    client: ClientSide
    rate: float
    params: PyTree
    history: Array

    @property
    def start(self):
        return _Routed((self.params, self.history), jnp.zeros_like(self.history))

    def weights(self, now, mine, present):
        return self.client.weights({"router": now[0]}, mine, now[1], present)

    def step(self, routed, grads):
        params, history = routed.now
        return _Routed((jax.tree.map(lambda p, g: p - self.rate * g, params, grads[0]), history), routed.sums)

    def pull(self, moved, at, grads):
        return _Routed(moved.now, moved.sums + grads[1])

    def finish(self, routed):
        return {"router": routed.now[0]}, routed.sums


class _UserRouting(NamedTuple):
    """A router that sees the history alone. As the views are fixed in local training, so is its input h: SGD changes
    the first layer W by -rate * h s^T with s the sum of the gradients by its output z, and z itself by
    -rate * (|h|^2 + 1) times them. Only z and the second layer go through the steps, and W is read and written once a
    round. The gradient by h at a step is W0 d - rate * h (s . d): the two sums over steps of d and of s . d give all.
    """

    router: views.Router
    temperature: float
    rate: float
    params: PyTree
    history: Array

    @property
    def inner(self):
        return self.params["params"]["inner"]

    @property
    def start(self):
        z = self.history.reshape(-1) @ self.inner["kernel"] + self.inner["bias"]
        zero = jnp.zeros_like(z)
        return _Routed((z, self.params["params"]["outer"]), (zero, zero, jnp.zeros(())))

    def weights(self, now, mine, present):
        z, outer = now
        logits = self.router.apply({"params": {"outer": outer}}, z, method="from_inner")
        return jax.nn.softmax(logits / self.temperature)

    def step(self, routed, grads):
        (z, outer), (s, d, sd) = routed
        z = z - self.rate * ((self.history**2).sum() + 1.0) * grads[0]
        outer = jax.tree.map(lambda p, g: p - self.rate * g, outer, grads[1])
        return _Routed((z, outer), (s + grads[0], d, sd))

    def pull(self, moved, at, grads):
        s, d, sd = moved.sums
        return _Routed(moved.now, (s, d + grads[0], sd + at.sums[0] @ grads[0]))

    def finish(self, routed):
        (_, outer), (s, d, sd) = routed
        h, kernel = self.history.reshape(-1), self.inner["kernel"]
        inner = {"kernel": kernel - self.rate * jnp.outer(h, s), "bias": self.inner["bias"] - self.rate * s}
        of_history = kernel @ d - self.rate * h * sd
        return {"router": {"params": {"inner": inner, "outer": outer}}}, of_history.reshape(self.history.shape)


def _stepped(params, grads, rates):
    """One SGD step, role by role."""
    return {r: jax.tree.map(lambda p, g, r=r: p - rates[r] * g, params[r], grads[r]) for r in params}


def _history_share(data: LocalData):
    """Every place of the history as its share of the mean [history]; zeros without one."""
    mask = data.history_mask.astype(jnp.float32)
    return mask / jnp.maximum(mask.sum(), 1.0)


def _mean_over_history(x, data: LocalData):
    """Mean over the history of [history, views, dim]."""
    # as a product: a sum over the first axis took 0.2 ms for 256 places
    return (_history_share(data) @ x.reshape(x.shape[0], -1)).reshape(x.shape[1:])


def history_mean(made, data: LocalData):
    """Mean views of the client's training items: what the router knows of r_u, [views, dim]."""
    return _mean_over_history(made[data.history], data)


def _spread(pulled, data: LocalData):
    """The cotangent of history_mean, [history, views, dim]."""
    return _history_share(data)[:, None, None] * pulled
