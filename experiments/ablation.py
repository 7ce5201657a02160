"""What the implicit term buys: solvers of the hypergradient in the preset `untargeted`.

    python experiments/ablation.py run --reference DIR
    python experiments/ablation.py table

`run` needs CIFAR-10 (TFDS_DATA_DIR) and the folder of the published checkpoints. It writes the
last row of each run to `experiments/results/ablation.jsonl` as it comes and leaves out what is
there already. A series or a solve that diverges is used as it is (`keep_diverged`), so that the
table shows the solver and not its fallback; how many did is in the table.
"""

import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro
from grid import RESULTS as FOLDER
from grid import Row, fill, read
from published_models import import_model

from ibau_jax import IBAUConfig, load, unlearn
from ibau_jax.hypergradient import CG, Direct, Neumann, NormalCG
from ibau_jax.models.architectures import build
from ibau_jax.models.files import load_model
from ibau_jax.models.model import evaluation_logits
from ibau_jax.results.metrics import evaluator

RESULTS = FOLDER / "ablation.jsonl"
NAMES = ("BadNets", "l2", "Trojan WM")
METHODS: dict[str, dict[str, Any]] = {
    # A ball of no size: nothing is patched, and Adam fine-tunes on the clean set.
    "fine-tuning": {"radius": 1e-9, "solver": Direct()},
    "direct": {"solver": Direct()},
    "Neumann 1": {"solver": Neumann(1, 0.1)},
    "Neumann 5": {"solver": Neumann(5, 0.1)},
    "Neumann 20": {"solver": Neumann(20, 0.1)},
    "CG 4": {"solver": CG(4)},
    "normal CG 2": {"solver": NormalCG(2, 0.1)},
    "projected, normal CG 2": {"solver": NormalCG(2, 0.1), "constrained": True},
}


@dataclass(frozen=True)
class Cell:
    """One run."""

    model: str
    method: str
    rounds: int
    seed: int


@dataclass
class Run:
    """Which cells."""

    reference: Path
    """Folder of the published models (checkpoints/, triggers/)."""
    rounds: tuple[int, ...] = (1, 3)
    seeds: tuple[int, ...] = (0, 1, 2)
    models: tuple[str, ...] = NAMES
    methods: tuple[str, ...] = tuple(METHODS)
    out: Path = RESULTS


def run(grid: Run) -> None:
    """Fill the grid, seed by seed."""
    cells = [
        Cell(name, method, rounds, seed)
        for seed in grid.seeds
        for rounds in grid.rounds
        for name in grid.models
        for method in grid.methods
    ]
    fill(grid.out, cells, partial(measure, grid.reference), shown)


def shown(row: Row) -> str:
    return f"ACC {row['acc']:.3f} ASR {row['asr']:.3f} excl. {row['asr_excl']:.3f}"


def measure(reference: Path, cell: Cell) -> Row:
    with tempfile.TemporaryDirectory() as folder:
        model = load_model(import_model(reference, cell.model, Path(folder)))
    logits = evaluation_logits(build(model.architecture, model.num_classes), model.variables)
    measure = evaluator(logits, load("cifar10", "test[5000:]"), model.attacks)
    config = replace(IBAUConfig.untargeted(), rounds=cell.rounds, keep_diverged=True)
    config = replace(config, **METHODS[cell.method])
    clean, key = load("cifar10", "test[:5000]"), jax.random.key(cell.seed)
    started = time.perf_counter()
    result = unlearn(logits, model.variables["params"], clean, config=config, key=key)
    wall = time.perf_counter() - started
    jax.clear_caches()  # programs of some thirty runs use up the mappings of a process
    kept = ("residual", "failed_solves", "fallbacks", "products", "contraction", "delta_norm")
    return {
        **measure(result.params)._asdict(),
        **{k: result.history[-1][k] for k in kept},
        **{"seconds": result.seconds, "wall_seconds": wall},
    }


def table() -> None:
    """Print the table (Markdown): mean over the seeds.

    Seconds are left out: the grid ran beside other work. They are measured apart, with `run --out`.
    """
    cells = defaultdict(list)
    for row in read(RESULTS):
        cell = row["cell"]
        cells[cell["rounds"], cell["model"], cell["method"]].append(row)
    print("| rounds | model | method | seeds | ACC | ASR | ASR excl. | residual | diverged |")
    print("|---|---|---|---|---|---|---|---|---|")
    for rounds in (1, 3):
        for name in NAMES:
            for method in METHODS:
                if not (rows := cells.get((rounds, name, method))):
                    continue
                values = []
                for field in ("acc", "asr", "asr_excl", "residual", "failed_solves"):
                    found = [r[field] for r in rows if r[field] is not None]
                    form = {"residual": ".3g", "failed_solves": ".0f"}
                    values.append(format(np.mean(found), form.get(field, ".3f")) if found else "")
                print(f"| {rounds} | {name} | {method} | {len(rows)} |", " | ".join(values), "|")


if __name__ == "__main__":
    commands = {"run": run, "table": table}
    flat = (tyro.conf.OmitArgPrefixes,)
    tyro.extras.subcommand_cli_from_dict(commands, description=__doc__, config=flat)
