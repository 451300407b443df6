"""Parts from which methods are put together: restriction to rows, local SGD, sharing by role.

Everything here is written for one client; tables are dictionaries keyed by role whose item roles hold the
client's working set [rows, dim].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from fedjax_rec.method import Batch, LocalData, batch_at
from fedjax_rec.types import ITEM_ROLES, Params, PRNGKey, PyTree

Loss = Callable[[Params, Params, Batch], Float[Array, ""]]
"""(parameters without an item axis, item vectors of the batch keyed by role [batch, dim], batch) -> scalar."""
Step = Callable[[PyTree, Batch], tuple[PyTree, Float[Array, ""]]]
Rate = float | Float[Array, ""]


IN_BOUNDS = "promise_in_bounds"  # a batch's indices are the sampler's and need no check


def item_roles(params: Mapping) -> Params:
    return {role: value for role, value in params.items() if role in ITEM_ROLES}


def other_roles(params: Mapping) -> Params:
    return {role: value for role, value in params.items() if role not in ITEM_ROLES}


def take_rows(table: PyTree, rows: Int[Array, "n"]) -> PyTree:
    """Rows of every array in `table`. Indices beyond its end read the last row: callers mask what they got."""
    return jax.tree.map(lambda x: x.at[rows].get(mode="clip"), table)


def batch_rows(tables: PyTree, batch: Batch) -> PyTree:
    """The batch's rows of every array in `tables`."""
    return jax.tree.map(lambda x: x.at[batch.item].get(mode=IN_BOUNDS), tables)


def restrict(params: Params, rows: Int[Array, "rows"]) -> Params:
    """Parameters with every item role cut to `rows`."""
    return {role: take_rows(value, rows) if role in ITEM_ROLES else value for role, value in params.items()}


def put_rows(table: PyTree, rows: Int[Array, "rows"], values: PyTree) -> PyTree:
    """`table` with `rows` replaced; padding rows (beyond its end) are dropped."""
    return jax.tree.map(lambda x, v: x.at[rows].set(v, mode="drop"), table, values)


def masked_mean(values: Float[Array, "n"], mask: Float[Array, "n"]) -> Float[Array, ""]:
    """Mean over the samples that are there; 0 if there are none."""
    return (values * mask).sum() / jnp.maximum(mask.sum(), 1.0)


@jax.custom_jvp
def _softplus(x: Float[Array, "*n"]) -> Float[Array, "*n"]:
    return jax.nn.softplus(x)


# the library's derivative goes through the logarithm again
_softplus.defjvps(lambda tangent, _, x: tangent * jax.nn.sigmoid(x))


def binary_cross_entropy(logits: Float[Array, "batch"], batch: Batch) -> Float[Array, ""]:
    """Mean binary cross-entropy of a batch, from logits."""
    # one softplus; the usual y log s(x) + (1 - y) log s(-x) takes two
    return masked_mean(_softplus(logits) - batch.label * logits, batch.mask)


def bayesian_personalised_ranking(logits: Float[Array, "batch"], batch: Batch) -> Float[Array, ""]:
    """Mean over all pairs of a positive and a negative of the batch of log(1 + exp(negative's logit - positive's)); 0
    without pairs. Source: Rendle et al. 2009, without its regulariser. It costs batch x batch numbers."""
    positive, negative = batch.mask * batch.label, batch.mask * (1.0 - batch.label)
    apart = _softplus(logits[None, :] - logits[:, None])
    pairs = positive.sum() * negative.sum()
    return (positive[:, None] * negative[None, :] * apart).sum() / jnp.maximum(pairs, 1.0)


def sgd_step(loss: Loss, rates: Mapping[str, Rate]) -> Step:
    """One plain SGD step on the roles named in `rates`; the others stay as they are.

    Differentiates with respect to the batch's item vectors and adds their updates into the table: the same as
    the gradient of the table (repeated items add up), without ever making a dense one.
    """

    def step(params: Params, batch: Batch):
        tables, rest = item_roles(params), other_roles(params)
        moving_rest = {role: rest[role] for role in rest if role in rates}
        vectors = batch_rows(tables, batch)
        moving_vectors = {role: vectors[role] for role in vectors if role in rates}

        def objective(moving, moving_items):
            return loss({**rest, **moving}, {**vectors, **moving_items}, batch)

        value, (grads, row_grads) = jax.value_and_grad(objective, argnums=(0, 1))(moving_rest, moving_vectors)
        new = dict(params)
        for role, grad in grads.items():
            new[role] = jax.tree.map(lambda p, g, r=rates[role]: p - r * g, params[role], grad)
        for role, grad in row_grads.items():
            new[role] = jax.tree.map(
                lambda p, g, r=rates[role]: p.at[batch.item].add(-r * g, mode=IN_BOUNDS), params[role], grad
            )
        return new, value

    return step


def on_tables(loss: Loss) -> Callable[[Params, Batch], Float[Array, ""]]:
    """The same objective as a function of the whole tables: (params, batch) -> scalar."""
    return lambda params, batch: loss(other_roles(params), batch_rows(item_roles(params), batch), batch)


def optax_step(objective: Callable[[Params, Batch], Float[Array, ""]], optimizer) -> tuple[Callable, Step]:
    """(init, step) for any optax optimiser over all roles; step carries (params, optimiser state).

    Differentiates with respect to the tables, so repeated items are summed before any norm or moment is taken.
    A step without samples changes nothing, whatever the optimiser would do with a zero gradient.
    """

    def step(carry, batch: Batch):
        params, state = carry
        value, grads = jax.value_and_grad(objective)(params, batch)
        updates, new_state = optimizer.update(grads, state, params)
        proposed = (optax.apply_updates(params, updates), new_state)
        has_samples = batch.mask.sum() > 0
        return jax.tree.map(lambda new, old: jnp.where(has_samples, new, old), proposed, carry), value

    return optimizer.init, step


def run_steps(step: Step, carry: PyTree, data: LocalData) -> tuple[PyTree, Float[Array, ""]]:
    """Runs all local steps; returns the carry and the mean loss over the round's samples."""

    def body(t, state):
        carry, total, seen = state
        batch = batch_at(data, t)
        carry, value = step(carry, batch)
        return carry, total + value * batch.mask.sum(), seen + batch.mask.sum()

    carry, total, seen = jax.lax.fori_loop(0, data.num_steps, body, (carry, jnp.zeros(()), jnp.zeros(())))
    return carry, total / jnp.maximum(seen, 1.0)


OPTIMIZERS: dict[str, Callable[[float], optax.GradientTransformation]] = {
    "sgd": optax.sgd,
    "momentum": lambda rate: optax.sgd(rate, momentum=0.9),
    "adam": optax.adam,
}
"""Local optimisers by name. All leave a row without gradient unchanged and start anew each round, so that
training on the working set equals training on the catalogue."""


def local_sgd(
    loss: Loss,
    rates: Mapping[str, Rate],
    *,
    optimizer: str = "sgd",
    clip_norm: float | None = None,
    noise: Mapping[str, optax.GradientTransformation] | None = None,
) -> Callable[[Params, LocalData], tuple[Params, Float[Array, ""]]]:
    """Local training: (params, data) -> (params, mean loss).

    Args:
        loss: objective of one batch.
        rates: learning rate of each role that trains.
        optimizer: a name in OPTIMIZERS, made anew every round.
        clip_norm: clips the global norm of each step's gradient (all roles that train together), if given.
        noise: by role, what is done to the clipped gradients (see gradient_noise).
    """
    if optimizer == "sgd" and clip_norm is None:
        step = sgd_step(loss, rates)
        return lambda params, data: run_steps(step, params, data)

    transform = by_role({role: OPTIMIZERS[optimizer](rate) for role, rate in rates.items()})
    if clip_norm is not None:
        only_moving = by_role({role: optax.identity() for role in rates})
        steps = [only_moving, optax.clip_by_global_norm(clip_norm)]
        if noise:
            steps.append(by_role({**{role: optax.identity() for role in rates}, **noise}))
        transform = optax.chain(*steps, transform)
    init, step = optax_step(on_tables(loss), transform)

    def train(params, data):
        (params, _), value = run_steps(step, (params, init(params)), data)
        return params, value

    return train


def gradient_noise(key: PRNGKey, std: float) -> optax.GradientTransformation:
    """Adds normal noise of standard deviation `std` to every entry of the gradients, drawn anew at each step."""

    def update(updates, step, params=None):
        leaves, structure = jax.tree.flatten(updates)
        keys = jax.random.split(jax.random.fold_in(key, step), len(leaves))
        noisy = [x + std * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
        return jax.tree.unflatten(structure, noisy), step + 1

    return optax.GradientTransformation(lambda params: jnp.zeros((), jnp.int32), update)


def by_role(transforms: Mapping[str, optax.GradientTransformation]) -> optax.GradientTransformation:
    """One optimiser per role; roles without one stay as they are."""
    labels_of = lambda params: {
        role: jax.tree.map(lambda _, r=role: r if r in transforms else "frozen", value)
        for role, value in params.items()
    }
    return optax.partition({**transforms, "frozen": optax.set_to_zero()}, labels_of)


def difference(after: Params, before: Params, roles: tuple[str, ...]) -> Params:
    """What training changed in `roles`."""
    return {role: jax.tree.map(jnp.subtract, after[role], before[role]) for role in roles}
