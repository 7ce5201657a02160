"""The preset `targeted` on the models that the choice may see.

    python experiments/targeted.py run [--models cifar10-l0] [--seeds 0 1] [--change searched=0.2]
    python experiments/targeted.py run --reference DIR --models BadNets
    python experiments/targeted.py table

CIFAR-10's of the zoo and, from the folder of the published checkpoints, those. Evaluated on
test[5000:7000] (these rows choose; they are no result). Needs CIFAR-10 and GTSRB (TFDS_DATA_DIR).
Rows go to `experiments/results/targeted.jsonl` as they come; what is there already is left out.
"""

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import tyro
from published_models import MODELS as PUBLISHED
from published_models import import_model, read
from zoo import CIFAR10, prepare, prepare_file

from ibau_jax import IBAUConfig, load, unlearn
from ibau_jax.results.rows import write_rows
from ibau_jax.training.optimizers import Adam

RESULTS = Path(__file__).parent / "results" / "targeted.jsonl"


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
    for cell in [(name, seed, changes, grid.images) for seed in grid.seeds for name in grid.models]:
        done = read(grid.out)
        keys = ("model", "seed", "changes", "images")
        if any(tuple(row[k] for k in keys) == cell for row in done):
            continue
        row = one(grid.reference, *cell)
        write_rows(grid.out, [*read(grid.out), row])
        print(*row.values(), flush=True)


def changed(changes: str) -> IBAUConfig:
    """The preset with the settings of `changes`."""
    config = IBAUConfig()
    for name, value in (change.split("=") for change in changes.split()):
        if name == "rate":
            outer = Adam(float(value), schedule="cosine", clip=1.0)
            config = replace(config, outer_optimizer=outer)
        else:
            whole = isinstance(getattr(config, name), int)
            config = replace(config, **{name: int(value) if whole else float(value)})
    return config


def one(reference: Path | None, name: str, seed: int, changes: str, images: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        reference = reference if name in PUBLISHED else None
        model, given, logits, measure = (
            prepare_file(import_model(reference, name, Path(folder)))
            if reference
            else prepare(name)
        )
    clean = load(model.dataset, f"test[:{images}]")
    found = unlearn(logits, given, clean, config=changed(changes), key=jax.random.key(seed))
    before, after = measure(given), measure(found.params)
    jax.clear_caches()
    told = found.diagnostics
    return {
        **{"model": name, "seed": seed, "changes": changes, "images": images},
        **{"targets": [attack.target for attack in model.attacks]},
        **{"acc_before": before.acc, "asr_before": before.asr},
        **{k: v for k, v in after.row().items() if k != "n"},
        **{
            k: told[k]
            for k in ("verdict", "flagged", "suspects", "stages", "searched", "left", "kept")
        },
        **{"seconds": found.seconds, "device": jax.devices()[0].device_kind},
    }


def table() -> None:
    """Print the table (Markdown)."""
    print("| model | settings, seed | as given | after | ASR excl. | RA | unlearned | verdict |")
    print("|---|---|---|---|---|---|---|---|")
    for row in read(RESULTS):
        first = ", ".join(filter(None, [row["changes"], str(row["seed"])]))
        asr = ["" if row[k] is None else f"{row[k]:.3f}" for k in ("asr_before", "asr")]
        excl, ra = ("" if row[k] is None else f"{row[k]:.3f}" for k in ("asr_excl", "ra"))
        flagged = ", ".join(map(str, row["flagged"]))
        print(
            f"| {row['model']} | {first} | {row['acc_before']:.3f} / {asr[0]} "
            f"| {row['acc']:.3f} / {asr[1]} | {excl} | {ra} | {flagged} | {row['verdict']} |"
        )


if __name__ == "__main__":
    commands = {"run": run, "table": table}
    flat = (tyro.conf.OmitArgPrefixes,)
    tyro.extras.subcommand_cli_from_dict(commands, description=__doc__, config=flat)
