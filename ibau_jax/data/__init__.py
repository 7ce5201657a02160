"""Data sets: `load(name, split)` gives a `Dataset` of images in [0, 1] and labels."""

from ibau_jax.data.check import (
    check_data,
    check_images,
    check_labels,
    missing_classes,
    name_some,
    note_missing,
)
from ibau_jax.data.datasets import DATASETS, DataInfo, Dataset, data_info, load
from ibau_jax.data.splits import check_disjoint, split_indices

__all__ = [
    "DATASETS",
    "DataInfo",
    "Dataset",
    "check_data",
    "check_disjoint",
    "check_images",
    "check_labels",
    "data_info",
    "load",
    "missing_classes",
    "name_some",
    "note_missing",
    "split_indices",
]
