"""What stands out on a model: the labels that found perturbations lead to, and how surely.

Clean models have universal perturbations too. A label is held for a target where one of a
geometry misleads more images than any that was found on clean models (`LEVELS`, measured on the zoo
of CIFAR-10; experiments/default.md).
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np

from ibau_jax.data import Dataset
from ibau_jax.models.model import Params
from ibau_jax.unlearning.batches import UNTARGETED
from ibau_jax.unlearning.search import Found, Geometry, Search, cosine, pixels, window

# Strength at which a label is held for a target.
LEVELS = {window(3): 0.6, window(5): 0.7, cosine(0.1): 0.95}
# Without a target (all-to-all): this much is misled, and no label gets this share of it.
AWAY, MISLED, ALIKE = pixels(9), 0.7, 0.4
GEOMETRIES = (*LEVELS, AWAY, pixels(25))
MOST = 7  # labels that are held for targets at once
WORTH = 0.2  # strength below which a perturbation is not worth to be unlearned


class Evidence(NamedTuple):
    """What a search of a whole model says.

    Attributes:
      strength: [G, L] of the geometries of `LEVELS`, towards each label; see `search.Found`.
      misled: share of held-back images that one perturbation of `AWAY` leads elsewhere.
      alike: share of those that the most frequent label gets.
      suspects: what is held for targets, the strongest first; `UNTARGETED` for images that are
        led to many labels. Empty: nothing stands out.
      found: perturbations towards `suspects` and their strength.
    """

    strength: np.ndarray
    misled: float
    alike: float
    suspects: tuple[int, ...]
    found: list["Perturbation"]


class Perturbation(NamedTuple):
    """One that was found: what is added [H, W, C], where it leads, how surely, and its geometry."""

    delta: np.ndarray
    label: int
    strength: float
    geometry: str


def look(
    search: Search,
    params: Params,
    clean: Dataset,
    num_classes: int,
    *,
    key: jax.Array,
    advance: Callable[[int], None] = lambda count: None,
) -> Evidence:
    """Search a model towards each label, and away from the true ones.

    Args:
      search: knows the `GEOMETRIES`.
      advance: called as the search goes on; `looks(num_classes)` in all.
    """
    keys = jax.random.split(key)
    labels = range(num_classes)
    towards = search(params, clean, labels, key=keys[0], among=list(LEVELS), advance=advance)
    away = search(params, clean, [UNTARGETED], key=keys[1], among=[AWAY], advance=advance)
    height = towards.strength / np.array([*LEVELS.values()])[:, None]
    order = np.argsort(-height.max(0), kind="stable")
    suspects = [int(label) for label in order if height[:, label].max() >= 1][:MOST]
    misled, given = float(away.strength[0, 0]), away.given[0, 0]
    where = np.bincount(given[given != away.true], minlength=1)
    alike = float(where.max() / max(1, where.sum()))
    if misled >= MISLED and alike < ALIKE:
        suspects.append(UNTARGETED)
    found = [
        one
        for one in (*collect(list(LEVELS), labels, towards), *collect([AWAY], [UNTARGETED], away))
        if one.label in suspects
    ]
    return Evidence(towards.strength, misled, alike, tuple(suspects), found)


def looks(num_classes: int) -> int:
    """How many ascents `look` takes."""
    return len(LEVELS) * num_classes + 1


def collect(geometries: list[Geometry], labels, found: Found) -> list[Perturbation]:
    """The perturbations of a search that are worth to be unlearned."""
    return [
        Perturbation(found.deltas[g, i], label, float(found.strength[g, i]), geometry.name)
        for g, geometry in enumerate(geometries)
        for i, label in enumerate(labels)
        if found.strength[g, i] > WORTH
    ]
