"""Training of a poisoned (or clean) model to a file."""

import hashlib
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import jax

from ibau_jax.attacks import Attack, Trigger, check_ratio, names_of, poison_all, scenario_of
from ibau_jax.data import data_info, load
from ibau_jax.data.cache import checksums
from ibau_jax.devices import mesh, processes
from ibau_jax.devices.mesh import Devices
from ibau_jax.errors import InputError, check_name
from ibau_jax.files import make_folder
from ibau_jax.models.architectures import ARCHITECTURES, build
from ibau_jax.models.files import MAX_COPIES, save_model, triggers_of
from ibau_jax.models.model import Classifier
from ibau_jax.models.stored import StoredModel
from ibau_jax.results.metrics import evaluator
from ibau_jax.results.rows import versions
from ibau_jax.training.states import Checkpoints, check_states
from ibau_jax.training.train import PRESETS, TrainConfig, train


def check_options(
    out: str | Path,
    dataset: str,
    *,
    poison_ratio: float | None = None,
    architecture: str = "vgg",
    preset: str = "cpu",
    epochs: int | None = None,
    copies: int = 1,
    seed: int = 0,
    resume: bool = False,
    keep_states: bool = True,
    num_devices: int | None = None,
    clean: bool = False,
) -> tuple[TrainConfig, Devices]:
    """What `train_model` refuses, before anything long is done, such as optimising triggers.

    Args:
      clean: without attacks.

    Returns:
      The settings (`epochs` of the preset where none are given), and the devices.

    Raises:
      InputError: says what was expected, what was found and what to do.
    """
    data_info(dataset)
    check_name("architecture", architecture, ARCHITECTURES)
    check_name("preset", preset, PRESETS)
    config = PRESETS[preset](dataset)
    if epochs is not None:
        config = replace(config, epochs=epochs)
    if clean and poison_ratio is not None:
        raise InputError("--poison-ratio of a clean model: nothing is poisoned; leave it out")
    check_ratio(_ratio(poison_ratio))
    if not 1 <= copies <= MAX_COPIES:
        raise InputError(f"--copies is {copies}: expected 1 to {MAX_COPIES}")
    if clean and copies > 1:
        raise InputError("--copies of a clean model: nothing is poisoned anew; leave it out")
    if resume and jax.process_count() > 1:
        raise InputError(
            "--resume in a run of several processes: they keep no states; leave it out, or train "
            "in one process"
        )
    if Path(out).exists() and not Path(out).is_file():
        what = "a folder" if Path(out).is_dir() else "no regular file"
        raise InputError(f"{str(out)!r} is {what}: expected a model file to write, by --out")
    devices = mesh.devices(num_devices)
    if processes.is_first():
        make_folder(Path(out).parent, "out")
    if keep_states and jax.process_count() == 1:
        known = settings_of(dataset, architecture, config, poison_ratio, copies, seed, clean)
        if epochs is None:
            known.pop("epochs")  # they depend on the attacks
        check_states(states_folder(out), known, resume)
    return config, devices


def _ratio(poison_ratio: float | None) -> float:
    return 0.2 if poison_ratio is None else poison_ratio


def states_folder(out: str | Path) -> Path:
    """The folder of the states of a training that writes `out`."""
    return Path(out).with_name(Path(out).name + ".checkpoints")


def settings_of(
    dataset: str,
    architecture: str,
    config: TrainConfig,
    poison_ratio: float | None,
    copies: int,
    seed: int,
    clean: bool,
) -> dict[str, Any]:
    """What a result depends on, but for the attacks and the data themselves."""
    return {
        "dataset": dataset,
        "poison ratio": None if clean else _ratio(poison_ratio),
        "copies": copies,
        "seed": seed,
        # Left out of those of the first architecture, which had no name.
        **({} if architecture == "vgg" else {"architecture": architecture}),
        "ibau_jax": versions()["ibau_jax"],
        **asdict(config),
    }


def train_model(
    out: str | Path,
    dataset: str,
    attacks: tuple[Attack, ...] = (),
    *,
    poison_ratio: float | None = None,
    architecture: str = "vgg",
    preset: str = "cpu",
    epochs: int | None = None,
    copies: int = 1,
    seed: int = 0,
    data_dir: str | Path | None = None,
    resume: bool = False,
    keep_states: bool = True,
    progress: bool = False,
    num_devices: int | None = None,
) -> dict[str, Any]:
    """Train a model, poisoned or clean, and write it to `out`.

    While it runs (in one process), `out` with the ending `.checkpoints` holds the last states.

    Args:
      out: model file to write; what was there is replaced when the training has ended.
      dataset: of `DATASETS`; its split `train` is poisoned and trained on.
      attacks: from `make_attacks`; empty: a clean model. Triggers are of class `Trigger`.
      poison_ratio: share of the training set that each attack poisons, in [0, 1]; None: 0.2.
      architecture: of `models.architectures.ARCHITECTURES`.
      preset: of `training.train.PRESETS`.
      epochs: passes over the data; None: the preset's. Preset `cpu` divides its own by the
        number of attacks and copies, since their joined data is as many times larger, and takes
        three times as many for all-to-all, where the trigger has to be learned for each class.
      copies: how often the training set is poisoned by each attack, each time in rows drawn
        anew, and joined, as the scenario seven-target joins its attacks' copies. The ratio of
        the whole remains; more different images carry the trigger. It is for all-to-all, whose
        images with the trigger have to be told apart as well as the others (5 copies: 67 % of the
        images have it in at least one of them, instead of 20 %).
      seed: of the poisoned rows, the first weights, the order and the dropout.
      data_dir: folder of TensorFlow Datasets; None: its own default.
      resume: go on where an earlier call with the same arguments was stopped. The number of
        devices and the versions of libraries may be others; a warning says that the result then
        differs by rounding.
      keep_states: False: keep none, so that the run cannot be resumed.
      progress: show a bar on stderr, and measure ACC and ASR after each epoch.
      num_devices: how many to compute on; None: all.

    Returns:
      For JSON: `model` (the file), `attack`, `preset`, `epochs`, the metrics (`Metrics.row`) on
      the evaluation split, `seconds` (with compilation and measuring), `train_seconds` and
      `images_per_second` (without), and `resumed_at`, the step from which it went on, or None.

    Raises:
      InputError: says what was expected, what was found and what to do.
    """
    config, devices = check_options(
        out,
        dataset,
        poison_ratio=poison_ratio,
        architecture=architecture,
        preset=preset,
        epochs=epochs,
        copies=copies,
        seed=seed,
        resume=resume,
        keep_states=keep_states,
        num_devices=num_devices,
        clean=not attacks,
    )
    ratio = _ratio(poison_ratio)
    if epochs is None and preset == "cpu":
        times = 3 if scenario_of(attacks) == "all-to-all" else 1
        config = replace(config, epochs=-(-times * config.epochs // max(1, len(attacks) * copies)))
    triggers = triggers_of(attacks)  # said now, not when the training has ended
    info, first, out = data_info(dataset), processes.is_first(), Path(out)
    data, held_out = load(dataset, "train", data_dir), load(dataset, info.split, data_dir)
    clean, (data, _) = data, poison_all(data, attacks * copies, ratio, seed)
    module = build(architecture, info.num_classes)
    checkpoints = None
    if keep_states and jax.process_count() == 1:
        settings = {
            **settings_of(dataset, architecture, config, poison_ratio, copies, seed, not attacks),
            "attack": names_of(attacks),
            "targets": [attack.target for attack in attacks],
            "triggers": [_digest(trigger) for trigger in triggers],
            "data": checksums((clean.images, data.labels)),  # these tell the poisoned rows
        }
        libraries = {k: v for k, v in versions().items() if k != "ibau_jax"}
        where = {"devices": len(devices.all), "backend": jax.default_backend(), **libraries}
        checkpoints = Checkpoints(states_folder(out), settings, resume, environment=where)

    started = time.perf_counter()
    measure = evaluator(Classifier(module), held_out, attacks)
    variables, history = train(
        module,
        data,
        config=config,
        key=jax.random.key(seed),
        evaluate=lambda variables: measure(variables).row(),
        progress=progress and first,
        devices=devices,
        checkpoints=checkpoints,
    )
    seconds = time.perf_counter() - started
    trained = {
        "seed": seed,
        "preset": preset,
        "epochs": config.epochs,
        "poison_ratio": ratio if attacks else None,
        "copies": copies,
        "num_devices": len(devices.all),
        "versions": versions(),
    }
    model = StoredModel(variables, architecture, info.num_classes, dataset, attacks, trained)
    if first:
        save_model(out, model)
    if checkpoints is not None:
        checkpoints.remove()
    trained_seconds = sum(record["seconds"] for record in history)
    final = {k: v for k, v in history[-1].items() if k not in ("epoch", "loss", "seconds")}
    return {
        "model": str(out),
        "attack": names_of(attacks),
        "architecture": architecture,
        "preset": preset,
        "epochs": config.epochs,
        **final,
        "seconds": seconds,
        "train_seconds": trained_seconds,
        "images_per_second": len(data.labels) * config.epochs / trained_seconds,
        "resumed_at": None if checkpoints is None else checkpoints.resumed,
    }


def _digest(trigger: Trigger) -> str:
    """Tells triggers apart."""
    parts = (trigger.rule.encode(), trigger.pattern.tobytes())
    mask = b"" if trigger.mask is None else trigger.mask.tobytes()
    return hashlib.sha256(b"|".join((*parts, mask))).hexdigest()[:16]
