"""Cleaned weights in the file that they came in."""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ibau_jax.errors import InputError
from ibau_jax.files import atomic_path
from ibau_jax.models.checkpoints.names import STATES
from ibau_jax.models.checkpoints.reading import Container


def write_checkpoint(path: str | Path, container: Container, state: Mapping[str, Any]) -> str:
    """Write a state dict to `path` as `container` held its own.

    A plain file keeps all else that it held; other state dicts of the same names beside it
    (averaged weights and those of the last step) are replaced too, since they have the backdoor.
    Of a file with objects that were not read, `model_name` and `num_classes` are kept and the state
    dict lies under `model`, as BackdoorBench writes a defended model; where it had neither, the
    state dict is all.

    Returns:
      A line on what differs from the file that was read, for the user; "" where nothing does.

    Raises:
      InputError: the file cannot be written.
    """
    import torch

    path, told = Path(path), []
    if container.kind == "safetensors":
        from safetensors.torch import save

        metadata = dict(container.metadata) or {"format": "pt"}
        whole = {name: value.detach().clone().contiguous() for name, value in state.items()}
        with atomic_path(path) as temporary:
            temporary.write_bytes(save(whole, metadata))
        return ""
    if container.kind == "plain":
        content, told = _replaced(container, state)
    else:
        names = {
            k: container.content[k] for k in ("model_name", "num_classes") if k in container.content
        }
        content = {**names, "model": state} if names else state
        what = "a TorchScript" if container.kind == "torchscript" else "other objects than weights"
        form = f"{', '.join([*names, 'model'])}" if names else "the state dict alone"
        told = [f"{container.path!r} holds {what}, which are not written back: the file has {form}"]
    try:
        with atomic_path(path) as temporary, temporary.open("wb") as file:
            torch.save(content, file)  # which refuses some names of files
    except (OSError, RuntimeError) as error:
        raise InputError(f"cannot write {str(path)!r}: {str(error).splitlines()[0]}") from error
    return "; ".join(told)


def _replaced(container: Container, state: Mapping[str, Any]) -> tuple[Any, list[str]]:
    if not container.place:
        return state, []
    *way, last = container.place
    content = copy.copy(container.content)
    inner = content
    for key in way:
        inner[key] = copy.copy(inner[key])
        inner = inner[key]
    inner[last] = state
    told = []
    for key in STATES:
        other = inner.get(key)
        if key != last and isinstance(other, Mapping) and other.keys() == container.state.keys():
            inner[key] = state
            told.append(f"{key!r} has the cleaned weights too")
    stale = [k for k in content if any(word in str(k).lower() for word in ("optim", "sched"))]
    if stale:
        told.append(f"{stale[0]!r} is as it was, of the training before")
    return content, told
