"""The one driver of all defenses: it checks, compiles, times, watches, and yields records.

A defense is a generator. Once it is sure that it can begin it yields the model as it was given,
after each round the model and what there is to tell of the round; in the end it returns what it
found out. `method.method` makes a function of it that is called as `unlearn` is:

    @method(Config())
    def defense(job: Job) -> Rounds:
        step = job.program(make_step(job.model, job.config), rows=(1,))
        row = {}
        yield job.variables, row
        with job.progress(job.config.rounds, "my defense") as advance:
            for _ in range(job.config.rounds):
                advance(1, note_of(row))
                state, loss = step(state, batches)
                row = {"loss": float(loss)}
                yield state.variables, row
        return Told(diagnostics={"flagged": [8]})

Whoever runs it round by round can measure each model, keep the best, and stop when it is enough:

    for record in defense.run(logits, params, clean, key=key):
        record.row["acc"] = accuracy(record.params)
"""

import contextlib
import itertools
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import numpy as np

from ibau_jax.data import Dataset
from ibau_jax.devices.mesh import Devices
from ibau_jax.errors import InputError
from ibau_jax.models.model import Model, Params, Variables, closed
from ibau_jax.progress import progress_bar

Evaluate = Callable[[Params], Mapping[str, Any]]
NOTHING: Mapping[str, Any] = MappingProxyType({})


class Told(NamedTuple):
    """What a defense tells in the end.

    Attributes:
      deltas: perturbations that it unlearned, one a round, float [rounds, H, W, C], any range.
      found: triggers that it reconstructed, by a caption that names the label, as pictures float
        [H, W, C] in [0, 1].
      diagnostics: of its decisions, as JSON values; those that look for triggers have `flagged`,
        the labels that they hold for targets; `note` is a line for the user.
      models: variables of other models that it made, by name, worth to be measured.
    """

    deltas: np.ndarray = np.zeros((0, 1, 1, 1), np.float32)
    found: Mapping[str, np.ndarray] = NOTHING
    diagnostics: Mapping[str, Any] = NOTHING
    models: Mapping[str, Variables] = NOTHING


Rounds = Generator[tuple[Variables, dict[str, Any]], None, Told]


class Record(NamedTuple):
    """A round.

    Attributes:
      row: `round` (0: the model as it was given), what the defense tells of the round, and
        `seconds` (without compiling, and without what is done between the rounds). What is added
        to it stands in the history.
      params: the model after the round, in the form and the dtypes it was given in; they stay
        valid.
    """

    row: dict[str, Any]
    params: Params


class Result(NamedTuple):
    """What a defense returns.

    Attributes:
      params: the cleaned model, in the form and the dtypes it was given in.
      history: the rows of the records, from round 1 on.
      seconds: sum over the rounds.
      compile_seconds: tracing and compiling.
      deltas, found, diagnostics: see `Told`; of other models that the defense made the
        diagnostics have what `evaluate` says of them, by their names.
    """

    params: Params
    history: list[dict[str, Any]]
    seconds: float
    compile_seconds: float
    deltas: np.ndarray
    found: Mapping[str, np.ndarray]
    diagnostics: Mapping[str, Any]


@dataclass
class Job:
    """What a defense is given, and what it leaves to the driver.

    Attributes:
      model, variables: see `models.model.opened`.
      clean: the checked clean set, images in [0, 1].
      config: the settings of the defense.
      key: random key.
      devices: over which batches are spread.
      num_classes: of the model.
      data: other data sets, by name.
      shown: whether there are progress bars.
      advice: what to do where the numbers are no longer finite; the defense says it.
      compile_seconds: so far.
    """

    model: Model
    variables: Variables
    clean: Dataset
    config: Any
    key: jax.Array
    devices: Devices
    num_classes: int
    data: Mapping[str, Any] = field(default_factory=dict)
    shown: bool = False
    advice: str = "choose a smaller learning rate"
    compile_seconds: float = 0.0

    def program(
        self, function: Callable, *, rows: tuple[int, ...] = (), donate: tuple[int, ...] = ()
    ) -> Callable:
        """`Devices.program`, the time of its compilation counted apart."""
        return self.devices.program(function, rows=rows, donate=donate, compiling=self.compiling)

    @contextlib.contextmanager
    def compiling(self) -> Iterator[None]:
        """What happens inside counts as compilation."""
        started = time.perf_counter()
        yield
        self.compile_seconds += time.perf_counter() - started

    def progress(self, total: int, title: str):
        """A progress bar on stderr; see `progress.progress_bar`."""
        return progress_bar(total, title, self.shown)

    def check_finite(self, what: str, *values: Any) -> None:
        """Raise `InputError`, with the `advice`, unless all `values` (arrays) are finite."""
        if not all(bool(np.isfinite(leaf).all()) for leaf in jax.tree.leaves(values)):
            raise InputError(f"{what} is no longer finite: {self.advice}")


class Run:
    """A run of a defense, to be iterated over once; see `method.Method.run`. Yields `Record`s.

    `job.compile_seconds` tells while it runs what compilation took so far.
    """

    def __init__(self, rounds: Callable[[Job], Rounds], job: Job, given: Params):
        self.job = job
        self._given = given
        self._params: Params = given
        self._history: list[dict[str, Any]] = []
        self._told = Told()
        self._records = self._iterate(rounds(job))

    def __iter__(self) -> Iterator[Record]:
        return self._records

    def _iterate(self, rounds: Rounds) -> Iterator[Record]:
        job = self.job
        for number in itertools.count():
            started, compiled = time.perf_counter(), job.compile_seconds
            try:
                variables, row = next(rounds)
            except StopIteration as end:
                self._told = end.value
                return
            seconds = time.perf_counter() - started - (job.compile_seconds - compiled)
            told = dict(row)
            row.clear()  # and not a new one, since the defense shows what is added to it
            row.update({"round": number, **told, "seconds": seconds if number else 0.0})
            if number:
                job.check_finite(f"a parameter after round {number}", variables["params"])
                self._params = closed(job.model, variables, self._given)
                self._history.append(row)
            yield Record(row, self._params)

    def result(self, evaluate: Evaluate | None = None) -> Result:
        """Run to the end, `evaluate(params)` put into the row of each round that is left."""
        for record in self:
            if evaluate is not None:
                record.row.update(evaluate(record.params))
        others = {}
        if evaluate is not None:
            others = {
                name: dict(evaluate(closed(self.job.model, variables, self._given)))
                for name, variables in self._told.models.items()
            }
        return Result(
            self._params,
            self._history,
            sum(row["seconds"] for row in self._history),
            self.job.compile_seconds,
            self._told.deltas,
            self._told.found,
            {**self._told.diagnostics, **others},
        )


def finite(value: Any) -> float | None:
    """A float for JSON, which knows neither NaN nor infinity."""
    return float(value) if np.isfinite(value) else None
