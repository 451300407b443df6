"""Neural collaborative filtering (He et al. 2017): an MLP tower, optionally beside a GMF branch."""

from __future__ import annotations

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from fedjax_rec.backbones import Backbone


class OfPair(nn.Module):
    """A dense layer over [user ; item] for one user: its user half is worked out once, and its item half once for all
    users that score the same items."""

    width: int

    @nn.compact
    def __call__(self, user, items):
        dim = user.shape[-1]
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (dim + items.shape[-1], self.width))
        bias = self.param("bias", nn.initializers.zeros_init(), (self.width,))
        return items @ kernel[dim:] + (user @ kernel[:dim] + bias)


class Tower(nn.Module):
    """ReLU layers of the given widths over one user's vector [dim] beside each item's [n, dim]."""

    widths: Sequence[int]

    @nn.compact
    def __call__(self, user, items):
        x = nn.relu(OfPair(self.widths[0], name="Dense_0")(user, items))
        for n, width in enumerate(self.widths[1:], 1):
            x = nn.relu(nn.Dense(width, name=f"Dense_{n}")(x))
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
                "tower": tower.init(k_tower, jnp.zeros(dim), jnp.zeros((1, dim))),
                "output": output.init(k_output, jnp.zeros((1, features))),
            },
        }

    def predict(params, items):
        user, network = params["user"], params["network"]
        hidden = tower.apply(network["tower"], user[:dim], items[:, :dim])
        if gmf:
            hidden = jnp.concatenate([hidden, user[dim:] * items[:, dim:]], axis=1)
        return output.apply(network["output"], hidden)[:, 0]

    return Backbone(init, predict, width, private=("user",))
