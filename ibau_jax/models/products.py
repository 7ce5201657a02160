"""A convolution of any kind as matrix products, whose derivatives are fast in loops on a CPU.

XLA's CPU backend runs the derivatives of `lax.conv` inside a loop (`fori_loop`, `scan`) as naive
loops, up to 39 times slower than outside, and the gradient of a kernel is slow even outside. A
convolution written as pads, slices and a few products (Winograd's, a third fewer, where they can
be) has only these in its derivatives, of any order, and costs the same in a loop. So it can run a
few images at a time, whose products stay in the cache. `rewrite` puts them into any program.
"""

import operator
from collections.abc import Iterable, Iterator, Sequence
from functools import partial, reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax


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
    input, for 3x3 (Winograd's products) 9 forwards and 15 in a gradient, for 3x3 with stride 2
    and twice as many channels 4 and 6, for the 7x7 with stride 2 of a ResNet (3 channels to 64)
    25 and 35, of which the output is 5; `lax.conv` takes up to 3, and 17 there. Depthwise
    convolutions make no copies.
    """
    del others  # batch_group_count, which is 1
    lhs, rhs, out = dimension_numbers
    given = x.dtype if preferred_element_type is None else preferred_element_type
    wide = jnp.promote_types(jnp.promote_types(x.dtype, given), jnp.float32)
    x = x.transpose(lhs[0], *lhs[2:], lhs[1]).astype(wide)  # [N, ..., C]
    kernel = kernel.transpose(*rhs[2:], rhs[1], rhs[0]).astype(wide)  # [..., C / groups, D]
    edges = [(low, high, d - 1) for (low, high), d in zip(padding, lhs_dilation, strict=True)]
    if any(edge != (0, 0, 0) for edge in edges):
        x = lax.pad(x, jnp.zeros((), wide), [(0, 0, 0), *edges, (0, 0, 0)])
    taps = Taps(tuple(window_strides), tuple(rhs_dilation))
    if feature_group_count == 1:
        y = dense(x, kernel, taps, precision)
    elif kernel.shape[-2] == 1:
        y = depthwise(x, kernel, taps)
    else:
        split = partial(_split, groups=feature_group_count)
        each = partial(dense, taps=taps, precision=precision)
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
    x: jax.Array, kernel: jax.Array, taps: Taps, precision: lax.PrecisionLike = None
) -> jax.Array:
    """Without padding or groups: [N, ..., C] and [..., C, D] -> [N, ..., D]."""
    *upper, length, channels, width = kernel.shape
    if any(stride > 1 for stride in taps.strides[:-1]):
        # Rows of the kernel meet different rows: one product holds one output, not one for each.
        every = [*taps.over(x, (*upper, length))]
        columns = jnp.concatenate(every, -1) if len(every) > 1 else every[0]
        return jnp.matmul(columns, kernel.reshape(-1, width), precision=precision)
    row = taps.along(x, len(upper) + 1, length)
    rows = jnp.concatenate(row, -1) if length > 1 else row[0]  # once for all rows of the kernel
    flat = kernel.reshape(-1, length * channels, width)
    # With few channels Winograd's sums cost more than the products that they save.
    even = upper == [3] and taps.dilation[0] == 1 and x.shape[1] % 2 == 0
    if even and channels >= 16:
        return _winograd(rows, flat, precision)
    pairs = zip(taps.over(rows, upper), flat, strict=True)
    return _total(jnp.matmul(part, row, precision=precision) for part, row in pairs)


def depthwise(x: jax.Array, kernel: jax.Array, taps: Taps) -> jax.Array:
    """A group for each channel, entry by entry: [N, ..., C] and [..., 1, C M] -> [N, ..., C M]."""
    *lengths, _, _ = kernel.shape
    entries = kernel.reshape(-1, x.shape[-1], kernel.shape[-1] // x.shape[-1])
    pairs = zip(taps.over(x, lengths), entries, strict=True)
    y = _total(part[..., None] * entry for part, entry in pairs)
    return y.reshape(*y.shape[:-2], -1)


def _winograd(rows: jax.Array, flat: jax.Array, precision: lax.PrecisionLike) -> jax.Array:
    """[N, H, W, K] correlated along H with [3, K, D] -> [N, H - 2, W, D], H even.

    Winograd's F(2, 3): two neighbouring sums of three products from four products instead of
    six, in every derivative as well (Lavin and Gray, "Fast algorithms for convolutional neural
    networks", 2016, section 4.1). Sums and differences of neighbours cost some rounding.
    """
    n, height, width, k = rows.shape
    pairs = rows.reshape(n, height // 2, 2, width, k)
    even, odd = pairs[:, :, 0], pairs[:, :, 1]
    r0, r1, r2, r3 = even[:, :-1], odd[:, :-1], even[:, 1:], odd[:, 1:]
    views = jnp.stack([r0 - r2, r1 + r2, r2 - r1, r1 - r3]).reshape(4, -1, k)
    middle = (flat[0] + flat[2]) / 2
    taps = jnp.stack([flat[0], middle + flat[1] / 2, middle - flat[1] / 2, flat[2]])
    m = jnp.matmul(views, taps, precision=precision).reshape(4, n, height // 2 - 1, width, -1)
    return jnp.stack([m[0] + m[1] + m[2], m[1] - m[2] - m[3]], 2).reshape(n, height - 2, width, -1)


def _split(a: jax.Array, groups: int) -> jax.Array:
    """The last axis in groups, which become the first: [..., G C] -> [G, ..., C]."""
    return jnp.moveaxis(a.reshape(*a.shape[:-1], groups, -1), -2, 0)


def _total(parts: Iterable[jax.Array]) -> jax.Array:
    return reduce(operator.add, parts)
