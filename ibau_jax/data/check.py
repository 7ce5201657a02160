"""Are these images and labels? Said before anything long is done with them."""

from collections.abc import Sequence

import numpy as np

from ibau_jax.data.datasets import Dataset
from ibau_jax.errors import InputError


def check_data(data: Dataset, what: str = "clean") -> Dataset:
    """The data as NumPy arrays, labels int32, after a check.

    Args:
      data: images [N, H, W, C], labels [N].
      what: `clean` or `training`, for the message.

    Raises:
      InputError: no image, shapes that do not fit, or images that are not floats in [0, 1].
    """
    images, labels = np.asarray(data.images), np.asarray(data.labels)
    if images.ndim != 4:
        raise InputError(f"{what} images have shape {images.shape}: expected [N, H, W, C]")
    if not len(images):
        raise InputError(f"the {what} set is empty: expected at least one image")
    if not np.issubdtype(images.dtype, np.floating):
        raise InputError(
            f"{what} images are {images.dtype}: expected float32 in [0, 1]; divide pixels by 255"
        )
    low, high = float(images.min()), float(images.max())
    if not (0 <= low and high <= 1):  # also true where one is NaN
        raise InputError(
            f"{what} images range from {low:g} to {high:g}: expected values in [0, 1] without "
            "NaN; divide pixels by 255 and leave out any normalisation (put it into the model)"
        )
    if labels.shape != images.shape[:1] or not np.issubdtype(labels.dtype, np.integer):
        raise InputError(
            f"{what} labels are {labels.dtype} {labels.shape}: expected integers of shape "
            f"({len(images)},), one for each image"
        )
    return Dataset(images, labels.astype(np.int32))


def missing_classes(labels: np.ndarray, num_classes: int) -> list[int]:
    """Classes that none of the labels (int [N]) is of, in order."""
    return np.setdiff1d(np.arange(num_classes), labels).tolist()


def note_missing(labels: np.ndarray, num_classes: int) -> str | None:
    """A line for the user on the classes that a clean set lacks; None: it has all."""
    missing = missing_classes(labels, num_classes)
    if not missing:
        return None
    return (
        f"the clean set has no image of {len(missing)} of the {num_classes} classes "
        f"({name_some(missing)}): the result may not hold for them, and fine-tuning may forget them"
    )


def name_some(classes: Sequence[int], most: int = 10) -> str:
    """Classes by their numbers, at most so many: `0, 1, 2 and 40 more`."""
    named = ", ".join(map(str, classes[:most]))
    return named if len(classes) <= most else f"{named} and {len(classes) - most} more"


def check_labels(labels: np.ndarray, num_classes: int, what: str = "clean") -> None:
    """Raise `InputError` unless all labels (int [N], N > 0) are classes of the model."""
    if labels.min() < 0 or labels.max() >= num_classes:
        raise InputError(
            f"{what} labels range from {labels.min()} to {labels.max()}, but the model has "
            f"{num_classes} classes: expected labels from 0 to {num_classes - 1}"
        )
