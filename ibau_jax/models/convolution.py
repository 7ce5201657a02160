"""3x3 convolutions: XLA's own for accelerators, matrix products for a CPU.

XLA's CPU backend runs the derivatives of `lax.conv` inside a loop (`fori_loop`, `scan`) as naive
loops, up to 39 times slower than outside, and the gradient of a kernel is slow even outside. A
convolution written as a few matrix products (Winograd's, a third fewer) has only matrix products in
its derivatives, of any order, and costs the same in a loop. So it can run a few images at a time,
whose products stay in the cache.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from ibau_jax.errors import check_name

CONVOLUTIONS = ("auto", "patches", "lax")


def convolve(x: jax.Array, kernel: jax.Array, implementation: str = "auto") -> jax.Array:
    """3x3 convolution, stride 1, zero padding 1: [N, H, W, C] and [3, 3, C, D] -> [N, H, W, D]."""
    if _resolve(implementation) == "lax":
        return lax.conv_general_dilated(
            x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
    height, width, channels = x.shape[1:]
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    # Three horizontal neighbours side by side: a third of the memory of all nine.
    rows = jnp.concatenate([padded[:, :, j : j + width] for j in range(3)], axis=-1)
    flat = kernel.reshape(3, 3 * channels, -1)
    if height % 2 or channels < 16:  # the rows of the kernel: products with shifted views
        upper, middle, lower = (rows[:, i : i + height] @ flat[i] for i in range(3))
        return upper + middle + lower
    return _winograd(rows, flat)


def convolve_in_parts(x: jax.Array, kernel: jax.Array, implementation: str = "auto") -> jax.Array:
    """`convolve`, with matrix products a few images at a time; for first derivatives only.

    For the layers of a training step, which batch norm keeps from being run in parts together.
    """
    if _resolve(implementation) == "lax":
        return convolve(x, kernel, "lax")
    # Half a megabyte of input: about what a core's cache can hold with all that is made of it.
    size = min(len(x), max(1, 2**17 // (x.shape[1] * x.shape[2] * max(16, x.shape[3]))))
    short = -len(x) % size
    padded = jnp.pad(x, ((0, short), (0, 0), (0, 0), (0, 0))) if short else x
    y: jax.Array = _in_parts(padded, kernel, size)
    return y[: len(x)]


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _in_parts(x, kernel, size):
    return _joined(lax.map(lambda part: convolve(part, kernel, "patches"), _split(x, size)))


def _forward(x, kernel, size):
    return _in_parts(x, kernel, size), (x, kernel)


def _backward(size, kept, cotangent):
    x, kernel = kept

    def add(total, part):
        rows, slope = part
        to_rows, to_kernel = jax.vjp(lambda r, k: convolve(r, k, "patches"), rows, kernel)[1](slope)
        return total + to_kernel, to_rows

    parts = _split(x, size), _split(cotangent, size)
    to_kernel, to_x = lax.scan(add, jnp.zeros_like(kernel), parts)
    return _joined(to_x), to_kernel


_in_parts.defvjp(_forward, _backward)


def _split(x, size):
    return x.reshape(-1, size, *x.shape[1:])


def _joined(x):
    return x.reshape(-1, *x.shape[2:])


def _resolve(implementation: str) -> str:
    check_name("convolution", implementation, CONVOLUTIONS)
    if implementation == "auto":
        return "patches" if jax.default_backend() == "cpu" else "lax"
    return implementation


def _winograd(rows: jax.Array, flat: jax.Array) -> jax.Array:
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
    m = (views @ taps).reshape(4, n, height // 2 - 1, width, -1)
    return jnp.stack([m[0] + m[1] + m[2], m[1] - m[2] - m[3]], 2).reshape(n, height - 2, width, -1)
