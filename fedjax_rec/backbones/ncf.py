"""Neural collaborative filtering (He et al. 2017): an MLP tower, optionally beside a GMF branch."""

from __future__ import annotations

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from fedjax_rec.backbones import Backbone


class Tower(nn.Module):
    """ReLU layers of the given widths."""

    widths: Sequence[int]

    @nn.compact
    def __call__(self, x):
        for width in self.widths:
            x = nn.relu(nn.Dense(width)(x))
        return x


def neural_cf(dim: int, *, layers: Sequence[int], gmf: bool, init_std: float) -> Backbone:
    """Tower over [p_u ; q_i], with `gmf` concatenated to p'_u * q'_i, then one linear output.

    Item vectors hold both branches side by side, [mlp | gmf], so their width is 2 dim with `gmf`.
    """
    width = 2 * dim if gmf else dim
    tower, output = Tower(tuple(layers)), nn.Dense(1)
    features = layers[-1] + (dim if gmf else 0)

    def init(key):
        k_user, k_tower, k_output = jax.random.split(key, 3)
        return {
            "user": init_std * jax.random.normal(k_user, (width,)),
            "network": {
                "tower": tower.init(k_tower, jnp.zeros((1, 2 * dim))),
                "output": output.init(k_output, jnp.zeros((1, features))),
            },
        }

    def predict(params, items):
        user, network = params["user"], params["network"]
        repeated = jnp.broadcast_to(user[:dim], (items.shape[0], dim))
        hidden = tower.apply(network["tower"], jnp.concatenate([repeated, items[:, :dim]], axis=1))
        if gmf:
            hidden = jnp.concatenate([hidden, user[dim:] * items[:, dim:]], axis=1)
        return output.apply(network["output"], hidden)[:, 0]

    return Backbone(init, predict, width, private=("user",))
