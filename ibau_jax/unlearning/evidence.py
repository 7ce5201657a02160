"""What stands out on a model: the labels that found perturbations lead to, and how surely.

Clean models have universal perturbations too. A label is held for a target where one of a
geometry misleads at least as many images as its level says (`LEVELS`), which lies above all that
was found on clean models (experiments/default_trials.md).
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from ibau_jax.unlearning.batches import UNTARGETED
from ibau_jax.unlearning.geometries import Geometry, cosine, field, pixels, square, window

# The strength from which on a label is held for a target.
LEVELS: Mapping[Geometry, float] = {
    window(3): 0.6,
    window(5): 0.7,
    cosine(0.07): 0.85,
    field(0.05): 0.6,
}
# All-to-all has no target: so many are misled, and no label gets such a share of them.
AWAY, MISLED, ALIKE = pixels(9), 0.7, 0.4
# When most of all-to-all is unlearned, no more images are misled than on a clean model, but more
# are led along the rule: .29, against .10 at most on a clean one (experiments/default_trials.md).
ALONG, SQUARE = 0.2, square(4)
GEOMETRIES = (*LEVELS, AWAY, SQUARE)
# Of a level: uncertain from here on. `ONE`: of all images; where so many go to one label under
# `AWAY`, it is a target although no search towards it reaches a level: a trigger that works at one
# place only can be missed by all of these (clean models: .34 at most; the same page).
NEAR, ONE = 0.85, 0.6
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
      where: that most frequent label.
    """

    strength: np.ndarray
    misled: float
    alike: float
    rule: np.ndarray
    found: list[Perturbation]
    where: int = UNTARGETED

    @property
    def along(self) -> np.ndarray:
        """The rule for a search: where it says nothing of a class, its images do not count."""
        return np.where(self.rule == UNTARGETED, np.arange(len(self.rule)), self.rule)

    @property
    def score(self) -> np.ndarray:
        """How near each label comes to a level, 1 where it reaches one: [L]."""
        return scores_of(self.strength).max(0)

    @property
    def suspects(self) -> tuple[int, ...]:
        """What reaches a level, the likeliest target first; empty: nothing stands out.

        A backdoor makes a model weak on other labels too, up to a strength of 1: they fall with it
        (experiments/default_trials.md). What tells it from them is that all geometries lead to it.

        `UNTARGETED` alone stands for a rule that leads to many labels: what leads to one label is
        part of it then, or a weakness.
        """
        if _many(self.misled, self.alike) >= 1:
            return (UNTARGETED,)
        support = scores_of(self.strength).mean(0)
        order = np.argsort(-support, kind="stable")
        reach = tuple(int(label) for label in order if self.score[label] >= 1)[:MOST]
        return reach if reach or self.lead < ONE else (self.where,)

    @property
    def nearly(self) -> tuple[int, ...]:
        """Where nothing reaches a level, but something comes near: that label, or `UNTARGETED`."""
        if self.verdict != "uncertain":
            return ()
        if self.score.max() >= NEAR:
            return (int(self.score.argmax()),)
        return (self.where if self.lead / ONE >= NEAR else UNTARGETED,)

    @property
    def lead(self) -> float:
        """The share of all images that the perturbation of `AWAY` leads to one label."""
        return self.misled * self.alike

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
        """The largest score, those of all-to-all and of what `AWAY` leads to among them."""
        away = max(_many(self.misled, self.alike), self.lead / ONE)
        return max(float(self.score.max()), away)

    @property
    def by_away(self) -> bool:
        """Is there a target that `AWAY` alone has named?"""
        return self.target is not None and bool(self.score[self.target] < 1)

    @property
    def verdict(self) -> str:
        """One of `VERDICTS`."""
        if self.suspects:
            return "backdoored"
        return "uncertain" if self.nearest >= NEAR else "clean"

    @property
    def reason(self) -> str:
        """Why, in a sentence."""
        scores = scores_of(self.strength)
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
        if self.by_away:
            return (
                f"{AWAY.name} lead {self.lead:.0%} of all images to label {self.where} (a target "
                f"from {ONE:.0%} on)"
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


def rule() -> str:
    """The rule of the verdict, in words."""
    each = ", ".join(f"{level:.0%} by a {g.name}" for g, level in LEVELS.items())
    return (
        f"backdoored: one perturbation leads {each} of the images of other labels to a label, or "
        f"{AWAY.name} lead {ONE:.0%} of all images to one label, or {MISLED:.0%} to others, none "
        f"of which gets {ALIKE:.0%} of them; uncertain: from {NEAR:.0%} of such a level on. The "
        "likeliest target is the label that comes nearest to the levels of all kinds together; "
        "others that reach one can be targets too, or weaknesses that a backdoor brings with it"
    )


def _many(misled: float, same: float) -> float:
    """The score of all-to-all; 0 where one label gets too many."""
    return misled / MISLED if same < ALIKE else 0.0


def scores_of(strength: np.ndarray) -> np.ndarray:
    """How near to its level each strength comes: [G, L] of the geometries of `LEVELS`."""
    return strength / np.array([*LEVELS.values()])[:, None]
