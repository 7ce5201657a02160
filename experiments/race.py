"""Seconds until a defense takes effect, looked at every fifth step: the paper's Table 6.

    python experiments/race.py run --reference DIR [--models BadNets] [--defenses ibau nad]
    python experiments/race.py table

A defense takes effect when ASR is below 20 % with at most 10 points of ACC lost (the paper calls it
a failure with more). The model is copied at every fifth call of the program that trains it, and
after each round; what copies and compilation take is left out, as is the evaluation, on 2000 images
of the test set, in the end. `--defenses` run in turn, `--repeats` times. Needs CIFAR-10 and GTSRB
(TFDS_DATA_DIR) and a machine with nothing else running. Rows go to
`experiments/results/steps.jsonl`.
"""

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import tyro
from baselines import FROM_ZOO, METHODS, ZOO
from published_models import MODELS as PUBLISHED
from published_models import import_model, read

from ibau_jax import load
from ibau_jax.defenses import find
from ibau_jax.defenses.run import Job
from ibau_jax.errors import check_name
from ibau_jax.models.files import load_model
from ibau_jax.models.model import Variables
from ibau_jax.results.metrics import evaluator
from ibau_jax.results.rows import write_rows

RESULTS = Path(__file__).parent / "results" / "steps.jsonl"
EVERY = 5


@dataclass
class Run:
    """Who runs."""

    reference: Path
    """Folder of the published models (checkpoints/, triggers/)."""
    models: tuple[str, ...] = ("BadNets", "Trojan WM", "l2")
    defenses: tuple[str, ...] = ("ibau", "ibau-untargeted", "ft-sam", "nad", "deepinspect")
    repeats: int = 1
    seed: int = 0
    out: Path = RESULTS


@dataclass
class Copies:
    """Of the model in training, each with the seconds until then."""

    job: Job | None = None
    began: float = 0.0
    apart: float = 0.0
    taken: list[tuple[float, Variables]] = field(default_factory=list)

    def seconds(self) -> float:
        assert self.job is not None
        return time.perf_counter() - self.began - self.apart - self.job.compile_seconds

    def take(self, variables: Variables) -> None:
        """Where it is one of the model that is cleaned (a generator of triggers is trained too)."""
        assert self.job is not None
        seconds, started = self.seconds(), time.perf_counter()
        shapes = [jax.tree.map(lambda a: a.shape, tree) for tree in (variables, self.job.variables)]
        if shapes[0] == shapes[1]:
            self.taken.append((seconds, jax.device_get(variables)))
        self.apart += time.perf_counter() - started


@contextmanager
def copying() -> Iterator[Copies]:
    """Copy what a program of a defense gives at every fifth call."""
    copies, program = Copies(), Job.program

    def watched(self: Job, function: Callable, **settings: Any) -> Callable:
        call, calls = program(self, function, **settings), 0
        copies.job = self

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
    for name in grid.models:
        for repeat in range(grid.repeats):
            for defense in grid.defenses:
                check_name("model", name, (*PUBLISHED, *FROM_ZOO))
                check_name("defense", defense, METHODS)
                row = {"model": name, "defense": defense, "repeat": repeat, "seed": grid.seed}
                row |= one(grid.reference, name, defense, grid.seed)
                write_rows(grid.out, [*read(grid.out), row])
                jax.clear_caches()
                print(name, defense, effective(row), row["seconds"], flush=True)


def one(reference: Path, name: str, defense: str, seed: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        zoo = name in FROM_ZOO
        path = ZOO / f"{name}.safetensors" if zoo else import_model(reference, name, Path(folder))
        model = load_model(path)
    method, preset = METHODS[defense]
    entry, _, config = find(method, preset, model.dataset)
    clean = load(model.dataset, "test[:5000]")
    key = jax.random.key(seed)
    with copying() as copies:
        run = entry.method.run(model.classifier, model.variables, clean, config=config, key=key)
        copies.began = time.perf_counter()
        for record in run:
            if record.row["round"]:
                copies.take(record.params)
        result = run.result()
    measure = evaluator(model.classifier, load(model.dataset, "test[5000:7000]"), model.attacks)
    given = measure(model.variables)
    looks = [(seconds, measure(variables)) for seconds, variables in copies.taken]
    return {
        "acc_before": given.acc,
        "looks": [[seconds, found.acc, found.asr] for seconds, found in looks],
        "seconds": result.seconds,
        "compile_seconds": result.compile_seconds,
        "device": jax.devices()[0].device_kind,
    }


def effective(row: dict[str, Any], asr: float = 0.2, drop: float = 0.1) -> float | None:
    """Seconds until it takes effect; None: never."""
    for seconds, acc, success in row["looks"]:
        if success < asr and acc >= row["acc_before"] - drop:
            return seconds
    return None


def table() -> None:
    """Print the table (Markdown)."""
    print("| model | defense | seconds to take effect | of the whole run | ACC, ASR in the end |")
    print("|---|---|---|---|---|")
    for row in read(RESULTS):
        took = effective(row)
        _, acc, asr = row["looks"][-1]
        print(
            f"| {row['model']} | {row['defense']} | {'never' if took is None else f'{took:.1f}'} "
            f"| {row['seconds']:.1f} | {acc:.3f}, {asr:.3f} |"
        )


if __name__ == "__main__":
    commands = {"run": run, "table": table}
    flat = (tyro.conf.OmitArgPrefixes,)
    tyro.extras.subcommand_cli_from_dict(commands, description=__doc__, config=flat)
