"""`cleaned.safetensors` of a model of the user's own: its weights, and what they want.

Beside the file in the format that came in, since that one says nothing of the normalisation. It
names the user's code and never runs it.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from ibau_jax.commands.options import OwnModel
from ibau_jax.errors import InputError
from ibau_jax.files import atomic_path, to_json

KEY = "ibau_jax model of your own"
TEXTS = ("library", "code", "mean", "std")


def save_own(path: Path, tensors: Mapping[str, Any], about: Mapping[str, Any]) -> Path:
    """Write the arrays of a model by name, and what `open_model` said of it (`info["own"]`)."""
    arrays = {name: np.asarray(_plain(value), order="C") for name, value in tensors.items()}
    kind = "pt" if about["library"] == "torch" else "np"
    data = safetensors.numpy.save(arrays, {"format": kind, KEY: to_json(dict(about))})
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)
    return path


def add_to(path: Path, about: Mapping[str, Any]) -> None:
    """Write the same into a safetensors file that is there, its arrays as they are."""
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    header.setdefault("__metadata__", {})[KEY] = to_json(dict(about))
    text = to_json(header).encode()
    text += b" " * (-len(text) % 8)
    with atomic_path(path) as temporary:
        temporary.write_bytes(len(text).to_bytes(8, "little") + text + data[end:])


def _plain(value: Any) -> np.ndarray:
    """Floats of 16 bits as float32, which every reader has."""
    array = np.asarray(value)
    narrow = array.dtype.itemsize < 4 and array.dtype.kind not in "biu"
    return array.astype(np.float32) if narrow else array


def remembered(path: str | Path, own: OwnModel) -> OwnModel:
    """The options with what such a file says of them where they are not given.

    Raises:
      InputError: no code is named, or that of another library; or what the file says is damaged.
    """
    about = _about(Path(path))
    if about is None:
        return own
    library = about["library"]
    if getattr(own, library, None) is None:
        raise InputError(
            f"{str(path)!r} has the weights of a model of your own, whose code is not in it: give "
            f"--{library} {about['code']}, or where it is now, to import and run it"
        )
    known = {name: about.get(name) for name in ("mean", "std")}
    known["model_args"] = json.dumps(about["arguments"])
    given = {k: v for k, v in vars(own).items() if v is not None}
    return OwnModel(**{**known, **given})


def _about(path: Path) -> dict[str, Any] | None:
    """What a file says of itself; None where it is another kind of file."""
    if path.suffix != ".safetensors" or not path.is_file():
        return None
    try:
        with safetensors.safe_open(path, framework="np") as file:
            text = (file.metadata() or {}).get(KEY)
    except Exception:  # a damaged one: its reader says so
        return None
    if text is None:
        return None
    try:
        about = json.loads(text)
        texts = all(isinstance(about.get(name, ""), str) for name in TEXTS)
        if texts and "code" in about and isinstance(about["arguments"], dict):
            if about["library"] in OwnModel.__dataclass_fields__:
                return about
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pass
    raise InputError(
        f"what {str(path)!r} says of its model is damaged: make it again with 'ibau defend', or "
        "take the weights in their own format"
    )
