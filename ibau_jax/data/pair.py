"""Clean images for a defense, and others to measure by: two sets without an image in common."""

import hashlib
import os

import numpy as np

from ibau_jax.data.classes import told
from ibau_jax.data.datasets import Dataset
from ibau_jax.data.given import Given, Reader, check_options, kind_of, read_given
from ibau_jax.data.splits import check_disjoint
from ibau_jax.errors import InputError
from ibau_jax.files import user_path


def load_both(
    clean: str | None, split: str | None, reader: Reader, labelled: bool = True, seed: int = 0
) -> tuple[Given, Given]:
    """The images that a defense may use, and others to measure by.

    Memory: both, and half of the one as much again where it is cut into halves.

    Args:
      clean, split: see `load_given`; None: the defaults of the data set. With images of the user's
        for `clean` and no `split`, half of each class (drawn by the seed) is held out.
      labelled: have the clean images labels that count?

    Returns:
      Both, without an image in common: those of `split` that are in `clean` too are left out, and a
      note says so. (Two splits that share a row are refused.)

    Raises:
      InputError: as `load_given`; also folders of other classes, or no image is left.
    """
    info = reader.info
    if clean is None and info is not None:
        clean = info.clean
    if clean is None:
        raise InputError(
            "no clean images are given, and the data set of the model is not known here: expected "
            "a folder or an .npz file",
            argument="clean",
        )
    kind = kind_of(clean, reader)
    if split is None and kind != "split" and labelled:
        check_options(reader, [kind])
        return _halves(read_given(clean, kind, reader, True, "clean"), clean, seed)
    if split is None and info is None:
        raise InputError(
            "nothing to measure by: expected images with labels, since the clean ones have none "
            "that count",
            argument="split",
        )
    split = split or (info.split if info is not None else "")
    other = kind_of(split, reader)
    check_options(reader, [kind, other])
    if info is not None and kind == other == "split":
        check_disjoint(clean, split, info.sizes)
    elif kind == other and os.path.realpath(user_path(clean)) == os.path.realpath(user_path(split)):
        raise InputError(
            f"{clean!r} is given for the clean images and to measure by: expected others; leave "
            "the latter out, and half of the images is held out",
            argument="split",
        )
    first = read_given(clean, kind, reader, labelled, "clean")
    second = read_given(split, other, reader, True, "evaluation")
    _check_alike(first, second)
    if kind != "split" or other != "split":
        second = _without(second, first)
    notes = tuple(note for note in second.notes if note not in first.notes)
    return first, second._replace(notes=notes)


def halves(labels: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows (sorted) of two halves of each class, drawn by the seed; the first has an odd one more.

    Args:
      labels: int [N].
    """
    rng = np.random.default_rng(seed)
    second = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        rows = rng.permutation(np.flatnonzero(labels == label))
        second[rows[: len(rows) // 2]] = True
    return np.flatnonzero(~second), np.flatnonzero(second)


def shared_rows(images: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Which of the images [N, H, W, C] are, bit for bit, among the others: bool [N]."""
    known = {_digest(image) for image in others}
    return np.array([_digest(image) in known for image in images], bool)


def _digest(image: np.ndarray) -> bytes:
    return hashlib.blake2b(np.ascontiguousarray(image).data, digest_size=16).digest()


def _halves(given: Given, name: str, seed: int) -> tuple[Given, Given]:
    parts = halves(given.data.labels, seed)
    first, second = (
        given._replace(data=Dataset(*(values[rows] for values in given.data))) for rows in parts
    )
    if not len(parts[1]):
        raise InputError(
            f"{name!r} has one image of each class, so that none can be held out: expected more, "
            "or others with labels to measure by",
            argument="split",
        )
    first = first._replace(name=f"half of {name}")
    second = _without(second._replace(name=f"the other half of {name}", notes=()), first)
    note = (
        f"half of the images of each class in {name!r} is held out to measure by (seed {seed}): "
        f"{len(first.data.labels)} clean images, {len(second.data.labels)} to measure by"
    )
    return first._replace(notes=(*first.notes, note)), second


def _without(second: Given, first: Given) -> Given:
    """`second` without the images of `first`, and a note on how many were left out."""
    if second.data.images.shape[1:] != first.data.images.shape[1:]:
        sizes = [f"{g.data.images.shape[1]}x{g.data.images.shape[2]}" for g in (first, second)]
        raise InputError(
            f"the clean images are {sizes[0]}, those to measure by {sizes[1]}: expected one size",
            argument="image_size",
        )
    shared = shared_rows(second.data.images, first.data.images)
    if not shared.any():
        return second
    if shared.all():
        raise InputError(
            f"all {len(shared)} images to measure by are among the clean ones: expected others, "
            "since a defense looks better on those that it was given",
            argument="split",
        )
    note = (
        f"{shared.sum()} of the {len(shared)} images to measure by are among the clean ones, and "
        "are left out"
    )
    data = Dataset(*(values[~shared] for values in second.data))
    return second._replace(data=data, notes=(*second.notes, note))


def _check_alike(first: Given, second: Given) -> None:
    """Raise `InputError` where two folders give the same label to different classes."""
    if first.classes and second.classes and first.classes != second.classes:
        raise InputError(
            f"the folders have different classes ({told(first.classes, 10)}; and "
            f"{told(second.classes, 10)}): expected the same; give a file with the names of all",
            argument="classes",
        )
