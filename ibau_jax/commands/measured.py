"""The attack to measure a model by, as the options of `evaluate` and `defend` name it."""

import numpy as np

from ibau_jax.attacks import ATTACKS, Attack, Trigger, check_target, trigger_from_files
from ibau_jax.commands.attack_options import OWN_SCENARIOS, attacks_on, trigger_options
from ibau_jax.commands.options import IN_THE_FILE, Measured
from ibau_jax.errors import InputError, check_name
from ibau_jax.models.stored import StoredModel


def measured_attacks(
    model: StoredModel, dataset: str, measured: Measured, shape: tuple[int, ...] | None = None
) -> tuple[Attack, ...]:
    """The attacks that the options name: `attacks_on`, or of a model of the user's own.

    Args:
      shape: of the images; None: not known yet, and nothing is given for the user's own.

    Raises:
      InputError: as `attacks_on`; also a trigger that does not fit the images.
    """
    if model.model is None:
        if measured.trigger_at is not None:
            raise InputError(
                "a place for the trigger of a model file of ours: expected a picture of the whole "
                "image; leave the place out",
                argument="trigger_at",
            )
        given = trigger_options(measured.trigger, measured.trigger_rule, measured.trigger_mask)
        one = (measured.attack, measured.scenario, measured.target)
        return attacks_on(model, dataset, *one, **given)
    if shape is None or measured == IN_THE_FILE:
        return ()
    name = measured.attack or (measured.trigger.stem if measured.trigger else None)
    if measured.trigger is not None:
        patch = measured.trigger_at is not None
        rule = measured.trigger_rule or ("replace" if patch else "add")
        trigger = trigger_from_files(measured.trigger, rule, measured.trigger_mask, patch)
        trigger = _fitted(trigger, shape, measured.trigger_at, str(measured.trigger))
    elif name in ATTACKS and (fixed := ATTACKS[name].fixed) is not None:
        trigger = fixed(shape=shape)
    else:
        raise InputError(
            f"the attack {name!r} on a model of your own: expected badnets or blend, or the "
            "picture of a trigger (--trigger)",
            argument="attack",
        )
    check_name("scenario", measured.scenario or "one-target", OWN_SCENARIOS)
    if measured.scenario == "all-to-all":
        return (Attack(str(name), trigger, None, model.num_classes),)
    if measured.target is None:
        raise InputError("no target: expected the label of triggered images", argument="target")
    check_target(measured.target, model.num_classes)
    return (Attack(str(name), trigger, measured.target),)


def _fitted(trigger: Trigger, shape: tuple[int, ...], at: str | None, where: str) -> Trigger:
    """A trigger for images of a shape [H, W, C]: pasted at X,Y, and grey where they are."""
    pattern, mask = trigger.pattern, trigger.mask
    if at is not None:
        try:
            x, y = (int(part) for part in at.split(","))
        except ValueError:
            raise InputError(
                f"the place is {at!r}: expected X,Y, such as 27,27", argument="trigger_at"
            ) from None
        high, wide = pattern.shape[:2]
        if x < 0 or y < 0 or y + high > shape[0] or x + wide > shape[1]:
            raise InputError(
                f"the trigger {where!r} is {high}x{wide}, and at {x},{y} it is not inside images "
                f"of {shape[0]}x{shape[1]}",
                argument="trigger_at",
            )
        around = ((y, shape[0] - y - high), (x, shape[1] - x - wide), (0, 0))
        pattern = np.pad(pattern, around)
        mask = None if mask is None else np.pad(mask, around)
    if shape[2] == 1:
        pattern = pattern.mean(-1, keepdims=True)
        mask = None if mask is None else mask.mean(-1, keepdims=True)
    if pattern.shape != tuple(shape):
        raise InputError(
            f"the trigger {where!r} has shape {pattern.shape}: expected {tuple(shape)}, or a place "
            "for it (--trigger-at)"
        )
    return Trigger(trigger.rule, pattern, mask)
