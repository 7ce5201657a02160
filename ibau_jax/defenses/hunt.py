"""What `unlearn` searches for, what it makes of it, and how it says how it ended.

The guard knows no trigger: it has the search, and clean images that were held back.
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from ibau_jax.data import Dataset
from ibau_jax.defenses.run import Job
from ibau_jax.models.model import Params, of_params
from ibau_jax.unlearning.batches import UNTARGETED
from ibau_jax.unlearning.config import IBAUConfig
from ibau_jax.unlearning.evidence import (
    GEOMETRIES,
    NEAR,
    Perturbation,
    collect,
    look,
    looks,
    rest,
)
from ibau_jax.unlearning.objective import Aim
from ibau_jax.unlearning.search import Search, check_count, rule_of


class Hunt:
    """What is searched before the first round and in the middle of them, and what it gave."""

    def __init__(self, job: Job, clean: Dataset, config: IBAUConfig, num_batches: int):
        check_count(clean)
        logits = of_params(job.model, job.variables)
        self.job, self.clean, self.config, self.num_batches = job, clean, config, num_batches
        self.rounds = config.rounds or 1
        self.search = Search(logits, GEOMETRIES, compiling=job.compiling)
        self.key = jax.random.fold_in(job.key, 1)  # not one of those that the rounds draw
        self.found: list[Perturbation] = []

    def aims(self, number: int, params: Params) -> list[Aim]:
        """For the ascents of round `number`."""
        if number == 0:
            self._look(params)
        suspects = self.evidence.suspects or (UNTARGETED,)
        if number in (0, -(-self.rounds // 2)) and self.evidence.suspects:
            self._again(params, jax.random.fold_in(self.key, number + 1))
        pool = np.zeros((self.room, *self.clean.images.shape[1:]), self.clean.images.dtype)
        rules = np.full((self.room, self.job.num_classes), UNTARGETED, np.int32)
        for i, one in enumerate(self.found):
            pool[i], rules[i] = one.delta, self._rule(one.label)
        shared = self.job.devices.replicate((pool, rules, np.int32(len(self.found))))
        # Each label is led to twice or more in all: what no delta led to stays (seven targets).
        usual = len(self.config.schedule(self.num_batches))
        count = min(self.num_batches, max(usual, -(-2 * len(suspects) // self.rounds)))
        aims = []
        for ascent in range(number * count, (number + 1) * count):
            label = suspects[ascent % len(suspects)]
            starts = sorted(
                (one for one in self.found if one.label == label), key=lambda one: -one.strength
            )
            # In turn from zero and from what was found: each finds what the other misses (the
            # corner patch of BadNets the former, the trigger of `smooth` the latter).
            turn, from_found = divmod(ascent // len(suspects), 2)
            start = starts[turn % len(starts)].delta if from_found and starts else 0 * pool[0]
            aims.append(Aim(*self.job.devices.replicate((self._rule(label), start)), *shared))
        return aims

    def _look(self, params: Params) -> None:
        classes = self.job.num_classes
        with self.job.compiling():
            self.search.warm(params, self.clean)
        with self.job.progress(looks(classes), "search") as advance:
            self.evidence = look(
                self.search, params, self.clean, classes, key=self.key, advance=advance
            )
        suspects = self.evidence.suspects
        self.found = [one for one in self.evidence.found if one.label in suspects]
        # So many can be found in all: the shape that the rounds are compiled for.
        wide = len(suspects) * len(GEOMETRIES)
        self.room = max(1, len(self.found) + 2 * wide)

    def _again(self, params: Params, key: jax.Array) -> None:
        suspects = self.evidence.suspects
        found = self.search(params, self.clean, [*map(self._rule, suspects)], key=key)
        self.found += collect(GEOMETRIES, suspects, found)

    def _rule(self, suspect: int) -> np.ndarray:
        """Where the images of each class are led: all to one label, or as all-to-all was read."""
        if suspect == UNTARGETED and self.evidence.suspects:
            return self.evidence.rule
        return np.array(rule_of(suspect, self.job.num_classes))

    def after(self, params: Params) -> float:
        """How near a fresh search comes to a level with a suspect; see `Evidence.score`."""
        if not self.evidence.suspects:
            return self.evidence.nearest
        key = jax.random.fold_in(self.key, 0)
        return rest(self.search, params, self.clean, self.evidence.suspects, key=key)

    def pictures(self) -> dict[str, np.ndarray]:
        """The strongest perturbation towards each suspect, grey where it changes nothing."""
        best: dict[int, Perturbation] = {}
        for one in self.found:
            if one.label not in best or one.strength > best[one.label].strength:
                best[one.label] = one
        return {one.caption: one.picture for one in best.values()}

    def told(self, left: float, kept: float) -> dict[str, Any]:
        """For the diagnostics: what was found, and how it ended.

        Args:
          left: of `after`, of the model that is returned.
          kept: of `roll_back`.
        """
        evidence = self.evidence
        if not evidence.suspects:
            verdict, reason = "was-clean", evidence.reason
        elif left < NEAR:
            verdict = "cleaned"
            reason = f"{evidence.reason}; now a fresh search comes to {left:.2f} of such a level"
        else:
            verdict = "not-cleaned"
            reason = f"{evidence.reason}; a fresh search still comes to {left:.2f} of such a level"
        if kept < 1:
            reason += (
                f"; only {kept:.0%} of the way was gone, since more costs too much accuracy on "
                "held-back images"
            )
        return {
            "verdict": verdict,
            "reason": reason,
            "flagged": evidence.flagged,
            "misled": evidence.misled,
            "alike": evidence.alike,
            "searched": len(self.found),
            "left": left,
            "kept": kept,
        }


def roll_back(
    measure: Callable[[Params], float], given: Params, params: Params, least: float
) -> tuple[Params, float]:
    """As far from `given` to `params` as `measure` (of parameters) is not below `least`.

    Returns:
      The parameters, and the share of the way.
    """
    for tenths in range(10, 0, -1):
        share = tenths / 10

        def between(a, b, share=share):
            return a + share * (b - a)

        there = params if tenths == 10 else jax.tree.map(between, given, params)
        if measure(there) >= least:
            return there, share
    return given, 0.0
