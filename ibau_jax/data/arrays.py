"""Images and labels in an .npz file, in the forms that people keep them in."""

from pathlib import Path

import numpy as np

from ibau_jax.data.classes import quoted
from ibau_jax.data.images import fitted, scaled
from ibau_jax.errors import InputError, why

# Of images and of labels: private files, then the test sets of Keras and of MedMNIST. (Their
# training sets may be what a model was poisoned with.)
KEYS = (
    ("images", "labels"),
    ("x", "y"),
    ("X", "y"),
    ("x_test", "y_test"),
    ("test_images", "test_labels"),
)


def read_npz(
    path: Path, num_classes: int, channels: int, size: int | None = None, labelled: bool = True
) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    """Read images and labels; see `KEYS` for their names.

    Memory: the array of the file, and float32 images (4 bytes a value) beside it.

    Args:
      num_classes: outputs of the model, the width of one-hot labels.
      channels, size: see `images.fitted`.
      labelled: False: labels do not count, and may be missing.

    Returns:
      images float32 [N, H, W, channels] in [0, 1] (floats of another range come back as they are),
      labels int64 [N] (0 where they do not count), and the names that were read.

    Raises:
      InputError: a file that is no .npz of plain arrays, or arrays that are no images and labels.
    """
    try:
        with path.open("rb") as stream:  # NumPy leaves a damaged file open that it opened itself
            loaded = np.load(stream, allow_pickle=False)
            if isinstance(loaded, np.ndarray):
                raise ValueError("one array, no archive")
            with loaded as file:
                keys = _keys(path, file.files, labelled)
                arrays = [np.asarray(file[key]) for key in keys]
    except InputError:
        raise
    except Exception as error:  # a damaged zip, or objects in it, raise several types
        raise InputError(
            f"cannot read {str(path)!r}: {why(error)}; expected an .npz file of plain arrays, "
            "images and labels, as numpy.savez writes it"
        ) from error
    images = _images(path, keys[0], arrays[0])
    if size is None and images.shape[-1] == channels:
        images = scaled(images)
    else:
        images = np.stack([fitted(image, channels, size) for image in images])
    if len(keys) == 1:
        return images, np.zeros(len(images), np.int64), keys
    return images, _labels(path, keys[1], arrays[1], len(images), num_classes), keys


def _keys(path: Path, found: list[str], labelled: bool) -> tuple[str, ...]:
    for images, labels in KEYS:
        if images in found and labelled and labels in found:
            return images, labels
        if images in found and not labelled:
            return (images,)
    pairs = ", ".join(f"{images}/{labels}" for images, labels in KEYS)
    raise InputError(
        f"{str(path)!r} holds {quoted(found) or 'nothing'}: expected images and labels by one of "
        f"the names {pairs}"
    )


def _images(path: Path, key: str, images: np.ndarray) -> np.ndarray:
    """The array as [N, H, W, 1 or 3], of uint8, uint16 or floats."""
    given = f"{key!r} of {str(path)!r} is {images.dtype} {images.shape}"
    if images.dtype.kind != "f" and images.dtype not in (np.uint8, np.uint16):
        raise InputError(f"{given}: expected uint8 (0 to 255), uint16, or floats in [0, 1]")
    if images.ndim == 3:
        images = images[..., None]
    elif images.ndim == 4 and images.shape[1] in (1, 3) and images.shape[-1] not in (1, 3):
        images = np.moveaxis(images, 1, -1)
    if images.ndim != 4 or images.shape[-1] not in (1, 3) or not images.size:
        raise InputError(
            f"{given}: expected images [N, H, W], [N, H, W, C] or [N, C, H, W] with 1 or 3 "
            "channels C, at least one"
        )
    return images


def _labels(path: Path, key: str, labels: np.ndarray, count: int, num_classes: int) -> np.ndarray:
    """Labels [N], [N, 1] or one-hot [N, num_classes] as int64 [N]."""
    given = f"{key!r} of {str(path)!r} is {labels.dtype} {labels.shape}"
    expected = f"expected {count} whole numbers, one for each image, or one-hot rows"
    if labels.dtype.kind not in "biuf":
        raise InputError(f"{given}: {expected}")
    if labels.shape == (count, num_classes) and num_classes > 1:
        if not (((labels == 0) | (labels == 1)).all() and (labels.sum(1) == 1).all()):
            raise InputError(f"{given}, and a row is not one-hot (a 1 among zeros): {expected}")
        return labels.argmax(1)
    if labels.shape not in ((count,), (count, 1)) or labels.dtype.kind == "b":
        raise InputError(f"{given}: {expected} of {num_classes} classes")
    labels = labels.reshape(count)
    outside = ~((labels >= 0) & (labels < num_classes) & (labels == np.floor(labels)))
    if outside.any():  # also where one is NaN
        raise InputError(
            f"{given}, and one is {labels[outside][0]}: expected classes of the model, 0 to "
            f"{num_classes - 1}"
        )
    return labels.astype(np.int64)
