"""Layers with batch norm in a model's variables, whoever wrote the model."""

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from flax.traverse_util import flatten_dict, unflatten_dict

from ibau_jax.models.model import Variables

Path = tuple[str, ...]
OFFSETS = ("offset", "bias")  # ours, which has a bias of the convolution beside it; flax's


class Normed(NamedTuple):
    """A batch norm, and the convolution before it where that can be told.

    Attributes:
      name: of the module in `batch_stats`, parts joined by `/`.
      scale, offset: paths in `params`.
      var: path in `batch_stats`.
      channels: how many.
      kernel: path in `params`: in the same module (`ConvNormELU`), or in that of the same scope
        and number (`Conv_3` of `BatchNorm_3`) with as many channels; None: not known.
    """

    name: str
    scale: Path
    offset: Path
    var: Path
    channels: int
    kernel: Path | None


def normed_layers(variables: Variables) -> list[Normed]:
    """All batch norms with a scale and an offset, in the order of their names and numbers."""
    params: dict[Path, Any] = flatten_dict(variables["params"])
    found = []
    for path in flatten_dict(variables.get("batch_stats", {})):
        module = path[:-1]
        offset = next((module + (n,) for n in OFFSETS if module + (n,) in params), None)
        if path[-1] == "var" and module + ("scale",) in params and offset is not None:
            scale = module + ("scale",)
            channels = params[scale].size
            kernel = _kernel(params, module, channels)
            found.append(Normed("/".join(module), scale, offset, path, channels, kernel))
    return sorted(found, key=lambda layer: _natural(layer.name))


def changed(variables: Variables, change: Callable[[dict[Path, Any]], Mapping[Path, Any]]) -> Any:
    """Variables with some parameters replaced: `change(params by path) -> replacements`."""
    params: dict[Path, Any] = flatten_dict(variables["params"])
    return {**variables, "params": unflatten_dict({**params, **change(params)})}


def _kernel(params: Mapping[Path, Any], module: Path, channels: int) -> Path | None:
    beside = module + ("kernel",)
    if beside in params and params[beside].ndim == 4:
        return beside
    number = re.search(r"\d+$", module[-1]) if module else None
    for path, leaf in params.items():
        same = path[:-2] == module[:-1] and path[-1:] == ("kernel",)
        if same and leaf.ndim == 4 and leaf.shape[-1] == channels:
            other = re.search(r"\d+$", "".join(path[-2:-1]))
            if number and other and number[0] == other[0]:
                return path
    return None


def _natural(name: str) -> list[Any]:
    return [int(p) if p.isdigit() else p for p in re.split(r"(\d+)", name)]
