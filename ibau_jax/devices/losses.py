"""The losses of many steps, read from the devices a few at a time."""

from collections.abc import Callable
from typing import Any

import numpy as np

from ibau_jax.devices.mesh import Devices

CHUNK = 10


class Losses:
    """Losses in the order of the steps, read once in `CHUNK` of them.

    Between two readings an accelerator need not wait for the host, nor the host for it; so what is
    said of the losses, above all that one is no longer finite, is said within a chunk.

    Args:
      check: called with the losses [n] of each chunk, and may raise.
      earlier: losses of steps before these.

    Attributes:
      finite: are all that were read?
    """

    def __init__(
        self,
        devices: Devices,
        check: Callable[[np.ndarray], Any] = lambda losses: None,
        earlier: list[float] | None = None,
    ):
        self._devices, self._check = devices, check
        self._read, self._waiting, self.finite = list(earlier or ()), [], True

    def add(self, loss: Any) -> None:
        """Of one more step: a scalar that is the same on all devices."""
        self._waiting.append(loss)
        if len(self._waiting) == CHUNK:
            self.read()

    def read(self) -> list[float]:
        """All losses so far; waits for the steps that run."""
        if self._waiting:
            found = np.array([float(loss) for loss in self._devices.read(self._waiting)])
            self._waiting = []
            self._read += found.tolist()
            self.finite &= bool(np.isfinite(found).all())
            self._check(found)
        return self._read
