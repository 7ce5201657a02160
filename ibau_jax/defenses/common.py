"""What the baselines share: one view of every model, and the bookkeeping of a run."""

import contextlib
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from ibau_jax.errors import InputError
from ibau_jax.ibau import Result
from ibau_jax.models import Classifier, Logits, Params
from ibau_jax.parallel import Devices

Variables = dict[str, Any]


class Frozen(NamedTuple):
    """A plain `logits(params, images)` with the methods of a `Classifier`.

    It is trained in evaluation mode, and there is nothing inside to look at.
    """

    logits: Logits

    def __call__(self, variables: Variables, images: jax.Array) -> jax.Array:
        return self.logits(variables["params"], images)

    def look(self, variables: Variables, images: jax.Array) -> tuple[jax.Array, list[jax.Array]]:
        return self(variables, images), []

    def train(self, variables: Variables, images: jax.Array, key, weights=None, axis=None):
        del key, weights, axis
        return self(variables, images), [], {}


Model = Classifier | Frozen


def opened(logits: Logits, params: Params) -> tuple[Model, Variables]:
    """The model and its variables, whichever form they were given in."""
    if isinstance(logits, Classifier):
        return logits, dict(params)
    return Frozen(logits), {"params": params}


def closed(model: Model, variables: Variables) -> Params:
    """The parameters in the form they were given in."""
    return variables if isinstance(model, Classifier) else variables["params"]


class Run:
    """Records of a run, and its seconds with compilation and evaluation apart.

    The clock starts with the record of round 0.

    Args:
      evaluate, on_round: as for `ibau_jax.ibau.unlearn`.
    """

    def __init__(
        self,
        model: Model,
        evaluate: Callable[[Params], Mapping[str, Any]] | None,
        on_round: Callable[[dict[str, Any]], None] | None,
    ):
        self.history: list[dict[str, Any]] = []
        self.seconds = self.compile_seconds = 0.0
        self._model, self._evaluate, self._on_round = model, evaluate, on_round
        self._since = time.perf_counter()

    def compile(
        self,
        devices: Devices,
        function: Callable,
        *args: Any,
        rows: tuple[int, ...] = (),
        donate: tuple[int, ...] = (),
    ) -> Callable:
        """`Devices.compile`, its time counted as compilation."""
        with self.compiling():
            return devices.compile(function, *args, rows=rows, donate=donate)

    @contextlib.contextmanager
    def compiling(self):
        """What happens inside counts as compilation."""
        started = time.perf_counter()
        with self.paused():
            yield
        self.compile_seconds += time.perf_counter() - started

    @contextlib.contextmanager
    def paused(self):
        """Stop the clock for a while."""
        started = time.perf_counter()
        yield
        self._since += time.perf_counter() - started

    def record(self, variables: Variables, **values: Any) -> dict[str, Any]:
        """Measure the model and keep the record of a round (0: the model as given)."""
        seconds = time.perf_counter() - self._since if self.history else 0.0
        record = {"round": len(self.history), **values, "seconds": seconds}
        self.seconds += seconds
        if self._evaluate is not None:
            record |= dict(self._evaluate(closed(self._model, variables)))
        if self._on_round is not None:
            self._on_round(record)
        self.history.append(record)
        self._since = time.perf_counter()
        return record

    def result(self, variables: Variables, **fields: Any) -> Result:
        """`fields`: `found`, `diagnostics` of `Result`."""
        return Result(
            params=closed(self._model, variables),
            history=self.history[1:],
            deltas=np.zeros((0, 1, 1, 1), np.float32),
            seconds=self.seconds,
            compile_seconds=self.compile_seconds,
            **fields,
        )


def needs_module(model: Model, defense: str, why: str) -> Classifier:
    """The model as a `Classifier`, for a defense that cannot do with a plain function.

    Raises:
      InputError: it is a plain function.
    """
    if not isinstance(model, Classifier):
        raise InputError(
            f"{defense} {why}: expected a flax module as ibau_jax.models.Classifier(module) with "
            "its variables, found a plain function"
        )
    return model


def finite(value: Any) -> float | None:
    """A float for JSON, which knows neither NaN nor infinity."""
    return float(value) if np.isfinite(value) else None


def check_positive(config: Any, *names: str) -> None:
    """Fields of a config that are numbers above zero (None: left open)."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not value > 0:
            raise InputError(f"{name} is {value}: expected a positive number")
