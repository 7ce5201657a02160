"""Sums over a batch, differentiated a few images at a time.

The activations of a few images stay in a CPU's cache, and memory does not grow with the
batch. The result is the same sum: batch norm is frozen, so images do not interact.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from ibau_jax.devices import mesh

Loss = Callable[[Any, Any, Any], jax.Array]


def summed(loss: Loss, size: int | None, axis: str | None = None) -> Loss:
    """`loss(delta, params, batch)`, a sum over the rows of `batch`, taken in parts.

    Differentiable to any order in `delta` and `params`. The gradient is taken microbatch by
    microbatch *inside* the loop (a plain gradient of a loop would keep every activation, or
    compute every forward pass twice), so forward-mode derivatives of it, which the
    hypergradient takes, are loops as well.

    Args:
      loss: gives a scalar that adds up over rows; `batch` is a pytree whose leaves have the
        rows as their first axis.
      size: rows in a microbatch; it must divide the batch. None: the whole batch at once.
      axis: name of a mapped axis (`jax.pmap`) over which the rows are spread. The value and
        the gradients are then summed over it in one message, and so is each derivative of the
        gradients in a direction; what they are taken at must be the same on all devices. Not
        for reverse-mode derivatives of the gradient.
    """
    if size is None and axis is None:
        return loss

    @jax.custom_vjp
    def total(delta, params, batch):
        return accumulate(lambda rows: loss(delta, params, rows), batch, size, axis)

    def forward(delta, params, batch):
        # Only the gradients that are asked for: the one in the parameters costs the most.
        perturbed = [any(p.perturbed for p in jax.tree.leaves(a)) for a in (delta, params)]
        argnums = tuple(i for i in (0, 1) if perturbed[i])
        delta, params, batch = (jax.tree.map(lambda p: p.value, a) for a in (delta, params, batch))
        gradient = jax.value_and_grad(loss, argnums)
        value, grads = accumulate(lambda rows: gradient(delta, params, rows), batch, size, axis)
        return value, dict(zip(argnums, grads, strict=True))

    def backward(grads, cotangent):
        if isinstance(cotangent, jax.custom_derivatives.SymbolicZero):
            return None, None, None
        scaled = jax.tree.map(lambda g: g * cotangent, grads)
        return scaled.get(0), scaled.get(1), None

    total.defvjp(forward, backward, symbolic_zeros=True)
    return total


def accumulate(
    function: Callable[[Any], Any], batch: Any, size: int | None, axis: str | None = None
) -> Any:
    """The sum of `function(rows)`, a pytree, over the microbatches of `batch` and the devices.

    Not to be differentiated: let `function` give gradients. Arguments as in `summed`.
    """
    if size is None:
        return mesh.total(function(batch), axis)

    def add(total, rows):
        return jax.tree.map(jnp.add, total, function(rows)), None

    parts = jax.tree.map(lambda a: a.reshape(-1, size, *a.shape[1:]), batch)
    shapes = jax.eval_shape(function, jax.tree.map(lambda a: a[0], parts))
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    return mesh.total(lax.scan(add, zeros, parts)[0], axis)
