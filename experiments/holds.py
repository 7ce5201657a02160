"""Does the default hold everywhere? Its removal and its search on models that it was not tuned on.

    python experiments/holds.py run --folder DIR --reference DIR [--models gtsrb-l0] [--seeds 0 1]
    python experiments/holds.py inspect --folder DIR --reference DIR
    python experiments/holds.py table

The zoo, the published models (of the folder --reference) and those of `experiments/unseen.py` (in
--folder; what is not there is left out). Measured as `ibau defend` does, on images that the clean
set does not have. Rows go to `experiments/results/holds.jsonl` and `inspect.jsonl` as they come;
what is there already is left out, and so is what `experiments/baselines.py` ran. Needs CIFAR-10 and
GTSRB (TFDS_DATA_DIR).
"""

import tempfile
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro
from baselines import RESULTS as BASELINES
from published_models import MODELS as PUBLISHED
from published_models import import_model, read
from unseen import MODELS as UNSEEN
from zoo import FOLDER as ZOO
from zoo import entries

from ibau_jax import inspect, load
from ibau_jax.commands.defend import defend
from ibau_jax.errors import check_name
from ibau_jax.models.files import load_model
from ibau_jax.results.rows import write_rows

RESULTS = Path(__file__).parent / "results" / "holds.jsonl"
SEARCHED = RESULTS.with_name("inspect.jsonl")
MODELS = (*(entry.name for entry in entries()), *PUBLISHED, *UNSEEN)


@dataclass
class Run:
    """Which cells."""

    folder: Path
    """Where `experiments/unseen.py` put its models."""
    reference: Path
    """Folder of the published models (checkpoints/, triggers/)."""
    models: tuple[str, ...] = MODELS
    seeds: tuple[int, ...] = (0,)
    images: int | None = None
    """Of the clean set; default: what `ibau defend` takes."""
    out: Path | None = None


@contextmanager
def stored(grid: Run, name: str) -> Iterator[Path | None]:
    """The file of a model; None where it is not there."""
    check_name("model", name, MODELS)
    with tempfile.TemporaryDirectory() as folder:
        if name in PUBLISHED:
            yield import_model(grid.reference, name, Path(folder))
        else:
            path = (grid.folder if name in UNSEEN else ZOO) / f"{name}.safetensors"
            yield path if path.exists() else None


def run(grid: Run) -> None:
    """Clean the models with the default, and measure them."""
    out = grid.out or RESULTS
    for seed in grid.seeds:
        for name in grid.models:
            cell = name, seed, grid.images
            done = [*read(out), *of_baselines()]
            if any((row["model"], row["seed"], row["images"]) == cell for row in done):
                continue
            with stored(grid, name) as path, tempfile.TemporaryDirectory() as folder:
                if path is None:
                    continue
                clean = f"test[:{grid.images}]" if grid.images else None
                found = defend(path, clean=clean, seed=seed, out=folder)
                targets = [attack.target for attack in load_model(path).attacks]
            row = {"model": name, "seed": seed, "images": grid.images, "targets": targets}
            kept = ("before", "after", "der", "verdict", "reason", "flagged", "seconds")
            row |= {k: found[k] for k in (*kept, "diagnostics")}
            write_rows(out, [*read(out), row])
            jax.clear_caches()
            print(name, seed, *shown(row), flush=True)


def of_baselines() -> list[dict[str, Any]]:
    """The runs of the default that the grid of all defenses has."""
    runs = defaultdict(list)
    for row in read(BASELINES):
        if row["defense"] == "ibau" and row["preset"] == "default":
            runs[row["experiment"], row["seed"]].append(row)
    return [
        {"model": model, "seed": seed, "images": None, "before": rows[0], "after": rows[-1]}
        | {k: rows[-1][k] for k in ("der", "verdict", "flagged")}
        for (model, seed), rows in runs.items()
    ]


def search(grid: Run) -> None:
    """Inspect the models, with the clean set that `ibau inspect` takes."""
    out = grid.out or SEARCHED
    for seed in grid.seeds:
        for name in grid.models:
            if any((row["model"], row["seed"]) == (name, seed) for row in read(out)):
                continue
            with stored(grid, name) as path:
                if path is None:
                    continue
                model = load_model(path)
            clean = load(model.dataset, model.data_info(None).clean)
            found = inspect(model.classifier, model.variables, clean, key=jax.random.key(seed))
            row = {
                **{"model": name, "seed": seed},
                **{"targets": [attack.target for attack in model.attacks]},
                **{"verdict": found.verdict, "target": found.target, "flagged": found.flagged},
                **{"misled": found.misled, "alike": found.alike, "nearest": found.nearest},
                **{"strength": np.round(found.strength, 3).tolist()},
            }
            write_rows(out, [*read(out), row])
            jax.clear_caches()
            print(*list(row.values())[:-1], flush=True)


def shown(row: dict[str, Any]) -> list[str]:
    """Of a row: as given, after, without the target's own images, RA, what it says of itself."""
    pair = [
        f"{one['acc']:.3f} / {one['asr']:.3f}" if one["asr"] is not None else f"{one['acc']:.3f}"
        for one in (row["before"], row["after"])
    ]
    after = row["after"]
    rest = ["" if after[k] is None else f"{after[k]:.3f}" for k in ("asr_excl", "ra")]
    der = "" if row["der"] is None else f"{row['der']:.3f}"
    return [*pair, *rest, der, ", ".join(map(str, row["flagged"])), row["verdict"]]


def table() -> None:
    """Print the tables (Markdown)."""
    print("| model | seed | as given | after | ASR excl. | RA | DER | unlearned | verdict |")
    print("|---|---|---|---|---|---|---|---|---|")
    found = [*read(RESULTS), *of_baselines()]
    rows = sorted(found, key=lambda row: (MODELS.index(row["model"]), row["seed"]))
    for row in rows:
        images = f", {row['images']} images" if row["images"] else ""
        print(f"| {row['model']} | {row['seed']}{images} | {' | '.join(shown(row))} |")
    print("\n| model (target) | verdict | target | others that stand out | nearest |")
    print("|---|---|---|---|---|")
    for row in sorted(read(SEARCHED), key=lambda row: MODELS.index(row["model"])):
        targets = ", ".join("y + 1" if t is None else str(t) for t in row["targets"]) or "clean"
        others = ", ".join(str(label) for label in row["flagged"] if label != row["target"])
        target = "" if row["target"] is None else row["target"]
        print(
            f"| {row['model']} ({targets}) | {row['verdict']} | {target} | {others} "
            f"| {row['nearest']:.2f} |"
        )


if __name__ == "__main__":
    commands = {"run": run, "inspect": search, "table": table}
    flat = (tyro.conf.OmitArgPrefixes,)
    tyro.extras.subcommand_cli_from_dict(commands, description=__doc__, config=flat)
