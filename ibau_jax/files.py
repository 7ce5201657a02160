"""What is read and written: paths as a user names them, whole files, strict JSON."""

import contextlib
import json
import math
import os
import secrets
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import platformdirs

from ibau_jax.errors import InputError


def cache_folder() -> Path:
    """`IBAU_CACHE`, else the user's cache folder of this operating system."""
    return user_path(os.environ.get("IBAU_CACHE") or platformdirs.user_cache_dir("ibau_jax"))


def user_path(path: str | Path) -> Path:
    """A path that a user named, where `~` is the home folder (no shell has seen it).

    Raises:
      InputError: it begins with `~NAME`, and there is no such user.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise InputError(
            f"cannot find the home folder of {str(path)!r}: expected ~ or the name of a user after "
            "it; write ./~NAME where the folder itself is called so"
        ) from error


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path in the folder of `path`; rename it to `path` on success.

    An exception (or a kill) in between leaves what was at `path` before.

    Raises:
      InputError: the folder cannot be made or written to.
    """
    path = Path(path)
    make_folder(path.parent)
    temporary = path.with_name(f".ibau-{secrets.token_hex(8)}")
    # Not by `tempfile`, whose files are private: the kernel takes the umask from this mode. (It
    # could be asked for the umask only by setting it, for all threads.)
    os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Write `text` (UTF-8) to `path`, whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def make_folder(path: str | Path, argument: str | None = None) -> Path:
    """Make `path` and its parents, and check that files can be written in it.

    Args:
      argument: of which function or command it comes, for the error.

    Raises:
      InputError: it cannot be made, is not a folder, or cannot be written to.
    """
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path):
            pass
    except OSError as error:
        raise InputError(
            f"cannot write in the folder {str(path)!r}: {error.strerror or error}; choose another "
            "one, or change its permissions",
            argument=argument,
        ) from error
    return path


def to_json(value: Any) -> str:
    """`value` as strict JSON in one line of ASCII.

    NumPy scalars and arrays become numbers and lists; NaN and infinity, which JSON does not know,
    become null; what is none of JSON's kinds becomes its `repr`.
    """
    return json.dumps(_plain(value), allow_nan=False)


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic | np.ndarray):
        value = value.tolist()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, str | int):
        return value
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return repr(value)
