"""Commands that make models, and what they need: `demo`, `train`, `convert`, `prepare`."""

from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from ibau_jax.commands.options import (
    ALONE,
    ARCHITECTURE_NAMES,
    ATTACK_NAMES,
    DATASET_NAMES,
    AsJson,
    DataDir,
    Machines,
    NumDevices,
    OwnScenario,
    Seed,
    Target,
    TriggerFile,
    TriggerMask,
    TriggerRule,
    join,
)
from ibau_jax.commands.output import finish, note


def demo(out: Path = Path("ibau-demo"), seed: Seed = 0, json: AsJson = False) -> None:
    """Train a backdoored model on handwritten digits and remove the backdoor (two minutes).

    Needs no download. Writes both models, the numbers and report.html into --out.
    """
    from ibau_jax.commands import demo as work

    note("training a backdoored model on handwritten digits, then cleaning it with I-BAU")
    finish(work.demo(out, seed=seed, progress=True), json, rows=out)


def train(
    out: Annotated[Path, arg(help="model file to write (.safetensors)")],
    dataset: Annotated[str, arg(help=DATASET_NAMES)] = "digits",
    attack: Annotated[
        str | None,
        arg(
            help=f"{ATTACK_NAMES}, with the paper's target where --target is not given (with "
            "--trigger too); none for a clean model; any other name with --trigger and --target; "
            "default: badnets"
        ),
    ] = None,
    scenario: Annotated[
        str, arg(help="one-target, all-to-all (y becomes y + 1) or seven-target (all attacks)")
    ] = "one-target",
    target: Target = None,
    poison_ratio: Annotated[
        float | None, arg(help="share of the training set that is poisoned; default: 0.2")
    ] = None,
    clean_model: Annotated[
        Path | None,
        arg(help="clean model, for triggers that are optimised (l0, l2, smooth, trojan-...)"),
    ] = None,
    trigger: TriggerFile = None,
    trigger_rule: TriggerRule = None,
    trigger_mask: TriggerMask = None,
    architecture: Annotated[str, arg(help=ARCHITECTURE_NAMES)] = "vgg",
    preset: Annotated[str, arg(help="cpu (few epochs) or paper (section A.3)")] = "cpu",
    epochs: Annotated[
        int | None,
        arg(help="default: the preset's (cpu: three times as many for all-to-all)"),
    ] = None,
    copies: Annotated[
        int,
        arg(help="of the training set, joined, each with other poisoned rows; fewer epochs at cpu"),
    ] = 1,
    resume: Annotated[bool, arg(help="go on with a training that was stopped")] = False,
    seed: Seed = 0,
    devices: NumDevices = None,
    machines: Machines = ALONE,
    data_dir: DataDir = None,
    json: AsJson = False,
) -> None:
    """Train a model, poisoned or clean, and write it to one file."""
    from ibau_jax.commands import attack_options, train

    join(machines)
    options = {
        "poison_ratio": poison_ratio,
        "architecture": architecture,
        "preset": preset,
        "epochs": epochs,
        "copies": copies,
        "seed": seed,
        "resume": resume,
        "num_devices": devices,
    }
    train.check_options(out, dataset, **options, clean=attack == "none")
    attacks = attack_options.make_attacks(
        dataset,
        attack,
        scenario,
        target,
        **attack_options.trigger_options(trigger, trigger_rule, trigger_mask),
        clean_model=clean_model,
        seed=seed,
        data_dir=data_dir,
        on_note=note,
    )
    found = train.train_model(out, dataset, attacks, data_dir=data_dir, progress=True, **options)
    finish(found, json)


def convert(
    source: Positional[Path],
    destination: Positional[Path],
    dataset: Annotated[str, arg(help="what it was trained on: cifar10 or gtsrb")] = "cifar10",
    attack: Annotated[
        str | None,
        arg(
            help="badnets, or a name for --trigger; one of the paper's has its target where "
            "--target is not given"
        ),
    ] = None,
    scenario: OwnScenario = None,
    target: Target = None,
    trigger: TriggerFile = None,
    trigger_rule: TriggerRule = None,
    trigger_mask: TriggerMask = None,
    seed: Seed = 0,
    json: AsJson = False,
) -> None:
    """Import a published PyTorch checkpoint (.pth), with its trigger, as a model file.

    The file is read as data only: one that holds anything but tensors and plain values is refused.
    """
    from ibau_jax.commands import attack_options
    from ibau_jax.commands import convert as work
    from ibau_jax.errors import check_name

    del seed  # nothing here is random
    check_name("scenario", scenario or "one-target", attack_options.OWN_SCENARIOS)
    chosen = attack_options.make_attacks(
        dataset,
        "none" if attack is None and trigger is None else attack,
        scenario or "one-target",
        target,
        **attack_options.trigger_options(trigger, trigger_rule, trigger_mask),
    )
    found = work.convert(source, destination, dataset=dataset, attacks=chosen)
    finish(found, json)


def prepare(
    dataset: Positional[str],
    archives: Annotated[
        Path | None, arg(help="folder with GTSRB's three official archives, downloaded by hand")
    ] = None,
    data_dir: DataDir = None,
    seed: Seed = 0,
    json: AsJson = False,
) -> None:
    """Download a data set (cifar10 or gtsrb) and write it for TensorFlow Datasets, once."""
    from ibau_jax.data.tfds import prepare as prepare_dataset

    del seed  # nothing here is random
    found = prepare_dataset(dataset, data_dir, archives)
    finish({"dataset": dataset, "folder": str(found)}, json)
