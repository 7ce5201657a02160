"""3x3 convolutions in a quarter of the products, and so all their derivatives, on a CPU.

Winograd's F(4, 3) in both directions: 4 x 4 neighbouring outputs from 36 products in place of 144
(Lavin and Gray, "Fast algorithms for convolutional neural networks", CVPR 2016). Sums and
differences of neighbours cost some rounding: in 32 bits about five times that of plain sums. And
outputs that are equal, in even areas of an image, differ by it: the first of equals, which maximum
pooling takes, may be another one.

To differentiate these sums would undo half of the gain: what comes out is no longer of this form.
But a convolution is linear in the images and in the kernel, and so are its derivatives: with
respect to the images it is a convolution again, with respect to the kernel a correlation of images
with slopes, whose own derivatives are convolutions. So there are two primitives of JAX's here, each
in a form that is fast, and derivatives of any order are made of these two.
"""

import operator
from collections.abc import Iterable, Sequence
from functools import partial, reduce
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

Padding = tuple[tuple[int, int], tuple[int, int]]

TILE, TAPS = 4, 3  # outputs and entries of the kernel a side
SPAN = TILE + TAPS - 1  # inputs a side

# Both polynomials of a product are evaluated at these points, and their highest terms ("infinity").
# With the usual 1 and 2 the errors are twice as large (a search: experiments/speed.md).
POINTS = np.array([0, 0.75, -0.75, 1.5, -1.5])


def _matrices(points: np.ndarray) -> tuple[list[list[float]], ...]:
    """Toom's and Cook's a, b, c: outputs = a [(b kernel) * (c inputs)] in one direction."""
    others = [np.delete(points, i) for i in range(len(points))]
    scales = [np.prod(p - rest) for p, rest in zip(points, others, strict=True)]
    to_outputs = np.vstack([points**i for i in range(TILE)])
    of_kernel = np.vstack([points**i / scales for i in range(TAPS)]).T
    of_inputs = np.vstack([np.append(np.poly(rest)[::-1], 0) for rest in others])
    last = [[0] * (TILE - 1) + [1]], [[0] * (TAPS - 1) + [1]], [np.poly(points)[::-1]]
    to_outputs = np.hstack([to_outputs, np.transpose(last[0])])
    found = to_outputs, np.vstack([of_kernel, last[1]]), np.vstack([of_inputs, last[2]])
    return tuple(matrix.tolist() for matrix in found)


OUTPUT, KERNEL, INPUT = _matrices(POINTS)


def suits(x: Sequence[int], kernel: Sequence[int], padding: Sequence[tuple[int, int]]) -> bool:
    """Whether it is fast for these shapes, stride 1 and no dilation: 3x3, and enough of all else.

    Of few channels the sums cost more than the products that they save; outputs of less than a tile
    are mostly padding. (A first layer with 3 channels gains in the derivative in its kernel.)
    """
    if tuple(kernel[:-2]) != (3, 3) or kernel[2] * kernel[3] < 32:
        return False
    return all(n + low + high >= SPAN for n, (low, high) in zip(x[1:3], padding, strict=True))


def convolve(
    x: jax.Array,
    kernel: jax.Array,
    padding: Sequence[tuple[int, int]],
    precision: lax.PrecisionLike = None,
) -> jax.Array:
    """[N, H, W, C] and [3, 3, C, D] -> [N, H', W', D], of one dtype, with stride 1.

    Args:
      padding: rows of zeros above and below, columns left and right; negative: cut off.
    """
    # The derivative in the images is padded by 2 less what these are: so much is done inside.
    inside = tuple((min(max(low, 0), 2), min(max(high, 0), 2)) for low, high in padding)
    outside = [(p[0] - q[0], p[1] - q[1]) for p, q in zip(padding, inside, strict=True)]
    x = padded(x, outside)
    return _convolve.bind(x[None], kernel[None], padding=inside, precision=precision)[0]


def padded(
    x: jax.Array, padding: Sequence[tuple[int, int]], inside: Sequence[int] | None = None
) -> jax.Array:
    """[N, ..., C] with zeros around, or cut, and so many between neighbours along each axis."""
    inside = [0] * len(padding) if inside is None else inside
    edges = [(*ends, between) for ends, between in zip(padding, inside, strict=True)]
    if not any(map(any, edges)):
        return x
    return lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *edges, (0, 0, 0)])


# Both have an axis of independent problems in front: vmap makes it longer. [G, N, H, W, C] with
# [G, 3, 3, C, D] is [G, N, H', W', D], and with [G, N, H', W', D] it is [G, 3, 3, C, D].
_convolve = Primitive("winograd_convolve")
_correlate = Primitive("winograd_correlate")


def _convolved(x: jax.Array, kernel: jax.Array, *, padding: Padding, precision: Any) -> jax.Array:
    height, width = _size(x.shape, padding)
    taps = jnp.stack(_sums(KERNEL, kernel))
    taps = jnp.stack(_sums(KERNEL, taps.swapaxes(0, 1)), 1)  # [6, 6, C, D]
    inputs = _inputs(x, padding)  # [6, 6, N, T, U, C], of T x U tiles
    products = jnp.matmul(_flat(inputs), _flat(taps), precision=precision)
    y = products.reshape(*inputs.shape[:-1], -1)
    y = jnp.stack(_sums(OUTPUT, y), 3)
    y = jnp.stack(_sums(OUTPUT, y), 4)  # [N, T, 4, U, 4, D]
    n, t, _, u, _, d = y.shape
    return y.reshape(n, TILE * t, TILE * u, d)[:, :height, :width]


def _correlated(x: jax.Array, slopes: jax.Array, *, padding: Padding, precision: Any) -> jax.Array:
    inputs = _inputs(x, padding)
    t, u = inputs.shape[3:5]
    n, height, width, d = slopes.shape
    slopes = padded(slopes, [(0, TILE * t - height), (0, TILE * u - width)])
    slopes = slopes.reshape(n, t, TILE, u, TILE, d)
    back = tuple(zip(*OUTPUT, strict=True))
    slopes = jnp.stack(_sums(back, jnp.moveaxis(slopes, 2, 0)))
    slopes = jnp.stack(_sums(back, jnp.moveaxis(slopes, 4, 0)), 1)  # [6, 6, N, T, U, D]
    products = jnp.matmul(_flat(inputs).swapaxes(1, 2), _flat(slopes), precision=precision)
    back = tuple(zip(*KERNEL, strict=True))
    y = jnp.stack(_sums(back, products.reshape(SPAN, SPAN, -1, d)))
    return jnp.stack(_sums(back, y.swapaxes(0, 1)), 1)


def _inputs(x: jax.Array, padding: Padding) -> jax.Array:
    """Of all tiles what is multiplied: [N, H, W, C] -> [6, 6, N, T, U, C]."""
    sizes = zip(_size(x.shape, padding), x.shape[1:3], padding, strict=True)
    whole = [(low, (-(-size // TILE) + 1) * TILE - n - low) for size, n, (low, _) in sizes]
    x = jnp.stack(_sums(INPUT, _windows(padded(x, whole), 1)))
    # One direction after the other: both in one expression are more work, and slow to compile.
    return jnp.stack(_sums(INPUT, _windows(x, 3)), 1)


def _windows(x: jax.Array, axis: int) -> list[jax.Array]:
    """What each of the six entries of T windows, four apart, meets of 4 (T + 1) along an axis."""
    tiles = x.shape[axis] // TILE - 1
    x = x.reshape(*x.shape[:axis], tiles + 1, TILE, *x.shape[axis + 1 :])
    entries = [lax.index_in_dim(x, i, axis + 1, keepdims=False) for i in range(TILE)]
    return [
        lax.slice_in_dim(entries[i % TILE], i // TILE, i // TILE + tiles, axis=axis)
        for i in range(SPAN)
    ]


def _sums(matrix: Sequence[Sequence[float]], parts: Iterable[jax.Array]) -> list[jax.Array]:
    """`matrix` times the `parts`."""
    parts = list(parts)

    def terms(row):
        for factor, part in zip(row, parts, strict=True):
            if factor:
                yield part if factor == 1 else -part if factor == -1 else factor * part

    return [reduce(operator.add, terms(row)) for row in matrix]


def _flat(x: jax.Array) -> jax.Array:
    """[6, 6, ..., C] -> [36, M, C]."""
    return x.reshape(SPAN * SPAN, -1, x.shape[-1])


def _size(shape: Sequence[int], padding: Padding) -> tuple[int, int]:
    """Of the output for images [..., H, W, C]."""
    (top, bottom), (left, right) = padding
    return shape[-3] + top + bottom - 2, shape[-2] + left + right - 2


def _turned(kernel: jax.Array) -> jax.Array:
    """The kernel of the derivative in the images: [G, 3, 3, C, D] -> [G, 3, 3, D, C]."""
    return kernel[:, ::-1, ::-1].swapaxes(3, 4)


def _to_images(slopes: jax.Array, kernel: jax.Array, padding: Padding, precision: Any) -> jax.Array:
    (top, bottom), (left, right) = padding
    padding = ((2 - top, 2 - bottom), (2 - left, 2 - right))
    return _convolve.bind(slopes, _turned(kernel), padding=padding, precision=precision)


def _convolve_to_images(slopes, x, kernel, *, padding, precision):
    del x
    return _to_images(slopes, kernel, padding, precision)


def _convolve_to_kernel(slopes, x, kernel, **params):
    del kernel
    return _correlate.bind(x, slopes, **params)


def _correlate_to_images(kernel, x, slopes, *, padding, precision):
    del x
    return _to_images(slopes, kernel, padding, precision)


def _correlate_to_slopes(kernel, x, slopes, **params):
    del slopes
    return _convolve.bind(x, kernel, **params)


def _convolve_shape(x, kernel, *, padding, precision):
    del precision
    return x.update(shape=(*x.shape[:2], *_size(x.shape, padding), kernel.shape[-1]))


def _correlate_shape(x, slopes, **params):
    del params
    return x.update(shape=(x.shape[0], 3, 3, x.shape[-1], slopes.shape[-1]))


def _batched(primitive, args, axes, **params):
    """The mapped axis becomes part of G, or of N where all images share a kernel."""
    size = next(a.shape[axis] for a, axis in zip(args, axes, strict=True) if axis is not None)
    if primitive is _convolve and axes[1] is None:
        x, kernel = jnp.moveaxis(args[0], axes[0], 1), args[1]
        y = _convolve.bind(x.reshape(x.shape[0], -1, *x.shape[3:]), kernel, **params)
        return y.reshape(x.shape[0], size, -1, *y.shape[2:]), 1
    every = (
        jnp.broadcast_to(a, (size, *a.shape)) if axis is None else jnp.moveaxis(a, axis, 0)
        for a, axis in zip(args, axes, strict=True)
    )
    y = primitive.bind(*(a.reshape(-1, *a.shape[2:]) for a in every), **params)
    return y.reshape(size, -1, *y.shape[1:]), 0


def _define(primitive: Primitive, value, shape, *transposes) -> None:
    def each(*args, **params):
        one = partial(value, **params)
        if args[0].shape[0] == 1:  # simpler programs for nearly all
            return one(*(a[0] for a in args))[None]
        return jax.vmap(one)(*args)

    primitive.def_abstract_eval(shape)
    primitive.def_impl(jax.jit(each, static_argnames=("padding", "precision")))
    mlir.register_lowering(primitive, mlir.lower_fun(each, multiple_results=False))
    ad.defbilinear(primitive, *transposes)
    batching.primitive_batchers[primitive] = partial(_batched, primitive)


_define(_convolve, _convolved, _convolve_shape, _convolve_to_images, _convolve_to_kernel)
_define(_correlate, _correlated, _correlate_shape, _correlate_to_images, _correlate_to_slopes)
