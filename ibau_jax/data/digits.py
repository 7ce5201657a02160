"""scikit-learn's handwritten digits, brought to the shape of CIFAR-10: the default, no download."""

import functools
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ibau_jax.errors import InputError

SIZES = {"train": 997, "test": 800}


def read(split: str, data_dir: str | Path | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Digits of 8x8 pixels, resized (bilinear) to 32x32 and three equal channels.

    Returns:
      images uint8 [N, 32, 32, 3], labels int32 [N]. The 1797 digits are shuffled once
      with a fixed seed and cut into `train` (997) and `test` (800).

    Raises:
      InputError: there is a `data_dir`, which could only be ignored.
    """
    if data_dir is not None:
        raise InputError(
            f"a data folder {str(data_dir)!r} for digits, which come with scikit-learn: leave it "
            "out, or choose another data set",
            argument="data_dir",
        )
    images, labels = _all()
    part = slice(0, SIZES["train"]) if split == "train" else slice(SIZES["train"], None)
    return images[part], labels[part]


@functools.cache
def _all() -> tuple[np.ndarray, np.ndarray]:
    from sklearn.datasets import load_digits  # slow to import, and needed by this data set only

    source: Any = load_digits()
    order = np.random.default_rng(0).permutation(len(source.images))
    resized = np.stack(
        [
            np.asarray(Image.fromarray(np.float32(i)).resize((32, 32), Image.Resampling.BILINEAR))
            for i in source.images[order]
        ]
    )
    pixels = np.rint(resized * (255 / 16)).astype(np.uint8)  # the source counts from 0 to 16
    return np.repeat(pixels[..., None], 3, axis=-1), source.target[order].astype(np.int32)
