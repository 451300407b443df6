"""How many of its dimensions a table uses: singular values, effective rank, correlation between dimensions."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float


def singular_spectrum(table: Float[Array, "items dim"]) -> Float[Array, "dim"]:
    """Singular values in falling order; zeros for the dimensions beyond the number of items."""
    values = jnp.linalg.svd(table, compute_uv=False)
    return jnp.pad(values, (0, table.shape[1] - values.shape[0]))


def effective_rank(spectrum: Float[Array, "dim"]) -> Float[Array, ""]:
    """exp of the entropy of the normalised singular values (Roy and Vetterli 2007): from 1, all in one direction, to
    `dim`, all directions alike; 0 for a table of zeros."""
    total = spectrum.sum()
    share = spectrum / jnp.where(total > 0, total, 1.0)
    entropy = -(share * jnp.log(jnp.where(share > 0, share, 1.0))).sum()
    return jnp.where(total > 0, jnp.exp(entropy), 0.0)


def redundancy(table: Float[Array, "items dim"]) -> Float[Array, ""]:
    """Mean absolute correlation between two different dimensions; a constant dimension correlates with none."""
    centred = table - table.mean(0)
    length = jnp.sqrt((centred**2).sum(0))
    unit = centred / jnp.where(length > 0, length, 1.0)
    correlation = jnp.abs(unit.T @ unit)
    dim = table.shape[1]
    return (correlation.sum() - jnp.trace(correlation)) / max(dim * (dim - 1), 1)
