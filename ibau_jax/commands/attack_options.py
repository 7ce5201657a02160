"""From command-line values to attacks."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ibau_jax.attacks import (
    ATTACKS,
    BLEND,
    RULES,
    SCENARIOS,
    Attack,
    Trigger,
    check_target,
    make_attack,
    make_trigger,
    masks,
    names_of,
    optimised,
    smooth,
    trigger_from_files,
)
from ibau_jax.data import DataInfo, data_info, load
from ibau_jax.data.cache import cached, checksums
from ibau_jax.errors import InputError, check_name
from ibau_jax.models.files import load_model, triggers_of
from ibau_jax.models.stored import IMAGE, StoredModel

OWN_SCENARIOS = ("one-target", "all-to-all")  # of a single attack
RULES_OF = {"blend": RULES, "smooth": ("add", "renormalise")}  # "add" is the paper's
OPTIMISED = (masks, optimised, smooth)  # a change in them forgets cached triggers


def make_attacks(
    dataset: str,
    attack: str | None = None,
    scenario: str = "one-target",
    target: int | None = None,
    trigger: Trigger | None = None,
    rule: str | None = None,
    clean_model: str | Path | None = None,
    seed: int = 0,
    data_dir: str | Path | None = None,
    on_note: Callable[[str], None] = lambda text: None,
    trigger_name: str = "trigger",
) -> tuple[Attack, ...]:
    """The attacks of a scenario, by name.

    Args:
      attack: of `ATTACKS`, or `none`, or any name for `trigger`; None: badnets, or all seven in
        the scenario seven-target.
      target: only in the scenario one-target; None: the paper's for `attack`.
      trigger: the user's own.
      rule: another one than the paper's for the trigger of `attack`, of `RULES_OF`: `replace` is
        the convex mix of Chen et al. (2017) for blend, `renormalise` what Zeng et al. (2021) do
        with the Smooth trigger.
      clean_model: model file against which triggers are optimised. They are kept in the cache.
      seed: of the triggers that are optimised.
      on_note: is told what takes long.
      trigger_name: of `trigger` where there is no `attack`. It decides nothing.

    Returns:
      No attack for `none`, else one, or seven in the scenario seven-target.

    Raises:
      InputError: names or values that do not fit each other.
    """
    info = data_info(dataset)
    check_attack(info.num_classes, attack, scenario, target, trigger is not None, rule, clean_model)
    if attack == "none":
        return ()

    def made(name: str, target: int | None) -> Trigger:
        return _trigger(name, info, clean_model, seed, data_dir, on_note, target)

    if scenario == "seven-target":
        triggers = [(name, made(name, None)) for name in ATTACKS]
        return tuple(
            make_attack(name, info.num_classes, ATTACKS[name].seven_target, found)
            for name, found in triggers
        )
    if trigger is None:
        name = attack or "badnets"
        trigger = made(name, target)
        if rule is not None:
            trigger = with_rule(trigger, rule)
    else:
        name = attack or trigger_name
    if scenario == "all-to-all":
        return (Attack(name, trigger, None, info.num_classes),)
    target = ATTACKS[name].target if target is None else target
    check_target(target, info.num_classes)
    return (Attack(name, trigger, target),)


def check_attack(
    num_classes: int,
    attack: str | None = None,
    scenario: str = "one-target",
    target: int | None = None,
    own: bool = False,
    rule: str | None = None,
    clean_model: str | Path | None = None,
) -> None:
    """What `make_attacks` refuses, before anything long is done; `own`: is a trigger given?

    Raises:
      InputError: names or values that do not fit each other.
    """
    check_name("scenario", scenario, SCENARIOS)
    if attack is not None and not attack.strip():
        raise InputError("the attack has an empty name: expected one by --attack, or none")
    if own and rule is not None:
        raise InputError("trigger and rule exclude each other: a trigger has its own rule")
    if scenario == "seven-target" and (attack is not None or own or target is not None):
        raise InputError(
            "the scenario seven-target has its own attacks and targets: leave out --attack, "
            "--trigger and --target"
        )
    if attack == "none" and (own or target is not None or scenario != "one-target"):
        raise InputError(
            "--attack none is a clean model: leave out --trigger, --target and --scenario, or "
            "name the attack"
        )
    if rule is not None:
        _check_rule(attack, rule)
    if attack is not None and not own:
        check_name("attack", attack, ["none", *ATTACKS])
    optimised = scenario == "seven-target" or (
        not own and attack in ATTACKS and ATTACKS[attack].fixed is None
    )
    if clean_model is not None and not optimised:
        raise InputError(
            "--clean-model is for triggers that are optimised against it: leave it out, or choose "
            + ", ".join(name for name, info in ATTACKS.items() if info.fixed is None)
        )
    if target is not None:
        if scenario == "all-to-all":
            raise InputError("the scenario all-to-all has no target: leave out --target")
        check_target(target, num_classes)
    elif own and scenario == "one-target" and attack not in ATTACKS:
        raise InputError(
            "a trigger of your own needs its target label, which no file name decides: give it by "
            f"--target (0 to {num_classes - 1}), or choose --scenario all-to-all"
        )


def attacks_on(
    model: StoredModel,
    dataset: str,
    attack: str | None = None,
    scenario: str | None = None,
    target: int | None = None,
    trigger: Trigger | None = None,
    rule: str | None = None,
    trigger_name: str = "trigger",
) -> tuple[Attack, ...]:
    """The attacks to measure a model by: those in its file, where the arguments name no other.

    An attack of the file keeps its trigger where none is given. The label rule is the model's own
    too, where no scenario or target is given: that of its attack of this name, or else of all its
    attacks. Only for a model without attacks it is the paper's.

    Args:
      dataset: name of the data set to measure on.

    Raises:
      InputError: values that do not fit each other or the model, or several labels are possible.
    """
    if attack is None and trigger is None:
        if not scenario is target is rule is None:
            raise InputError(
                "--target, --scenario, --trigger-rule or --trigger-mask alone: name the attack or "
                "the trigger too"
            )
        return model.attacks
    if scenario is not None:
        check_name("scenario", scenario, OWN_SCENARIOS)
    stored = next((a for a in model.attacks if a.name == attack), None)
    if attack is not None and trigger is None:
        check_name("attack", attack, ["none", *ATTACKS, *(a.name for a in model.attacks)])
    like = model.attacks if stored is None else (stored,)
    if attack != "none" and target is None and scenario != "all-to-all" and like:
        targets = {a.target for a in like}
        if len(targets) > 1:
            raise InputError(
                f"the model has attacks with the targets {[a.target for a in like]}: say by "
                "--target which label is meant (or --scenario all-to-all), or choose one of its "
                f"attacks by --attack: {', '.join(a.name for a in like)}"
            )
        (own,) = targets
        if own is not None:
            target = own
        elif scenario is None:
            scenario = "all-to-all"
    if trigger is None and attack in ATTACKS and stored is None and ATTACKS[attack].fixed is None:
        raise InputError(
            f"the trigger {attack!r} is optimised against a model, and the file has none of this "
            "name: give its picture by --trigger"
        )
    if trigger is None and attack != "none" and stored is not None:
        trigger = _stored_trigger(stored, rule)
        rule = None
    return make_attacks(
        dataset, attack, scenario or "one-target", target, trigger, rule, trigger_name=trigger_name
    )


def with_rule(trigger: Trigger, rule: str) -> Trigger:
    """The trigger of Blend or Smooth under another rule; `replace`: the convex mix of Blend."""
    pattern = trigger.pattern
    return Trigger(rule, pattern, np.full_like(pattern, BLEND) if rule == "replace" else None)


def _stored_trigger(attack: Attack, rule: str | None) -> Trigger:
    (trigger,) = triggers_of([attack])
    if rule is not None:
        _check_rule(attack.name, rule)
    return trigger if rule in (None, trigger.rule) else with_rule(trigger, rule)


def _check_rule(attack: str | None, rule: str) -> None:
    if attack not in RULES_OF:
        raise InputError(
            "--trigger-rule without --trigger: expected a picture, or --attack "
            + " or ".join(RULES_OF)
        )
    check_name(f"trigger rule of {attack}", rule, RULES_OF[attack])


def trigger_options(path: Path | None, rule: str | None, mask: Path | None) -> dict[str, Any]:
    """Arguments of `make_attacks` for the options of a trigger of one's own."""
    if path is not None:
        own = read_trigger(path, rule or "add", mask)
        return {"trigger": own, "rule": None, "trigger_name": path.stem}
    if mask is not None:
        raise InputError("a trigger mask without a trigger: give the picture by --trigger")
    return {"rule": rule}


def read_trigger(path: str | Path, rule: str = "add", mask: str | Path | None = None) -> Trigger:
    """A trigger for 32x32 RGB images from a picture; see `trigger_from_files`."""
    found = trigger_from_files(path, rule, mask)
    if found.pattern.shape != IMAGE:
        raise InputError(
            f"the trigger {str(path)!r} has shape {found.pattern.shape}: expected {IMAGE}"
        )
    return found


def _trigger(
    name: str,
    info: DataInfo,
    clean_model: str | Path | None,
    seed: int,
    data_dir: str | Path | None,
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
            f"({names_of(model.attacks) or 'clean'}): expected a clean model of {info.name}"
        )
    images = np.asarray(load(info.name, "train[:100]", data_dir).images)

    def optimise() -> tuple[np.ndarray, np.ndarray]:
        on_note(f"optimising the trigger {name} against {str(clean_model)!r}")
        made = make_trigger(name, model.network, images, seed, target)
        return made.pattern, np.zeros(0, np.float32) if made.mask is None else made.mask

    source = b"".join(Path(str(module.__file__)).read_bytes() for module in OPTIMISED)
    made_by = hashlib.sha256(source).hexdigest()[:8]
    made_of = f"{info.name}-{checksums([images])[0]:08x}-{model.hash}"
    key = f"trigger-{made_by}-{name}-{target}-{made_of}-seed{seed}"
    pattern, mask = (np.array(array) for array in cached(key, optimise))
    return Trigger("replace", pattern, mask) if mask.size else Trigger("add", pattern)
