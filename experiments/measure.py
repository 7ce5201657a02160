"""Measures cells: `ibau defend` on the models of `cells.py`.

    python experiments/measure.py GRID... [--reference DIR] [--folder DIR] [--methods nad]

Each GRID is one of `cells.GRIDS`. On images that the clean set does not have; rows go to
`experiments/results/cells.jsonl` as they come, and what is there already is left out (`grid.py`).
The models are those of `experiments/zoo/`, the published ones (of the folder --reference:
checkpoints/, triggers/) and those of `experiments/unseen.py` (in --folder); cells of models that
are not there are left out. Needs CIFAR-10 and GTSRB (TFDS_DATA_DIR).
"""

import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import tyro
from cells import GRIDS, METHODS, PUBLISHED, Cell
from grid import RESULTS, ZOO, Row, commit, fill
from published_models import import_model

from ibau_jax.attacks import ATTACKS
from ibau_jax.commands.attack_options import make_attacks
from ibau_jax.commands.defend import defend
from ibau_jax.commands.train import train_model
from ibau_jax.defenses import DEFENSES
from ibau_jax.errors import check_name
from ibau_jax.results.rows import read_rows

CELLS = RESULTS / "cells.jsonl"
POISON_RATIO = 0.2  # of the published models, whose files do not tell
PER_ROUND = (
    *("round", "seconds", "acc", "asr", "asr_excl", "ra", "der", "by_attack"),
    *("outer_loss", "held_acc", "failed_solves", "fallbacks", "loss"),
)
OF_RUN = (
    *("dataset", "attack", "scenario", "defense", "preset", "n_clean", "poison_ratio", "n"),
    *("device", "num_devices", "versions", "model_hash", "config", "compile_seconds"),
    *("flagged", "verdict", "reason"),
)


@dataclass(frozen=True)
class Models:
    """Where the models are that are not in `experiments/zoo/`."""

    reference: Path | None = None
    """Folder of the published models (checkpoints/, triggers/)."""
    folder: Path | None = None
    """Where `experiments/unseen.py` put its models."""
    zoo: Path = ZOO
    stands_in: str | None = None
    """A data set whose models stand for those of the others: digits-l0 for cifar10-l0, and for
    lack of it digits-badnets."""

    @contextmanager
    def file(self, name: str) -> Iterator[Path | None]:
        """The file of a model; None where it is not there."""
        if self.stands_in:
            name = stand_in(name, self.stands_in, self.zoo)
        with tempfile.TemporaryDirectory() as folder:
            if name in PUBLISHED:
                where = self.reference
                yield import_model(where, name, Path(folder)) if where else None
            else:
                tried = [d / f"{name}.safetensors" for d in (self.zoo, self.folder) if d]
                yield next((path for path in tried if path.is_file()), None)


def stand_in(name: str, dataset: str, zoo: Path) -> str:
    """Of a model, the one of another data set that stands for it."""
    attack = name.partition("-")[2]
    if (zoo / f"{dataset}-{attack}.safetensors").is_file():
        return f"{dataset}-{attack}"
    several = attack in ("all-to-all", "seven-target")
    return f"{dataset}-{attack if several else 'badnets'}"


def train_stand_ins(names: Iterable[str], dataset: str, zoo: Path, epochs: int = 3) -> None:
    """Train what is missing of the models that stand for others, seconds each.

    The seven targets are led to by those triggers that need no model to be made.
    """
    for name in {stand_in(name, dataset, zoo) for name in names}:
        out = zoo / f"{name}.safetensors"
        scenario = name.removeprefix(f"{dataset}-")
        if out.is_file():
            continue
        if scenario == "seven-target":
            fixed = [attack for attack, spec in ATTACKS.items() if spec.fixed is not None]
            attacks = tuple(
                make_attacks(dataset, attack, target=i)[0] for i, attack in enumerate(fixed)
            )
        else:
            scenario = "one-target" if scenario == "badnets" else scenario
            attacks = make_attacks(dataset, "badnets", scenario)
        train_model(
            out,
            dataset,
            attacks,
            epochs=epochs,
            architecture="vgg-mini",
            keep_states=False,
            progress=True,
        )


def measure(
    cell: Cell,
    models: Models,
    *,
    alone: bool = False,
    preset: str | None = None,
    rounds: int | None = None,
    images: int | None = None,
) -> Row | None:
    """The row of a cell: what is known of the run, and of each round, 0 before the first.

    Args:
      alone: nothing else runs on the machine.
      preset: of the defenses that are not I-BAU; None: their default.
      rounds, images: in place of the cell's.

    Returns:
      None where the model is not there.
    """
    method = METHODS[cell.method]
    images = images or cell.images
    with models.file(cell.model) as path, tempfile.TemporaryDirectory() as out:
        if path is None:
            return None
        told = cell.model not in PUBLISHED  # its file tells the poison ratio
        found = defend(
            path,
            defense=method.defense,
            preset=method.preset if method.defense == "ibau" else preset,
            clean=f"test[:{images}]" if images else None,
            rounds=rounds or cell.rounds,
            seed=cell.seed,
            out=out,
            poison_ratio=POISON_RATIO if DEFENSES[method.defense].train_set and not told else None,
            progress=True,
        )
        rows = read_rows(out)
    jax.clear_caches()  # the programs of some thirty runs use up the mappings of a process
    return row_of(rows, found["diagnostics"]) | {"commit": commit(), "alone": alone}


def row_of(rows: list[Row], diagnostics: dict[str, Any]) -> Row:
    """One row of a run, of its `rows.jsonl`."""
    rounds = [{k: row[k] for k in PER_ROUND if k in row} for row in rows]
    run = {k: rows[-1][k] for k in OF_RUN if k in rows[-1]}
    return {**run, "diagnostics": diagnostics, "rounds": rounds}


def shown(row: Row) -> str:
    """How a run ended, in a line."""
    last = row["rounds"][-1]
    names = {"acc": "ACC", "asr": "ASR", "asr_excl": "excl.", "ra": "RA"}
    values = [f"{text} {last[k]:.3f}" for k, text in names.items() if last.get(k) is not None]
    return " ".join([*values, row.get("verdict", "")]).strip()


@dataclass
class Run:
    """Which cells."""

    grids: tyro.conf.Positional[tuple[str, ...]]
    models: tuple[str, ...] = ()
    """Of these models only."""
    methods: tuple[str, ...] = ()
    """Of these methods only."""
    seeds: tuple[int, ...] = ()
    """Of these seeds only."""
    reference: Path | None = None
    """Folder of the published models (checkpoints/, triggers/)."""
    folder: Path | None = None
    """Where `experiments/unseen.py` put its models."""
    alone: bool = False
    """Nothing else runs on the machine: the seconds count."""
    out: Path = CELLS


def main(run: Run) -> None:
    """Fill the grids."""
    for name in run.grids:
        check_name("grid", name, GRIDS)
    cells = [
        cell
        for name in run.grids
        for cell in GRIDS[name]
        if (not run.models or cell.model in run.models)
        and (not run.methods or cell.method in run.methods)
        and (not run.seeds or cell.seed in run.seeds)
    ]
    models = Models(run.reference, run.folder)
    fill(run.out, cells, partial(measure, models=models, alone=run.alone), shown)


if __name__ == "__main__":
    main(tyro.cli(Run, description=__doc__, config=(tyro.conf.OmitArgPrefixes,)))
