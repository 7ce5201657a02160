"""The default on the models that the choice may see, and with parts of it left out or changed.

    python experiments/targeted.py run [--models cifar10-l0] [--seeds 0 1] [--change searched=0.2]
    python experiments/targeted.py run --reference DIR --models BadNets
    python experiments/targeted.py table
    python experiments/targeted.py ablate
    python experiments/targeted.py ablation

CIFAR-10's of the zoo and, from the folder of the published checkpoints, those. Evaluated on
test[5000:7000] (these rows choose; they are no result). `ablate` runs `ABLATION` on four models,
`ablation` prints it. Needs CIFAR-10 and GTSRB (TFDS_DATA_DIR). Rows go to `targeted.jsonl` and
`default_ablation.jsonl` of `experiments/results/` as they come; what is there already is left out.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any
from unittest import mock

import jax
import tyro
from grid import RESULTS as FOLDER
from grid import Row, commit, fill, read
from measure import Models
from paper.tables import heads, line
from zoo import CIFAR10, prepare_file

from ibau_jax import IBAUConfig, load, unlearn
from ibau_jax.defenses import hunt, pool
from ibau_jax.hypergradient import Direct
from ibau_jax.training.optimizers import Adam
from ibau_jax.unlearning import evidence, look
from ibau_jax.unlearning.config import PRESETS
from ibau_jax.unlearning.objective import Aim

RESULTS = FOLDER / "targeted.jsonl"
ABLATED_ROWS = FOLDER / "default_ablation.jsonl"


@dataclass(frozen=True)
class Cell:
    """One run."""

    model: str
    seed: int
    changes: str
    images: int


@dataclass
class Run:
    """Which cells."""

    models: tuple[str, ...] = CIFAR10
    reference: Path | None = None
    """Folder of the published models (checkpoints/, triggers/)."""
    seeds: tuple[int, ...] = (0,)
    change: tuple[str, ...] = ()
    """Settings that are not those of the preset, as name=value; `rate` is the outer one."""
    images: int = 5000
    """Of the clean set."""
    out: Path = RESULTS


def run(grid: Run) -> None:
    """Fill the grid."""
    changes = " ".join(sorted(grid.change))
    cells = [Cell(name, seed, changes, grid.images) for seed in grid.seeds for name in grid.models]
    fill(grid.out, cells, partial(measure, models=Models(grid.reference)), shown)


@dataclass
class Ablate:
    """Every change of the ablation, on its four models."""

    seeds: tuple[int, ...] = (0, 1, 2)
    out: Path = ABLATED_ROWS


def ablate(grid: Ablate) -> None:
    """Fill the ablation."""
    for seed in grid.seeds:
        for change in ABLATION:
            run(Run(models=ABLATED, seeds=(seed,), change=change, out=grid.out))


def ablation(path: Path = ABLATED_ROWS) -> None:
    """Print the ablation (Markdown): mean ACC / ASR over the seeds of each model, and of all."""
    print(*heads("settings", *ABLATED, "mean", "verdicts that are not `cleaned`"), sep="\n")
    rows = read(path)
    for changes in (" ".join(sorted(change)) for change in ABLATION):
        each = [
            [r for r in rows if r["cell"]["changes"] == changes and r["cell"]["model"] == model]
            for model in ABLATED
        ]
        cells = [pair(of_model) for of_model in each]
        all_of_it = [row for of_model in each for row in of_model]
        bad = sum(row["verdict"] != "cleaned" for row in all_of_it)
        whole = len({len(of_model) for of_model in each}) == 1
        mean = pair(all_of_it) if whole else "not all run"
        print(line([changes or "default", *cells, mean, str(bad)]))


def pair(rows: list[Row]) -> str:
    """Mean ACC / ASR."""
    if not rows:
        return "not run"
    acc, asr = (fmean(row[k] for row in rows) for k in ("acc", "asr"))
    return f"{acc:.3f} / {asr:.3f}"


ABLATED = ("cifar10-badnets", "cifar10-l0", "cifar10-smooth", "cifar10-trojan-watermark")
ABLATION: tuple[tuple[str, ...], ...] = (
    (),
    ("mixed=0",),
    ("distilled=0",),
    ("aimed=no",),
    ("searched=0.0001",),  # searched for, and delta leads there, but no image carries it
    ("searched=0.2",),
    ("share=0.01",),
    ("pool=1",),
    ("outer_steps=1000",),  # one ascent in a pass
    ("solver=direct",),
    ("without=3x3-window",),
    ("without=5x5-window",),
    ("without=cosine-0.07",),
    ("without=field-0.05",),
    ("preset=untargeted",),
)


def changed(changes: str) -> IBAUConfig:
    """The default with the settings of `changes`; those of `mocked` are left out."""
    config = IBAUConfig()
    for name, value in (change.split("=") for change in changes.split()):
        if name == "preset":
            config = PRESETS[value]("cifar10")
        elif name == "rate":
            outer = Adam(float(value), schedule="cosine", clip=1.0)
            config = replace(config, outer_optimizer=outer)
        elif name == "solver":
            config = replace(config, solver={"direct": Direct()}[value])
        elif name not in MOCKED:
            whole = isinstance(getattr(config, name), int | None)
            config = replace(config, **{name: int(value) if whole else float(value)})
    return config


@contextmanager
def mocked(changes: str) -> Iterator[None]:
    """What no setting changes: `without` a geometry, a `pool` of so many, delta not `aimed`."""
    with ExitStack() as stack:
        for name, value in (change.split("=") for change in changes.split()):
            if name in MOCKED:
                MOCKED[name](stack, value.replace("-", " "))
        yield


def without(stack: ExitStack, name: str) -> None:
    levels = {g: level for g, level in evidence.LEVELS.items() if g.name != name}
    geometries = tuple(g for g in evidence.GEOMETRIES if g.name != name)
    if len(geometries) == len(evidence.GEOMETRIES):
        raise ValueError(f"no geometry {name}")
    for module in (evidence, look, hunt, pool):
        stack.enter_context(mock.patch.multiple(module, LEVELS=levels, GEOMETRIES=geometries))


def pool_of(stack: ExitStack, value: str) -> None:
    look = hunt.Hunt.look

    def look_for_few(self: hunt.Hunt, params: Any) -> None:
        look(self, params)
        self.pool.room = int(value)

    stack.enter_context(mock.patch.object(hunt.Hunt, "look", look_for_few))


def not_aimed(stack: ExitStack, value: str) -> None:
    """Delta leads away from the true labels, as in the paper, and not to the target."""
    del value
    aims = pool.Pool.aims

    def away(self: pool.Pool, number: int, targets: Sequence[int]) -> list[Aim]:
        del targets
        return aims(self, number, ())

    stack.enter_context(mock.patch.object(pool.Pool, "aims", away))


MOCKED = {"without": without, "pool": pool_of, "aimed": not_aimed}


def measure(cell: Cell, models: Models) -> Row | None:
    with models.file(cell.model) as path:
        if path is None:
            return None
        model, given, logits, look = prepare_file(path)
    clean, key = load(model.dataset, f"test[:{cell.images}]"), jax.random.key(cell.seed)
    with mocked(cell.changes):
        found = unlearn(logits, given, clean, config=changed(cell.changes), key=key)
    before, after = look(given), look(found.params)
    jax.clear_caches()
    told = found.diagnostics
    return {
        **{"targets": [attack.target for attack in model.attacks]},
        **{"acc_before": before.acc, "asr_before": before.asr},
        **{k: v for k, v in after.row().items() if k != "n"},
        **{
            k: told.get(k)
            for k in ("verdict", "flagged", "suspects", "stages", "searched", "left", "kept")
        },
        **{"seconds": found.seconds, "device": jax.devices()[0].device_kind, "commit": commit()},
    }


def shown(row: Row) -> str:
    """ACC, ASR and the rest after it, and what it says of itself."""
    values = [f"{row[k]:.3f}" for k in ("acc", "asr", "asr_excl") if row.get(k) is not None]
    return " ".join([*values, str(row["verdict"])])


def table() -> None:
    """Print the table (Markdown)."""
    print("| model | settings, seed | as given | after | ASR excl. | RA | unlearned | verdict |")
    print("|---|---|---|---|---|---|---|---|")
    for row in read(RESULTS):
        cell = row["cell"]
        first = ", ".join(filter(None, [cell["changes"], str(cell["seed"])]))
        asr = ["" if row[k] is None else f"{row[k]:.3f}" for k in ("asr_before", "asr")]
        excl, ra = ("" if row[k] is None else f"{row[k]:.3f}" for k in ("asr_excl", "ra"))
        flagged = ", ".join(map(str, row["flagged"] or ()))
        print(
            f"| {cell['model']} | {first} | {row['acc_before']:.3f} / {asr[0]} "
            f"| {row['acc']:.3f} / {asr[1]} | {excl} | {ra} | {flagged} | {row['verdict']} |"
        )


if __name__ == "__main__":
    commands = {"run": run, "table": table, "ablate": ablate, "ablation": ablation}
    flat = (tyro.conf.OmitArgPrefixes,)
    tyro.extras.subcommand_cli_from_dict(commands, description=__doc__, config=flat)
