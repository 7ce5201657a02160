"""Are these images and labels? Said before anything long is done with them."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from ibau_jax.data.datasets import Dataset
from ibau_jax.errors import InputError, first_line

NEAR_CHANCE = 0.1  # of the way from guessing to all right


def check_data(data: Dataset, what: str = "clean") -> Dataset:
    """The data as NumPy arrays in the precision that is computed in, after a check.

    Args:
      data: images [N, H, W, C] (see `check_images`), labels integers [N]; arrays of any library,
        or lists.
      what: `clean`, `training` or `evaluation`, for the message.

    Returns:
      images float32 (float64 where JAX is set to it and they are), labels int32.

    Raises:
      InputError: no image, shapes that do not fit, images that are not floats in [0, 1], or labels
        that are not integers of 32 bits.
    """
    images = check_images(data.images, what)
    if not len(images):
        raise InputError(f"the {what} set is empty: expected at least one image")
    labels = _array(data.labels, f"{what} labels")
    if labels.shape != images.shape[:1] or not np.issubdtype(labels.dtype, np.integer):
        raise InputError(
            f"{what} labels are {labels.dtype} {labels.shape}: expected integers of shape "
            f"({len(images)},), one for each image"
        )
    small = labels.astype(np.int32)
    if not np.array_equal(small, labels):
        raise InputError(
            f"{what} labels range from {labels.min()} to {labels.max()}: expected classes, "
            "counted from 0"
        )
    return Dataset(images, small)


def check_images(images: Any, what: str = "") -> np.ndarray:
    """Images as a NumPy array, after a check: the one door for images of the user's.

    Args:
      images: floats [N, H, W, C] in [0, 1] of any precision, as an array of any library or a list.
      what: the set they belong to, for the message.

    Returns:
      float32 [N, H, W, C]; float64 where JAX is set to it and they are.

    Raises:
      InputError: another shape, no floats, or values that are not in [0, 1].
    """
    name = f"{what} images".strip()
    images = _array(images, name)
    if images.ndim != 4:
        hint = "; give grey images a channel, images[..., None]" if images.ndim == 3 else ""
        raise InputError(f"{name} have shape {images.shape}: expected [N, H, W, C]{hint}")
    if not jnp.issubdtype(images.dtype, jnp.floating):  # NumPy does not know bfloat16 for a float
        raise InputError(
            f"{name} are {images.dtype}: expected float32 in [0, 1]; divide pixels by 255"
        )
    low, high = (float(images.min()), float(images.max())) if images.size else (0.0, 0.0)
    if not (0 <= low and high <= 1):  # also true where one is NaN
        raise InputError(
            f"{name} range from {low:g} to {high:g}: expected values in [0, 1] without "
            "NaN; divide pixels by 255 and leave out any normalisation (put it into the model)"
        )
    if 0 < high < 1.5 / 255:
        raise InputError(
            f"{name} range from {low:g} to {high:g}: expected values in [0, 1], the largest near "
            "1; divide pixels by 255 only once"
        )
    return images.astype(jnp.promote_types(jnp.float32, jnp.result_type(images)), copy=False)


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


def note_accuracy(acc: float, what: str, least: float = 0.5) -> str | None:
    """A line for the user where a model is often wrong on images of the user's; None: it is not.

    Labels in another order and pixels in another form than the model's look just so.
    """
    if acc >= least:
        return None
    return (
        f"the model gives {acc:.0%} of {what} their labels: are the classes in the order that it "
        "was trained with, and the images as it reads them (RGB in [0, 1], this size)?"
    )


def check_accuracy(acc: float, num_classes: int, what: str) -> str | None:
    """As `note_accuracy`, before a model is changed by what is known of these images.

    Raises:
      InputError: the accuracy is within a tenth of the way of what guessing gives.
    """
    chance = 1 / num_classes
    if acc > chance + NEAR_CHANCE * (1 - chance):
        return note_accuracy(acc, what)
    raise InputError(
        f"the model gives {acc:.0%} of {what} their labels, hardly more than guessing ({chance:.0%}"
        "): expected the classes in the order that it was trained with, and images as it reads "
        "them (RGB in [0, 1], its size, normalised only if it does not do so itself)"
    )


def name_some(names: Sequence[Any], most: int = 10) -> str:
    """Classes by their numbers, or anything else, at most so many: `0, 1, 2 and 40 more`."""
    named = ", ".join(map(str, names[:most]))
    return named if len(names) <= most else f"{named} and {len(names) - most} more"


def check_labels(labels: np.ndarray, num_classes: int, what: str = "clean") -> None:
    """Raise `InputError` unless all labels (int [N], N > 0) are classes of the model."""
    if labels.min() < 0 or labels.max() >= num_classes:
        raise InputError(
            f"{what} labels range from {labels.min()} to {labels.max()}, but the model has "
            f"{num_classes} classes: expected labels from 0 to {num_classes - 1}"
        )


def _array(values: Any, what: str) -> np.ndarray:
    try:
        return np.asarray(values)
    except Exception as error:  # ragged lists; tensors on a device, or with a graph
        raise InputError(
            f"{what} cannot be read as one array ({first_line(error)}): expected "
            "an array, or images of one size"
        ) from error
