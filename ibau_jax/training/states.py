"""Checkpoints of a training run: written whole or not at all, taken up again after any end."""

import contextlib
import copy
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ibau_jax.errors import InputError, first_line

Tree = Any
SECONDS = 60.0  # between two states within an epoch


def check_states(folder: str | Path, settings: Mapping[str, Any], resume: bool) -> None:
    """What `Checkpoints` refuses, as far as it is known before the rest of the settings is.

    Args:
      settings: some of those that the run depends on.

    Raises:
      InputError: as `Checkpoints`.
    """
    if Path(folder).is_file():
        raise InputError(f"{str(folder)!r} is a file: expected a folder of checkpoints")
    if not any(path.name.isdigit() for path in Path(folder).glob("*")):
        return
    _check_wanted(folder, resume)
    states = Checkpoints(folder, settings, resume, partial=True)
    states.close()


class Checkpoints:
    """The last states of a run in a folder (Orbax, two are kept).

    Args:
      folder: made when it is missing.
      settings: JSON values that the result depends on; a folder with others is refused.
      resume: go on from the last state, if there is one; else the folder must have none.
      seconds: between two states within an epoch (None: `SECONDS`); each end of an epoch makes
        one as well.
      environment: JSON values on which the result depends by rounding only, as on the number of
        devices (the state is the same on all); a folder with others is taken up with a warning.
      partial: `settings` are only some, and nothing will be saved.

    Attributes:
      resumed: the step of the state that `last` gave; None: none so far.

    Raises:
      InputError: the folder holds states and `resume` is off, or is of another run.
    """

    def __init__(
        self,
        folder: str | Path,
        settings: Mapping[str, Any],
        resume: bool = False,
        seconds: float | None = None,
        environment: Mapping[str, Any] | None = None,
        partial: bool = False,
    ):
        import orbax.checkpoint as ocp  # takes a second

        if Path(folder).is_file():
            raise InputError(f"{str(folder)!r} is a file: expected a folder of checkpoints")
        self.folder, self.settings = Path(folder).absolute(), settings
        self.environment = environment or {}
        self.seconds = SECONDS if seconds is None else seconds
        self.resumed: int | None = None
        self._args = ocp.args
        options = ocp.CheckpointManagerOptions(max_to_keep=2, cleanup_tmp_directories=True)
        self._manager = ocp.CheckpointManager(self.folder, options=options)
        self._saved = time.monotonic()
        if self._manager.latest_step() is None:
            return
        _check_wanted(folder, resume)
        _, found = self._read(about=ocp.args.JsonRestore())
        stored = found["about"]
        if other := _differences(stored["settings"], settings, partial):
            raise InputError(
                f"{str(folder)!r} was begun with {other}: give the options that it was begun with "
                "to go on with it, or remove the folder to train anew"
            )
        if not partial and (other := _differences(stored.get("environment", {}), self.environment)):
            warnings.warn(
                f"{str(folder)!r} was begun with {other}: the training goes on from its last "
                "state, but its result will differ by rounding from that of a run that was never "
                "stopped; remove the folder to train anew",
                stacklevel=2,
            )

    def due(self) -> bool:
        """Is it time for a state within an epoch?"""
        return time.monotonic() - self._saved >= self.seconds

    def save(self, step: int, state: Tree, about: Mapping[str, Any]) -> None:
        """Write a state (a pytree of arrays) and JSON values, in the background.

        Where that fails (a full disk) there is a warning, at the latest with the next state.
        """
        # Copies: they are written while the training goes on.
        run = {"settings": dict(self.settings), "environment": dict(self.environment)}
        about = copy.deepcopy({**run, **about})
        content = self._args.Composite(
            state=self._args.StandardSave(jax.tree.map(np.array, state)),
            about=self._args.JsonSave(about),
        )
        self._try(lambda: self._manager.save(step, args=content))
        self._saved = time.monotonic()

    def last(self, like: Tree) -> tuple[int, Tree, dict[str, Any]] | None:
        """The last step, its state (a pytree as `like`) and the values; None: there is none."""
        if self._manager.latest_step() is None:
            return None
        like = jax.tree.map(np.array, like)
        step, found = self._read(
            state=self._args.StandardRestore(like), about=self._args.JsonRestore()
        )
        self.resumed = step
        return step, found["state"], found["about"]

    def close(self) -> None:
        """Wait for what is being written, and let go of the folder."""
        self._try(self._manager.wait_until_finished)
        self._try(self._manager.close)

    def remove(self) -> None:
        """Delete the folder: the run is done. A kill in between leaves it whole or not at all."""
        self.close()
        with contextlib.suppress(OSError):  # someone else removed it
            trash = tempfile.mkdtemp(prefix=f".{self.folder.name}.", dir=self.folder.parent)
            self.folder.rename(Path(trash) / "states")
            shutil.rmtree(trash)

    def _try(self, action: Callable[[], Any]) -> None:
        """A training does not need its states, and does not end because of them."""
        try:
            action()
        except Exception as error:  # of many types
            warnings.warn(
                f"cannot write a state in {str(self.folder)!r}: {first_line(error)[:200]}; the "
                "training goes on, and could be resumed from an older state only",
                stacklevel=3,
            )

    def _read(self, **parts):
        """Step and content of the last state that can be read."""
        reason = ""
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                return step, self._manager.restore(step, args=self._args.Composite(**parts))
            except Exception as error:  # a damaged file raises many types
                reason = first_line(error)[:200]
        raise InputError(
            f"cannot read a checkpoint in {str(self.folder)!r}: {reason}; expected one of this "
            "version of ibau_jax and of its libraries: go on with the version that began it, or "
            "remove the folder to train anew"
        )


def _check_wanted(folder: str | Path, resume: bool) -> None:
    if not resume:
        raise InputError(
            f"{str(folder)!r} holds an unfinished training: resume it, or remove the folder to "
            "train anew",
            argument="resume",
        )


def _differences(stored: Mapping[str, Any], now: Mapping[str, Any], partial: bool = False) -> str:
    """Which values differ, in words; empty where none does. `partial`: only those in `now`."""
    names = sorted(now.keys() if partial else stored.keys() | now.keys())
    return ", ".join(
        f"{name} {_short(stored.get(name))}, now it is {_short(now.get(name))}"
        for name in names
        if stored.get(name) != now.get(name)
    )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
