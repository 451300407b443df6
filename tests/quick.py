"""The CPU, and less compiler work, which is nearly all that tests spend: in this process, and in those of scripts.

What users run is compiled as they have it in the tests of launch.py and of the README's examples as processes.
"""

from __future__ import annotations

import gc
import importlib.metadata
import os
import tempfile

import jax

# also beside an accelerator: tests need several devices, and sums of one order. Processes inherit it
PLATFORMS = os.environ.setdefault("JAX_PLATFORMS", "cpu")
# a third off with this jaxlib; a flag that another does not know would abort it
KNOWN = importlib.metadata.version("jaxlib").startswith("0.10.")
FLAGS = " --xla_cpu_use_fusion_emitters=false" if KNOWN else ""
_compiled = tempfile.TemporaryDirectory(prefix="compiled_")  # what one run has compiled serves the next
ENVIRONMENT = {
    **os.environ,
    # level 1 compiles nearly as fast as no optimisations at all, and what it makes runs several times as fast
    "XLA_FLAGS": os.environ.get("XLA_FLAGS", "") + FLAGS + " --xla_backend_optimization_level=1",
    "JAX_COMPILATION_CACHE_DIR": _compiled.name,
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
}
"""Of the processes of scripts."""


def in_this_process() -> None:
    """Makes four virtual CPU devices (tests of the mesh need several) that compile quickly."""
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)  # a tenth of what tracing takes is looking for cycles that are not there
    jax.config.update("jax_platforms", PLATFORMS)
    jax.config.update("jax_num_cpu_devices", 4)
    jax.config.update("jax_disable_most_optimizations", True)
    jax.config.update("jax_compilation_cache_dir", _compiled.name)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.15)  # less is read no faster than made
    before = os.environ.get("XLA_FLAGS")
    os.environ["XLA_FLAGS"] = (before or "") + FLAGS
    jax.devices()  # reads them
    if before is None:
        del os.environ["XLA_FLAGS"]
    else:
        os.environ["XLA_FLAGS"] = before
