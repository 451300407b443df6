"""Matrix products that come out alike on every device."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax


def in_float32(function: Callable) -> Callable:
    """`function` (to be compiled), the matrix products of which are float32 on every device.

    Accelerators by default round the factors first, to 8 bits (TPUs) or 11 (GPUs): means by numbers of samples would be
    off, users' similarities near 1 equal, and scores tied. Where the user has chosen a precision
    (JAX_DEFAULT_MATMUL_PRECISION), that holds.
    """

    @functools.wraps(function)
    def traced(*arguments):
        with jax.default_matmul_precision(jax.config.jax_default_matmul_precision or "highest"):
            return function(*arguments)

    return traced
