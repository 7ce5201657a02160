"""Data sets: `load(name, split)` gives a `Dataset` of images in [0, 1] and labels.

`load_given` does so for what a user may name instead: a folder or an .npz file.
"""

from ibau_jax.data.check import (
    check_accuracy,
    check_data,
    check_images,
    check_labels,
    missing_classes,
    name_some,
    note_accuracy,
    note_missing,
)
from ibau_jax.data.datasets import DATASETS, DataInfo, Dataset, data_info, load
from ibau_jax.data.given import Given, Reader, load_given
from ibau_jax.data.pair import load_both
from ibau_jax.data.splits import check_disjoint, split_indices

__all__ = [
    "DATASETS",
    "DataInfo",
    "Dataset",
    "Given",
    "Reader",
    "check_data",
    "check_disjoint",
    "check_images",
    "check_labels",
    "data_info",
    "load",
    "load_both",
    "load_given",
    "missing_classes",
    "name_some",
    "check_accuracy",
    "note_accuracy",
    "note_missing",
    "split_indices",
]
