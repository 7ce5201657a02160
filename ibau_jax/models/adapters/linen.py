"""Any `flax.linen` module as a model. (`model.Classifier` is for the architectures of our own.)

model = from_linen(module)
result = unlearn(model, module.init(key, images), clean, key=key)
"""

import dataclasses
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import flax.linen as nn
import jax
from flax.core import unfreeze

from ibau_jax.models.adapters.inside import (
    Call,
    dropped,
    is_map,
    joined,
    natural,
    normalised,
    others,
    stages,
    switches,
)
from ibau_jax.models.model import Variables
from ibau_jax.models.rewrite import on_cpu

Path = tuple[str, ...]


def from_linen(module: nn.Module, call: Call | None = None) -> "Linen":
    """A module as a model.

    Args:
      module: of images [N, H, W, C] in [0, 1]. Whether it trains is told by an argument of its call
        or by an attribute, of a name in `inside.ON` or `inside.OFF`; a module that has none is
        trained as it is.
      call: `call(module, images, train) -> logits` for another switch, or another call.
    """
    return Linen(module, call)


@dataclass(frozen=True, eq=False)
class Linen:
    """A linen module as `logits(variables, images)` that can also be trained and looked into.

    The variables are all that `module.init` returns: `params`, and as state any other collection.

    In training, `nn.BatchNorm` takes its statistics over the batch of all devices, and `nn.Dropout`
    draws one mask for it. Of a layer of the user's own that does so itself, the statistics are
    those of each device's rows (padding among them), and then the mean over the devices.

    Attributes:
      module, call: see `from_linen`.
      dropout: False: `nn.Dropout` drops nothing in training.
    """

    module: nn.Module
    call: Call | None = None
    dropout: bool = True

    def __call__(self, variables: Variables, images: jax.Array) -> jax.Array:
        """[N, H, W, C] in [0, 1] -> [N, num_classes], in evaluation mode."""
        return on_cpu(lambda v, x: self._apply(v, x, False))(variables, images)

    def look(self, variables: Variables, images: jax.Array) -> tuple[jax.Array, list[jax.Array]]:
        """Logits and maps in evaluation mode.

        The maps are what the module sows as `intermediates`, in the order of the names, where it
        sows maps; else those of `inside.stages`.
        """

        def apply(variables, images):
            return self._with_maps(variables, images, False, [])[:2]

        return on_cpu(apply)(variables, images)

    def train(
        self,
        variables: Variables,
        images: jax.Array,
        key: jax.Array,
        weights: jax.Array | None = None,
        axis: str | None = None,
    ) -> tuple[jax.Array, list[jax.Array], Variables]:
        """Logits, maps, and the other collections updated, in training mode; see `Model`."""

        def apply(variables, images, key, weights):
            names = others(variables)
            spread = Spread(weights, axis, self.dropout)
            with nn.intercept_methods(spread):
                # `params` is whatever else a module draws from.
                found = self._with_maps(
                    variables, images, True, names, rngs={"dropout": key, "params": key}
                )
            logits, maps, state = found
            # A collection that the module has not touched is not among them.
            state = {name: state.get(name, variables[name]) for name in names}
            return logits, maps, joined(state, axis)

        return on_cpu(apply)(variables, images, key, weights)

    def init(self, key: jax.Array, images: jax.Array) -> Variables:
        """Fresh variables for images like these."""
        module, arguments = self._mode(False)
        method = None if self.call is None else lambda m, x: self._called(m, x, False)
        return unfreeze(module.init(key, images, method=method, **arguments))

    def without_dropout(self) -> "Linen":
        """The same, whose training drops nothing."""
        return dataclasses.replace(self, dropout=False)

    def _apply(self, variables, images, train: bool, **options: Any) -> Any:
        module, arguments = self._mode(train)
        method = None if self.call is None else lambda m, x: self._called(m, x, train)
        return module.apply(variables, images, method=method, **arguments, **options)

    def _called(self, module, images, train: bool) -> jax.Array:
        assert self.call is not None
        return self.call(module, images, train)

    def _mode(self, train: bool) -> tuple[nn.Module, dict[str, bool]]:
        """The module and the arguments of its call in a mode."""
        if self.call is not None:
            return self.module, {}
        arguments = switches(train, inspect.signature(type(self.module).__call__).parameters)
        fields: dict[str, bool | None] = {**switches(train, _fields(self.module))}
        # Where a switch is both, flax wants one of them to be left open.
        fields |= {name: None for name in fields if name in arguments}
        return cast(Any, self.module).clone(**fields), arguments

    def _with_maps(self, variables, images, train, mutable, **options):
        """Logits, maps, and what is `mutable` of the collections, or was sown."""
        order: list[Path] = []

        def note(module: nn.Module, method: str) -> bool:
            if method == "__call__":
                order.append(module.path)
            return method == "__call__"

        logits, found = self._apply(
            variables, images, train,
            capture_intermediates=note, mutable=[*mutable, "intermediates"], **options,
        )  # fmt: skip
        seen = found.get("intermediates", {})
        sown = [one for one in _sown(seen) if is_map(one, images)]
        return logits, sown or stages(_in_order(seen, order, variables["params"]), images), found


class Spread:
    """An interceptor of flax's methods, for training: batch norm and dropout over all devices."""

    def __init__(self, weights: jax.Array | None, axis: str | None, dropout: bool):
        self.weights, self.axis, self.dropout = weights, axis, dropout

    def __call__(self, next_call, args, kwargs, context):
        module = context.module
        if context.method_name != "__call__":
            return next_call(*args, **kwargs)
        if isinstance(module, nn.Dropout) and not self.dropout:
            return args[0]
        spread = self.axis is not None or self.weights is not None
        if spread and isinstance(module, nn.Dropout | nn.BatchNorm):
            names = list(inspect.signature(type(module).__call__).parameters)[1:]
            given = dict(zip(names, args, strict=False)) | kwargs
            over: Any = _dropout if isinstance(module, nn.Dropout) else _norm
            return over(module, self, given, lambda: next_call(*args, **kwargs))
        return next_call(*args, **kwargs)


def _dropout(module: nn.Dropout, spread: Spread, given, as_it_is):
    off = nn.merge_param("deterministic", module.deterministic, given.get("deterministic"))
    if off or not module.rate or 0 in module.broadcast_dims:
        return as_it_is()
    key = given.get("rng")
    key = module.make_rng(module.rng_collection) if key is None else key
    return dropped(given["inputs"], module.rate, module.broadcast_dims, key, spread.axis)


def _norm(module: nn.BatchNorm, spread: Spread, given, as_it_is):
    off = nn.merge_param(
        "use_running_average", module.use_running_average, given.get("use_running_average")
    )
    if off or not module.has_variable("batch_stats", "mean"):
        return as_it_is()
    x, (scale, bias) = (
        given["x"],
        (
            module.get_variable("params", name) if module.has_variable("params", name) else None
            for name in ("scale", "bias")
        ),
    )
    y, *moments = normalised(
        x, module.axis, spread.weights, spread.axis, module.epsilon, scale, bias
    )
    for name, new in zip(("mean", "var"), moments, strict=True):
        old = module.get_variable("batch_stats", name)
        new = module.momentum * old + (1 - module.momentum) * new.astype(old.dtype)
        module.put_variable("batch_stats", name, new)
    return y if module.dtype is None else y.astype(module.dtype)


def _fields(module: nn.Module) -> list[str]:
    return [field.name for field in dataclasses.fields(module) if field.name != "name"]


def _sown(seen: Mapping[str, Any]) -> list[Any]:
    """What modules sowed themselves, in the order of the names."""
    found = []
    for name in sorted(seen, key=natural):
        if name != "__call__":
            one = seen[name]
            found += _sown(one) if isinstance(one, Mapping) else one
    return found


def _in_order(seen: Mapping[str, Any], order: list[Path], params: Mapping[str, Any]) -> list[Any]:
    """The outputs of modules with parameters, in the order in which they were computed."""
    found, times = [], {}
    for path in order:
        number = times[path] = times.get(path, -1) + 1
        outputs = _at(seen, (*path, "__call__"))
        if outputs is not None and number < len(outputs) and _at(params, path):
            found.append(outputs[number])
    return found


def _at(tree: Any, path: Path) -> Any:
    for name in path:
        if not isinstance(tree, Mapping) or name not in tree:
            return None
        tree = tree[name]
    return tree
