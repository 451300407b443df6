"""Saving and restoring runs. The only file that knows Orbax."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from fedjax_rec import system
from fedjax_rec.types import PyTree
from fedjax_rec.workdir import UsageError

CHUNK_BYTES = 2**26  # arrays are written in pieces of this size: client tables may be larger than what memory is left
KEEP = 2  # the newest, and the one before for a person to go back to (remove the newest)
WHY_CHARACTERS = 160  # of Orbax's reasons, which can be pages


class Checkpoints:
    """Numbered checkpoints of a run in one folder.

    A checkpoint appears under its number only when it is complete, so a killed run leaves the last good one.
    """

    def __init__(self, folder: str | os.PathLike):
        policy = ocp.training.preservation_policies.LatestN(KEEP)
        self._folder = Path(folder)
        self._checkpointer = ocp.training.Checkpointer(
            os.path.abspath(folder), preservation_policy=policy, cleanup_tmp_directories=True
        )

    @property
    def latest(self) -> int | None:
        """Rounds done in the newest checkpoint."""
        newest = self._checkpointer.latest
        return None if newest is None else newest.step

    def save(self, rounds_done: int, state: PyTree, notes: dict[str, Any]) -> None:
        """Saves arrays (`state`) and small JSON facts (`notes`) under the number of rounds done."""
        if rounds_done != self.latest:
            context = ocp.Context()
            context.array.saving.storage_options.chunk_byte_size = CHUNK_BYTES
            with context:
                self._checkpointer.save(rounds_done, state, custom_metadata=notes)
            system.return_free_memory()

    def notes(self) -> dict[str, Any]:
        """The facts saved with the newest checkpoint; UsageError if it cannot be read."""
        newest = self._checkpointer.latest
        with self._reading(newest.step):
            return self._checkpointer.metadata(newest.step).custom_metadata or {}

    def load(self, like: PyTree) -> tuple[int, PyTree]:
        """(rounds done, state) of the newest checkpoint.

        Args:
            like: arrays or shapes with shardings; what is loaded gets their shapes, types and placement.

        Raises:
            UsageError: if it cannot be read.
        """
        newest = self._checkpointer.latest
        with self._reading(newest.step):
            state = self._checkpointer.load(newest.step, abstract_state=jax.tree.map(_abstract, like))
        return newest.step, state

    @contextlib.contextmanager
    def _reading(self, step: int) -> Iterator[None]:
        """Says which checkpoint is damaged, and from where a run goes on without it."""
        try:
            yield
        except MemoryError:
            raise
        except Exception as error:  # Orbax has no one kind: damage is a KeyError, ValueError, OSError, ...
            before = max((kept.step for kept in self._checkpointer.checkpoints if kept.step < step), default=0)
            cause = error.__cause__ or error.__context__ or error  # Orbax hides it behind its registry
            why = (" ".join(str(cause).split()) or type(cause).__name__)[:WHY_CHARACTERS]
            path = self._folder / str(step)
            raise UsageError(f"{path} cannot be read ({why}); remove it to go on from round {before}") from error

    def close(self) -> None:
        self._checkpointer.close()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *exc) -> None:
        self.close()


def _abstract(x):
    if isinstance(x, np.ndarray):
        return x
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
