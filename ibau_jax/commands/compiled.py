"""Compiled programs are kept in the user's cache folder: a second run starts sooner."""

import contextlib
import hashlib
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from ibau_jax.files import cache_folder

LARGEST = 2**30  # bytes, of the folder; the least recently used go first


def keep_programs() -> None:
    """Turn JAX's persistent compilation cache on, before JAX is imported.

    What the user's environment says of it comes first; `JAX_ENABLE_COMPILATION_CACHE=false` turns
    it off.
    """
    for name, value in {
        "JAX_COMPILATION_CACHE_DIR": str(programs_folder()),
        "JAX_COMPILATION_CACHE_MAX_SIZE": str(LARGEST),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
    }.items():
        os.environ.setdefault(name, value)


def programs_folder() -> Path:
    """A folder for this kind of machine and this version of XLA.

    A program for a CPU with other instructions crashes, and home folders are shared on clusters
    (jax-ml/jax#38445 tells of what JAX itself checks).
    """
    parts = [platform.system(), platform.machine()]
    with contextlib.suppress(PackageNotFoundError):
        parts.append(version("jaxlib"))
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        parts += sorted({line for line in lines if line.startswith(("flags", "Features"))})
    kind = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
    return cache_folder() / "programs" / kind
