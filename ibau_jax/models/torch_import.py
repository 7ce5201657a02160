"""The import of PyTorch files: read as data, never executed."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
from flax.traverse_util import unflatten_dict

from ibau_jax.errors import InputError, first_line
from ibau_jax.models.checkpoints.names import PREFIXES, STATES, find_state
from ibau_jax.models.files import (
    FLOATS,
    FORMAT,
    check_weights,
    existing,
    few,
    read_tensors,
    short,
)


def _read_pth(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Tensors by name as float32, and what else the file says."""
    try:
        import torch
    except ImportError as error:
        raise InputError(
            "reading a .pth file needs PyTorch, which is not installed: run "
            "pip install 'ibau_jax[torch]'"
        ) from error
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many types on a damaged or refused file
        raise InputError(
            f"cannot read {str(path)!r}: {first_line(error)[:200]}; expected a PyTorch file that "
            "holds only tensors and plain values (anything else is refused and never executed)"
        ) from error
    state = content
    for key in find_state(content, lambda value: _holds_tensors(value, torch.Tensor)) or ():
        state = state[key]
    places = ", ".join(STATES)
    if not isinstance(state, dict):
        raise InputError(
            f"{str(path)!r} holds {type(content).__name__}: expected a dict of tensors, or a dict "
            f"with such a dict under one of {places}"
        )
    tensors = {str(k): v for k, v in state.items() if isinstance(v, torch.Tensor)}
    if not tensors:
        raise InputError(
            f"{str(path)!r} holds no tensors: expected them at the top or under one of {places}, "
            f"found the keys {few(state)}"
        )
    arrays = {}
    for name, value in tensors.items():
        try:
            if value.is_complex():
                raise ValueError(f"its values are {value.dtype}")
            arrays[name] = value.detach().to(torch.float32).numpy()
        except Exception as error:  # sparse, quantised, on no device
            raise InputError(
                f"cannot read the tensor {short(repr(name))} of {str(path)!r}: "
                f"{short(str(error), 120)}; expected plain numbers"
            ) from error
    outer = content if isinstance(content, dict) else {}
    return arrays, {k: outer[k] for k in ("acc", "epoch") if type(outer.get(k)) in (int, float)}


def _holds_tensors(value: Any, kind: type) -> bool:
    return isinstance(value, dict) and any(isinstance(v, kind) for v in value.values())


def _read_safetensors(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Tensors by name as float32, and nothing else."""
    import ml_dtypes  # noqa: F401  (comes with JAX; by it NumPy knows bfloat16)

    try:
        with safetensors.safe_open(path, framework="np") as file:
            metadata = file.metadata() or {}
            arrays = read_tensors(file, str(path), (*FLOATS, "BF16", "I64"))
    except InputError:
        raise
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise InputError(
            f"cannot read {str(path)!r}: {error}; expected a whole safetensors file"
        ) from error
    if FORMAT in metadata:
        raise InputError(
            f"{str(path)!r} is a model file already: expected one with PyTorch's names of layers; "
            "use it as it is"
        )
    return arrays, {}


def convert_pth(path: str | Path) -> tuple[dict[str, Any], int, dict[str, Any]]:
    """Read a PyTorch checkpoint of the published `small_VGG16` (never executed).

    The layouts differ: kernels are [out, in, 3, 3] there, and the last layer reads channels
    first. See `ibau_reference`'s README for the table of layers.

    Args:
      path: a file that PyTorch wrote, whose tensors are at the top or under one of `STATES`, or
        a safetensors file with the same names (which needs no PyTorch). Names may begin with
        `PREFIXES`; float16 and bfloat16 become float32. See `checkpoints.names`.

    Returns:
      Flax variables, the number of classes, and what else the file says (`acc`, `epoch`).

    Raises:
      InputError: PyTorch is missing, or the file is not such a checkpoint.
    """
    path = existing(path)
    read = _read_safetensors if path.suffix == ".safetensors" else _read_pth
    state, extra = read(path)
    weights = _vgg_from_torch(state, str(path))
    bias = weights.get("params/classifier/bias", np.zeros(0))
    classes = bias.size if bias.ndim == 1 else 0
    check_weights(weights, "vgg", classes, str(path))
    return unflatten_dict(weights, sep="/"), classes, extra


def _names() -> dict[str, str]:
    names = {
        "classifier.weight": "params/classifier/kernel",
        "classifier.bias": "params/classifier/bias",
    }
    # Place in the published `features` of each convolution; its batch norm comes next.
    for i, place in enumerate((0, 3, 8, 11, 16, 19)):
        names |= {
            f"features.{place}.weight": f"params/conv{i + 1}/kernel",
            f"features.{place}.bias": f"params/conv{i + 1}/bias",
            f"features.{place + 1}.weight": f"params/conv{i + 1}/scale",
            f"features.{place + 1}.bias": f"params/conv{i + 1}/offset",
            f"features.{place + 1}.running_mean": f"batch_stats/conv{i + 1}/mean",
            f"features.{place + 1}.running_var": f"batch_stats/conv{i + 1}/var",
        }
    return names


VGG_NAMES = _names()  # of the published checkpoints -> ours


def _vgg_from_torch(state: Mapping[str, np.ndarray], where: str) -> dict[str, np.ndarray]:
    weights = {}
    for given, value in state.items():
        name = given
        while prefix := next((p for p in PREFIXES if name.startswith(p)), None):
            name = name.removeprefix(prefix)
        if name.endswith("num_batches_tracked"):
            continue
        if value.ndim == 4:
            value = value.transpose(2, 3, 1, 0)
        elif name == "classifier.weight" and value.shape[-1:] == (2048,):
            # PyTorch flattens (C, H, W), flax (H, W, C).
            value = value.reshape(-1, 128, 4, 4).transpose(2, 3, 1, 0).reshape(2048, -1)
        name = VGG_NAMES.get(name, name)
        if name in weights:
            raise InputError(
                f"{where!r} has the layer {short(repr(given))} twice, with and without a prefix: "
                "expected one model"
            )
        weights[name] = value
    if not weights.keys() & set(VGG_NAMES.values()):
        raise InputError(
            f"{where!r} does not fit the architecture 'vgg': expected names such as "
            f"features.0.weight and classifier.bias, found {few(state)}"
        )
    return weights
