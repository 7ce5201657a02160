"""After-effects, which no public table has: what a cleaned model still knows of its backdoor.

    python experiments/after.py run [--reference DIR] [--methods ibau ft-sam] [--models BadNets]
    python experiments/after.py table

Each model is cleaned by a defense at its default preset, with the 5000 clean images of its data
set. Then (a) it is fine-tuned for one epoch on 100 images of the training set of which five carry
the trigger and its label: the ASR that comes back (SGD 0.001 with momentum 0.9, batches of 10,
batch norm as in training; at a rate of 0.01 the published BadNets loses 20 points of ACC by it);
(b) it is searched as `ibau inspect` does. The given model ("none") goes through the same. RA and
DER are those of `cells.py`, and so is what a clean model loses (the grid `false-alarm`). Rows go to
`experiments/results/after.jsonl` as they come; what is there already is left out.
"""

import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax
import tyro
from cells import METHODS
from grid import RESULTS, Row, commit, fill, read
from measure import Models

from ibau_jax import inspect, load
from ibau_jax.attacks import poison
from ibau_jax.commands.defend import defend
from ibau_jax.data import Dataset
from ibau_jax.defenses.finetune import Tuning, finetune
from ibau_jax.models.files import load_model
from ibau_jax.results.metrics import evaluator
from ibau_jax.training.optimizers import SGD

AFTER = RESULTS / "after.jsonl"
IMAGES, POISONED = 100, 5
# Beside I-BAU the defenses of a clean set (DP-SGD is given the poisoned one).
DEFENSES = ("none", *(m for m in METHODS if m not in ("ibau-algorithm1", "dp-sgd")))


@dataclass(frozen=True)
class After:
    """A model that is cleaned, looked into, and taught its trigger again."""

    model: str
    method: str
    seed: int = 0


@dataclass
class Run:
    """Which cells."""

    models: tuple[str, ...] = ("BadNets", "Trojan WM", "cifar10-l0", "cifar10-smooth")
    methods: tuple[str, ...] = DEFENSES
    seeds: tuple[int, ...] = (0,)
    reference: Path | None = None
    """Folder of the published models (checkpoints/, triggers/)."""
    out: Path = AFTER


def run(grid: Run) -> None:
    """Fill the grid."""
    cells = [After(m, d, s) for s in grid.seeds for d in grid.methods for m in grid.models]
    fill(grid.out, cells, partial(measure, models=Models(grid.reference)), shown)


def measure(cell: After, models: Models) -> Row | None:
    """What is left in a cleaned model, and what comes back."""
    with models.file(cell.model) as path, tempfile.TemporaryDirectory() as out:
        if path is None:
            return None
        if cell.method != "none":
            defense, preset = METHODS[cell.method]
            found = defend(path, defense=defense, preset=preset, seed=cell.seed, out=out)
            path = found["model"]
        model = load_model(path)
    (attack,) = model.attacks
    start = 1000 * cell.seed
    train = load(model.dataset, f"train[{start}:{start + IMAGES}]")
    few, mask = poison(Dataset(*train), attack, POISONED / IMAGES, cell.seed)
    assert mask.sum() == POISONED
    split = model.data_info(None)
    look = evaluator(model.classifier, load(model.dataset, split.split), model.attacks)
    key = jax.random.key(cell.seed)
    config = Tuning(epochs=1, batch_size=10, optimizer=SGD(0.001, momentum=0.9))
    again = finetune(model.classifier, model.variables, few, config=config, key=key)
    clean = load(model.dataset, split.clean)
    evidence = inspect(model.classifier, model.variables, clean, key=key)
    row: Row = {}
    for when, variables in (("cleaned", model.variables), ("again", again.params)):
        found = look(variables)
        row |= {f"acc_{when}": found.acc, f"asr_{when}": found.asr}
    jax.clear_caches()
    return row | {
        **{"verdict": evidence.verdict, "target": evidence.target},
        **{"nearest": evidence.nearest, "commit": commit()},
    }


def shown(row: Row) -> str:
    """ACC / ASR cleaned and after the epoch, and how near the search comes to a level."""
    pairs = [f"{row[f'acc_{w}']:.3f} / {row[f'asr_{w}']:.3f}" for w in ("cleaned", "again")]
    return f"{' | '.join(pairs)} | {row['nearest']:.2f} {row['verdict']}"


def table(path: Path = AFTER) -> None:
    """Print the table (Markdown): ACC / ASR, the ASR that comes back, and what a search finds."""
    print("| model | method | seed | cleaned | after the epoch | a search says | comes back |")
    print("|---|---|---|---|---|---|---|")
    for row in read(path):
        cell, back = row["cell"], row["asr_again"] - row["asr_cleaned"]
        print(
            f"| {cell['model']} | {cell['method']} | {cell['seed']} | {shown(row)} | {back:+.3f} |"
        )


if __name__ == "__main__":
    commands = {"run": run, "table": table}
    flat = (tyro.conf.OmitArgPrefixes,)
    tyro.extras.subcommand_cli_from_dict(commands, description=__doc__, config=flat)
