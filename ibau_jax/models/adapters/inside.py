"""What the adapters share: maps, and what happens to a batch that is spread over devices."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from ibau_jax.devices import mesh
from ibau_jax.models.model import Variables

# What libraries and their users call the switch of a module, as an argument or an attribute.
ON = ("train", "training", "is_training", "is_train")
OFF = ("deterministic", "use_running_average", "inference", "eval", "evaluate")


def switches(train: bool, names: Iterable[str]) -> dict[str, bool]:
    """The value in a mode of those of `names` that are such a switch."""
    wanted = dict.fromkeys(ON, train) | dict.fromkeys(OFF, not train)
    return {name: wanted[name] for name in names if name in wanted}


def stages(outputs: Iterable[jax.Array], images: jax.Array) -> list[jax.Array]:
    """The maps that stand for a model: of each size the last one before the size changes.

    Args:
      outputs: of modules with parameters, in the order in which they were computed, [N, h, w, c]
        those that are maps. One of the images' own shape (a normalisation, for example) and one of
        a single place (a pooled one) are none.
    """
    found: list[jax.Array] = []
    for one in outputs:
        if is_map(one, images):
            if found and found[-1].shape[1:3] == one.shape[1:3]:
                found.pop()
            found.append(one)
    return found


def is_map(value: Any, images: jax.Array) -> bool:
    """Whether something that a module gives is a map [N, h, w, c] of the images' batch."""
    shape: Any = getattr(value, "shape", ())
    floats = len(shape) == 4 and jnp.issubdtype(value.dtype, jnp.floating)
    rows = shape[:1] == images.shape[:1] and shape[1:] != images.shape[1:]
    return floats and rows and shape[1] * shape[2] > 1


def normalised(
    x: jax.Array,
    features: int | Sequence[int],
    weights: jax.Array | None,
    axis: str | None,
    epsilon: float,
    scale: jax.Array | None,
    bias: jax.Array | None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Batch norm in training over a batch spread over devices, where rows may be padding.

    Args:
      x: [N, ...], this device's rows.
      features: the axes that are not summed over.
      weights: [N], adding up to 1 over the devices; None: all rows count the same.

    Returns:
      `x` normalised, the mean and the (biased) variance of the whole batch, in the shape of
      `features`.
    """
    kept = [features] if isinstance(features, int) else list(features)
    kept = [axis % x.ndim for axis in kept]
    places = [i for i in range(1, x.ndim) if i not in kept]

    def mean_of(y: jax.Array) -> jax.Array:
        rows = y.mean(places)
        if weights is None:
            return mesh.total(rows.mean(0), axis) / mesh.width(axis)
        return mesh.total(jnp.tensordot(weights.astype(rows.dtype), rows, 1), axis)

    def spread(of_features: jax.Array) -> jax.Array:
        return of_features.reshape([n if i in kept else 1 for i, n in enumerate(x.shape)])

    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    mean = mean_of(wide)
    var = mean_of(jnp.square(wide - spread(mean)))
    gain = lax.rsqrt(var + epsilon)
    gain = gain if scale is None else gain * scale.reshape(gain.shape)
    y = (wide - spread(mean)) * spread(gain)
    y = y if bias is None else y + spread(bias.reshape(mean.shape))
    return y.astype(x.dtype), mean, var


def dropped(
    x: jax.Array, rate: float, together: Sequence[int], key: jax.Array, axis: str | None
) -> jax.Array:
    """Dropout whose mask is the same however many devices the batch [N, ...] is spread over.

    Args:
      together: axes along which all is dropped or nothing, of which the first may not be one.
    """
    if rate >= 1:
        return jnp.zeros_like(x)
    shape = [len(x) * mesh.width(axis), *x.shape[1:]]
    for i in together:
        shape[i] = 1
    keep = jax.random.bernoulli(key, 1 - rate, shape)
    if shape[0] > 1:
        keep = mesh.own(keep, axis)
    return jnp.where(keep, x / (1 - rate), 0)


def joined(state: Variables, axis: str | None) -> Variables:
    """State after a step, the same on all devices: means of what came out on each."""
    if axis is None:
        return state

    def mean(leaf):
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return leaf
        return mesh.total(leaf, axis) / mesh.width(axis)

    return jax.tree.map(mean, state)


def fits(new: Any, own: Any) -> bool:
    """Whether two pytrees have the same structure and shapes."""
    shapes = [list(map(jnp.shape, jax.tree.leaves(tree))) for tree in (new, own)]
    return jax.tree.structure(new) == jax.tree.structure(own) and shapes[0] == shapes[1]


def others(variables: Mapping[str, Any]) -> list[str]:
    """The names of the collections that are state."""
    return [name for name in variables if name != "params"]


def natural(name: str) -> list[Any]:
    """To sort by: a name's numbers as numbers."""
    return [int(p) if p.isdigit() else p for p in re.split(r"(\d+)", name)]


Call = Callable[[Any, jax.Array, bool], jax.Array]  # (module, images, train) -> logits
