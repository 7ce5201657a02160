"""A PyTorch file as a state dict and what is around it."""

import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ibau_jax.errors import InputError, first_line, printable
from ibau_jax.files import user_path
from ibau_jax.models.checkpoints import inert
from ibau_jax.models.checkpoints.names import STATES, find_state
from ibau_jax.models.files import existing, few, short


@dataclass(frozen=True)
class Container:
    """What a file held.

    Attributes:
      path: of the file.
      kind: `plain` (tensors and plain values), `foreign` (other objects, or a whole module),
        `torchscript` or `safetensors`.
      state: the state dict as it was: keys with their prefix, order, dtypes.
      content: all that was read of a plain file, else the plain values beside the state dict.
      place: the keys that lead to `state` in `content`.
      metadata: of safetensors.
      tied: see `TorchModel.tied`; filled in by who knows the module.
    """

    path: str
    kind: str
    state: Mapping[str, Any]
    content: Any = None
    place: tuple[str, ...] = ()
    metadata: Mapping[str, str] = field(default_factory=dict)
    tied: tuple[tuple[str, str], ...] = ()


def read_checkpoint(path: str | Path) -> Container:
    """Read a file of PyTorch's: a state dict, a dict that holds one, a whole module, a TorchScript.

    Nothing in it is executed: what `torch.load(weights_only=True)` refuses is read by
    `inert.Unpickler`. Safetensors files are read too.

    Raises:
      InputError: PyTorch is missing, or the file is damaged or holds no state dict.
    """
    from ibau_jax.models.adapters.torch_pass import need_torch

    torch = need_torch()
    path = existing(user_path(path))
    if path.suffix == ".safetensors":
        return _safetensors(path)
    try:
        if zipfile.is_zipfile(path) and _is_script(path):
            raise pickle.UnpicklingError("a TorchScript")
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # torch raises many types on a file that it refuses
        return _inert(path)
    place = find_state(content, _is_state)
    state = _at(content, place, path)
    return Container(str(path), "plain", state, content, place or ())


def _safetensors(path: Path) -> Container:
    import safetensors
    from safetensors.torch import load_file

    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
        state = load_file(path)
    except Exception as error:
        raise InputError(
            f"cannot read {str(path)!r}: {short(first_line(error), 150)}; expected a whole "
            "safetensors file"
        ) from error
    if not state:
        raise InputError(f"{str(path)!r} holds no tensors: expected the weights of a module")
    return Container(str(path), "safetensors", state, metadata=metadata)


def _inert(path: Path) -> Container:
    script = False
    if zipfile.is_zipfile(path):
        content, stored, script = inert.read_archive(path)
    else:
        content, stored = inert.read_old(path)
    place = find_state(content, _is_inert_state)
    found = _at(content, place, path)
    named = _named(found) if isinstance(found, inert.Stub) else dict(found)
    numbers: dict[inert.Stored, Any] = dict(stored)
    state = OrderedDict()
    for name, value in named.items():
        try:
            state[str(name)] = (
                inert.tensor(value, numbers) if isinstance(value, inert.Weights) else value
            )
        except Exception as error:
            raise InputError(
                f"cannot read the tensor {short(repr(name))} of {str(path)!r}: "
                f"{short(printable(first_line(error)), 120)}; expected a whole PyTorch file"
            ) from error
    around = dict(content) if isinstance(content, Mapping) and place else {}
    plain = {k: v for k, v in around.items() if type(v) in (str, int, float, bool)}
    kind = "torchscript" if script else "foreign"
    return Container(str(path), kind, state, plain, place or ())


def _is_script(path: Path) -> bool:
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def _at(content: Any, place: tuple[str, ...] | None, path: Path) -> Any:
    if place is None:
        found = f"the keys {few(content)}" if isinstance(content, Mapping) else _kind(content)
        raise InputError(
            f"{str(path)!r} holds no state dict: expected tensors by name, at the top or under one "
            f"of {', '.join(STATES)}, or a module; found {found}"
        )
    for key in place:
        content = content[key]
    return content


def _kind(content: Any) -> str:
    if isinstance(content, inert.Stub):
        return short(printable(".".join(content.origin)))
    return type(content).__name__


def _is_state(value: Any) -> bool:
    import torch

    return isinstance(value, Mapping) and any(isinstance(v, torch.Tensor) for v in value.values())


def _is_inert_state(value: Any) -> bool:
    if isinstance(value, inert.Stub):
        return bool(_named(value))
    return isinstance(value, Mapping) and any(isinstance(v, inert.Weights) for v in value.values())


def _named(module: inert.Stub) -> dict[str, inert.Weights]:
    """The state dict of a module that was pickled whole, or of one of a TorchScript.

    In the order of `state_dict()`: a module's own parameters, its buffers, then its submodules.
    """
    found: dict[str, inert.Weights] = {}
    left, seen = [("", module)], set()
    while left:
        prefix, one = left.pop()
        if id(one) in seen or not isinstance(one.state, dict):
            continue
        seen.add(id(one))
        state, hidden = one.state, one.state.get("_non_persistent_buffers_set", ())
        hidden = hidden if isinstance(hidden, set) else ()
        parts = [state.get(name) for name in ("_parameters", "_buffers", "_modules")]
        parts = [part for part in parts if isinstance(part, dict)] or [state]
        inside = []
        for name, value in (item for part in parts for item in part.items()):
            if isinstance(value, inert.Weights) and name not in hidden:
                found[f"{prefix}{name}"] = value
            elif isinstance(value, inert.Stub):
                inside.append((f"{prefix}{name}.", value))
        left.extend(reversed(inside))
    return found
