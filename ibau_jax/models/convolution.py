"""3x3 convolutions of the VGG: XLA's own for accelerators, matrix products for a CPU.

`products` says why. Other models are rewritten to the same (`rewrite`).
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from ibau_jax.errors import check_name
from ibau_jax.models.products import Taps, dense

CONVOLUTIONS = ("auto", "patches", "lax")


def convolve(x: jax.Array, kernel: jax.Array, implementation: str = "auto") -> jax.Array:
    """3x3 convolution, stride 1, zero padding 1: [N, H, W, C] and [3, 3, C, D] -> [N, H, W, D]."""
    if _resolve(implementation) == "lax":
        return lax.conv_general_dilated(
            x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
    return dense(x, kernel, Taps((1, 1), (1, 1)), ((1, 1), (1, 1)))


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
