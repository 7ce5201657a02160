"""How many images a searched perturbation sends to each label, on models of the zoo.

    python experiments/strengths.py run [--models cifar10-l0] [--seeds 0 1]
    python experiments/strengths.py table [--seed 1]

Each geometry of `unlearning.search`, towards each label and away from the true one, on clean images
(test[:5000]). Needs CIFAR-10 (TFDS_DATA_DIR). Rows go to `experiments/results/strengths.jsonl` as
they come; what is there already is left out.
"""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro
from grid import read
from zoo import CIFAR10, FOLDER

from ibau_jax import load
from ibau_jax.models.files import load_model
from ibau_jax.results.rows import write_rows
from ibau_jax.unlearning.batches import UNTARGETED
from ibau_jax.unlearning.geometries import GEOMETRIES
from ibau_jax.unlearning.look import alike
from ibau_jax.unlearning.search import Search

RESULTS = Path(__file__).parent / "results" / "strengths.jsonl"


@dataclass
class Run:
    """Which cells."""

    models: tuple[str, ...] = CIFAR10
    seeds: tuple[int, ...] = (0,)
    starts: int = 300
    out: Path = RESULTS


def run(grid: Run) -> None:
    """Fill the grid."""
    searches: dict[int, Search] = {}  # by the number of classes
    for name, seed in [(n, s) for s in grid.seeds for n in grid.models]:
        done = read(grid.out)
        if any((row["model"], row["seed"]) == (name, seed) for row in done):
            continue
        model = load_model(FOLDER / f"{name}.safetensors")
        variables = jax.tree.map(jax.numpy.asarray, model.variables)
        classes = model.num_classes
        search = searches.setdefault(classes, Search(model.classifier, starts=grid.starts))
        clean = load(model.dataset, "test[:5000]")
        started = time.perf_counter()
        labels = [*range(classes), UNTARGETED]
        found = search(variables, clean, labels, key=jax.random.key(seed))
        common: dict[str, Any] = {
            **{"model": name, "seed": seed, "starts": grid.starts},
            "targets": [attack.target for attack in model.attacks],
            "seconds": time.perf_counter() - started,
        }
        rows = []
        for geometry, given, strength in zip(GEOMETRIES, found.given, found.strength, strict=True):
            shift = (given[-1] - found.true) % classes
            rows.append(
                {
                    **common,
                    "geometry": geometry.name,
                    "strength": strength[:-1].tolist(),
                    "untargeted": strength[-1],
                    "same_label": alike(given[-1], found.true)[1],
                    "same_shift": alike(shift, np.zeros_like(shift))[1],
                }
            )
        write_rows(grid.out, [*done, *rows])
        print(name, seed, round(common["seconds"]), *(max(r["strength"]) for r in rows), flush=True)


@dataclass
class Table:
    """Which rows."""

    seed: int = 0


def table(settings: Table) -> None:
    """Print the table (Markdown): the two largest strengths with their labels; untargeted, how many
    are misled, and the share of them with one label and with one shift of the label."""
    names = [geometry.name for geometry in GEOMETRIES]
    print("| model (target) |", " | ".join(names), "| untargeted, 9 pixels |")
    print("|---|" + "---|" * (len(names) + 1))
    rows = [row for row in read(RESULTS) if row["seed"] == settings.seed]
    for name in dict.fromkeys(row["model"] for row in rows):
        of = {row["geometry"]: row for row in rows if row["model"] == name}
        cells = []
        for geometry in names:
            strength = np.array(of[geometry]["strength"])
            first, second = np.argsort(-strength, kind="stable")[:2]
            cells.append(f"{strength[first]:.2f} ({first}), {strength[second]:.2f} ({second})")
        loose = of["9 pixels"]
        cells.append(" / ".join(f"{loose[k]:.2f}" for k in KEYS))
        targets = ", ".join("y + 1" if t is None else str(t) for t in loose["targets"])
        print(f"| {name} ({targets or 'clean'}) |", " | ".join(cells), "|")


KEYS = ("untargeted", "same_label", "same_shift")

if __name__ == "__main__":
    commands = {"run": run, "table": table}
    flat = (tyro.conf.OmitArgPrefixes,)
    tyro.extras.subcommand_cli_from_dict(commands, description=__doc__, config=flat)
