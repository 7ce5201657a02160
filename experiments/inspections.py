"""What `ibau inspect` says of every model: true and false alarms.

    python experiments/inspections.py run [--reference DIR] [--folder DIR] [--models gtsrb-l0]
    python experiments/inspections.py table

The zoo, the published models (of the folder --reference) and those of `experiments/unseen.py` (in
--folder), with the clean set that `ibau inspect` takes. Rows go to
`experiments/results/inspect.jsonl` as they come; what is there already is left out.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax
import numpy as np
import tyro
from cells import MODELS
from grid import RESULTS, Row, fill, read
from measure import Models
from unseen import MODELS as UNSEEN

from ibau_jax import inspect, load
from ibau_jax.models.files import load_model

SEARCHED = RESULTS / "inspect.jsonl"


@dataclass(frozen=True)
class Inspection:
    """A search of a model as it was given."""

    model: str
    seed: int = 0


@dataclass
class Run:
    """Which cells."""

    models: tuple[str, ...] = (*MODELS, *UNSEEN)
    seeds: tuple[int, ...] = (0,)
    reference: Path | None = None
    """Folder of the published models (checkpoints/, triggers/)."""
    folder: Path | None = None
    """Where `experiments/unseen.py` put its models."""
    out: Path = SEARCHED


def run(grid: Run) -> None:
    """Search the models."""
    cells = [Inspection(model, seed) for seed in grid.seeds for model in grid.models]
    models = Models(grid.reference, grid.folder)
    fill(grid.out, cells, partial(measure, models=models), lambda row: shown(row)[0])


def measure(cell: Inspection, models: Models) -> Row | None:
    """What stands out."""
    with models.file(cell.model) as path:
        if path is None:
            return None
        model = load_model(path)
    clean = load(model.dataset, model.data_info(None).clean)
    key = jax.random.key(cell.seed)
    found = inspect(model.classifier, model.variables, clean, key=key)
    jax.clear_caches()
    return {
        "targets": [attack.target for attack in model.attacks],
        **{"verdict": found.verdict, "target": found.target, "flagged": found.flagged},
        **{"misled": found.misled, "alike": found.alike, "nearest": found.nearest},
        "strength": np.round(found.strength, 3).tolist(),
    }


def shown(row: Row) -> list[str]:
    """The verdict, the likeliest target, the other labels that stand out, the largest score."""
    others = [str(label) for label in row["flagged"] if label != row["target"]]
    target = "" if row["target"] is None else str(row["target"])
    return [row["verdict"], target, ", ".join(others), f"{row['nearest']:.2f}"]


def table(path: Path = SEARCHED) -> None:
    """Print the table (Markdown)."""
    print("| model (target) | seed | verdict | target | others that stand out | nearest |")
    print("|---|---|---|---|---|---|")
    order = (*MODELS, *UNSEEN)
    for row in sorted(read(path), key=lambda row: order.index(row["cell"]["model"])):
        targets = ", ".join("y + 1" if t is None else str(t) for t in row["targets"]) or "clean"
        cell = row["cell"]
        print(f"| {cell['model']} ({targets}) | {cell['seed']} | {' | '.join(shown(row))} |")


if __name__ == "__main__":
    commands = {"run": run, "table": table}
    flat = (tyro.conf.OmitArgPrefixes,)
    tyro.extras.subcommand_cli_from_dict(commands, description=__doc__, config=flat)
