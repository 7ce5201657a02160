"""Reconstructed triggers: which labels stand out, and how a model unlearns what was found."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from ibau_jax.data import Dataset
from ibau_jax.errors import InputError

Stamp = Callable[[np.ndarray], np.ndarray]


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


def check_labels(count: int) -> None:
    """A model has enough labels for one to stand out.

    Raises:
      InputError: fewer than three.
    """
    if count < 3:
        raise InputError(f"the model has {count} labels: expected at least 3 for one to stand out")


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
