"""The implicit hypergradient on any pytrees; only `solvers` of this package is needed here.

For delta(params) = argmin inner(delta, params), the gradient of outer(delta(params), params) is

    d2 outer - (d12 inner)^T (d11 inner)^-1 d1 outer                            (paper eq. 4)

Line 7 of the paper's Algorithm 1 has a plus where equation (4) has this minus; the derivation
from equations (2) and (3) and the published code both give the minus.

Three choices are separate: the two functions, the linear solver, and the route by which the
products are formed (`hypergradient`: `jax.linearize` and `jax.jvp`; `hypergradient_jaxopt`:
`jaxopt.implicit_diff.root_vjp`; `implicit_argmin`: `jaxopt.implicit_diff.custom_root` around an
inner solver, so that plain `jax.grad` gives the hypergradient). `unrolled` differentiates
through the inner steps instead, to compare with.
"""

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from ibau_jax.solvers import (
    CG,
    GMRES,
    Dense,
    Direct,
    MatVec,
    Neumann,
    NormalCG,
    Report,
    Solver,
    Tree,
    add,
    all_finite,
    dot,
    scale,
    with_residual,
)

__all__ = [
    "CG",
    "Ball",
    "Dense",
    "Direct",
    "GMRES",
    "Neumann",
    "NormalCG",
    "Report",
    "Solver",
    "hypergradient",
    "hypergradient_jaxopt",
    "implicit_argmin",
    "unrolled",
]

Objective = Callable[[Tree, Tree], jax.Array]


class Ball(NamedTuple):
    """The set ||delta|| <= radius that delta is held in, `norm` being `l2` or `linf`."""

    radius: float
    norm: str = "l2"

    def size(self, delta: Tree) -> jax.Array:
        """||delta||, in the ball's own norm."""
        if self.norm == "linf":
            return jnp.max(jnp.stack([jnp.abs(d).max() for d in jax.tree.leaves(delta)]))
        return jnp.sqrt(dot(delta, delta))

    def project(self, delta: Tree) -> Tree:
        """The nearest point of the ball (line 5 of Algorithm 1)."""
        if self.norm == "linf":
            return jax.tree.map(lambda d: jnp.clip(d, -self.radius, self.radius), delta)
        return scale(jnp.minimum(1, self.radius / jnp.maximum(self.size(delta), 1e-12)), delta)

    def tangent(self, delta: Tree, slope: Tree) -> tuple[MatVec, jax.Array]:
        """Where delta can move: a projection Q, and the curvature that the border adds.

        `slope` is d1 inner at delta. A border counts where delta is on it and the slope presses
        outwards; elsewhere Q is the identity and the curvature is 0. On a sphere that curvature
        is the Lagrange multiplier -<slope, delta> / ||delta||^2; the faces of a cube are flat.
        """
        edge = self.radius * (1 - 1e-4)  # float32 projection lands within rounding of it
        if self.norm == "linf":

            def free(d, s):
                return (jnp.abs(d) < edge) | (d * s > 0)

            mask = jax.tree.map(free, delta, slope)
            zero = jnp.zeros(())
            return lambda v: jax.tree.map(lambda x, m: jnp.where(m, x, 0), v, mask), zero
        squared = dot(delta, delta)
        multiplier = -dot(slope, delta) / jnp.maximum(squared, 1e-30)
        active = (jnp.sqrt(squared) >= edge) & (multiplier > 0)

        def onto(v):
            along = jnp.where(active, dot(delta, v) / jnp.maximum(squared, 1e-30), 0)
            return add(v, scale(-along, delta))

        return onto, jnp.where(active, multiplier, 0)


def hypergradient(
    outer: Objective,
    inner: Objective,
    delta: Tree,
    params: Tree,
    *,
    solver: Solver = Neumann(),  # noqa: B008  (frozen)
    ball: Ball | None = None,
    keep_diverged: bool = False,
) -> tuple[jax.Array, Tree, Report]:
    """The implicit hypergradient of `outer` at `delta`, a (near) stationary point of `inner`.

    Args:
      outer: `outer(delta, params) -> scalar`, what the parameters minimise.
      inner: `inner(delta, params) -> scalar`, what delta minimises (for I-BAU minus the loss).
      delta: pytree of arrays.
      params: pytree of arrays.
      solver: how (d11 inner) x = d1 outer is solved.
      ball: delta is a minimum of `inner` in this ball, possibly on its border, where equation
        (4) does not hold: there d1 inner is not 0. The system is then the one of the projected
        fixed point delta = project(delta - a d1 inner), reduced to the directions in which delta
        can move: Q (d11 inner + curvature) Q x = Q d1 outer. It does not depend on a.
      keep_diverged: use an x that leaves more residual than none would, as the published code
        does (an x that is not finite is never used).

    Returns:
      value: `outer(delta, params)`.
      gradient: d2 outer - (d12 inner)^T x, with the structure of `params`; d2 outer alone (the
        direct gradient) where the solve failed.
      report: how well the system was solved.
    """
    value, (to_delta, to_params) = jax.value_and_grad(outer, (0, 1))(delta, params)
    if isinstance(solver, Direct):
        return value, to_params, solver(lambda v: v, to_delta)[1]
    # The primal pass is paid once; each product is then a tangent pass.
    slope, hessian = jax.linearize(lambda d: jax.grad(inner, 0)(d, params), delta)
    onto, curvature = (lambda v: v, 0.0) if ball is None else ball.tangent(delta, slope)
    goal = onto(to_delta)

    def border(v, image):  # Q (A + curvature) v, for a v that Q leaves alone
        return image if ball is None else onto(add(image, scale(curvature, v)))

    x, report = solver(lambda v: border(v, hessian(onto(v))), goal)
    x = onto(x)
    # (d12 inner)^T x as the derivative of the parameters' gradient along x (mixed derivatives
    # commute): forward over reverse, which needs no memory of the backward pass. The same pass
    # gives A x, hence the exact residual; the solver's own, one product more, is then dead
    # code that XLA drops.
    _, (image, mixed) = jax.jvp(lambda d: jax.grad(inner, (0, 1))(d, params), (delta,), (x,))
    report = with_residual(report, border(x, image), goal)
    return value, *_sum(to_params, scale(-1.0, mixed), report, keep_diverged)


def hypergradient_jaxopt(
    outer: Objective,
    inner: Objective,
    delta: Tree,
    params: Tree,
    *,
    solver: Solver = Neumann(),  # noqa: B008  (frozen)
    ball: Ball | None = None,
    keep_diverged: bool = False,
) -> tuple[jax.Array, Tree, Report]:
    """The same gradient by `jaxopt.implicit_diff.root_vjp` on the condition d1 inner = 0.

    Arguments and results as `hypergradient`; a second, independent route to compare with. On
    the border of a ball the condition is project(delta - d1 inner) = delta, whose system is not
    symmetric: choose `GMRES`, `Dense` or `Neumann`.
    """
    root_vjp = _jaxopt().root_vjp
    reports = []

    def solve(matvec, b):
        x, report = solver(matvec, b)
        reports.append(report)
        return x

    def condition(d, p):
        slope = jax.grad(inner, 0)(d, p)
        if ball is None:
            return slope
        return add(d, scale(-1.0, ball.project(add(d, scale(-1.0, slope)))))

    value, (to_delta, to_params) = jax.value_and_grad(outer, (0, 1))(delta, params)
    (implicit,) = root_vjp(condition, sol=delta, args=(params,), cotangent=to_delta, solve=solve)
    return value, *_sum(to_params, implicit, reports[0], keep_diverged)


def implicit_argmin(
    minimise: Callable[[Tree], Tree],
    inner: Objective,
    *,
    solver: Solver = Neumann(),  # noqa: B008  (frozen)
) -> Callable[[Tree], Tree]:
    """`minimise(params) -> delta`, given the derivative of a minimum of `inner`.

    `jax.grad(lambda p: outer(implicit_argmin(minimise, inner)(p), p))` is then the
    hypergradient, whatever `minimise` does inside (it is not differentiated). By
    `jaxopt.implicit_diff.custom_root`.
    """
    solve = _jaxopt().custom_root(jax.grad(inner, 0), solve=lambda matvec, b: solver(matvec, b)[0])(
        lambda _, params: minimise(params)
    )
    return lambda params: solve(None, params)


def unrolled(
    outer: Objective,
    step: Callable[[Any, Tree, Tree], Tree],
    start: Tree,
    params: Tree,
    *,
    steps: int,
    checkpoint: bool = False,
) -> tuple[jax.Array, Tree, Tree]:
    """The gradient through the inner steps themselves, by reverse mode over a bounded loop.

    Args:
      outer: `outer(delta, params) -> scalar`.
      step: `step(i, delta, params) -> delta`, one inner step.
      start: delta before the first step.
      params: pytree of arrays.
      steps: how many; all their intermediate values are kept.
      checkpoint: keep only delta of each step and compute the rest again (`jax.checkpoint`):
        memory still grows with `steps`, but by one delta a step.

    Returns:
      `outer` at the last delta, its gradient in `params`, and that delta.
    """

    def run(p):
        def one(i, delta):
            return step(i, delta, p)

        body = jax.checkpoint(one) if checkpoint else one  # pyright: ignore[reportPrivateImportUsage]
        delta = lax.fori_loop(0, steps, body, start)
        return outer(delta, p), delta

    (value, delta), gradient = jax.value_and_grad(run, has_aux=True)(params)
    return value, gradient, delta


def _sum(direct: Tree, implicit: Tree, report: Report, keep_diverged: bool) -> tuple[Tree, Report]:
    """The two terms added up, without the implicit one where the solve failed."""
    residual = jnp.where(all_finite(implicit), report.residual, jnp.inf)
    report = report._replace(residual=residual)
    drop = jnp.isinf(residual) if keep_diverged else report.failed
    total = jax.tree.map(lambda d, i: d + jnp.where(drop, jnp.zeros_like(i), i), direct, implicit)
    return total, report._replace(dropped=drop)


def _jaxopt():
    with warnings.catch_warnings():  # no longer developed, and says so: imported here only
        warnings.simplefilter("ignore", DeprecationWarning)
        from jaxopt import implicit_diff
    return implicit_diff
