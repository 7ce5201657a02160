"""Layers with batch norm in a model's variables, whoever wrote the model."""

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from flax.traverse_util import flatten_dict, unflatten_dict

from ibau_jax.models.model import Variables

Path = tuple[str, ...]


class Names(NamedTuple):
    """What a library calls the arrays of a batch norm, and of a convolution.

    Attributes:
      offsets: any of them.
      outputs, inputs: axes of a kernel that count the channels given and read.
    """

    var: str
    scale: str
    offsets: tuple[str, ...]
    kernel: str
    outputs: int
    inputs: int


OURS = Names("var", "scale", ("offset", "bias"), "kernel", 3, 2)  # of ours, and of flax
TORCH = Names("running_var", "weight", ("bias",), "weight", 0, 1)


class Normed(NamedTuple):
    """A batch norm, and the convolution before it where that can be told.

    Attributes:
      name: of the module in `batch_stats`, parts joined by `/`.
      scale, offset: paths in `params`.
      var: path in `batch_stats`.
      channels: how many.
      kernel: path in `params`: in the same module (`ConvNormELU`), or in that of the same scope
        and number (`Conv_3` of `BatchNorm_3`, `conv1` of `bn1`) with as many channels, of numbers
        alone in that of the number before (`downsample.0` of `downsample.1`); None: not known.
      names: the library's.
    """

    name: str
    scale: Path
    offset: Path
    var: Path
    channels: int
    kernel: Path | None
    names: Names = OURS

    def hwio(self, kernel: Any) -> Any:
        """Its kernel as [height, width, C_in, C]."""
        return kernel.transpose(2, 3, 1, 0) if self.names is TORCH else kernel


def normed_layers(variables: Variables) -> list[Normed]:
    """All batch norms with a scale and an offset, in the order of their names and numbers."""
    params: dict[Path, Any] = flatten_dict(variables["params"])
    found = []
    for path in flatten_dict(variables.get("batch_stats", {})):
        module = path[:-1]
        names = next((names for names in (OURS, TORCH) if path[-1] == names.var), None)
        if names is None or module + (names.scale,) not in params:
            continue
        offset = next((module + (n,) for n in names.offsets if module + (n,) in params), None)
        if offset is not None:
            scale = module + (names.scale,)
            channels = params[scale].size
            found.append(Normed("/".join(module), scale, offset, path, channels, None, names))
    before = {_pattern(layer) for layer in found if _reads_what_is_normed(params, layer)}
    layers = [
        layer._replace(kernel=_kernel(params, layer, back=_pattern(layer) in before))
        for layer in found
    ]
    return sorted(layers, key=lambda layer: _natural(layer.name))


def changed(variables: Variables, change: Callable[[dict[Path, Any]], Mapping[Path, Any]]) -> Any:
    """Variables with some parameters replaced: `change(params by path) -> replacements`."""
    params: dict[Path, Any] = flatten_dict(variables["params"])
    return {**variables, "params": unflatten_dict({**params, **change(params)})}


def _kernel(params: Mapping[Path, Any], layer: Normed, back: bool) -> Path | None:
    """The kernel before a batch norm.

    Args:
      back: in these blocks a convolution reads what the batch norm of its number gives (`bn1`,
        then `conv1`, then `bn2`), so the one before has the number before.
    """
    names, module = layer.names, layer.var[:-1]
    beside = module + (names.kernel,)
    if beside in params and params[beside].ndim == 4:
        return beside
    if not module:
        return None
    number = _number(module[-1])
    if number is None:
        wanted = None
    else:
        wanted = number - (back or module[-1].isdigit())
    fitting = [
        path
        for path, leaf in _kernels(params, layer)
        if leaf.shape[names.outputs] == layer.channels and _number(path[-2]) == wanted
    ]
    return fitting[0] if fitting and (number is not None or len(fitting) == 1) else None


def _reads_what_is_normed(params: Mapping[Path, Any], layer: Normed) -> bool:
    """Does the convolution of the same number have its channels as inputs, and others as outputs?

    It then comes after the batch norm, as in a residual network with pre-activation.
    """
    names, module = layer.names, layer.var[:-1]
    if not module or module[-1].isdigit() or _number(module[-1]) is None:
        return False
    kernels = [
        leaf for path, leaf in _kernels(params, layer) if _number(path[-2]) == _number(module[-1])
    ]
    return any(leaf.shape[names.inputs] == layer.channels for leaf in kernels) and not any(
        leaf.shape[names.outputs] == layer.channels for leaf in kernels
    )


def _kernels(params: Mapping[Path, Any], layer: Normed) -> list[tuple[Path, Any]]:
    """Kernels of convolutions in modules of the same scope."""
    scope = layer.var[:-2]
    return [
        (path, leaf)
        for path, leaf in params.items()
        if path[:-2] == scope and path[-1] == layer.names.kernel and leaf.ndim == 4
        and len(path) == len(scope) + 2
    ]  # fmt: skip


def _pattern(layer: Normed) -> str:
    """The scope without its numbers: the same in blocks that are built alike."""
    return re.sub(r"\d+", "#", "/".join(layer.var[:-2]))


def _number(name: str) -> int | None:
    found = re.search(r"\d+$", name)
    return int(found[0]) if found else None


def _natural(name: str) -> list[Any]:
    return [int(p) if p.isdigit() else p for p in re.split(r"(\d+)", name)]
