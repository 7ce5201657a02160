"""A module of `flax.nnx` as a model, and back.

model, variables = from_nnx(module)
result = unlearn(model, variables, clean, key=key)
cleaned = to_nnx(module, result.params)
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

from ibau_jax.errors import InputError
from ibau_jax.models.adapters.inside import (
    Call,
    dropped,
    fits,
    joined,
    normalised,
    others,
    stages,
    switches,
)
from ibau_jax.models.adapters.watch import Feeds, Path, watching
from ibau_jax.models.model import Variables
from ibau_jax.models.rewrite import on_cpu


def from_nnx(module: nnx.Module, call: Call | None = None) -> tuple["NNX", Variables]:
    """A module as a model, and its variables.

    Args:
      module: of images [N, H, W, C] in [0, 1]; it is not changed. Whether it trains is told by
        attributes of it and of its parts, or by an argument of its call, of a name in `inside.ON`
        or `inside.OFF`.
      call: `call(module, images, train) -> logits` for another call.

    Returns:
      The model, and its variables as nested dicts by the names of attributes: `params` (`nnx.Param`
      in floating point), `batch_stats` (`nnx.BatchStat`), and `state` (other variables and arrays).
      The state of random numbers is none of them: a training draws from its own key.

    Raises:
      InputError: it is no module of NNX.
    """
    if not isinstance(module, nnx.Module):
        raise InputError(
            f"expected a module of flax.nnx, found a {type(module).__name__}; a linen module is "
            "for ibau_jax.models.adapters.linen.from_linen"
        )
    graph, state = nnx.split(nnx.clone(module))
    model = NNX(graph, dict(nnx.to_flat_state(state)), call)
    return model, model.collected(model.leaves)


def to_nnx(module: nnx.Module, variables: Mapping[str, Any]) -> nnx.Module:
    """A copy of the module with the values of `variables`, in its own dtypes."""
    model, own = from_nnx(module)
    if not fits(dict(variables), own):
        raise InputError(
            "the variables do not fit the module: expected the collections, names and shapes of "
            "from_nnx(module); give the module that they are of"
        )
    cast = jax.tree.map(lambda new, old: jnp.asarray(new, old.dtype), dict(variables), own)
    return model.merged(cast)


@dataclass(frozen=True, eq=False)
class NNX:
    """An NNX module as `logits(variables, images)` that can also be trained and looked into.

    In training, `nnx.BatchNorm` takes its statistics over the batch of all devices, and
    `nnx.Dropout` draws one mask for it. Of a layer of the user's own that does so itself, the
    statistics are those of each device's rows (padding among them), and then the mean over the
    devices.

    Attributes:
      graph, leaves: the module apart: what is no array, and its variables by path.
      call: see `from_nnx`.
      dropout: False: `nnx.Dropout` drops nothing in training.
    """

    graph: Any
    leaves: Mapping[tuple[Any, ...], Any]
    call: Call | None = None
    dropout: bool = True

    def __call__(self, variables: Variables, images: jax.Array) -> jax.Array:
        """[N, H, W, C] in [0, 1] -> [N, num_classes], in evaluation mode."""
        return on_cpu(lambda v, x: self._run(self.merged(v), x, False))(variables, images)

    def look(self, variables: Variables, images: jax.Array) -> tuple[jax.Array, list[jax.Array]]:
        """Logits and maps (see `inside.stages`) in evaluation mode."""

        def apply(variables, images):
            module, seen = self.merged(variables), []
            with watching(nnx.iter_modules(module), functools.partial(_record, seen)):
                logits = self._run(module, images, False)
            return logits, stages(seen, images)

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
            module, seen = self.merged(variables, key), []
            spread = axis is not None or weights is not None

            def each(path, module, next_call, args, kwargs):
                if isinstance(module, nnx.Dropout) and not self.dropout:
                    return args[0]
                if spread and isinstance(module, nnx.BatchNorm | nnx.Dropout):
                    over = _norm if isinstance(module, nnx.BatchNorm) else _dropout
                    next_call = functools.partial(over, module, next_call, weights, axis)
                return _record(seen, path, module, next_call, args, kwargs)

            with watching(nnx.iter_modules(module), each):
                logits = self._run(module, images, True)
            after = self.collected(dict(nnx.to_flat_state(nnx.state(module))))
            state = {name: after[name] for name in others(variables)}
            return logits, stages(seen, images), joined(state, axis)

        return on_cpu(apply)(variables, images, key, weights)

    def without_dropout(self) -> "NNX":
        """The same, whose training drops nothing."""
        return dataclasses.replace(self, dropout=False)

    def fed_by(self, variables: Variables, images: jax.Array) -> dict[Path, Path]:
        """Of each part, the part whose output it is given as it is (their paths)."""
        feeds = Feeds()

        def apply(variables, images):
            module = self.merged(variables)
            with watching(nnx.iter_modules(module), feeds):
                return self._run(module, images, False)

        jax.eval_shape(apply, variables, images)
        return feeds.found

    def merged(self, variables: Mapping[str, Any], key: jax.Array | None = None) -> Any:
        """The module with these values; with a key, what it draws random numbers from is new."""
        given = {name: flatten_dict(dict(tree)) for name, tree in variables.items()}
        leaves, number = {}, 0
        for path, leaf in self.leaves.items():
            value = _value(leaf)
            if collection := _collection(leaf):
                value = given[collection][tuple(map(str, path))]
            elif isinstance(leaf, nnx.RngKey) and key is not None:
                value, number = jax.random.fold_in(key, number), number + 1
            leaves[path] = leaf.replace(value) if isinstance(leaf, nnx.Variable) else value
        return nnx.merge(self.graph, nnx.from_flat_state(list(leaves.items())))

    def collected(self, leaves: Mapping[tuple[Any, ...], Any]) -> Variables:
        """The collections of the module's variables by path."""
        found: dict[str, dict[Path, Any]] = {}
        for path, own in self.leaves.items():
            if collection := _collection(own):
                found.setdefault(collection, {})[tuple(map(str, path))] = _value(leaves[path])
        return {name: unflatten_dict(flat) for name, flat in found.items()}

    def _run(self, module: Any, images: jax.Array, train: bool) -> jax.Array:
        for _, part in nnx.iter_modules(module):
            for name, value in switches(train, vars(part)).items():
                setattr(part, name, value)
        if self.call is not None:
            return self.call(module, images, train)
        names = inspect.signature(type(module).__call__).parameters
        return module(images, **switches(train, names))


def _collection(leaf: Any) -> str | None:
    """Where a variable belongs; None: it is state of random numbers."""
    if isinstance(leaf, nnx.RngState):
        return None
    floats = jnp.issubdtype(jnp.result_type(_value(leaf)), jnp.floating)
    if isinstance(leaf, nnx.Param) and floats:
        return "params"
    return "batch_stats" if isinstance(leaf, nnx.BatchStat) else "state"


def _value(leaf: Any) -> Any:
    return leaf.get_value() if isinstance(leaf, nnx.Variable) else leaf


def _record(seen: list[Any], path, module, next_call, args, kwargs):
    """Note the outputs of parts with parameters."""
    del path
    out = next_call(*args, **kwargs)
    if jax.tree.leaves(nnx.state(module, nnx.Param)):
        seen.append(out)
    return out


def _norm(
    module: nnx.BatchNorm, as_it_is: Callable, weights, axis, x: Any, *args: Any, **kwargs: Any
):
    given = kwargs.get("use_running_average", args[0] if args else None)
    if module.use_running_average if given is None else given:
        return as_it_is(x, *args, **kwargs)
    scale, bias = (None if v is None else v[...] for v in (module.scale, module.bias))
    y, *moments = normalised(x, module.axis, weights, axis, module.epsilon, scale, bias)
    for variable, new in zip((module.mean, module.var), moments, strict=True):
        old = variable[...]
        variable[...] = module.momentum * old + (1 - module.momentum) * new.astype(old.dtype)
    return y if module.dtype is None else y.astype(module.dtype)


def _dropout(module: nnx.Dropout, as_it_is: Callable, weights, axis, x: Any, **kwargs: Any):
    del weights
    given = kwargs.get("deterministic")
    off = module.deterministic if given is None else given
    if off or not module.rate or 0 in module.broadcast_dims:
        return as_it_is(x, **kwargs)
    rngs: Any = kwargs.get("rngs")
    rngs = module.rngs if rngs is None else rngs
    if isinstance(rngs, nnx.Rngs):
        key = rngs[module.rng_collection]()
    else:
        key = rngs() if isinstance(rngs, nnx.RngStream) else rngs
    return dropped(x, module.rate, module.broadcast_dims, key, axis)
