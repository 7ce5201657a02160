"""An attack is a trigger, a target and a poison ratio; `poison` applies it to a data set."""

from dataclasses import dataclass

import numpy as np

from ibau_jax.attacks.triggers import Trigger, badnets_square
from ibau_jax.data import Dataset
from ibau_jax.errors import InputError, check_name

# The targets of the paper (A.3.1).
ATTACKS: dict[str, int] = {"badnets": 8}


@dataclass(frozen=True)
class Attack:
    """One trigger, one target (paper section 6.1, "one-trigger-one-target").

    Attributes:
      name: `badnets`, or any name for a trigger of the user's own.
      trigger: stamps images.
      target: the label that stamped images shall get.
    """

    name: str
    trigger: Trigger
    target: int


def make_attack(name: str, num_classes: int, target: int | None = None) -> Attack:
    """An attack by name, with the paper's target unless another is given.

    Raises:
      InputError: unknown attack, or a target outside the classes.
    """
    check_name("attack", name, ATTACKS)
    target = ATTACKS[name] if target is None else target
    check_target(target, num_classes)
    return Attack(name, badnets_square(), target)


def check_target(target: int, num_classes: int) -> None:
    """Raise `InputError` unless `target` is one of the classes."""
    if not 0 <= target < num_classes:
        raise InputError(
            f"target {target} is not a class: expected 0 to {num_classes - 1}; choose with --target"
        )


def poison(
    data: Dataset, attack: Attack, ratio: float, seed: int = 0
) -> tuple[Dataset, np.ndarray]:
    """Stamp and relabel part of a training set (published code, `poison_dataset`).

    int(N * ratio) rows are drawn uniformly from those whose label is not the target; they
    get the trigger and the target label in place. The other rows are not touched.

    Args:
      data: images [N, H, W, C] in [0, 1], labels [N].
      ratio: poison ratio, share of the whole set, in [0, 1].
      seed: the same seed draws the same rows.

    Returns:
      The poisoned set (same size) and a mask bool [N] of the poisoned rows.

    Raises:
      InputError: the ratio is outside [0, 1] or asks for more rows than there are.
    """
    if not 0 <= ratio <= 1:
        raise InputError(f"poison ratio {ratio}: expected a share in [0, 1], for example 0.2")
    images, labels = np.array(data.images), np.array(data.labels)
    candidates = np.flatnonzero(labels != attack.target)
    count = int(len(labels) * ratio)
    if count > len(candidates):
        raise InputError(
            f"poison ratio {ratio} asks for {count} images, but only {len(candidates)} are not "
            f"of the target class {attack.target}; choose a smaller ratio"
        )
    rows = np.random.default_rng(seed).choice(candidates, count, replace=False)
    images[rows] = np.asarray(attack.trigger(images[rows]))
    labels[rows] = attack.target
    mask = np.zeros(len(labels), bool)
    mask[rows] = True
    return Dataset(images, labels), mask
