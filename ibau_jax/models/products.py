"""A convolution of any kind as matrix products, whose derivatives are fast in loops on a CPU.

XLA's CPU backend runs the derivatives of `lax.conv` inside a loop (`fori_loop`, `scan`) as naive
loops, up to 39 times slower than outside, and the gradient of a kernel is slow even outside. A
convolution written as pads, slices and a few products (`winograd`, where it can be) has only these
in its derivatives, of any order, and costs the same in a loop. So it can run a few images at a
time, whose products stay in the cache. `rewrite` puts them into any program.
"""

import operator
from collections.abc import Iterable, Iterator, Sequence
from functools import partial, reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from ibau_jax.models import winograd


def convolution_as_products(
    x: jax.Array,
    kernel: jax.Array,
    *,
    window_strides: Sequence[int],
    padding: Sequence[tuple[int, int]],
    lhs_dilation: Sequence[int],
    rhs_dilation: Sequence[int],
    dimension_numbers: lax.ConvDimensionNumbers,
    feature_group_count: int = 1,
    precision: Any = None,
    preferred_element_type: Any = None,
    **others: Any,
) -> jax.Array:
    """What `conv_general_dilated_p` gives with these parameters, to rounding; see `suits`.

    16-bit floats are multiplied and added up in 32 bits.

    Memory: of a kernel [..., K, L] with strides [..., S, T] a row is laid side by side (L / T
    copies of the padded input) and multiplied row by row. Where S is above 1, all of the kernel is
    (K L / (S T) copies), for one product. With what XLA keeps beside it that makes, in sizes of the
    input, for 3x3 with stride 2 and twice as many channels 4 and 6 in a gradient, for the 7x7 with
    stride 2 of a ResNet (3 channels to 64) 25 and 35, of which the output is 5; `lax.conv` takes up
    to 3, and 17 there. Depthwise convolutions make no copies.
    """
    del others  # batch_group_count, which is 1
    lhs, rhs, out = dimension_numbers
    given = x.dtype if preferred_element_type is None else preferred_element_type
    wide = jnp.promote_types(jnp.promote_types(x.dtype, given), jnp.float32)
    x = x.transpose(lhs[0], *lhs[2:], lhs[1]).astype(wide)  # [N, ..., C]
    kernel = kernel.transpose(*rhs[2:], rhs[1], rhs[0]).astype(wide)  # [..., C / groups, D]
    if any(d > 1 for d in lhs_dilation) or kernel.shape[-2] == 1:
        inside = [d - 1 for d in lhs_dilation]
        x, padding = winograd.padded(x, padding, inside), [(0, 0)] * len(padding)
    taps = Taps(tuple(window_strides), tuple(rhs_dilation))
    each = partial(dense, taps=taps, padding=padding, precision=precision)
    if feature_group_count == 1:
        y = each(x, kernel)
    elif kernel.shape[-2] == 1:
        y = depthwise(x, kernel, taps)
    else:
        split = partial(_split, groups=feature_group_count)
        y = jax.vmap(each, (0, 0), -2)(split(x), split(kernel))
        y = y.reshape(*y.shape[:-2], -1)
    places = [out[0], *out[2:], out[1]]
    return y.transpose([places.index(axis) for axis in range(y.ndim)]).astype(given)


def suits(x: Any, kernel: Any, batch_group_count: int = 1, **others: Any) -> bool:
    """Whether `convolution_as_products` takes it: floats in at least one dimension, and no groups
    of the batch (which only the derivatives of grouped convolutions have)."""
    del others
    floats = all(jnp.issubdtype(a.dtype, jnp.floating) for a in (x, kernel))
    return floats and batch_group_count == 1 and len(x.shape) > 2


class Taps(NamedTuple):
    """How the entries of a kernel lie over an input [N, ..., C]; of each axis between.

    Attributes:
      strides: from one place of the kernel to the next.
      dilation: from one entry of the kernel to the next.
    """

    strides: tuple[int, ...]
    dilation: tuple[int, ...]

    def along(self, x: jax.Array, axis: int, length: int) -> list[jax.Array]:
        """What each of the `length` entries of a kernel meets along an axis (1 is the first)."""
        stride, apart = self.strides[axis - 1], self.dilation[axis - 1]
        span = (x.shape[axis] - (length - 1) * apart - 1) // stride * stride + 1
        starts = range(0, length * apart, apart)
        return [lax.slice_in_dim(x, i, i + span, stride, axis) for i in starts]

    def over(self, x: jax.Array, lengths: Sequence[int], axis: int = 1) -> Iterator[jax.Array]:
        """The same for all entries along the axes from `axis` on, in the order of the kernel."""
        if not lengths:
            yield x
            return
        for part in self.along(x, axis, lengths[0]):
            yield from self.over(part, lengths[1:], axis + 1)


def dense(
    x: jax.Array,
    kernel: jax.Array,
    taps: Taps,
    padding: Sequence[tuple[int, int]],
    precision: lax.PrecisionLike = None,
) -> jax.Array:
    """Without groups: [N, ..., C] and [..., C, D] -> [N, ..., D]."""
    if {*taps.strides, *taps.dilation} == {1} and winograd.suits(x.shape, kernel.shape, padding):
        return winograd.convolve(x, kernel, padding, precision)
    x = winograd.padded(x, padding)
    *upper, length, channels, width = kernel.shape
    if any(stride > 1 for stride in taps.strides[:-1]):
        # Rows of the kernel meet different rows: one product holds one output, not one for each.
        every = [*taps.over(x, (*upper, length))]
        columns = jnp.concatenate(every, -1) if len(every) > 1 else every[0]
        return jnp.matmul(columns, kernel.reshape(-1, width), precision=precision)
    row = taps.along(x, len(upper) + 1, length)
    rows = jnp.concatenate(row, -1) if length > 1 else row[0]  # once for all rows of the kernel
    flat = kernel.reshape(-1, length * channels, width)
    pairs = zip(taps.over(rows, upper), flat, strict=True)
    return _total(jnp.matmul(part, row, precision=precision) for part, row in pairs)


def depthwise(x: jax.Array, kernel: jax.Array, taps: Taps) -> jax.Array:
    """A group for each channel, entry by entry: [N, ..., C] and [..., 1, C M] -> [N, ..., C M]."""
    *lengths, _, _ = kernel.shape
    entries = kernel.reshape(-1, x.shape[-1], kernel.shape[-1] // x.shape[-1])
    pairs = zip(taps.over(x, lengths), entries, strict=True)
    y = _total(part[..., None] * entry for part, entry in pairs)
    return y.reshape(*y.shape[:-2], -1)


def _split(a: jax.Array, groups: int) -> jax.Array:
    """The last axis in groups, which become the first: [..., G C] -> [G, ..., C]."""
    return jnp.moveaxis(a.reshape(*a.shape[:-1], groups, -1), -2, 0)


def _total(parts: Iterable[jax.Array]) -> jax.Array:
    return reduce(operator.add, parts)
