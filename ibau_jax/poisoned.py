"""From command-line values to attacks, and to a trained model file."""

import hashlib
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from ibau_jax import parallel, processes
from ibau_jax.attacks import (
    ATTACKS,
    SCENARIOS,
    Attack,
    Network,
    Trigger,
    check_target,
    make_attack,
    make_trigger,
    masks,
    optimised,
    poison_all,
    scenario_of,
    smooth,
    trigger_from_files,
)
from ibau_jax.checkpoint import Model, load_model, model_hash, save_model
from ibau_jax.data import DataInfo, data_info, load
from ibau_jax.data.cache import cached
from ibau_jax.errors import InputError, check_name
from ibau_jax.files import make_folder
from ibau_jax.metrics import evaluator
from ibau_jax.models import build
from ibau_jax.report import versions
from ibau_jax.resume import Checkpoints
from ibau_jax.training import PRESETS, train

OPTIMISED = (masks, optimised, smooth)  # a change in them forgets cached triggers


def train_model(
    out: str | Path,
    dataset: str,
    attacks: tuple[Attack, ...] = (),
    poison_ratio: float = 0.2,
    preset: str = "cpu",
    epochs: int | None = None,
    seed: int = 0,
    data_dir: str | None = None,
    resume: bool = False,
    keep_states: bool = True,
    progress: bool = False,
    num_devices: int | None = None,
) -> dict[str, Any]:
    """Train a model, poisoned or clean, and write it to `out`.

    While it runs (in one process), `out` with the ending `.checkpoints` holds the last states.

    Args:
      attacks: from `make_attacks`; empty: a clean model.
      preset: of `training.PRESETS`.
      epochs: passes over the data; None: the preset's. Preset `cpu` divides its own by the
        number of attacks, since their joined data is as many times larger, and takes three
        times as many for all-to-all, where the trigger has to be learned for each class.
      resume: go on where an earlier call with the same arguments was stopped.
      keep_states: False: keep none, so that the run cannot be resumed.
      num_devices: how many to compute on; None: all.
    """
    info = data_info(dataset)
    check_name("preset", preset, PRESETS)
    config = PRESETS[preset](dataset)
    if epochs is not None:
        config = replace(config, epochs=epochs)
    elif preset == "cpu" and scenario_of(attacks) == "all-to-all":
        config = replace(config, epochs=3 * config.epochs)
    elif preset == "cpu" and len(attacks) > 1:
        config = replace(config, epochs=-(-config.epochs // len(attacks)))
    if resume and jax.process_count() > 1:
        raise InputError(
            "--resume in a run of several processes: they keep no states; leave it out, or train "
            "in one process"
        )
    devices, first = parallel.devices(num_devices), processes.is_first()
    out = Path(out)
    if out.is_dir():
        raise InputError(f"{str(out)!r} is a folder: expected a model file to write, by --out")
    if first:
        make_folder(out.parent)
    data, held_out = load(dataset, "train", data_dir), load(dataset, info.split, data_dir)
    data, _ = poison_all(data, attacks, poison_ratio, seed)
    module = build("vgg", info.num_classes)
    checkpoints = None
    if keep_states and jax.process_count() == 1:
        settings = {
            "dataset": dataset,
            "attack": describe(attacks),
            "targets": [attack.target for attack in attacks],
            "triggers": [_digest(attack.trigger) for attack in attacks],
            "poison ratio": poison_ratio if attacks else None,
            "seed": seed,
            "devices": len(devices.all),
            "settings": repr(config),
        }
        checkpoints = Checkpoints(out.with_name(out.name + ".checkpoints"), settings, resume)

    started = time.perf_counter()
    # The running statistics of batch norm change, so the "parameters" are all variables here.
    measure = evaluator(cast(Any, module.apply), held_out, attacks)

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
        "poison_ratio": poison_ratio if attacks else None,
        "num_devices": len(devices.all),
        "versions": versions(),
    }
    model = Model(variables, "vgg", info.num_classes, dataset, attacks, trained)
    if first:
        save_model(out, model)
    if checkpoints is not None:
        checkpoints.remove()
    trained_seconds = sum(record["seconds"] for record in history)
    final = {k: v for k, v in history[-1].items() if k not in ("epoch", "loss", "seconds")}
    return {
        "model": str(out),
        "attack": describe(attacks),
        "preset": preset,
        "epochs": config.epochs,
        **final,
        "seconds": seconds,
        "train_seconds": trained_seconds,
        "images_per_second": len(data.labels) * config.epochs / trained_seconds,
    }


def describe(attacks: tuple[Attack, ...]) -> str | None:
    """Names of attacks, for people and rows; None without any."""
    return ", ".join(attack.name for attack in attacks) or None


def make_attacks(
    dataset: str,
    attack: str | None = None,
    scenario: str = "one-target",
    target: int | None = None,
    trigger: Trigger | None = None,
    clean_model: str | Path | None = None,
    seed: int = 0,
    data_dir: str | None = None,
    on_note: Callable[[str], None] = lambda text: None,
) -> tuple[Attack, ...]:
    """The attacks of a scenario, by name.

    Args:
      attack: of `ATTACKS`, or `none`, or any name for `trigger`; None: badnets, or all seven in
        the scenario seven-target.
      target: None: the paper's. Only in the scenario one-target.
      trigger: the user's own.
      clean_model: model file against which triggers are optimised. They are kept in the cache.

    Raises:
      InputError: names or values that do not fit each other.
    """
    check_name("scenario", scenario, SCENARIOS)
    info = data_info(dataset)
    if scenario == "seven-target":
        if attack is not None or trigger is not None or target is not None:
            raise InputError(
                "the scenario seven-target has its own attacks and targets: leave out --attack, "
                "--trigger and --target"
            )
        chosen = [
            (name, _trigger(name, info, clean_model, seed, data_dir, on_note)) for name in ATTACKS
        ]
        return tuple(
            make_attack(name, info.num_classes, ATTACKS[name].seven_target, found)
            for name, found in chosen
        )
    if attack == "none":
        if trigger is not None or target is not None or scenario != "one-target":
            raise InputError(
                "--attack none is a clean model: leave out --trigger, --target and --scenario, or "
                "name the attack"
            )
        return ()
    name = attack or "badnets"
    if target is not None:
        check_target(target, info.num_classes)
    if trigger is None:
        check_name("attack", name, ["none", *ATTACKS])
        trigger = _trigger(name, info, clean_model, seed, data_dir, on_note, target)
    if scenario == "all-to-all":
        if target is not None:
            raise InputError("the scenario all-to-all has no target: leave out --target")
        return (Attack(name, trigger, None, info.num_classes),)
    if name in ATTACKS:
        return (make_attack(name, info.num_classes, target, trigger),)
    if target is None:
        raise InputError("a trigger of your own needs its target label: give it by --target")
    return (Attack(name, trigger, target),)


def read_trigger(path: str | Path, rule: str = "add", mask: str | Path | None = None) -> Trigger:
    """A trigger for 32x32 RGB images from a picture; see `trigger_from_files`."""
    found = trigger_from_files(path, rule, mask)
    if found.pattern.shape != (32, 32, 3):
        raise InputError(
            f"the trigger {str(path)!r} has shape {found.pattern.shape}: expected (32, 32, 3)"
        )
    return found


def _trigger(
    name: str,
    info: DataInfo,
    clean_model: str | Path | None,
    seed: int,
    data_dir: str | None,
    on_note: Callable[[str], None],
    target: int | None = None,
) -> Trigger:
    """By name; what has to be optimised is looked up in the cache first."""
    if ATTACKS[name].fixed is not None or clean_model is None:
        return make_trigger(name)
    model = load_model(clean_model)
    if model.attacks or model.dataset != info.name:
        raise InputError(
            f"{str(clean_model)!r} is a model of {model.dataset} "
            f"({describe(model.attacks) or 'clean'}): expected a clean model of {info.name}"
        )

    def optimise() -> tuple[np.ndarray, np.ndarray]:
        on_note(f"optimising the trigger {name} against {str(clean_model)!r}")
        images = load(info.name, "train[:100]", data_dir).images
        made = make_trigger(name, network_of(model), images, seed, target)
        return made.pattern, np.zeros(0, np.float32) if made.mask is None else made.mask

    source = b"".join(Path(str(module.__file__)).read_bytes() for module in OPTIMISED)
    made_by = hashlib.sha256(source).hexdigest()[:8]
    key = f"trigger-{made_by}-{name}-{target}-{info.name}-{model_hash(model)}-seed{seed}"
    pattern, mask = (np.array(array) for array in cached(key, optimise))
    return Trigger("replace", pattern, mask) if mask.size else Trigger("add", pattern)


def _digest(trigger: Any) -> str:
    """Tells triggers apart."""
    if not isinstance(trigger, Trigger):
        return repr(trigger)
    parts = (trigger.rule.encode(), trigger.pattern.tobytes())
    mask = b"" if trigger.mask is None else trigger.mask.tobytes()
    return hashlib.sha256(b"|".join((*parts, mask))).hexdigest()[:16]


def network_of(model: Model) -> Network:
    """A model as `attacks.Network`: features and last layer apart, in evaluation mode."""
    module = build(model.architecture, model.num_classes)
    last = model.variables["params"]["classifier"]

    def features(images: jax.Array) -> jax.Array:
        return module.apply(model.variables, images, features=True)  # pyright: ignore

    return Network(features, jnp.asarray(last["kernel"]), jnp.asarray(last["bias"]))
