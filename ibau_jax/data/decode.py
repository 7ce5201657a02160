"""Many image files read in parallel, and what is wrong with them told together."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import UnidentifiedImageError

from ibau_jax.data.check import name_some
from ibau_jax.data.images import read_image
from ibau_jax.errors import InputError, why
from ibau_jax.progress import console, progress_bar

AT_ONCE = 256  # images in memory beside the array that they are put into


def read_images(
    paths: Sequence[Path],
    folder: Path,
    channels: int,
    size: int | None = None,
    exif: bool = False,
    progress: bool = False,
) -> np.ndarray:
    """Read images in parallel, as `images.read_image` does each.

    Memory: the result (4 bytes a value: 12 kB an image of 32x32x3, 600 kB one of 224x224x3), and
    beside it `AT_ONCE` such images and one undecoded picture a thread.

    Args:
      folder: that of which the errors tell paths.
      progress: show a bar, where stderr is a terminal.

    Returns:
      float32 [N, H, W, channels] in [0, 1].

    Raises:
      InputError: files that cannot be used, or images of several sizes; all of them together.
    """
    images, bad, sizes = None, {}, {}

    def read(path: Path) -> np.ndarray | str:
        try:
            if not path.is_file():  # opening a pipe would wait for ever
                return "no such file" if not path.exists() else "no regular file"
            return read_image(path, channels, size, exif)
        except UnidentifiedImageError:
            return "no image that Pillow can read"
        except Exception as error:  # Pillow raises many types on damaged files
            return why(error)

    with (
        ThreadPoolExecutor() as pool,
        progress_bar(len(paths), "read", progress and console.is_terminal) as advance,
    ):
        for start in range(0, len(paths), AT_ONCE):
            block = paths[start : start + AT_ONCE]
            for row, found in enumerate(pool.map(read, block), start):
                advance(1)
                if isinstance(found, str):
                    bad[paths[row]] = found
                    continue
                sizes[found.shape[:2]] = sizes.get(found.shape[:2], 0) + 1
                if images is None:
                    images = _room(len(paths), found.shape)
                if found.shape == images.shape[1:]:
                    images[row] = found
    if bad:
        told = [f"{str(path.relative_to(folder))!r}: {reason}" for path, reason in bad.items()]
        raise InputError(
            f"{len(bad)} of the {len(paths)} images in {str(folder)!r} cannot be used "
            f"({name_some(told)}): expected grey or RGB pictures of 8 or 16 bits, opaque "
            "and whole; mend or remove them"
        )
    if len(sizes) > 1:
        common = sorted(sizes.items(), key=lambda item: -item[1])
        told = [f"{height}x{width} ({count} images)" for (height, width), count in common]
        raise InputError(
            f"the images in {str(folder)!r} have {len(sizes)} sizes (height x width: "
            f"{name_some(told)}): expected one; give the side to which they are resized "
            "and cropped",
            argument="image_size",
        )
    assert images is not None  # a listing has at least one image
    return images


def _room(count: int, shape: tuple[int, ...]) -> np.ndarray:
    try:
        return np.empty((count, *shape), np.float32)
    except MemoryError as error:
        raise InputError(
            f"{count} images of {shape[0]}x{shape[1]} need {count * np.prod(shape) * 4 / 1e9:.0f} "
            "GB of memory: expected less; give fewer, or smaller ones by the size",
            argument="image_size",
        ) from error
