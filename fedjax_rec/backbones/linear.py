"""A personal linear head over item vectors (PFedRec's score function)."""

from __future__ import annotations

import jax

from fedjax_rec.backbones import Backbone


def linear_head(dim: int) -> Backbone:
    """score = w . q_i + b, initialised uniformly in +-1/sqrt(dim) as in the released code."""

    def init(key):
        k_weight, k_bias = jax.random.split(key)
        bound = dim**-0.5
        return {
            "head": {
                "weight": jax.random.uniform(k_weight, (dim,), minval=-bound, maxval=bound),
                "bias": jax.random.uniform(k_bias, (), minval=-bound, maxval=bound),
            }
        }

    return Backbone(init, lambda p, items: items @ p["head"]["weight"] + p["head"]["bias"], dim, private=("head",))
