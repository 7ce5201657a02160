"""Decoded images in the user's cache folder, memory-mapped and checked when they are opened."""

import json
import logging
import os
import shutil
import tempfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from ibau_jax.files import cache_folder

Arrays = tuple[np.ndarray, np.ndarray]
log = logging.getLogger(__name__)


def cached(key: str, decode: Callable[[], Arrays]) -> Arrays:
    """The arrays stored under `key`; the first time (or when the copy is damaged) from `decode`.

    Args:
      key: names the source and its state; another state of the source needs another key.
      decode: gives two arrays, such as images uint8 [N, H, W, C] and labels int32 [N].

    Returns:
      Read-only memory maps of the two arrays, or the arrays themselves where the cache
      cannot be written.
    """
    folder = cache_folder() / key
    stored = _open(folder)
    if stored is not None:
        return stored
    arrays = decode()
    try:
        _store(folder, arrays)
    except OSError as error:
        log.warning("no decoded copy is kept: cannot write %s (%s)", folder, error)
        return arrays
    return _open(folder) or arrays


def _open(folder: Path) -> Arrays | None:
    try:
        checks = json.loads((folder / "checks.json").read_text())
        images = np.load(folder / "images.npy", mmap_mode="r")
        labels = np.load(folder / "labels.npy", mmap_mode="r")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, EOFError):
        checks, images, labels = None, np.empty(0), np.empty(0)
    if checks == checksums((images, labels)):
        return images, labels
    log.warning("the decoded copy in %s is damaged: made again", folder)
    return None


def _store(folder: Path, arrays: Arrays) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        np.save(temporary / "images.npy", arrays[0])
        np.save(temporary / "labels.npy", arrays[1])
        (temporary / "checks.json").write_text(json.dumps(checksums(arrays)))
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def checksums(arrays: Sequence[np.ndarray]) -> list[int]:
    """CRC-32 of each array: finds damage at about 1 GB/s; it is no guard against an attacker."""
    return [zlib.crc32(np.ascontiguousarray(a).view(np.uint8).reshape(-1).data) for a in arrays]
