"""An attack is a trigger and the label it shall lead to; `poison` applies it to a data set."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ibau_jax.data import Dataset, check_data, check_images
from ibau_jax.errors import InputError

SCENARIOS = ("one-target", "all-to-all", "seven-target")


@dataclass(frozen=True)
class Attack:
    """One trigger and its label rule (paper section 6.1).

    Attributes:
      name: of `ATTACKS`, or any name for a trigger of the user's own.
      trigger: stamps images [N, H, W, C] in [0, 1]; a `Trigger`, or any such function.
      target: the label that stamped images shall get; None: all-to-all, label y shall become
        (y + 1) mod num_classes.
      num_classes: for all-to-all only.
    """

    name: str
    trigger: Callable[[Any], Any]
    target: int | None
    num_classes: int | None = None

    def __post_init__(self):
        if self.target is None and not self.num_classes:
            raise InputError("an all-to-all attack needs the number of classes")

    def wanted(self, labels: np.ndarray) -> np.ndarray:
        """The label that each stamped image shall get, for its true one: int [N] -> int [N]."""
        if self.target is None:
            assert self.num_classes is not None
            return (np.asarray(labels) + 1) % self.num_classes
        return np.full_like(labels, self.target)

    def stamp(self, images: np.ndarray) -> np.ndarray:
        """Images with the trigger: [N, H, W, C] in [0, 1] -> the same shape, in [0, 1].

        Raises:
          InputError: the images are no such images, or the trigger gave something else.
        """
        images = check_images(images)
        stamped = np.asarray(self.trigger(images))
        low, high = float(stamped.min(initial=0)), float(stamped.max(initial=0))
        if stamped.shape != images.shape or not (low >= 0 and high <= 1):  # also true for NaN
            raise InputError(
                f"the trigger {self.name!r} makes {stamped.shape}, values from {low:g} to "
                f"{high:g}, of images {images.shape}: expected the same shape, values in [0, 1]"
            )
        return stamped


def scenario_of(attacks: Sequence[Attack]) -> str | None:
    """The scenario that attacks make: one of `SCENARIOS`, `multi-target`, or None without any."""
    if not attacks:
        return None
    if len(attacks) > 1:
        return "seven-target" if len(attacks) == 7 else "multi-target"
    return "all-to-all" if attacks[0].target is None else "one-target"


def names_of(attacks: Sequence[Attack]) -> str | None:
    """Names of attacks, for people and rows; None without any."""
    return ", ".join(attack.name for attack in attacks) or None


def described(attacks: Sequence[Attack]) -> dict[str, Any]:
    """Attacks as JSON values: `attack`, `scenario`, `target` (of several a list)."""
    targets = [attack.target for attack in attacks]
    return {
        "attack": names_of(attacks),
        "scenario": scenario_of(attacks),
        "target": targets[0] if len(targets) == 1 else (targets or None),
    }


def check_target(target: int, num_classes: int) -> None:
    """Raise `InputError` unless `target` is one of the classes."""
    if not 0 <= target < num_classes:
        raise InputError(
            f"target {target} is not a class: expected 0 to {num_classes - 1}", argument="target"
        )


def check_ratio(ratio: float) -> None:
    """Raise `InputError` unless `ratio` is a poison ratio."""
    if not 0 <= ratio <= 1:
        raise InputError(f"poison ratio {ratio}: expected a share in [0, 1], for example 0.2")


def poison(
    data: Dataset, attack: Attack, ratio: float, seed: int | Sequence[int] = 0
) -> tuple[Dataset, np.ndarray]:
    """Stamp and relabel part of a training set (published code, `poison_dataset`).

    int(N * ratio) rows are drawn uniformly from those whose label is not the wanted one (all
    rows in the all-to-all scenario); they get the trigger and that label in place. The other
    rows are not touched.

    Args:
      data: images [N, H, W, C] in [0, 1], labels [N].
      ratio: poison ratio, share of the whole set, in [0, 1].
      seed: the same seed draws the same rows.

    Returns:
      The poisoned set (same size) and a mask bool [N] of the poisoned rows.

    Raises:
      InputError: the ratio is outside [0, 1] or asks for more rows than there are, `data` are not
        as described, or the trigger makes what is no image.
    """
    check_ratio(ratio)
    images, labels = map(np.array, check_data(data, "training"))
    wanted = attack.wanted(labels)
    candidates = np.flatnonzero(labels != wanted)
    count = int(len(labels) * ratio)
    if count > len(candidates):
        raise InputError(
            f"poison ratio {ratio} asks for {count} images, but only {len(candidates)} are not "
            f"of the target class {attack.target}; choose a smaller ratio"
        )
    rows = np.random.default_rng(seed).choice(candidates, count, replace=False)
    images[rows] = attack.stamp(images[rows])
    labels[rows] = wanted[rows]
    mask = np.zeros(len(labels), bool)
    mask[rows] = True
    return Dataset(images, labels), mask


def poison_all(
    data: Dataset, attacks: Sequence[Attack], ratio: float, seed: int = 0
) -> tuple[Dataset, np.ndarray]:
    """Poison the whole set once for each attack and join the copies (seven-target, 6.1).

    With seven attacks each clean image occurs up to seven times, and each trigger is in
    `ratio` / 7 of the result. One attack: the same as `poison`; none: the data as it is.

    Returns:
      The joined sets, of len(attacks) * N rows, and the mask of poisoned rows.
    """
    if not attacks:
        return data, np.zeros(len(data.labels), bool)
    if len(attacks) == 1:
        return poison(data, attacks[0], ratio, seed)
    size, number = np.shape(data.images), len(attacks)
    images = np.empty((number * size[0], *size[1:]), np.float32)
    labels, masks = [], []
    for i, attack in enumerate(attacks):  # one copy at a time: 350 000 images are 4.3 GB
        copy, mask = poison(data, attack, ratio, [seed, i])
        images[i * size[0] : (i + 1) * size[0]] = copy.images
        labels.append(copy.labels)
        masks.append(mask)
    return Dataset(images, np.concatenate(labels)), np.concatenate(masks)
