"""What stands out on a model: the labels that found perturbations lead to, and how surely.

Clean models have universal perturbations too. A label is held for a target where one of a
geometry misleads at least as many images as its level says (`LEVELS`), which lies above all that
was found on clean models (experiments/default.md).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np

from ibau_jax.data import Dataset
from ibau_jax.models.model import Logits, Params, opened
from ibau_jax.progress import progress_bar
from ibau_jax.unlearning.batches import UNTARGETED, check_clean
from ibau_jax.unlearning.geometries import Geometry, cosine, pixels, window
from ibau_jax.unlearning.search import Found, Search, check_count

# The strength from which on a label is held for a target.
LEVELS: Mapping[Geometry, float] = {window(3): 0.6, window(5): 0.7, cosine(0.07): 0.85}
# All-to-all has no target: so many are misled, and no label gets such a share of them.
AWAY, MISLED, ALIKE = pixels(9), 0.7, 0.4
GEOMETRIES = (*LEVELS, AWAY)
NEAR = 0.85  # of a level: uncertain from here on
MOST = 7  # labels that are held for targets at once
SHORTLIST = 12  # labels that are ascended towards, of any number
WORTH = 0.2  # strength below which nothing is worth to be unlearned
VERDICTS = ("backdoored", "uncertain", "clean")


class Perturbation(NamedTuple):
    """One that was found: what is added [H, W, C], where it leads, how surely, and its geometry."""

    delta: np.ndarray
    label: int
    strength: float
    geometry: str

    @property
    def picture(self) -> np.ndarray:
        """[H, W, C] in [0, 1], grey where nothing is changed."""
        return np.clip(0.5 + self.delta / 2, 0, 1)

    @property
    def caption(self) -> str:
        """For its picture."""
        where = "many labels" if self.label == UNTARGETED else f"label {self.label}"
        return f"{where}: {self.geometry}, {self.strength:.0%}"


class Evidence(NamedTuple):
    """What a search of a whole model says.

    Attributes:
      strength: [G, L] of the geometries of `LEVELS`, towards each label; see `search.Found`.
      misled: share of held-back images that one perturbation of `AWAY` leads elsewhere.
      alike: share of those that the most frequent label gets.
      rule: int32 [L], the label that the perturbation of `AWAY` gives most of the images of each
        class that it misleads; `UNTARGETED` where it misleads none.
      found: the perturbations of strength `WORTH` and more, also towards other labels.
    """

    strength: np.ndarray
    misled: float
    alike: float
    rule: np.ndarray
    found: list[Perturbation]

    @property
    def score(self) -> np.ndarray:
        """How near each label comes to a level, 1 where it reaches one: [L]."""
        return (self.strength / _levels()).max(0)

    @property
    def suspects(self) -> tuple[int, ...]:
        """What reaches a level, the likeliest target first; empty: nothing stands out.

        A backdoor makes a model weak on other labels too, up to a strength of 1: they fall with it
        (experiments/default.md). What tells it from them is that all geometries lead to it.

        `UNTARGETED` alone stands for a rule that leads to many labels: what leads to one label is
        part of it then, or a weakness.
        """
        if _many(self.misled, self.alike) >= 1:
            return (UNTARGETED,)
        support = (self.strength / _levels()).mean(0)
        order = np.argsort(-support, kind="stable")
        return tuple(int(label) for label in order if self.score[label] >= 1)[:MOST]

    @property
    def nearly(self) -> tuple[int, ...]:
        """Where nothing reaches a level, but something comes near: that label, or `UNTARGETED`."""
        if self.verdict != "uncertain":
            return ()
        return (int(self.score.argmax()) if self.score.max() >= NEAR else UNTARGETED,)

    @property
    def flagged(self) -> list[int]:
        """The labels among the suspects."""
        return [label for label in self.suspects if label != UNTARGETED]

    @property
    def target(self) -> int | None:
        """The likeliest one; None: nothing stands out, or many labels are led to."""
        return self.flagged[0] if self.flagged else None

    @property
    def nearest(self) -> float:
        """The largest score, that of all-to-all among them."""
        return max(float(self.score.max()), _many(self.misled, self.alike))

    @property
    def verdict(self) -> str:
        """One of `VERDICTS`."""
        if self.suspects:
            return "backdoored"
        return "uncertain" if self.nearest >= NEAR else "clean"

    @property
    def reason(self) -> str:
        """Why, in a sentence."""
        scores = self.strength / _levels()
        label = int(np.argmax(self.score)) if self.target is None else self.target
        which = int(np.argmax(scores[:, label]))
        geometry = list(LEVELS)[which]
        best = (
            f"a {geometry.name} leads {self.strength[which, label]:.0%} of the images of other "
            f"labels to label {label} (a target from {LEVELS[geometry]:.0%} on)"
        )
        many = (
            f"{AWAY.name} lead {self.misled:.0%} of the images to other labels, of which one gets "
            f"{self.alike:.0%} (all-to-all from {MISLED:.0%} on and below {ALIKE:.0%})"
        )
        if self.suspects:
            return many if UNTARGETED in self.suspects else best
        by_little = ", but not by much" if self.verdict == "uncertain" else ""
        return f"nothing stands out{by_little}; {best}; {many}"

    def pictures(self) -> dict[str, np.ndarray]:
        """Of what leads to each suspect the pictures by their captions, the strongest first."""
        found = sorted(self.found, key=lambda one: -one.strength)
        return {
            one.caption: one.picture
            for label in self.suspects
            for one in found
            if one.label == label
        }


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
      key: random key.
      advance: called with 1 after each ascent, `looks(num_classes)` times in all.
    """
    keys = jax.random.split(key)
    labels, levels = range(num_classes), list(LEVELS)
    towards = search(
        params, clean, labels, key=keys[0], among=levels, most=SHORTLIST, advance=advance
    )
    away = search(params, clean, [UNTARGETED], key=keys[1], among=[AWAY], advance=advance)
    misled, same = float(away.strength[0, 0]), alike(away.given[0, 0], away.true)
    found = collect(levels, labels, towards) + collect([AWAY], [UNTARGETED], away)
    leads = read_rule(away.given[0, 0], away.true, num_classes)
    return Evidence(towards.strength, misled, same, leads, found)


def inspect(
    logits: Logits, params: Params, clean: Dataset, *, key: jax.Array, progress: bool = False
) -> Evidence:
    """Does a model carry a backdoor, and towards which label? The search alone.

    Args:
      logits, params, clean: as `unlearn` takes them.
      key: random key (`jax.random.key(seed)`).
      progress: show a progress bar on stderr.

    Raises:
      InputError: the model or the clean set are not as described.
    """
    clean = check_clean(logits, params, clean)
    check_count(clean)
    model, variables = opened(logits, params)
    search = Search(model, GEOMETRIES)
    num_classes = jax.eval_shape(logits, params, clean.images[:1]).shape[1]
    with progress_bar(looks(num_classes), "search", progress) as advance:
        return look(search, variables, clean, num_classes, key=key, advance=advance)


def rest(
    search: Search,
    params: Params,
    clean: Dataset,
    suspects: Sequence[int],
    *,
    key: jax.Array,
    starts: int | None = None,
) -> tuple[dict[int, float], list[Perturbation]]:
    """A fresh search: how near it comes to a level with each suspect (1 reaches it), its finds."""
    if UNTARGETED in suspects:
        found = search(params, clean, [UNTARGETED], key=key, among=[AWAY])
        score = _many(float(found.strength[0, 0]), alike(found.given[0, 0], found.true))
        return {UNTARGETED: score}, collect([AWAY], [UNTARGETED], found)
    levels = list(LEVELS)
    found = search(params, clean, suspects, key=key, among=levels, starts=starts)
    scores = map(float, (found.strength / _levels()).max(0))
    return dict(zip(suspects, scores, strict=True)), collect(levels, suspects, found)


def looks(num_classes: int) -> int:
    """How many ascents `look` takes."""
    return len(LEVELS) * num_classes + 1


def collect(
    geometries: Sequence[Geometry], labels: Sequence[int], found: Found
) -> list[Perturbation]:
    """What of a search is worth to be unlearned.

    Of the untargeted ones those that lead to many labels: the others are natural weaknesses.
    """
    return [
        Perturbation(found.deltas[g, i], label, float(found.strength[g, i]), geometry.name)
        for g, geometry in enumerate(geometries)
        for i, label in enumerate(labels)
        if found.strength[g, i] > WORTH
        and (label != UNTARGETED or alike(found.given[g, i], found.true) < ALIKE)
    ]


def alike(given: np.ndarray, true: np.ndarray) -> float:
    """Of the images [N] that are misled, the share that gets the most frequent label; 0: none."""
    wrong = given[given != true]
    return float(np.bincount(wrong).max() / len(wrong)) if len(wrong) else 0.0


def read_rule(given: np.ndarray, true: np.ndarray, num_classes: int) -> np.ndarray:
    """The label rule of all-to-all, read from labels before and after; see `Evidence`."""
    counts = np.zeros((num_classes, num_classes), int)
    np.add.at(counts, (true, given), 1)
    np.fill_diagonal(counts, 0)
    return np.where(counts.any(1), counts.argmax(1), UNTARGETED).astype(np.int32)


def rule() -> str:
    """The rule of the verdict, in words."""
    levels = ", ".join(f"{level:.0%} by a {g.name}" for g, level in LEVELS.items())
    return (
        f"backdoored: one perturbation leads {levels} of the images of other labels to a label, or "
        f"{AWAY.name} lead {MISLED:.0%} of all to other labels, none of which gets "
        f"{ALIKE:.0%} of them; uncertain: from {NEAR:.0%} of such a level on. The likeliest "
        "target is the label that comes nearest to the levels of all kinds together; others that "
        "reach one can be targets too, or weaknesses that a backdoor brings with it"
    )


def _many(misled: float, same: float) -> float:
    """The score of all-to-all; 0 where one label gets too many."""
    return misled / MISLED if same < ALIKE else 0.0


def _levels() -> np.ndarray:
    return np.array([*LEVELS.values()])[:, None]
