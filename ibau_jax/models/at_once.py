"""How many images are best differentiated at a time."""

import math
from typing import Any, cast

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr

from ibau_jax.models.model import Logits, Params
from ibau_jax.models.rewrite import has_convolution, inside

MEMORY = 3 * 2**30
"""Bytes that what is differentiated at a time may take, by a rough count: see `at_once`."""

KEPT = 4
"""Numbers for each one of an intermediate result: itself, its tangent, and of both what comes back
(assumed of a second derivative, not measured)."""

CACHED = 10 * 32 * 32
"""Pixels whose activations stay in a CPU's cache: ten images of CIFAR-10."""


def at_once(logits: Logits, params: Params, images: Any) -> int | None:
    """At most so many images are best differentiated at a time, in a loop; None: all.

    On a CPU about ten of 32 x 32 pixels stay in the cache; but a model in which a `lax.conv` is
    left (`models.rewrite` takes out nearly all) should not run inside a loop there (XLA's
    derivatives of convolutions in loops are many times slower), and an accelerator wants the whole
    batch. More than `MEMORY` holds are never taken: that is what counts with images of 224 x 224
    pixels.

    Args:
      images: [N, H, W, C]; only their shape counts.
    """
    program = jax.make_jaxpr(logits)(params, images[:1])
    fit = max(1, MEMORY // max(1, KEPT * _bytes_of(program)))
    if jax.default_backend() == "cpu" and not has_convolution(program):
        pixels = images.shape[1] * images.shape[2]
        return min(fit, 10, max(1, CACHED // pixels))
    return fit if fit < len(images) else None


def divisor(count: int, most: int | None) -> int | None:
    """The largest divisor of `count` that is not above `most`; None for None."""
    if most is None:
        return None
    return max(n for n in range(1, min(count, most) + 1) if count % n == 0)


def _bytes_of(program: Jaxpr | ClosedJaxpr) -> int:
    """Of all intermediate results of a program, at any depth."""
    total = 0
    for eqn in program.eqns:
        if programs := list(inside(eqn)):
            total += eqn.params.get("length", 1) * sum(map(_bytes_of, programs))  # of a scan
        else:
            avals = [cast(Any, v.aval) for v in eqn.outvars]
            total += sum(math.prod(a.shape) * a.dtype.itemsize for a in avals)
    return total
