"""The data sets by name, and `load`."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ibau_jax.data import digits, tfds
from ibau_jax.data.splits import split_indices
from ibau_jax.errors import check_name


class Dataset(NamedTuple):
    """Images and their labels.

    Attributes:
      images: float32 [N, H, W, C] in [0, 1]; no mean or deviation is taken away
        (as in the published code of the paper).
      labels: int32 [N].
    """

    images: Any
    labels: Any


@dataclass(frozen=True)
class DataInfo:
    """What is known of a data set without reading it.

    Attributes:
      class_names: one name a class, in the order of the labels.
      sizes: rows of each split.
      clean: default split that a defense may use.
      split: default split for evaluation, disjoint from `clean`.
      read: `read(split, data_dir) -> (images uint8 [N, 32, 32, 3], labels int32 [N])`.
    """

    name: str
    class_names: tuple[str, ...]
    sizes: Mapping[str, int]
    clean: str
    split: str
    read: Callable[[str, str | Path | None], tuple[np.ndarray, np.ndarray]]

    @property
    def num_classes(self) -> int:
        return len(self.class_names)


CIFAR10_CLASSES = "airplane automobile bird cat deer dog frog horse ship truck".split()

DATASETS: dict[str, DataInfo] = {
    info.name: info
    for info in (
        DataInfo(
            "digits",
            tuple("0123456789"),
            digits.SIZES,
            "test[:400]",
            "test[400:]",
            digits.read,
        ),
        DataInfo(
            "cifar10",
            tuple(CIFAR10_CLASSES),
            {"train": 50_000, "test": 10_000},
            "test[:5000]",
            "test[5000:]",
            lambda split, data_dir: tfds.read("cifar10", split, data_dir),
        ),
        DataInfo(
            "gtsrb",
            tuple(f"sign {i:02d}" for i in range(43)),
            {"train": 39_209, "test": 12_630},
            "test[:5000]",
            "test[5000:]",
            lambda split, data_dir: tfds.read("gtsrb", split, data_dir),
        ),
    )
}


def data_info(name: str) -> DataInfo:
    """The `DataInfo` of a data set; an unknown name raises and tells the nearest."""
    check_name("data set", name, DATASETS)
    return DATASETS[name]


def load(name: str, split: str, data_dir: str | Path | None = None) -> Dataset:
    """Load a data set.

    Args:
      name: `digits` (comes with scikit-learn), `cifar10` or `gtsrb` (prepared through
        TensorFlow Datasets: `ibau prepare NAME`).
      split: as in TFDS, for example `"test[:5000]"`. CIFAR-10 is in the official order.
      data_dir: folder of TFDS; default: the environment variable `TFDS_DATA_DIR`, else
        TFDS's own default. Not for `digits`.

    Returns:
      A `Dataset`: images float32 [N, 32, 32, 3] in [0, 1], labels int32 [N].

    Raises:
      InputError: unknown name or split, or the data set is not prepared or damaged.
    """
    info = data_info(name)
    images, labels = [], []
    for part, rows in split_indices(split, info.sizes):
        all_images, all_labels = info.read(part, data_dir)
        # The rows of one part are contiguous, so this is a slice and not a copy of the file.
        window = slice(rows[0], rows[-1] + 1) if len(rows) else slice(0, 0)
        images.append(all_images[window])
        labels.append(all_labels[window])
    pixels = np.concatenate(images) if len(images) > 1 else images[0]
    scaled = np.divide(pixels, np.float32(255), dtype=np.float32)
    return Dataset(scaled, np.concatenate(labels).astype(np.int32))
