"""What the images of the rounds carry, and where the deltas of the rounds lead and start."""

from collections.abc import Sequence

import jax
import numpy as np

from ibau_jax.data import Dataset
from ibau_jax.defenses.run import Job
from ibau_jax.models.model import Variables
from ibau_jax.unlearning.batches import UNTARGETED
from ibau_jax.unlearning.config import IBAUConfig
from ibau_jax.unlearning.evidence import GEOMETRIES, LEVELS, SQUARE, WORTH, Evidence, Perturbation
from ibau_jax.unlearning.objective import Aim
from ibau_jax.unlearning.search import Search
from ibau_jax.unlearning.strength import Label, rule_of, share

# Where images are led to several labels, each has few ascents and a small part of the pool. So more
# images carry something, what leads to its label no more is left out of the pool, and searches are
# wider.
# The strongest window is of many colours, and to unlearn it leaves a trigger of one colour (the
# white square of BadNets beside six others): so several squares go into the pool, as they are drawn
# (experiments/default_trials.md).
SHARES, STARTS, SQUARES = 2.0, 1000, 8


def several(targets: Sequence[int]) -> bool:
    """Is there more than one label to lead to? Of all-to-all there is."""
    return len(targets) > 1 or UNTARGETED in targets


def starts_for(targets: Sequence[int]) -> int | None:
    """How many random starts a search has; None: as many as ever."""
    return STARTS if several(targets) else None


class Pool:
    """The perturbations that lead to the targets.

    Args:
      num_batches: of a round.
      suspects: how many labels may ever be targets.
      evidence: of the given model.

    `found` are all that were found, `members` those that the rounds have, the newest last, `led`
    the labels that the ascents of the last round led to.
    """

    def __init__(
        self,
        search: Search,
        job: Job,
        clean: Dataset,
        config: IBAUConfig,
        num_batches: int,
        suspects: int,
        evidence: Evidence,
    ):
        self.search, self.job, self.clean, self.config = search, job, clean, config
        self.num_batches, self.evidence = num_batches, evidence
        self.found: list[Perturbation] = []
        self.members: list[Perturbation] = []
        # What the searches of all stages can find.
        self.room = max(len(GEOMETRIES), suspects * len(LEVELS)) * config.stages
        self.led: list[int] = []

    def add(self, found: list[Perturbation]) -> None:
        """Take what a search found."""
        self.found += found
        self.members += found

    def aims(self, number: int, targets: Sequence[int]) -> list[Aim]:
        """For the ascents of round `number` of a stage; no targets: away from the true labels."""
        led_to = targets or (UNTARGETED,)
        newest = self.members[-self.room :]
        # The shape that the rounds are compiled for: the same for most models, so that a program
        # that was kept serves the next one too, whatever the number of its suspects.
        rows = max(64, 1 << (self.room - 1).bit_length())
        pool = np.zeros((rows, *self.clean.images.shape[1:]), self.clean.images.dtype)
        rules = np.full((rows, self.job.num_classes), UNTARGETED, np.int32)
        for i, one in enumerate(newest):
            pool[i], rules[i] = one.delta, self._rule(one.label, targets)
        times = np.float32(SHARES if several(targets) else 1)
        shared = self.job.devices.replicate((pool, rules, np.int32(len(newest)), times))
        # Each label is led to twice or more in all: what no delta led to stays (seven targets).
        usual, rounds = len(self.config.schedule(self.num_batches)), self.config.rounds or 1
        count = min(self.num_batches, max(usual, -(-2 * len(led_to) // rounds)))
        aims = []
        self.led = [led_to[i % len(led_to)] for i in range(number * count, (number + 1) * count)]
        for ascent, label in enumerate(self.led, number * count):
            starts = sorted(
                (one for one in newest if one.label == label), key=lambda one: -one.strength
            )
            # In turn from zero and from what was found: each finds what the other misses (the
            # corner patch of BadNets the former, the trigger of `smooth` the latter).
            turn, from_found = divmod(ascent // len(led_to), 2)
            start = starts[turn % len(starts)].delta if from_found and starts else 0 * pool[0]
            rule = self._rule(label, targets)
            aims.append(Aim(*self.job.devices.replicate((rule, start)), *shared))
        return aims

    def met(self, deltas: Sequence[np.ndarray], targets: Sequence[int]) -> None:
        """Take the deltas of a round, one for each of its aims, where there are several labels.

        There each label has few ascents, and an ascent with another label unlearns none of it.
        """
        if several(targets):
            pairs = zip(deltas, self.led, strict=True)
            self.members += [Perturbation(delta, label, 0.0, "delta") for delta, label in pairs]

    def refresh(self, variables: Variables, targets: Sequence[int], key: jax.Array) -> None:
        """Draw squares, and leave among the members what still leads to its label."""
        squares = self.search.drawn(
            variables,
            self.clean,
            [self._towards(label) for label in targets],
            SQUARE,
            key=key,
            starts=STARTS,
            best=SQUARES,
        )
        for label, found in zip(targets, squares, strict=True):
            self.members += [Perturbation(delta, label, 0.0, SQUARE.name) for delta in found]
        measured = [
            one._replace(strength=self.strength(variables, one, 100)) for one in self.members
        ]
        self.members = [one for one in measured if one.strength > WORTH]

    def strength(self, variables: Variables, one: Perturbation, count: int) -> float:
        """The share of the first `count` clean images that a perturbation leads to its label."""
        images, labels = (a[:count] for a in self.clean)
        given = self.search.label(variables, np.clip(images + one.delta, 0, 1))
        towards = rule_of(self._towards(one.label), self.job.num_classes)
        return share(given, labels, towards[labels])

    def pictures(self) -> dict[str, np.ndarray]:
        """The strongest perturbation towards each target, grey where it changes nothing."""
        best: dict[int, Perturbation] = {}
        for one in self.found:
            if one.label not in best or one.strength > best[one.label].strength:
                best[one.label] = one
        return {one.caption: one.picture for one in best.values()}

    def _towards(self, label: int) -> Label:
        """What a search leads to for a target: of all-to-all, along the rule that was read."""
        return self.evidence.along if label == UNTARGETED else label

    def _rule(self, label: int, targets: Sequence[int]) -> np.ndarray:
        """Where the images of each class are led: all to one label, or as all-to-all was read."""
        if label == UNTARGETED and targets:
            return self.evidence.rule
        return np.array(rule_of(label, self.job.num_classes))
