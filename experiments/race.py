"""Seconds until a defense takes effect, looked at every fifth step: the paper's Table 6.

    python experiments/race.py run --reference DIR [--models BadNets] [--methods ibau nad]
    python experiments/race.py table

A defense takes effect when ASR is below 20 % with at most 10 points of ACC lost (the paper calls it
a failure with more). The model is copied at every fifth call of the program that trains it, and
after each round; what copies and compilation take is left out, as is the evaluation, on 2000 images
of the test set, in the end. `--methods` run in turn, `--repeats` times. Needs CIFAR-10 and GTSRB
(TFDS_DATA_DIR) and a machine with nothing else running. Rows go to
`experiments/results/steps.jsonl`.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import tyro
from cells import ATTACKS, METHODS
from grid import RESULTS as FOLDER
from grid import Row, fill, read
from measure import Models
from paper.seconds import METHODS as TIMED
from paper.seconds import effective

from ibau_jax import Dataset, load
from ibau_jax.defenses import find, with_rounds
from ibau_jax.defenses.run import Job
from ibau_jax.models.files import load_model
from ibau_jax.models.model import Variables
from ibau_jax.results.metrics import evaluator

RESULTS = FOLDER / "steps.jsonl"
EVERY = 5


@dataclass(frozen=True)
class Cell:
    """One run; the same again where there are many repeats."""

    model: str
    method: str
    seed: int
    repeat: int


# Of the paper's Table 6; a machine's hours.
TABLE = tuple(
    Cell(f"{dataset}-{attack}", method, 0, 0)
    for attack in ATTACKS
    for dataset in ("cifar10", "gtsrb")
    for method in TIMED
)


@dataclass
class Run:
    """Who runs."""

    reference: Path
    """Folder of the published models (checkpoints/, triggers/)."""
    models: tuple[str, ...] = ("BadNets", "Trojan WM", "l2")
    methods: tuple[str, ...] = ("ibau", "ibau-untargeted", "ft-sam", "nad", "deepinspect")
    repeats: int = 1
    seed: int = 0
    out: Path = RESULTS


@dataclass
class Copies:
    """Of the model in training, each with the seconds until then."""

    job: Job
    began: float
    apart: float = 0.0
    taken: list[tuple[float, Variables]] = field(default_factory=list)

    def seconds(self) -> float:
        return time.perf_counter() - self.began - self.apart - self.job.compile_seconds

    def take(self, variables: Variables) -> None:
        """Where it is one of the model that is cleaned (a generator of triggers is trained too)."""
        seconds, started = self.seconds(), time.perf_counter()
        shapes = [jax.tree.map(lambda a: a.shape, tree) for tree in (variables, self.job.variables)]
        if shapes[0] == shapes[1]:
            self.taken.append((seconds, jax.device_get(variables)))
        self.apart += time.perf_counter() - started


@contextmanager
def copying(job: Job) -> Iterator[Copies]:
    """Copy what a program of a defense gives at every fifth call, from now on."""
    copies, program = Copies(job, time.perf_counter()), Job.program

    def watched(self: Job, function: Callable, **settings: Any) -> Callable:
        call, calls = program(self, function, **settings), 0

        def called(*args: Any) -> Any:
            nonlocal calls
            found, calls = call(*args), calls + 1
            state = found[0] if isinstance(found, tuple) else None
            if calls % EVERY == 0 and state is not None:
                if hasattr(state, "variables"):
                    copies.take(self.devices.one(state.variables))
                elif hasattr(state, "params"):
                    params = self.devices.one(state.params)
                    copies.take({**self.variables, "params": params})
            return found

        return called

    with mock.patch.object(Job, "program", watched):
        yield copies


def run(grid: Run) -> None:
    """Let them run in turn."""
    cells = [
        Cell(model, method, grid.seed, repeat)
        for model in grid.models
        for repeat in range(grid.repeats)
        for method in grid.methods
    ]
    fill(grid.out, cells, partial(measure, models=Models(grid.reference)), shown)


def measure(
    cell: Cell,
    models: Models,
    *,
    preset: str | None = None,
    rounds: int | None = None,
    images: int | None = None,
) -> Row | None:
    """What a defense's model is at every fifth step; the limits are those of `measure.measure`."""
    with models.file(cell.model) as path:
        if path is None:
            return None
        model = load_model(path)
    defense, own = METHODS[cell.method]
    entry, _, config = find(defense, own or preset, model.dataset)
    if rounds is not None:
        config = with_rounds(config, rounds)
    split = model.data_info(None)
    clean = load(model.dataset, f"test[:{images}]" if images else split.clean)
    key = jax.random.key(cell.seed)
    run = entry.method.run(model.classifier, model.variables, clean, config=config, key=key)
    with copying(run.job) as copies:
        for record in run:
            if record.row["round"]:
                copies.take(record.params)
    result = run.result()
    look = evaluator(model.classifier, first(load(model.dataset, split.split)), model.attacks)
    given = look(model.variables)
    looks = [(seconds, look(variables)) for seconds, variables in copies.taken]
    jax.clear_caches()
    return {
        "acc_before": given.acc,
        "looks": [[seconds, found.acc, found.asr] for seconds, found in looks],
        "seconds": result.seconds,
        "compile_seconds": result.compile_seconds,
        "device": jax.devices()[0].device_kind,
        "machine": machine(),
    }


def first(data: Dataset, count: int = 2000) -> Dataset:
    return Dataset(data.images[:count], data.labels[:count])


def machine() -> str:
    """What the seconds are of."""
    cpu = Path("/proc/cpuinfo")
    names = [
        line.partition(":")[2].strip()
        for line in (cpu.read_text().splitlines() if cpu.is_file() else ())
        if line.startswith("model name")
    ]
    device = jax.devices()[0].device_kind
    return f"{len(names)} cores of an {names[0]}" if names and device == "cpu" else device


def shown(row: Row) -> str:
    """Seconds to take effect, and of the whole run."""
    took = effective(row)
    return f"{'never' if took is None else f'{took:.1f}'} {row['seconds']:.1f}"


def table() -> None:
    """Print the table (Markdown)."""
    print("| model | defense | seconds to take effect | of the whole run | ACC, ASR in the end |")
    print("|---|---|---|---|---|")
    for row in read(RESULTS):
        took = effective(row)
        _, acc, asr = row["looks"][-1]
        print(
            f"| {row['cell']['model']} | {row['cell']['method']} "
            f"| {'never' if took is None else f'{took:.1f}'} | {row['seconds']:.1f} "
            f"| {acc:.3f}, {asr:.3f} |"
        )


if __name__ == "__main__":
    commands = {"run": run, "table": table}
    flat = (tyro.conf.OmitArgPrefixes,)
    tyro.extras.subcommand_cli_from_dict(commands, description=__doc__, config=flat)
