"""A module of Equinox as a model, and back (needs the extra `equinox`).

model, variables = from_equinox(*eqx.nn.make_with_state(Net)(key))
result = unlearn(model, variables, clean, key=key)
cleaned, state = to_equinox(module, result.params)
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax

from ibau_jax.devices import mesh
from ibau_jax.errors import InputError
from ibau_jax.models.adapters.inside import fits, joined, stages, switches
from ibau_jax.models.adapters.watch import Path, watching
from ibau_jax.models.model import Variables
from ibau_jax.models.rewrite import on_cpu

# (module, image [C, H, W], state, key, train) -> (logits [num_classes], state)
One = Callable[[Any, jax.Array, Any, jax.Array, bool], tuple[jax.Array, Any]]
AXIS = "batch"  # of the images, where no batch norm of the module has named it


def from_equinox(
    module: eqx.Module, state: eqx.nn.State | None = None, call: One | None = None
) -> tuple["Equinox", Variables]:
    """A module as a model, and its variables.

    Args:
      module: of one image [C, H, W] in [0, 1], as Equinox has it. It is called as `module(x)`, with
        a state as `module(x, state)`, with `key=` where its call has such an argument. Whether it
        trains is told by `eqx.nn.inference_mode`, and by an argument of its call of a name in
        `inside.ON` or `inside.OFF`.
      state: what `eqx.nn.make_with_state` gives beside it, where it has any.
      call: `call(module, x, state, key, train) -> (logits, state)` for another call.

    Returns:
      The model, of images [N, H, W, C], and its variables: `params`, the module's arrays in
      floating point, and `state`, as it is.

    Raises:
      InputError: it is no module of Equinox, or its batch norms name several axes.
    """
    if not isinstance(module, eqx.Module) or not callable(module):
        raise InputError(
            f"expected a module of Equinox that can be called, found a {type(module).__name__}"
        )
    params, static = eqx.partition(module, eqx.is_inexact_array)
    norms = [part for _, part in _parts(module) if isinstance(part, eqx.nn.BatchNorm)]
    names = {norm.axis_name for norm in norms} or {AXIS}
    if len(names) > 1 or not isinstance(name := names.pop(), str):
        raise InputError(
            "the module's batch norms name several axes: expected one axis_name for all, that of "
            "the images"
        )
    model = Equinox(static, name, call)
    return model, {"params": params} | ({} if state is None else {"state": state})


def to_equinox(
    module: eqx.Module, variables: Mapping[str, Any]
) -> tuple[eqx.Module, eqx.nn.State | None]:
    """A copy of the module with the values of `variables`, in its own dtypes, and its state."""
    own, static = eqx.partition(module, eqx.is_inexact_array)
    params = variables["params"]
    if not fits(params, own):
        raise InputError(
            "the variables do not fit the module: expected the structure and shapes of "
            "from_equinox(module); give the module that they are of"
        )
    cast = jax.tree.map(lambda new, old: jnp.asarray(new, old.dtype), params, own)
    return eqx.combine(cast, static), variables.get("state")


@dataclass(frozen=True, eq=False)
class Equinox:
    """An Equinox module as `logits(variables, images)` that can also be trained and looked into.

    In training, `eqx.nn.BatchNorm` takes its statistics over the batch of all devices, without
    padding; each image has a random key of its own.

    Attributes:
      static: the module without its arrays in floating point.
      axis: the name that its batch norms have for the axis of the images.
      call: see `from_equinox`.
      dropout: False: `eqx.nn.Dropout` drops nothing in training.
    """

    static: Any
    axis: str = AXIS
    call: One | None = None
    dropout: bool = True

    def __call__(self, variables: Variables, images: jax.Array) -> jax.Array:
        """[N, H, W, C] in [0, 1] -> [N, num_classes], in evaluation mode."""
        return self.look(variables, images)[0]

    def look(self, variables: Variables, images: jax.Array) -> tuple[jax.Array, list[jax.Array]]:
        """Logits and maps (see `inside.stages`) in evaluation mode."""

        def apply(variables, images):
            keys = jax.random.split(jax.random.key(0), len(images))  # asked for, and not used
            logits, _, maps = self._run(variables, images, keys, False, None, None)
            return logits, maps

        return on_cpu(apply)(variables, images)

    def train(
        self,
        variables: Variables,
        images: jax.Array,
        key: jax.Array,
        weights: jax.Array | None = None,
        axis: str | None = None,
    ) -> tuple[jax.Array, list[jax.Array], Variables]:
        """Logits, maps, and the state updated, in training mode; see `Model`."""

        def apply(variables, images, key, weights):
            keys = jax.random.split(key, len(images) * mesh.width(axis))
            keys = keys[mesh.numbers(len(images), axis)]
            logits, state, maps = self._run(variables, images, keys, True, weights, axis)
            updated = {} if state is None else {"state": joined(state, axis)}
            return logits, maps, updated

        return on_cpu(apply)(variables, images, key, weights)

    def without_dropout(self) -> "Equinox":
        """The same, whose training drops nothing."""
        return dataclasses.replace(self, dropout=False)

    def _run(self, variables, images, keys, train: bool, weights, axis):
        spread = axis is not None or weights is not None
        if weights is None:
            weights = jnp.full(len(images), 1 / (len(images) * mesh.width(axis)), images.dtype)

        def one(variables, image, key, weight):
            module = eqx.combine(variables["params"], self.static)
            module = eqx.nn.inference_mode(module, value=not train)
            seen: list[jax.Array] = []

            def each(path: Path, part, next_call, args, kwargs):
                del path
                if isinstance(part, eqx.nn.Dropout) and not self.dropout:
                    return args[0]
                if spread and train and isinstance(part, eqx.nn.BatchNorm):
                    names = (self.axis,) if axis is None else (self.axis, axis)
                    next_call = functools.partial(_norm, part, next_call, weight, names)
                out = next_call(*args, **kwargs)
                shown = out[0] if isinstance(out, tuple) else out
                if getattr(shown, "ndim", 0) == 3 and _has_arrays(part):
                    seen.append(shown)
                return out

            with watching(_parts(module), each):
                logits, state = self._call(module, image, variables.get("state"), key, train)
            return (logits, tuple(seen)), state

        mapped = jax.vmap(one, (None, 0, 0, 0), (0, None), axis_name=self.axis)
        x = images.transpose(0, 3, 1, 2)
        (logits, seen), state = mapped(variables, x, keys, weights)
        return logits, state, stages([a.transpose(0, 2, 3, 1) for a in seen], images)

    def _call(self, module, image, state, key, train: bool):
        if self.call is not None:
            return self.call(module, image, state, key, train)
        names = inspect.signature(type(module).__call__).parameters
        options: dict[str, Any] = {**switches(train, names)}
        if "key" in names:
            options["key"] = key
        if state is None:
            return module(image, **options), None
        return module(image, state, **options)


def _parts(module: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """A module and the modules in it, with their paths."""
    yield path, module
    inner = jax.tree_util.tree_leaves_with_path(
        module, is_leaf=lambda one: isinstance(one, eqx.Module) and one is not module
    )
    for where, part in inner:
        if isinstance(part, eqx.Module):
            yield from _parts(part, (*path, jax.tree_util.keystr(where, simple=True)))


def _has_arrays(part: Any) -> bool:
    return any(map(eqx.is_inexact_array, jax.tree.leaves(part)))


def _norm(
    part: Any, as_it_is: Callable, weight: jax.Array, names: tuple[str, ...],
    x: jax.Array, state: eqx.nn.State, *, key: Any = None, inference: bool | None = None,
):  # fmt: skip
    """The call of an `eqx.nn.BatchNorm` in training, of one image of a batch with these weights."""
    if part.inference if inference is None else inference:
        return as_it_is(x, state, inference=inference)
    rest = tuple(range(1, x.ndim))

    def total(of_image: jax.Array) -> jax.Array:
        return lax.psum(weight.astype(x.dtype) * of_image.mean(rest), names)

    def spread(of_channels: jax.Array) -> jax.Array:
        return of_channels.reshape(-1, *(1 for _ in rest))

    mean = total(x)
    var = total(jnp.square(x - spread(mean)))
    keep = part.momentum
    if part.mode == "ema":  # which normalises by what it keeps
        old = state.get(part.ema_state_index)
        first = state.get(part.ema_first_time_index)
        mean, var = (
            jnp.where(first, new, keep * kept + (1 - keep) * new)
            for kept, new in zip(old, (mean, var), strict=True)
        )
        state = state.set(part.ema_first_time_index, jnp.array(False))
        state = state.set(part.ema_state_index, (mean, var))
    else:
        old = state.get(part.batch_state_index)
        new = (keep * kept + (1 - keep) * one for kept, one in zip(old, (mean, var), strict=True))
        count = state.get(part.batch_counter) + 1
        state = state.set(part.batch_counter, count).set(part.batch_state_index, tuple(new))
    y = (x - spread(mean)) / jnp.sqrt(spread(var) + part.eps)
    if part.channelwise_affine:
        y = y * spread(part.weight) + spread(part.bias)
    return y, state
