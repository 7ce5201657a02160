"""Reconstructed triggers: which labels stand out, and how a model unlearns what was found."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from ibau_jax.data import Dataset, missing_classes, name_some, note_missing
from ibau_jax.errors import InputError

Stamp = Callable[[np.ndarray], np.ndarray]

# The largest share of an image that is taken for a trigger where there is nothing to compare it
# with. On three of the authors' models and three of our own for digits, triggers that were found
# for targets cover 0.3 to 1.6 % of the image, the smallest of the other labels' 2 to 9 %, and the
# median 4 to 12 %.
LARGE = 0.1


class Outliers(NamedTuple):
    """What the MAD rule says.

    Attributes:
      index: the anomaly index of each label, float [C].
      flagged: labels whose score is a low outlier.
    """

    index: np.ndarray
    flagged: list[int]


def low_outliers(scores: np.ndarray, threshold: float = 2.0, gap: float = 0.0) -> Outliers:
    """Labels whose score lies far below the others': those with a trigger that is too easy.

    The rule of Neural Cleanse (Wang et al. 2019, section IV): the anomaly index is
    |score - median| / (1.4826 * median of these distances), a label is flagged where it exceeds
    the threshold on the low side. The median of an even number is the mean of the middle two
    (PyTorch's `median`, used by several toolkits, takes the lower one and flags other labels).

    Args:
      scores: float [C], one for each label; a label without a usable score has NaN and takes no
        part. Among fewer than three scores nothing stands out.
      threshold: of the anomaly index.
      gap: a flagged label's score is at least so far below the median. (Where the scores lie close
        together a small difference has a large index.)

    Raises:
      InputError: there are fewer than three labels.
    """
    scores = np.asarray(scores, float)
    check_labels(len(scores))
    known = np.isfinite(scores)
    if known.sum() < 3:
        return Outliers(np.full(len(scores), np.nan), [])
    median = np.median(scores[known])
    distance = np.abs(scores - median)
    spread = 1.4826 * np.median(distance[known])
    # All but a few scores are equal: any difference is an outlier, equal ones are none.
    index = np.where(distance > 0, distance / np.maximum(spread, 1e-12), 0.0)
    index = np.where(known, index, np.nan)
    low = known & (scores <= median - gap) & (np.nan_to_num(index) > threshold)
    return Outliers(index, [int(label) for label in np.flatnonzero(low)])


def stand_out(scores: np.ndarray, config: Any) -> Outliers:
    """Labels whose triggers come too easily, by positive scores [C]: the MAD rule and two more.

    1. The paper's rule flags by chance: of ten (of 43) scores that are all drawn from one normal
       distribution it flags some in 33 (64) % of all cases. So a flagged score is also at most a
       share of the median, `config.ratio` (1: no such rule).
    2. Scores of honest labels differ by factors. On the linear scale the index of a low score
       stays below median / spread, whatever the score: DeepInspect's below 2 on one poisoned model
       in three (small VGGs for digits), Neural Cleanse's 1.65 for a mask of 3 pixels among masks of
       27 to 149. So logarithms are compared, unless `config.scale` is `linear`.
    """
    compared = np.log(np.maximum(scores, 1e-6)) if config.scale == "log" else scores
    index, low = low_outliers(compared, config.threshold)
    if not low:
        return Outliers(index, [])
    highest = config.ratio * np.nanmedian(scores)
    return Outliers(index, [label for label in low if scores[label] <= highest])


class Judged(NamedTuple):
    """Which labels the rule of outliers can judge.

    Attributes:
      works: labels with a trigger that works, bool [C].
      crowded: labels of half of the clean images or more, bool [C].
    """

    works: np.ndarray
    crowded: np.ndarray

    def comparable(self, scores: np.ndarray, ceiling: float) -> np.ndarray:
        """Scores [C] for `low_outliers`, where not every label can be judged.

        A label whose search found no trigger that works has no score (NaN): the size of what does
        not work says nothing. All that is known is that its smallest trigger is larger than what
        the others needed, so it would lie on the high side, and as long as three others are left
        to give a median and a spread it is not needed. (To count it as larger than all widens the
        spread, which is measured on both sides: with four failed labels of ten the index of a mask
        of 3 pixels among masks of 60 to 72 falls from 8 to 1.2.)

        Where only one or two labels have a trigger that works, that is the plainest sign of a
        backdoor, and nobody is left to compare with. Then the others count as `ceiling`, the score
        of a trigger so large that it is none: a working one stands out if it is well below that.

        Crowded labels never have a score: a search towards a label that most images show already
        succeeds with next to nothing.
        """
        judged = self.works & ~self.crowded & np.isfinite(scores)
        failed = ~self.works & ~self.crowded
        known = np.where(judged, scores, np.nan)
        return np.where(failed, ceiling, known) if 0 < judged.sum() < 3 else known

    def notes(self) -> list[str]:
        """Lines for the user."""
        lines = []
        failed = np.flatnonzero(~self.works & ~self.crowded).tolist()
        judged = int(np.sum(self.works & ~self.crowded))
        if failed:
            lines.append(f"no trigger found for {_labels(failed)}")
            if not judged:
                lines[-1] += ": the search says nothing of this model"
            elif judged < 3:
                lines[-1] += ": they count as out of reach"
            else:
                lines[-1] += ": not judged"
        if self.crowded.any():
            crowded = np.flatnonzero(self.crowded).tolist()
            lines.append(
                f"{_labels(crowded)} not judged: half or more of the clean images show it already"
            )
        return lines


def judge(works: Sequence[bool] | np.ndarray, labels: np.ndarray) -> Judged:
    """Which labels can be judged, by whether a trigger works [C] and the clean labels [N]."""
    works = np.asarray(works, bool)
    shares = np.bincount(labels, minlength=len(works)) / len(labels)
    return Judged(works, shares >= 0.5)


def note(judged: Judged, flagged: Sequence[int], labels: np.ndarray) -> str | None:
    """The line for the user on what a search did not find, or on what its clean set lacks."""
    missing = note_missing(labels, len(judged.works))
    nothing = None if flagged else "no label stands out: the model is returned as it was given"
    return "; ".join(line for line in (missing, *judged.notes(), nothing) if line) or None


def _labels(labels: list[int]) -> str:
    return f"label{'s' if len(labels) > 1 else ''} {name_some(labels)}"


def check_labels(count: int, labels: np.ndarray | None = None) -> None:
    """A model has enough labels for one to stand out, and there are images to search with.

    Args:
      count: labels of the model.
      labels: of the clean set, int [N]; None: not looked at.

    Raises:
      InputError: fewer than three labels, or all images are of one class: a trigger towards a
        label is sought on images of others, and what is unlearned on one class unlearns the rest.
    """
    if count < 3:
        raise InputError(f"the model has {count} labels: expected at least 3 for one to stand out")
    if labels is not None and len(missing_classes(labels, count)) == count - 1:
        raise InputError(
            f"the clean set has images of class {labels[0]} only ({len(labels)} of them): expected "
            "images of at least two classes, since a trigger is sought on images of other labels; "
            "give a clean set with more classes"
        )


def with_stamps(
    clean: Dataset, stamps: Sequence[Stamp], share: float, rng: np.random.Generator
) -> Dataset:
    """The clean set with found triggers on a share of its images, true labels kept.

    Args:
      clean: images [N, H, W, C] in [0, 1], labels [N].
      stamps: `stamp(images [n, H, W, C]) -> images`; the share is divided evenly among them.
      share: of the images, in (0, 1]; at least one image for each stamp (if there are as many).
    """
    count = len(clean.labels)
    images = np.array(clean.images)
    chosen = rng.permutation(count)[: min(count, max(len(stamps), round(share * count)))]
    for rows, stamp in zip(np.array_split(chosen, len(stamps)), stamps, strict=True):
        if len(rows):
            images[rows] = stamp(images[rows])
    return Dataset(np.clip(images, 0, 1), clean.labels)
