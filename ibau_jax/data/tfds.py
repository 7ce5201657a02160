"""CIFAR-10 and GTSRB through TensorFlow Datasets, without TensorFlow (`tfds.data_source`)."""

import contextlib
import hashlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ibau_jax.data.cache import Arrays, cached
from ibau_jax.data.images import crop
from ibau_jax.errors import InputError, check_name
from ibau_jax.files import user_path

VERSIONS = {"cifar10": "3.0.2", "gtsrb": "1.0.0"}


def read(name: str, split: str, data_dir: str | Path | None = None) -> Arrays:
    """A whole split: images uint8 [N, 32, 32, 3], labels int32 [N].

    The first call decodes (about 14 s for CIFAR-10's training set); later ones map a
    checked copy from the cache folder.

    Raises:
      InputError: the data set is not prepared, or its files are damaged.
    """
    folder = dataset_folder(name, data_dir)
    files = sorted(folder.glob(f"{name}-{split}.array_record*"))
    if not files or not (folder / "dataset_info.json").is_file():
        raise InputError(
            f"the data set {name!r} is not prepared: expected ArrayRecord files of its split "
            f"{split!r} in {folder}; run 'ibau prepare {name}' (needs internet), or give the "
            "folder that has it, for example by TFDS_DATA_DIR",
            argument="data_dir",
        )
    # The key changes with the files' sizes and the description, so that a data set that is
    # prepared anew is decoded anew. It leaves out times, which a plain copy changes.
    state = hashlib.sha256((folder / "dataset_info.json").read_bytes())
    for file in files:
        state.update(f"{file.name} {file.stat().st_size}".encode())
    key = f"{name}-{VERSIONS[name]}-{split}-{state.hexdigest()[:16]}"
    return cached(key, lambda: _decode(name, split, folder))


def dataset_folder(name: str, data_dir: str | Path | None = None) -> Path:
    """Where TFDS keeps `name`: `data_dir`, else `TFDS_DATA_DIR`, else TFDS's default."""
    root = data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    return user_path(root) / name / VERSIONS[name]


def prepare(name: str, data_dir: str | Path | None = None, archives: str | Path | None = None):
    """Download a data set and write it in TFDS's format (once, on a machine with internet).

    Args:
      name: `cifar10` (TFDS's own builder; needs TensorFlow, extra `prepare`) or `gtsrb`
        (our builder, needs no TensorFlow).
      archives: folder with the three official archives of GTSRB, where they were
        downloaded by hand.

    Returns:
      The folder that was written (or was there already).
    """
    check_name("data set to prepare", name, VERSIONS)
    if archives is not None and name != "gtsrb":
        raise InputError(
            f"a folder of archives for {name}: expected gtsrb, whose archives are downloaded by "
            "hand; leave it out",
            argument="archives",
        )
    root = dataset_folder(name, data_dir).parent.parent
    import tensorflow_datasets as tfds

    if name == "gtsrb":
        from ibau_jax.data.gtsrb import ARCHIVES, Gtsrb

        for file in () if archives is None else ARCHIVES.values():
            if not (Path(archives or "") / file).is_file():
                raise InputError(
                    f"no official archive {file} in {str(archives)!r}: expected the three of "
                    f"{', '.join(ARCHIVES.values())}; download them, or leave the folder out",
                    argument="archives",
                )
        builder = Gtsrb(archives=archives, data_dir=root, file_format="array_record")
    else:
        try:
            import tensorflow  # noqa: F401  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise InputError(
                "preparing cifar10 needs TensorFlow, which is not installed: run "
                "pip install 'ibau_jax[prepare]' (reading the prepared data does not need it)"
            ) from error
        builder = tfds.builder("cifar10", data_dir=root, file_format="array_record")
    try:
        with contextlib.redirect_stdout(sys.stderr):  # TFDS tells its progress there
            builder.download_and_prepare()
    except Exception as error:
        raise InputError(
            f"could not prepare {name} in {root}: {_first_line(error)}; check the connection "
            "and the free space, then run the same command again"
        ) from error
    return Path(builder.data_dir)


def _decode(name: str, split: str, folder: Path) -> Arrays:
    import tensorflow_datasets as tfds  # takes seconds, so only when something is decoded

    try:
        builder: Any = tfds.builder_from_directory(folder)
        source = builder.as_data_source(split)
        records = source.__getitems__(range(len(source)))
        expected = builder.info.splits[split].num_examples
        if len(records) != expected:
            raise ValueError(f"expected {expected} records, found {len(records)}")
        return _ARRANGE[name](records)
    except Exception as error:
        raise InputError(
            f"the data set {name!r} in {folder} is damaged (split {split!r}: "
            f"{_first_line(error)}); delete that folder and run 'ibau prepare {name}'"
        ) from error


def _arrange_cifar10(records: list[dict]) -> Arrays:
    """The official order: by `id` (TFDS stores the records in an order of its own)."""
    records = sorted(records, key=lambda r: r["id"])
    return _stack([r["image"] for r in records], records)


def _arrange_gtsrb(records: list[dict]) -> Arrays:
    """Each image cropped to the annotated sign, as the paper's models were trained.

    On whole frames the published models lose 20 points of accuracy.
    """
    return _stack([crop(r["image"], r["bbox"]) for r in records], records)


_ARRANGE: dict[str, Callable[[list[dict]], Arrays]] = {
    "cifar10": _arrange_cifar10,
    "gtsrb": _arrange_gtsrb,
}


def _stack(images: list[np.ndarray], records: list[dict]) -> Arrays:
    return np.stack(images), np.array([r["label"] for r in records], np.int32)


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__
