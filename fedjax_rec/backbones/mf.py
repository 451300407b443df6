"""Matrix factorisation: the inner product of a user vector and an item vector."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from fedjax_rec.backbones import Backbone


def matrix_factorisation(dim: int, *, bias: bool, init_std: float) -> Backbone:
    """score = p_u . q_i (+ b_u). The user bias moves all scores of a user alike: it serves the loss, not the
    ranking."""

    def init(key):
        user = {"vector": init_std * jax.random.normal(key, (dim,))}
        return {"user": {**user, "bias": jnp.zeros(())} if bias else user}

    def predict(params, items):
        logits = items @ params["user"]["vector"]
        return logits + params["user"]["bias"] if bias else logits

    return Backbone(init, predict, dim, private=("user",))
