"""How fast a cleaned model learns its backdoor again: a handful of poisoned images later on.

    python experiments/relearn.py run --reference DIR [--defenses ibau ft-sam] [--models BadNets]
    python experiments/relearn.py table

Each model is cleaned by a defense at its default preset, with the 5000 clean images of its data
set, and then fine-tuned for one epoch on 100 images of the training set of which five carry the
trigger and its label (SGD 0.001 with momentum 0.9, batches of 10, batch norm as in training; at a
rate of 0.01 the published BadNets loses 20 points of ACC by it). The
given model's rows ("none") say what the epoch does to a model that was not cleaned. Rows go to
`experiments/results/relearn.jsonl` as they come; what is there already is left out.
"""

import tempfile
from dataclasses import dataclass
from pathlib import Path

import jax
import tyro
from published_models import MODELS as PUBLISHED
from published_models import import_model, read
from zoo import FOLDER as ZOO

from ibau_jax import load
from ibau_jax.attacks import poison
from ibau_jax.commands.defend import defend
from ibau_jax.data import Dataset
from ibau_jax.defenses.finetune import Tuning, finetune
from ibau_jax.models.files import load_model
from ibau_jax.results.metrics import evaluator
from ibau_jax.results.rows import write_rows
from ibau_jax.training.optimizers import SGD

RESULTS = Path(__file__).parent / "results" / "relearn.jsonl"
IMAGES, POISONED = 100, 5


@dataclass
class Run:
    """Which cells."""

    reference: Path
    """Folder of the published models (checkpoints/, triggers/)."""
    models: tuple[str, ...] = ("BadNets", "Trojan WM", "cifar10-l0", "cifar10-smooth")
    defenses: tuple[str, ...] = ("none", "ibau", "ft-sam", "finetune")
    seeds: tuple[int, ...] = (0,)
    out: Path = RESULTS


def run(grid: Run) -> None:
    """Fill the grid."""
    for seed in grid.seeds:
        for name in grid.models:
            for defense in grid.defenses:
                cell = name, defense, seed
                done = read(grid.out)
                if any((row["model"], row["defense"], row["seed"]) == cell for row in done):
                    continue
                row = one(grid.reference, *cell)
                write_rows(grid.out, [*read(grid.out), row])
                print(*row.values(), flush=True)


def one(reference: Path, name: str, defense: str, seed: int) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        path = ZOO / f"{name}.safetensors"
        path = import_model(reference, name, Path(folder)) if name in PUBLISHED else path
        if defense != "none":
            found = defend(path, defense=defense, seed=seed, out=Path(folder) / "run")
            path = found["model"]
        model = load_model(path)
    (attack,) = model.attacks
    train = load(model.dataset, f"train[{1000 * seed}:{1000 * seed + IMAGES}]")
    few, mask = poison(Dataset(*train), attack, POISONED / IMAGES, seed)
    assert mask.sum() == POISONED
    measure = evaluator(model.classifier, load(model.dataset, "test[5000:]"), model.attacks)
    config = Tuning(epochs=1, batch_size=10, optimizer=SGD(0.001, momentum=0.9))
    key = jax.random.key(seed)
    again = finetune(model.classifier, model.variables, few, config=config, key=key)
    row: dict = {"model": name, "defense": defense, "seed": seed}
    for when, variables in (("cleaned", model.variables), ("again", again.params)):
        found = measure(variables)
        row |= {f"acc_{when}": found.acc, f"asr_{when}": found.asr}
    jax.clear_caches()
    return row


def table() -> None:
    """Print the table (Markdown): ACC / ASR, and the ASR that comes back."""
    print("| model | defense | seed | cleaned | after the epoch | comes back |")
    print("|---|---|---|---|---|---|")
    for row in read(RESULTS):
        cells = [f"{row[f'acc_{w}']:.3f} / {row[f'asr_{w}']:.3f}" for w in ("cleaned", "again")]
        back = row["asr_again"] - row["asr_cleaned"]
        print(f"| {row['model']} | {row['defense']} | {row['seed']} | {' | '.join(cells)} ", end="")
        print(f"| {back:+.3f} |")


if __name__ == "__main__":
    commands = {"run": run, "table": table}
    flat = (tyro.conf.OmitArgPrefixes,)
    tyro.extras.subcommand_cli_from_dict(commands, description=__doc__, config=flat)
