"""The import of PyTorch files: read as data, never executed."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import unflatten_dict

from ibau_jax.errors import InputError
from ibau_jax.models.files import (
    PREFIXES,
    _existing,
    _few,
    _read_pth,
    _read_safetensors,
    _short,
    check_weights,
)


def convert_pth(path: str | Path) -> tuple[dict[str, Any], int, dict[str, Any]]:
    """Read a PyTorch checkpoint of the published `small_VGG16` (never executed).

    The layouts differ: kernels are [out, in, 3, 3] there, and the last layer reads channels
    first. See `ibau_reference`'s README for the table of layers.

    Args:
      path: a file that PyTorch wrote, whose tensors are at the top or under one of `STATES`, or
        a safetensors file with the same names (which needs no PyTorch). Names may begin with
        `PREFIXES`; float16 and bfloat16 become float32.

    Returns:
      Flax variables, the number of classes, and what else the file says (`acc`, `epoch`).

    Raises:
      InputError: PyTorch is missing, or the file is not such a checkpoint.
    """
    path = _existing(path)
    read = _read_safetensors if path.suffix == ".safetensors" else _read_pth
    state, extra = read(path)
    weights = _vgg_from_torch(state, str(path))
    bias = weights.get("params/classifier/bias", np.zeros(0))
    classes = bias.size if bias.ndim == 1 else 0
    check_weights(weights, "vgg", classes, str(path))
    return unflatten_dict(weights, sep="/"), classes, extra


# Place in the published `features` of each convolution; its batch norm comes next.
_TORCH_CONVOLUTIONS = (0, 3, 8, 11, 16, 19)


def _vgg_from_torch(state: Mapping[str, np.ndarray], where: str) -> dict[str, np.ndarray]:
    names = {}
    for i, place in enumerate(_TORCH_CONVOLUTIONS):
        names |= {
            f"features.{place}.weight": f"params/conv{i + 1}/kernel",
            f"features.{place}.bias": f"params/conv{i + 1}/bias",
            f"features.{place + 1}.weight": f"params/conv{i + 1}/scale",
            f"features.{place + 1}.bias": f"params/conv{i + 1}/offset",
            f"features.{place + 1}.running_mean": f"batch_stats/conv{i + 1}/mean",
            f"features.{place + 1}.running_var": f"batch_stats/conv{i + 1}/var",
        }
    names |= {
        "classifier.weight": "params/classifier/kernel",
        "classifier.bias": "params/classifier/bias",
    }
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
        name = names.get(name, name)
        if name in weights:
            raise InputError(
                f"{where!r} has the layer {_short(repr(given))} twice, with and without a prefix: "
                "expected one model"
            )
        weights[name] = value
    if not weights.keys() & set(names.values()):
        raise InputError(
            f"{where!r} does not fit the architecture 'vgg': expected names such as "
            f"features.0.weight and classifier.bias, found {_few(state)}"
        )
    return weights
