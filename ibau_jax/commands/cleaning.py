"""Commands for a model that is not trusted: `inspect`, `evaluate`, `defend`."""

from pathlib import Path
from typing import Annotated

from tyro.conf import arg

from ibau_jax.commands.options import (
    ALONE,
    AS_STORED,
    DEFENSE_NAMES,
    IN_THE_FILE,
    OURS,
    OWN_IMAGES,
    AsJson,
    DataDir,
    DataName,
    Machines,
    Measured,
    NoLabels,
    NumDevices,
    OwnImages,
    OwnModel,
    Seed,
    join,
)
from ibau_jax.commands.output import finish, note


def inspect(
    model: Annotated[Path, arg(help="model file")],
    dataset: DataName = None,
    clean: Annotated[
        str | None,
        arg(
            help="clean images: a split, for example 'test[:5000]', the default of CIFAR-10, "
            + OWN_IMAGES
        ),
    ] = None,
    no_labels: NoLabels = False,
    images: OwnImages = AS_STORED,
    own: OwnModel = OURS,
    seed: Seed = 0,
    out: Annotated[
        Path | None, arg(help="folder of report.html; default: runs/MODEL-inspect-seedN")
    ] = None,
    data_dir: DataDir = None,
    json: AsJson = False,
) -> None:
    """Does a model carry a backdoor, and towards which label? A search, without a trigger.

    Backdoored: one perturbation leads 60 % of the images of other labels to a label by a window
    of 3x3 pixels, 70 % by 5x5, 85 % by a cosine of amplitude 0.07, 60 % by a field that changes
    slowly over the image (rms 0.05); or 9 pixels lead 60 % of all images to one label, or 70 % to
    others, none of which gets 40 % of them (all-to-all). Uncertain from 0.85 of a level on. The
    likeliest target is the label that comes nearest to all levels together; the others that reach
    one are targets too, or weaknesses that a backdoor brings with it: `defend` tells.
    The levels are from CIFAR-10 (experiments/default.md); on other images take them as a hint.
    """
    from ibau_jax.commands.inspect import inspect_model
    from ibau_jax.results.inspection import table

    found = inspect_model(
        model,
        dataset=dataset,
        clean=clean,
        no_labels=no_labels,
        images=images,
        own=own,
        seed=seed,
        out=out,
        data_dir=data_dir,
        progress=True,
        on_note=note,
    )
    finish(found, json, shown=table(found))


def evaluate(
    model: Annotated[Path, arg(help="model file")],
    dataset: DataName = None,
    split: Annotated[
        str | None, arg(help=f"images to measure by: a split, as 'test[5000:]', {OWN_IMAGES}")
    ] = None,
    images: OwnImages = AS_STORED,
    own: OwnModel = OURS,
    measured: Measured = IN_THE_FILE,
    seed: Seed = 0,
    data_dir: DataDir = None,
    json: AsJson = False,
) -> None:
    """Measure ACC, and ASR where an attack is known."""
    from ibau_jax.commands.evaluate import evaluate_model

    del seed  # nothing here is random
    found = evaluate_model(
        model,
        dataset=dataset,
        split=split,
        images=images,
        own=own,
        measured=measured,
        data_dir=data_dir,
        progress=True,
        on_note=note,
    )
    finish(found, json)


def defend(
    model: Annotated[Path, arg(help="model file")],
    defense: Annotated[
        str,
        arg(help=DEFENSE_NAMES),
    ] = "ibau",
    preset: Annotated[
        str | None,
        arg(
            help="of ibau: default, untargeted, algorithm1 or published; of the others: cpu (few "
            "steps) or paper; default: the first"
        ),
    ] = None,
    dataset: DataName = None,
    clean: Annotated[
        str | None, arg(help=f"clean images that the defense uses: a split, {OWN_IMAGES}")
    ] = None,
    no_labels: NoLabels = False,
    split: Annotated[
        str | None,
        arg(
            help="images for evaluation, as --clean and disjoint from it; default of your own "
            "clean images: half of them"
        ),
    ] = None,
    images: OwnImages = AS_STORED,
    own: OwnModel = OURS,
    measured: Measured = IN_THE_FILE,
    rounds: Annotated[int | None, arg(help="passes over the clean set; default: preset's")] = None,
    poison_ratio: Annotated[
        float | None,
        arg(help="dp-sgd: poisoned share of the training set; default: as the model's file says"),
    ] = None,
    seed: Seed = 0,
    out: Annotated[
        Path | None, arg(help="folder to write; default: runs/MODEL-DEFENSE-PRESET-seedN")
    ] = None,
    devices: NumDevices = None,
    machines: Machines = ALONE,
    data_dir: DataDir = None,
    json: AsJson = False,
) -> None:
    """Remove the backdoor from a model with a small clean set; write the result and a report."""
    from ibau_jax.commands import defend

    join(machines)
    found = defend.defend(
        model,
        defense=defense,
        preset=preset,
        dataset=dataset,
        clean=clean,
        no_labels=no_labels,
        split=split,
        rounds=rounds,
        poison_ratio=poison_ratio,
        images=images,
        own=own,
        measured=measured,
        seed=seed,
        out=out,
        data_dir=data_dir,
        progress=True,
        on_note=note,
        num_devices=devices,
    )
    finish(found, json, rows=Path(found["report"]).parent)
