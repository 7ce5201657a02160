"""What the baselines share: the bookkeeping of a run, and checks."""

import contextlib
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from ibau_jax.devices.mesh import Devices
from ibau_jax.errors import InputError
from ibau_jax.models.model import Classifier, Model, Params, Variables, closed
from ibau_jax.unlearning.ibau import Result


class Run:
    """Records of a run, and its seconds with compilation and evaluation apart.

    The clock starts with the record of round 0.

    Args:
      model: from `models.model.opened`.
      given: the parameters as they were given; results come in their form and dtypes.
      evaluate, on_round: as for `ibau_jax.unlearn`.
    """

    def __init__(
        self,
        model: Model,
        given: Params,
        evaluate: Callable[[Params], Mapping[str, Any]] | None,
        on_round: Callable[[dict[str, Any]], None] | None,
    ):
        self.history: list[dict[str, Any]] = []
        self.seconds = self.compile_seconds = 0.0
        self._model, self._given = model, given
        self._evaluate, self._on_round = evaluate, on_round
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
        record |= self.measured(variables)
        if self._on_round is not None:
            self._on_round(record)
        self.history.append(record)
        self._since = time.perf_counter()
        return record

    def measured(self, variables: Variables) -> dict[str, Any]:
        """What `evaluate` says of a model."""
        return {} if self._evaluate is None else dict(self._evaluate(self._closed(variables)))

    def result(self, variables: Variables, **fields: Any) -> Result:
        """`fields`: `found`, `diagnostics` of `Result`."""
        return Result(
            params=self._closed(variables),
            history=self.history[1:],
            deltas=np.zeros((0, 1, 1, 1), np.float32),
            seconds=self.seconds,
            compile_seconds=self.compile_seconds,
            **fields,
        )

    def _closed(self, variables: Variables) -> Params:
        return closed(self._model, variables, self._given)


def needs_module(model: Any, defense: str, why: str) -> Classifier:
    """The user's model, for a defense that cannot do with a plain function.

    Raises:
      InputError: it is no `Classifier`.
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
