"""The set that a perturbation is held in."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from ibau_jax.hypergradient.solvers import MatVec, Tree, dot, norm, power_of_two, scale


class Ball(NamedTuple):
    """The set ||delta|| <= radius that delta is held in, `norm` being `l2` or `linf`."""

    radius: float
    norm: str = "l2"

    def size(self, delta: Tree) -> jax.Array:
        """||delta||, in the ball's own norm; its derivatives at 0 are 0."""
        if self.norm == "linf":
            sizes = jax.tree.map(lambda d: jnp.where(d == 0, 0, jnp.abs(d)), delta)
            return jnp.max(jnp.stack([d.max(initial=0) for d in jax.tree.leaves(sizes)]))
        return norm(delta)

    def project(self, delta: Tree) -> Tree:
        """The nearest point of the ball (line 5 of Algorithm 1); the identity inside."""
        if self.norm == "linf":
            return jax.tree.map(lambda d: jnp.clip(d, -self.radius, self.radius), delta)
        # So that no square leaves the range of numbers, as it does in optax.projections.
        unit = power_of_two(delta)
        size, radius = norm(scale(1 / unit, delta)), self.radius / unit
        outside = size > radius
        return scale(jnp.where(outside, radius / jnp.where(outside, size, 1), 1), delta)

    def tangent(self, delta: Tree, slope: Tree) -> tuple[MatVec, jax.Array]:
        """Where delta can move: a projection Q, and the curvature that the border adds.

        `slope` is d1 inner at delta. A border counts where delta is on it and the slope presses
        outwards; elsewhere Q is the identity and the curvature is 0. On a sphere that curvature
        is the Lagrange multiplier -<slope, delta> / ||delta||^2; the faces of a cube are flat.
        """
        # A projection lands within rounding of the border.
        rounding = max(float(jnp.finfo(d.dtype).eps) for d in jax.tree.leaves(delta))
        edge = self.radius * (1 - max(1e-4, rounding))
        size = norm(delta)
        if self.norm == "linf":

            def free(d, s):
                return (jnp.abs(d) < edge) | (jnp.sign(d) * jnp.sign(s) > 0)

            mask = jax.tree.map(free, delta, slope)
            return lambda v: jax.tree.map(lambda x, m: jnp.where(m, x, 0), v, mask), 0 * size
        safe = jnp.where(size > 0, size, 1)
        normal = jax.tree.map(lambda d: d / safe, delta)
        pressure = -dot(slope, normal)
        active = (size >= edge) & (pressure > 0)

        def onto(v):
            along = jnp.where(active, dot(normal, v), 0)
            return jax.tree.map(lambda x, n: (x - along * n).astype(jnp.result_type(x)), v, normal)

        return onto, jnp.where(active, pressure / safe, 0)
