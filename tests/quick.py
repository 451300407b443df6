"""The CPU, and less compiler work, which is nearly all that tests spend: in this process, and in those of scripts.

What users run is compiled as they have it in the tests of launch.py and of the README's examples as processes.
"""

from __future__ import annotations

import importlib.metadata
import os
import tempfile

import jax

# also beside an accelerator: tests need several devices, and sums of one order. Processes inherit it
PLATFORMS = os.environ.setdefault("JAX_PLATFORMS", "cpu")
# a third off with this jaxlib; a flag that another does not know would abort it
KNOWN = importlib.metadata.version("jaxlib").startswith("0.10.")
FLAGS = " --xla_cpu_use_fusion_emitters=false" if KNOWN else ""
_compiled = tempfile.TemporaryDirectory(prefix="compiled_")  # what one process has compiled serves the next
ENVIRONMENT = {
    **os.environ,
    "XLA_FLAGS": os.environ.get("XLA_FLAGS", "") + FLAGS,
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    "JAX_COMPILATION_CACHE_DIR": _compiled.name,
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.3",
}
"""Of the processes of scripts."""


def in_this_process() -> None:
    """Makes four virtual CPU devices (tests of the mesh need several) that compile quickly."""
    jax.config.update("jax_platforms", PLATFORMS)
    jax.config.update("jax_num_cpu_devices", 4)
    jax.config.update("jax_disable_most_optimizations", True)
    before = os.environ.get("XLA_FLAGS")
    os.environ["XLA_FLAGS"] = ENVIRONMENT["XLA_FLAGS"]
    jax.devices()  # reads them
    if before is None:
        del os.environ["XLA_FLAGS"]
    else:
        os.environ["XLA_FLAGS"] = before
