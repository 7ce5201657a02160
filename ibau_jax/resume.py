"""Checkpoints of a training run: written whole or not at all, taken up again after any end."""

import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ibau_jax.errors import InputError

Tree = Any


class Checkpoints:
    """The last states of a run in a folder (Orbax, two are kept).

    Args:
      folder: made when it is missing.
      settings: JSON values that the run depends on; a folder with others is refused.
      resume: go on from the last state, if there is one; else the folder must have none.
      seconds: between two states within an epoch; each end of an epoch makes one as well.

    Raises:
      InputError: the folder holds states and `resume` is off, or is of another run.
    """

    def __init__(
        self,
        folder: str | Path,
        settings: Mapping[str, Any],
        resume: bool = False,
        seconds: float = 60.0,
    ):
        import orbax.checkpoint as ocp  # takes a second

        if Path(folder).is_file():
            raise InputError(f"{str(folder)!r} is a file: expected a folder of checkpoints")
        self.folder, self.settings, self.seconds = Path(folder).absolute(), settings, seconds
        self._args = ocp.args
        options = ocp.CheckpointManagerOptions(max_to_keep=2, cleanup_tmp_directories=True)
        self._manager = ocp.CheckpointManager(self.folder, options=options)
        self._saved = time.monotonic()
        if self._manager.latest_step() is None:
            return
        if not resume:
            raise InputError(
                f"{str(folder)!r} holds an unfinished training: go on with it by --resume, or "
                "remove the folder"
            )
        _, found = self._read(about=ocp.args.JsonRestore())
        stored = found["about"]["settings"]
        for name in sorted(stored.keys() | settings.keys()):
            if stored.get(name) != settings.get(name):
                raise InputError(
                    f"{str(folder)!r} was begun with {name} {stored.get(name)!r}, now it is "
                    f"{settings.get(name)!r}: resume with the same settings, or remove the folder"
                )

    def due(self) -> bool:
        """Is it time for a state within an epoch?"""
        return time.monotonic() - self._saved >= self.seconds

    def save(self, step: int, state: Tree, about: Mapping[str, Any]) -> None:
        """Write a state (a pytree of arrays) and JSON values, in the background."""
        content = self._args.Composite(
            state=self._args.StandardSave(jax.tree.map(np.array, state)),
            about=self._args.JsonSave({"settings": dict(self.settings), **about}),
        )
        self._manager.save(step, args=content)
        self._saved = time.monotonic()

    def last(self, like: Tree) -> tuple[int, Tree, dict[str, Any]] | None:
        """The last step, its state (a pytree as `like`) and the values; None: there is none."""
        if self._manager.latest_step() is None:
            return None
        like = jax.tree.map(np.array, like)
        step, found = self._read(
            state=self._args.StandardRestore(like), about=self._args.JsonRestore()
        )
        return step, found["state"], found["about"]

    def remove(self) -> None:
        """Delete the folder: the run is done."""
        self._manager.wait_until_finished()
        self._manager.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _read(self, **parts):
        """Step and content of the last state that can be read."""
        reason = ""
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                return step, self._manager.restore(step, args=self._args.Composite(**parts))
            except Exception as error:  # a damaged file raises many types
                reason = (str(error).strip() or repr(error)).splitlines()[0][:200]
        raise InputError(
            f"cannot read a checkpoint in {str(self.folder)!r}: {reason}; remove the folder and "
            "train anew"
        )
