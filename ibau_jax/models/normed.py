"""Layers with batch norm in a model's variables, whoever wrote the model."""

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
from flax.traverse_util import flatten_dict, unflatten_dict

from ibau_jax.models.adapters.inside import natural
from ibau_jax.models.adapters.watch import Feeds
from ibau_jax.models.model import Model, Variables

Path = tuple[str, ...]


class Names(NamedTuple):
    """What a library calls the arrays of a batch norm and a kernel, and that as [h, w, in, out].

    Attributes:
      offsets: any of them.
    """

    var: str
    scale: str
    offsets: tuple[str, ...]
    kernel: str
    order: tuple[int, int, int, int]


# Our own offset has a bias of the convolution beside it; flax's is called so.
OURS = Names("var", "scale", ("offset", "bias"), "kernel", (0, 1, 2, 3))
TORCH = Names("running_var", "weight", ("bias",), "weight", (2, 3, 1, 0))


class Normed(NamedTuple):
    """A batch norm, and the convolution before it where that can be told.

    Attributes:
      name: of the module in `batch_stats`, parts joined by `/`.
      scale, offset: paths in `params`.
      var: path in `batch_stats`.
      channels: how many.
      kernel: path in `params`: in the same module (`ConvNormELU`), or in that whose output the
        batch norm is given (`fed_by`), or, where that was not looked for, in that of the same
        scope and number (`Conv_3` of `BatchNorm_3`) with as many channels; None: not known.
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
        """Its kernel as [height, width, in, out]."""
        return kernel.transpose(self.names.order)


def fed_by(model: Model, variables: Variables, images: jax.Array) -> dict[Path, Path] | None:
    """Of each part of a model, the part whose output it is given as it is (their paths).

    None: that cannot be seen.
    """
    if hasattr(model, "fed_by"):
        return model.fed_by(variables, images)  # pyright: ignore[reportAttributeAccessIssue]
    feeds = Feeds()

    def watch(next_call, args, kwargs, context):
        if context.method_name != "__call__":
            return next_call(*args, **kwargs)
        return feeds(context.module.path, context.module, next_call, args, kwargs)

    with nn.intercept_methods(watch):
        jax.eval_shape(lambda v, x: model(v, x), variables, images)
    return feeds.found or None


def normed_layers(variables: Variables, fed: Mapping[Path, Path] | None = None) -> list[Normed]:
    """All batch norms with a scale and an offset, in the order of their names and numbers.

    Args:
      fed: see `fed_by`; None: it is not known.
    """
    if not isinstance(variables["params"], Mapping):
        return []  # of Equinox, whose batch norms are objects
    params: dict[Path, Any] = flatten_dict(variables["params"])
    found = []
    for path in flatten_dict(variables.get("batch_stats", {})):
        module = path[:-1]
        names = next((names for names in (OURS, TORCH) if path[-1] == names.var), None)
        if names is None or (scale := module + (names.scale,)) not in params:
            continue
        offset = next((module + (n,) for n in names.offsets if module + (n,) in params), None)
        if offset is not None:
            layer = Normed("/".join(module), scale, offset, path, params[scale].size, None, names)
            found.append(layer._replace(kernel=_kernel(params, layer, fed)))
    return sorted(found, key=lambda layer: natural(layer.name))


def changed(variables: Variables, change: Callable[[dict[Path, Any]], Mapping[Path, Any]]) -> Any:
    """Variables with some parameters replaced: `change(params by path) -> replacements`."""
    params: dict[Path, Any] = flatten_dict(variables["params"])
    return {**variables, "params": unflatten_dict({**params, **change(params)})}


def _kernel(
    params: Mapping[Path, Any], layer: Normed, fed: Mapping[Path, Path] | None
) -> Path | None:
    module, name = layer.var[:-1], layer.names.kernel

    def fits(path: Path) -> bool:
        leaf = params.get(path)
        return leaf is not None and leaf.ndim == 4 and layer.hwio(leaf).shape[3] == layer.channels

    beside = module + (name,)
    if beside in params and params[beside].ndim == 4:
        return beside
    if fed is not None:
        kernel = (*fed.get(module, ()), name)
        return kernel if fits(kernel) else None
    number = re.search(r"\d+$", module[-1]) if module else None
    for path in params:
        if path[:-2] == module[:-1] and path[-1:] == (name,) and fits(path):
            other = re.search(r"\d+$", "".join(path[-2:-1]))
            if number and other and number[0] == other[0]:
                return path
    return None
