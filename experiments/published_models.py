"""The presets of I-BAU on the five published models: the README's table.

    python experiments/published_models.py run --reference DIR [--presets untargeted published]
    python experiments/published_models.py table

`run` needs CIFAR-10 and GTSRB (TFDS_DATA_DIR) and the folder of the published checkpoints. It
writes a row for each model, preset and seed to `experiments/results/published_models.jsonl` as
it comes, and leaves out what is there already, so it can be stopped and started again.
"""

import json
import tempfile
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

from ibau_jax.commands.attack_options import make_attacks, read_trigger
from ibau_jax.commands.convert import convert
from ibau_jax.commands.defend import defend
from ibau_jax.results.rows import read_rows, write_rows

RESULTS = Path(__file__).parent / "results" / "published_models.jsonl"
MODELS = {  # file, data set, trigger, target
    "BadNets": ("badnets_8_02", "cifar10", None, 8),
    "l2": ("l2_inv_0_02", "cifar10", "l2_inv", 0),
    "Trojan WM": ("trojan_wm_2_02", "cifar10", "trojan_wm", 2),
    "GTSRB BadNets": ("gtsrbbadnets_8_02", "gtsrb", None, 8),
    "GTSRB Trojan WM": ("gtsrbtrojan_wm_2_02", "gtsrb", "trojan_wm", 2),
}


@dataclass
class Run:
    """Which cells."""

    reference: Path
    """Folder of the published models (checkpoints/, triggers/)."""
    presets: tuple[str, ...] = ("default", "untargeted", "published", "algorithm1")
    seeds: tuple[int, ...] = (0, 1, 2)
    models: tuple[str, ...] = tuple(MODELS)


def run(grid: Run) -> None:
    """Fill the grid."""
    for preset in grid.presets:
        # Algorithm 1 patches every image, so its seed changes nothing.
        for seed in grid.seeds if preset != "algorithm1" else grid.seeds[:1]:
            for name in grid.models:
                done = read()
                if any(key(row) == (name, preset, seed) for row in done):
                    continue
                with tempfile.TemporaryDirectory() as folder:
                    rows = one(grid.reference, name, preset, seed, Path(folder))
                write_rows(RESULTS, [*done, *rows])
                last = rows[-1]
                print(name, preset, seed, *(round(last[k], 4) for k in ("acc", "asr", "asr_excl")))


def one(reference: Path, name: str, preset: str, seed: int, folder: Path) -> list[dict]:
    """Rows of one run, round 0 first."""
    model = import_model(reference, name, folder)
    defend(model, preset=preset, seed=seed, out=folder / "run", progress=True, experiment=name)
    return read_rows(folder / "run")


def import_model(reference: Path, name: str, folder: Path) -> Path:
    """Convert a published checkpoint, with its trigger, to a model file in `folder`."""
    file, dataset, trigger, target = MODELS[name]
    picture = reference / "triggers" / f"{trigger}.png" if trigger else None
    own = read_trigger(picture) if picture else None
    attacks = make_attacks(dataset, trigger or "badnets", target=target, trigger=own)
    model = folder / f"{file}.safetensors"
    source = reference / "checkpoints" / f"{file}_ckpt.pth"
    convert(source, model, dataset=dataset, attacks=attacks)
    return model


def read(path: Path = RESULTS) -> list[dict]:
    """Rows written so far."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def key(row: dict) -> tuple:
    return row["experiment"], row["preset"], row["seed"]


def table() -> None:
    """Print the table (Markdown): mean over the seeds."""
    runs = defaultdict(list)
    for row in read():
        runs[key(row)].append(row)
    cells = defaultdict(list)
    for (name, preset, _), rows in runs.items():
        cells[name, preset].append(rows)
    print("| model | preset | rounds | ACC before | ACC | ASR | ASR excl. | seconds |")
    print("|---|---|---|---|---|---|---|---|")
    for name in MODELS:
        for preset in ("default", "untargeted", "published", "algorithm1"):
            if (name, preset) not in cells:
                continue
            group = cells[name, preset]
            before = np.mean([rows[0]["acc"] for rows in group])
            values = []
            for field in ("acc", "asr", "asr_excl"):
                found = [rows[-1][field] for rows in group]
                spread = f" ({min(found):.3f} to {max(found):.3f})" if len(found) > 1 else ""
                values.append(f"{np.mean(found):.3f}{spread}")
            seconds = np.mean([sum(row["seconds"] for row in rows) for rows in group])
            rounds = group[0][-1]["round"]
            print(f"| {name} | {preset} | {rounds} | {before:.3f} | ", end="")
            print(" | ".join([*values, f"{seconds:.0f}"]), "|")


if __name__ == "__main__":
    commands = {"run": run, "table": table}
    flat = (tyro.conf.OmitArgPrefixes,)
    tyro.extras.subcommand_cli_from_dict(commands, description=__doc__, config=flat)
