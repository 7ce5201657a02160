"""The command line `ibau`: results on stdout, progress and notes on stderr.

Exit status 0: done; 2: a bad argument or unreadable input, told in one line; 3: another process
of the run is gone. Of many processes the first prints the result.
"""

import contextlib
import functools
import io
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import tyro
from tyro.conf import Positional, arg

from ibau_jax.commands.compiled import keep_programs
from ibau_jax.commands.options import (
    ALONE,
    ARCHITECTURE_NAMES,
    AS_STORED,
    ATTACK_NAMES,
    DATASET_NAMES,
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
    OwnScenario,
    Seed,
    Target,
    TriggerFile,
    TriggerMask,
    TriggerRule,
    join,
)
from ibau_jax.commands.output import fail, finish, note
from ibau_jax.errors import InputError, LostProcess, printable
from ibau_jax.files import user_path

app = tyro.extras.SubcommandApp()


def command(function: Callable[..., None]) -> Callable[..., None]:
    """Register a command. Parsing gives the call to make, so that the two can fail apart."""

    @functools.wraps(function)
    def bind(*args: Any, **kwargs: Any) -> Callable[[], None]:
        if not 0 <= kwargs.get("seed", 0) < 2**32:  # JAX takes larger ones modulo 2**32
            raise InputError(f"the seed is {kwargs['seed']}: expected 0 to {2**32 - 1}")
        return functools.partial(
            function, *map(_expanded, args), **{k: _expanded(v) for k, v in kwargs.items()}
        )

    app.command(bind)
    return function


def _expanded(value: Any) -> Any:
    """An option's value, or a group of them; of a path, with the home folder in place of `~`."""
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{f.name: _expanded(getattr(value, f.name)) for f in fields(value)})
    return user_path(value) if isinstance(value, Path) else value


@command
def demo(out: Path = Path("ibau-demo"), seed: Seed = 0, json: AsJson = False) -> None:
    """Train a backdoored model on handwritten digits and remove the backdoor (two minutes).

    Needs no download. Writes both models, the numbers and report.html into --out.
    """
    from ibau_jax.commands import demo as work

    note("training a backdoored model on handwritten digits, then cleaning it with I-BAU")
    finish(work.demo(out, seed=seed, progress=True), json, rows=out)


@command
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


@command
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
    slowly over the image (rms 0.05); or 9 pixels lead 70 % of all to other labels, none of which
    gets 40 % of them (all-to-all). Uncertain from 0.85 of a level on, but backdoored where 9 pixels
    lead 50 % of all images to that label too. The likeliest target is the label that comes nearest
    to all levels together; the others that reach one are targets too, or weaknesses that a backdoor
    brings with it: `defend` tells.
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


@command
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


@command
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


@command
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


@command
def report(folder: Positional[Path], seed: Seed = 0, json: AsJson = False) -> None:
    """Show the table of a run and write its report.html again."""
    from ibau_jax.results.report import write_report
    from ibau_jax.results.rows import read_rows

    del seed  # nothing here is random
    rows = read_rows(folder)
    finish({"rows": rows, "report": str(write_report(folder))}, json, rows=folder)


@command
def reproduce(
    name: Positional[str],
    scale: Annotated[
        str, arg(help="smoke (digits, seconds), cpu (what is there) or paper")
    ] = "cpu",
    run: Annotated[bool, arg(help="first measure what is missing: hours at the scale cpu")] = False,
    methods: Annotated[tuple[str, ...], arg(help="measure only these, as ibau nad")] = (),
    models: Annotated[
        Path | None,
        arg(help="folder of poisoned models, DATASET-ATTACK.safetensors; default: the zoo"),
    ] = None,
    reference: Annotated[
        Path | None, arg(help="folder of the authors' published models (checkpoints/, triggers/)")
    ] = None,
    out: Annotated[Path, arg(help="folder to write to")] = Path("runs"),
    seed: Seed = 0,
    data_dir: DataDir = None,
    json: AsJson = False,
) -> None:
    """Make a table or figure of the paper again: table1 to table6, figure1 to figure5."""
    from ibau_jax.commands.reproduce import module

    found = module().reproduce(
        name,
        scale=scale,
        run=run,
        methods=methods,
        models=models,
        reference=reference,
        out=out,
        seed=seed,
        data_dir=data_dir,
        on_note=lambda text: None if json else print(text),
    )
    finish(found if json else {k: v for k, v in found.items() if k != "cells"}, json)


@command
def bound(
    model: Annotated[Path, arg(help="model file")],
    dataset: DataName = None,
    clean: Annotated[str | None, arg(help="split of clean images")] = None,
    radius: Annotated[float, arg(help="C, the largest l2 norm of a perturbation")] = 10.0,
    margin: Annotated[float, arg(help="gamma, by which the true logit has to lead")] = 1.0,
    xi: Annotated[float, arg(help="the bound holds with probability 1 - xi")] = 0.05,
    seed: Seed = 0,
    data_dir: DataDir = None,
    json: AsJson = False,
) -> None:
    """Evaluate the paper's Theorem 3 on a model, term by term (a diagnostic, not a guarantee)."""
    from ibau_jax.commands import bound as work

    del seed  # nothing here is random
    found = work.bound(
        model,
        dataset=dataset,
        clean=clean,
        radius=radius,
        margin=margin,
        xi=xi,
        data_dir=data_dir,
    )
    if not json:
        for row in found["layers"]:
            note(
                "{layer:>10}: spectral norm {spectral:.3f}, (2,1) norm {two_one:.1f}".format(**row)
            )
    finish(found, json)
    if found["vacuous"]:
        note(f"the bound is vacuous: {found['total']:.3g}, where 1 is true of every model")


@command
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


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax: tracebacks of what we tell
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    try:
        keep_programs()
        _parse(arguments)()
    except InputError as error:
        option = error.argument and f" (--{error.argument.replace('_', '-')})"
        return fail(f"{error}{option or ''}", 2)
    except LostProcess as error:
        return fail(str(error), 3)
    except KeyboardInterrupt:
        kept = "results of earlier runs are untouched"
        return fail(f"interrupted; {kept}, and 'ibau train --resume' goes on with a training", 130)
    except OSError as error:  # for example a full disk
        return fail(f"cannot read or write: {error}", 2)
    return 0


def _parse(arguments: list[str] | None) -> Callable[[], None]:
    """The call that a command line asks for; tyro's box of errors becomes one line."""
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            return app.cli(
                prog="ibau",
                description="Backdoor removal with I-BAU in JAX.",
                args=arguments,
                config=(tyro.conf.FlagCreatePairsOff, tyro.conf.OmitArgPrefixes),
            )
    except SystemExit as stop:
        if not stop.code:  # --help
            raise
        printable = re.sub(r"[^ -~]+|-{3,}", " ", complaint.getvalue())
        words = " ".join(printable.split()).partition("Argument helptext")[0]
        words = words.partition("For full helptext")[0].strip()
        raise InputError(f"{words}; see 'ibau --help' or 'ibau COMMAND --help'") from None


def run() -> None:
    """Entry point of the console script."""
    warnings.formatwarning = lambda message, *_: f"ibau: warning: {printable(message)}\n"
    if isinstance(sys.stdout, io.TextIOWrapper):  # a name may hold what its encoding has not
        sys.stdout.reconfigure(errors="backslashreplace")
    sys.exit(main())


if __name__ == "__main__":
    sys.exit(main())
