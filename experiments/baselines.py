"""Every defense on the five published models and seven of the zoo, beside the paper's figures.

    python experiments/baselines.py run --reference DIR [--defenses nad naive] [--models BadNets]
    python experiments/baselines.py table

`run` needs CIFAR-10 and GTSRB (TFDS_DATA_DIR) and the folder of the published checkpoints. Each
defense runs with its default preset (of I-BAU `default`, of the others `cpu`); `ibau-untargeted` is
what was the default of I-BAU before it searched. The rows of each run are written to
`experiments/results/baselines.jsonl` as it ends; what is there already is left out, so it can be
stopped and started again. `experiments/race.py` looks at the seconds more closely.
"""

import tempfile
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import tyro
from published_models import MODELS as PUBLISHED
from published_models import import_model, read

from ibau_jax.commands import defend
from ibau_jax.defenses import DEFENSES
from ibau_jax.errors import check_name
from ibau_jax.results.rows import read_rows, write_rows

RESULTS = Path(__file__).parent / "results" / "baselines.jsonl"
POISON_RATIO = 0.2  # of the published models
ZOO = Path(__file__).parent / "zoo"
FROM_ZOO = (
    *("cifar10-l0", "cifar10-smooth", "cifar10-blend", "cifar10-all-to-all"),
    *("cifar10-seven-target", "gtsrb-all-to-all", "gtsrb-trojan-square"),
)
MODELS = (*PUBLISHED, *FROM_ZOO)
# What was the default of I-BAU before it searched is beside the others under a name of its own.
UNTARGETED = "ibau-untargeted"
METHODS = {  # name -> defense, preset
    "ibau": ("ibau", None),
    UNTARGETED: ("ibau", "untargeted"),
    **{name: (name, None) for name in DEFENSES if name != "ibau"},
}
# ACC and ASR in %: Table 1 for CIFAR-10, Table 2 for GTSRB (which has neither NC nor DI).
PAPER = {
    "BadNets": {
        "neural-cleanse": (83.42, 8.76),
        "deepinspect": (82.12, 48.50),
        "tabor": (83.78, 8.12),
        "fine-pruning": (82.22, 96.66),
        "nad": (78.72, 11.66),
        "dp-sgd": (11.08, 21.77),
        "ibau": (83.35, 12.30),
    },
    "Trojan WM": {
        "neural-cleanse": (81.76, 6.02),
        "deepinspect": (82.88, 7.24),
        "tabor": (82.60, 49.26),
        "fine-pruning": (81.64, 99.88),
        "nad": (56.84, 0.82),
        "dp-sgd": (15.21, 32.89),
        "ibau": (83.58, 3.42),
    },
    "GTSRB BadNets": {
        "tabor": (98.99, 4.16),
        "fine-pruning": (99.34, 60.19),
        "nad": (15.19, 9.08),
        "dp-sgd": (6.46, 100.0),
        "ibau": (99.38, 3.32),
    },
}


@dataclass
class Run:
    """Which cells."""

    reference: Path
    """Folder of the published models (checkpoints/, triggers/)."""
    defenses: tuple[str, ...] = tuple(METHODS)
    models: tuple[str, ...] = MODELS
    seeds: tuple[int, ...] = (0,)
    out: Path = RESULTS
    again: bool = False
    """Measure anew what is there already."""
    timed: bool = True
    """Alone on the machine. Without, the rows say so, and the table leaves their seconds out."""


def run(grid: Run) -> None:
    """Fill the grid."""
    cells = [(m, d, s) for s in grid.seeds for d in grid.defenses for m in grid.models]
    for name, defense, seed in cells:
        check_name("model", name, MODELS)
        check_name("defense", defense, METHODS)
        cell = name, defense, seed
        if not grid.again and any(key(row) == cell for row in read(grid.out)):
            continue
        rows = [{**row, "timed": grid.timed} for row in one(grid.reference, *cell)]
        write_rows(grid.out, [*(row for row in read(grid.out) if key(row) != cell), *rows])
        last = rows[-1]
        print(*cell, *(round(last[k], 4) for k in ("acc", "asr", "asr_excl")), flush=True)


def one(reference: Path, name: str, defense: str, seed: int) -> list[dict]:
    """The rows of all rounds of a defense on a published model; the last has its diagnostics."""
    with tempfile.TemporaryDirectory() as folder:
        zoo = name in FROM_ZOO
        path = ZOO / f"{name}.safetensors" if zoo else import_model(reference, name, Path(folder))
        defense, preset = METHODS[defense]
        found = defend.defend(
            path,
            defense=defense,
            preset=preset,
            seed=seed,
            out=Path(folder) / "run",
            poison_ratio=POISON_RATIO if DEFENSES[defense].train_set and not zoo else None,
            experiment=name,
            progress=True,
        )
        more = {} if zoo else {"poison_ratio": POISON_RATIO}
        rows = [{**r, **more} for r in read_rows(Path(folder) / "run")]
    rows[-1]["diagnostics"] = found["diagnostics"]
    return rows


def key(row: dict) -> tuple:
    method = UNTARGETED if row["preset"] == "untargeted" else row["defense"]
    return row["experiment"], method, row["seed"]


def effective(rows: list[dict], asr: float = 0.2, drop: float = 0.1) -> tuple[float, int] | None:
    """Seconds and rounds until ASR is below 20 % and ACC fell by at most 10 points.

    With less accuracy the paper calls a defense a failure (marks of Table 1). None: never.
    """
    seconds = 0.0
    for row in rows:
        seconds += row["seconds"]
        if row["asr"] < asr and row["acc"] >= rows[0]["acc"] - drop:
            return seconds, row["round"]
    return None


def table() -> None:
    """Print the table (Markdown), seed 0, after the last round; then the means."""
    runs = defaultdict(list)
    for row in read(RESULTS):
        runs[key(row)].append(row)
    print(
        "| model | defense | ACC | paper | ASR | paper | ASR excl. | RA | DER | flagged | seconds "
        "| to take effect |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|---|---|")
    for name in MODELS:
        paper = PAPER.get(name, {})
        for defense in ("none", *METHODS):
            rows = runs.get((name, UNTARGETED if defense == "none" else defense, 0))
            if rows is None:
                continue
            row = rows[0] if defense == "none" else rows[-1]
            acc, asr = paper.get(METHODS.get(defense, (None,))[0], (None, None))
            values = [
                *(f"{row['acc']:.3f}", percent(acc), f"{row['asr']:.3f}", percent(asr)),
                *(f"{row['asr_excl']:.3f}", f"{row['ra']:.3f}"),
                "" if row["der"] is None else f"{row['der']:.3f}",
                ", ".join(map(str, row["flagged"])) or "×" if "flagged" in row else "",
                *(("", "") if defense == "none" else seconds(rows)),
            ]
            print(f"| {name} | {defense} | {' | '.join(values)} |")
    print()
    means(runs)


def means(runs: dict[tuple, list[dict]]) -> None:
    """Print the mean of each defense over the models and seeds that have its rows.

    A model's fall is from its own figures before, so that defenses with other models compare.
    """
    print(
        "| defense | runs | models | fall of ACC | ASR | ASR excl. | RA | DER | seconds | failed |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    for defense in METHODS:
        found = {k: rows for k, rows in runs.items() if k[1] == defense and k[0] in MODELS}
        if not found:
            continue
        last = [rows[-1] for rows in found.values()]
        falls = [rows[0]["acc"] - rows[-1]["acc"] for rows in found.values()]

        def mean(field: str, last=last) -> str:
            values = [row[field] for row in last if row[field] is not None]
            return f"{sum(values) / len(values):.3f}"

        spent = [sum(row["seconds"] for row in rows) for rows in found.values() if timed(rows)]
        failed = sum(row["asr"] >= 0.2 or fall > 0.1 for row, fall in zip(last, falls, strict=True))
        print(
            f"| {defense} | {len(found)} | {len({k[0] for k in found})} "
            f"| {sum(falls) / len(falls):.3f} | {mean('asr')} | {mean('asr_excl')} "
            f"| {mean('ra')} | {mean('der')} "
            f"| {f'{sum(spent) / len(spent):.0f}' if spent else ''} | {failed} |"
        )


def timed(rows: list[dict]) -> bool:
    """Whether the run was alone on the machine."""
    return all(row.get("timed", True) for row in rows)


def seconds(rows: list[dict]) -> tuple[str, str]:
    """Of the whole run, and until it took effect; empty where another job ran beside."""
    if not timed(rows):
        return "", ""
    took = effective(rows)
    return f"{sum(r['seconds'] for r in rows):.0f}", f"{took[0]:.0f}" if took else "never"


def percent(value: float | None) -> str:
    return "" if value is None else f"{value / 100:.3f}"


if __name__ == "__main__":
    commands = {"run": run, "table": table}
    flat = (tyro.conf.OmitArgPrefixes,)
    tyro.extras.subcommand_cli_from_dict(commands, description=__doc__, config=flat)
