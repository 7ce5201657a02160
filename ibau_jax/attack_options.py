"""From command-line values to attacks."""

import dataclasses
import hashlib
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from ibau_jax.attacks import (
    ATTACKS,
    RULES,
    SCENARIOS,
    Attack,
    Network,
    Trigger,
    blend,
    check_target,
    make_attack,
    make_trigger,
    masks,
    optimised,
    smooth,
    trigger_from_files,
)
from ibau_jax.checkpoint import Model, load_model, model_hash
from ibau_jax.data import DataInfo, data_info, load
from ibau_jax.data.cache import cached, checksums
from ibau_jax.errors import InputError, check_name
from ibau_jax.models import build

RULES_OF = {"blend": RULES, "smooth": ("add", "renormalise")}  # "add" is the paper's
OPTIMISED = (masks, optimised, smooth)  # a change in them forgets cached triggers


def describe(attacks: tuple[Attack, ...]) -> str | None:
    """Names of attacks, for people and rows; None without any."""
    return ", ".join(attack.name for attack in attacks) or None


def make_attacks(
    dataset: str,
    attack: str | None = None,
    scenario: str = "one-target",
    target: int | None = None,
    trigger: Trigger | None = None,
    rule: str | None = None,
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
      rule: another one than the paper's for the trigger of `attack`, of `RULES_OF`: `replace` is
        the convex mix of Chen et al. (2017) for blend, `renormalise` what Zeng et al. (2021) do
        with the Smooth trigger.
      clean_model: model file against which triggers are optimised. They are kept in the cache.
      seed: of the triggers that are optimised.
      on_note: is told what takes long.

    Returns:
      No attack for `none`, else one, or seven in the scenario seven-target.

    Raises:
      InputError: names or values that do not fit each other.
    """
    check_name("scenario", scenario, SCENARIOS)
    if rule is not None:
        if trigger is not None:
            raise InputError("trigger and rule exclude each other: a trigger has its own rule")
        if attack not in RULES_OF:
            raise InputError(
                "--trigger-rule without --trigger: expected a picture, or --attack "
                + " or ".join(RULES_OF)
            )
        check_name(f"trigger rule of {attack}", rule, RULES_OF[attack])
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
        if scenario == "all-to-all":
            raise InputError("the scenario all-to-all has no target: leave out --target")
        check_target(target, info.num_classes)
    if (name, rule) == ("blend", "replace"):
        trigger = blend(rule="convex")
    elif trigger is None:
        check_name("attack", name, ["none", *ATTACKS])
        trigger = _trigger(name, info, clean_model, seed, data_dir, on_note, target)
        if rule is not None:
            trigger = dataclasses.replace(trigger, rule=rule)
    if scenario == "all-to-all":
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
    target = ATTACKS[name].target if target is None else target
    if ATTACKS[name].fixed is not None or clean_model is None:
        return make_trigger(name)
    model = load_model(clean_model)
    if model.attacks or model.dataset != info.name:
        raise InputError(
            f"{str(clean_model)!r} is a model of {model.dataset} "
            f"({describe(model.attacks) or 'clean'}): expected a clean model of {info.name}"
        )
    images = np.asarray(load(info.name, "train[:100]", data_dir).images)

    def optimise() -> tuple[np.ndarray, np.ndarray]:
        on_note(f"optimising the trigger {name} against {str(clean_model)!r}")
        made = make_trigger(name, network_of(model), images, seed, target)
        return made.pattern, np.zeros(0, np.float32) if made.mask is None else made.mask

    source = b"".join(Path(str(module.__file__)).read_bytes() for module in OPTIMISED)
    made_by = hashlib.sha256(source).hexdigest()[:8]
    made_of = f"{info.name}-{checksums([images])[0]:08x}-{model_hash(model)}"
    key = f"trigger-{made_by}-{name}-{target}-{made_of}-seed{seed}"
    pattern, mask = (np.array(array) for array in cached(key, optimise))
    return Trigger("replace", pattern, mask) if mask.size else Trigger("add", pattern)


def network_of(model: Model) -> Network:
    """A model as `attacks.Network`: features and last layer apart, in evaluation mode."""
    module = build(model.architecture, model.num_classes)
    last = model.variables["params"]["classifier"]

    def features(images: jax.Array) -> jax.Array:
        return module.apply(model.variables, images, features=True)  # pyright: ignore

    return Network(features, jnp.asarray(last["kernel"]), jnp.asarray(last["bias"]))
