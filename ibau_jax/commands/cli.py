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
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.text import Text
from tyro.conf import Positional, arg

from ibau_jax.errors import InputError, LostProcess, printable

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
    """An option's value; of a path, with the home folder in place of `~`."""
    if not isinstance(value, Path):
        return value
    from ibau_jax.files import user_path

    return user_path(value)


DataDir = Annotated[
    Path | None,
    arg(help="folder of TensorFlow Datasets; default: TFDS_DATA_DIR, else TFDS's own"),
]
AsJson = Annotated[bool, arg(help="print one JSON object on stdout")]
Seed = Annotated[int, arg(help="seed of everything that is random")]
DataName = Annotated[str | None, arg(help="digits, cifar10 or gtsrb; default: the model's own")]
Target = Annotated[int | None, arg(help="label that triggered images shall get")]
OwnScenario = Annotated[
    str | None,
    arg(
        help="of --attack or --trigger: one-target or all-to-all (y becomes y + 1); default: the "
        "model's own, else one-target"
    ),
]
TriggerFile = Annotated[Path | None, arg(help="picture of a trigger, 32x32")]
TriggerRule = Annotated[
    str | None,
    arg(
        help="of --trigger, blend or smooth: add (default), clip(image + trigger), renormalise, "
        "image + trigger brought to [0, 1], or replace, image * (1 - mask) + trigger (blend: the "
        "convex mix; not of smooth)"
    ),
]
NumDevices = Annotated[int | None, arg(help="GPUs, TPU cores or CPUs to use; default: all")]
Coordinator = Annotated[
    str | None,
    arg(help="several machines: HOST:PORT of process 0, or auto (SLURM, Open MPI, TPU pods)"),
]
NumProcesses = Annotated[int | None, arg(help="several machines: how many processes")]
ProcessId = Annotated[int | None, arg(help="several machines: which one this is, from 0")]
TriggerMask = Annotated[
    Path | None,
    arg(
        help="for the rule replace: an .npy file [32, 32], values from 0 to 1; default: where the "
        "picture is opaque"
    ),
]


@command
def demo(out: Path = Path("ibau-demo"), seed: Seed = 0, json: AsJson = False) -> None:
    """Train a backdoored model on handwritten digits and remove the backdoor (two minutes).

    Needs no download. Writes both models, the numbers and report.html into --out.
    """
    from ibau_jax.commands import defend

    _note("training a backdoored model on handwritten digits, then cleaning it with I-BAU")
    _finish(defend.demo(out, seed, progress=True), json, rows=out)


@command
def train(
    out: Annotated[Path, arg(help="model file to write (.safetensors)")],
    dataset: Annotated[str, arg(help="digits, cifar10 or gtsrb")] = "digits",
    attack: Annotated[
        str | None,
        arg(
            help="badnets, blend, l0, l2, smooth, trojan-square or trojan-watermark, with the "
            "paper's target where --target is not given (with --trigger too); none for a clean "
            "model; any other name with --trigger and --target; default: badnets"
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
    coordinator: Coordinator = None,
    num_processes: NumProcesses = None,
    process_id: ProcessId = None,
    data_dir: DataDir = None,
    json: AsJson = False,
) -> None:
    """Train a model, poisoned or clean, and write it to one file."""
    from ibau_jax.commands import attack_options, train

    _join(coordinator, num_processes, process_id)
    train.check_options(
        out,
        dataset,
        poison_ratio,
        preset,
        epochs,
        copies,
        seed,
        resume,
        num_devices=devices,
        clean=attack == "none",
    )
    attacks = attack_options.make_attacks(
        dataset,
        attack,
        scenario,
        target,
        **_trigger(trigger, trigger_rule, trigger_mask),
        clean_model=clean_model,
        seed=seed,
        data_dir=data_dir,
        on_note=_note,
    )
    found = train.train_model(
        out,
        dataset,
        attacks,
        poison_ratio,
        preset,
        epochs,
        copies,
        seed,
        data_dir,
        resume,
        progress=True,
        num_devices=devices,
    )
    _finish(found, json)


@command
def evaluate(
    model: Annotated[Path, arg(help="model file")],
    dataset: DataName = None,
    split: Annotated[str | None, arg(help="for example 'test[5000:]'")] = None,
    attack: Annotated[
        str | None,
        arg(
            help="default: those in the model's file; the label rule is the model's own (of a "
            "clean model: the paper's)"
        ),
    ] = None,
    scenario: OwnScenario = None,
    target: Target = None,
    trigger: TriggerFile = None,
    trigger_rule: TriggerRule = None,
    trigger_mask: TriggerMask = None,
    seed: Seed = 0,
    data_dir: DataDir = None,
    json: AsJson = False,
) -> None:
    """Measure ACC, and ASR where an attack is known."""
    from ibau_jax.commands import attack_options, defend
    from ibau_jax.models.files import load_model

    del seed  # nothing here is random
    stored = load_model(model)
    chosen = attack_options.attacks_on(
        stored,
        defend.info_for(stored, dataset, model).name,
        attack,
        scenario,
        target,
        **_trigger(trigger, trigger_rule, trigger_mask),
    )
    _finish(defend.evaluate_model(model, dataset, split, chosen, data_dir), json)


@command
def defend(
    model: Annotated[Path, arg(help="model file")],
    defense: Annotated[
        str,
        arg(
            help="ibau, finetune, neural-cleanse, deepinspect, tabor, fine-pruning, nad, dp-sgd or "
            "naive"
        ),
    ] = "ibau",
    preset: Annotated[
        str | None,
        arg(
            help="of ibau: default, algorithm1 or published; of the others: cpu (few steps) or "
            "paper; default: the first"
        ),
    ] = None,
    dataset: DataName = None,
    clean: Annotated[str | None, arg(help="split that the defense uses")] = None,
    split: Annotated[str | None, arg(help="split for evaluation, disjoint from --clean")] = None,
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
    coordinator: Coordinator = None,
    num_processes: NumProcesses = None,
    process_id: ProcessId = None,
    data_dir: DataDir = None,
    json: AsJson = False,
) -> None:
    """Remove the backdoor from a model with a small clean set; write the result and a report."""
    from ibau_jax.commands import defend

    _join(coordinator, num_processes, process_id)
    found = defend.defend(
        model,
        defense,
        preset,
        dataset,
        clean,
        split,
        rounds,
        poison_ratio,
        seed,
        out,
        data_dir,
        progress=True,
        on_note=_note,
        num_devices=devices,
    )
    _finish(found, json, rows=Path(found["report"]).parent)


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
    from ibau_jax.commands import attack_options, defend
    from ibau_jax.errors import check_name

    del seed  # nothing here is random
    check_name("scenario", scenario or "one-target", attack_options.OWN_SCENARIOS)
    chosen = attack_options.make_attacks(
        dataset,
        "none" if attack is None and trigger is None else attack,
        scenario or "one-target",
        target,
        **_trigger(trigger, trigger_rule, trigger_mask),
    )
    _finish(defend.convert(source, destination, dataset, chosen), json)


@command
def report(folder: Positional[Path], seed: Seed = 0, json: AsJson = False) -> None:
    """Show the table of a run and write its report.html again."""
    from ibau_jax.results.report import write_report
    from ibau_jax.results.rows import read_rows

    del seed  # nothing here is random
    rows = read_rows(folder)
    _finish({"rows": rows, "report": str(write_report(folder))}, json, rows=folder)


@command
def reproduce(
    name: Positional[str],
    models: Annotated[
        Path, arg(help="folder of poisoned models, DATASET-ATTACK.safetensors, with triggers")
    ] = Path("experiments/zoo"),
    scale: Annotated[str, arg(help="smoke (digits only), cpu or paper")] = "cpu",
    out: Annotated[Path, arg(help="folder to write to")] = Path("runs"),
    seed: Seed = 0,
    data_dir: DataDir = None,
    json: AsJson = False,
) -> None:
    """Make a figure of the paper again: figure2 (the triggers, before and after patching)."""
    from ibau_jax.commands import reproduce

    _finish(reproduce.reproduce(name, models, scale, out, seed, data_dir), json)


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
    from ibau_jax.commands import defend

    del seed  # nothing here is random
    found = defend.bound(model, dataset, clean, radius, margin, xi, data_dir)
    if not json:
        for row in found["layers"]:
            _note(
                "{layer:>10}: spectral norm {spectral:.3f}, (2,1) norm {two_one:.1f}".format(**row)
            )
    _finish(found, json)
    if found["vacuous"]:
        _note(f"the bound is vacuous: {found['total']:.3g}, where 1 is true of every model")


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
    _finish({"dataset": dataset, "folder": str(found)}, json)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax: tracebacks of what we tell
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    try:
        _parse(arguments)()
    except InputError as error:
        return _fail(str(error), 2)
    except LostProcess as error:
        return _fail(str(error), 3)
    except KeyboardInterrupt:
        kept = "results of earlier runs are untouched"
        return _fail(f"interrupted; {kept}, and 'ibau train --resume' goes on with a training", 130)
    except OSError as error:  # for example a full disk
        return _fail(f"cannot read or write: {error}", 2)
    return 0


def _fail(text: str, status: int) -> int:
    print(f"ibau: {printable(text)}", file=sys.stderr, flush=True)
    if "ibau_jax.devices.processes" in sys.modules:
        sys.modules["ibau_jax.devices.processes"].leave(status)
    return status


def _join(coordinator: str | None, num_processes: int | None, process_id: int | None) -> None:
    from ibau_jax.devices import processes

    if coordinator is not None:
        # Gloo, which connects CPUs, talks on stdout; that is for results alone.
        results = os.dup(1)
        os.dup2(2, 1)
        sys.stdout = open(results, "w")  # noqa: SIM115  (until the process ends)
        processes.start(coordinator, num_processes, process_id)
    elif num_processes is not None or process_id is not None:
        raise InputError(
            "--num-processes or --process-id without --coordinator: give HOST:PORT of process 0"
        )


def _trigger(path: Path | None, rule: str | None, mask: Path | None) -> dict[str, Any]:
    """Arguments of `make_attacks` for the options of a trigger of one's own."""
    from ibau_jax.commands.attack_options import read_trigger

    if path is not None:
        own = read_trigger(path, rule or "add", mask)
        return {"trigger": own, "rule": None, "trigger_name": path.stem}
    if mask is not None:
        raise InputError("a trigger mask without a trigger: give the picture by --trigger")
    return {"rule": rule}


def _parse(arguments: list[str] | None) -> Callable[[], None]:
    """The call that a command line asks for; tyro's box of errors becomes one line."""
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            return app.cli(
                prog="ibau",
                description="Backdoor removal with I-BAU in JAX.",
                args=arguments,
                config=(tyro.conf.FlagCreatePairsOff,),
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


def _note(text: str) -> None:
    print(f"ibau: {printable(text)}", file=sys.stderr)


def _finish(found: dict[str, Any], as_json: bool, rows: Path | None = None) -> None:
    """Print a result: JSON, or a table (of rows, where there are some) and the other values."""
    if (
        "ibau_jax.devices.processes" in sys.modules
        and not sys.modules["ibau_jax.devices.processes"].is_first()
    ):
        return
    if as_json:
        from ibau_jax.files import to_json

        print(to_json(found))
        return
    console = Console()
    if rows is not None:
        from ibau_jax.results.rows import print_table, read_rows

        print_table(read_rows(rows), console)
    for name, value in found.items():
        if isinstance(value, float):
            value = f"{value:.4f}" if abs(value) < 1e6 else f"{value:.3e}"
        if not isinstance(value, dict | list) and value is not None:
            # As `Text`: in a plain string rich would look for markup and emoji.
            console.print(Text(f"{name:>16}  {printable(value)}"), soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
