"""The implicit hypergradient on any pytrees; only `solvers` of this package is needed here.

For delta(params) = argmin inner(delta, params), the gradient of outer(delta(params), params) is

    d2 outer - (d12 inner)^T (d11 inner)^-1 d1 outer                            (paper eq. 4)

Line 7 of the paper's Algorithm 1 has a plus where equation (4) has this minus; the derivation
from equations (2) and (3) and the published code both give the minus.

Three choices are separate: the two functions, the linear solver, and the route by which the
products are formed (`hypergradient`: `jax.linearize` and `jax.jvp`; `hypergradient_jaxopt`:
`jaxopt.implicit_diff.root_vjp`, reverse mode only; `implicit_argmin`: `lax.custom_root` around
an inner solver, so that plain `jax.grad` gives the hypergradient). `unrolled` differentiates
through the inner steps instead, to compare with.
"""

import re
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import eval_jaxpr
from jax.interpreters.partial_eval import dce_jaxpr

from ibau_jax.hypergradient.ball import Ball
from ibau_jax.hypergradient.solvers import (
    Direct,
    NormalCG,
    Report,
    Solver,
    Tree,
    add,
    all_finite,
    check_floating,
    power_of_two,
    scale,
    with_residual,
)

Objective = Callable[[Tree, Tree], jax.Array]

# Right on any symmetric system, definite or not, singular (the pseudo-inverse) or not. No damping:
# it is in units of the Hessian squared, so none fits all sizes, and 100 eigenvalues of +-[0.5, 4]
# are solved to 2e-6 without, to 2e-3 with 1e-3 (float32). What is ill-conditioned is left to the
# number of steps: they take the strong directions first, and the residual says what is left.
DEFAULT = NormalCG(steps=50)


def hypergradient(
    outer: Objective,
    inner: Objective,
    delta: Tree,
    params: Tree,
    *,
    solver: Solver = DEFAULT,
    ball: Ball | None = None,
    keep_diverged: bool = False,
) -> tuple[jax.Array, Tree, Report]:
    """The implicit hypergradient of `outer` at `delta`, a (near) stationary point of `inner`.

    Args:
      outer: `outer(delta, params) -> scalar`, what the parameters minimise.
      inner: `inner(delta, params) -> scalar`, what delta minimises (for I-BAU minus the loss).
      delta: pytree of floating-point arrays.
      params: pytree of floating-point arrays.
      solver: how (d11 inner) x = d1 outer is solved; the default is right for a Hessian with
        eigenvalues of either sign.
      ball: delta is a minimum of `inner` in this ball, possibly on its border, where equation
        (4) does not hold: there d1 inner is not 0. The system is then the one of the projected
        fixed point delta = project(delta - a d1 inner), reduced to the directions in which delta
        can move: Q (d11 inner + curvature) Q x = Q d1 outer. It does not depend on a.
      keep_diverged: use an x that leaves no smaller residual than none would, as the published
        code does (an x that is not finite is never used).

    Returns:
      value: `outer(delta, params)`.
      gradient: d2 outer - (d12 inner)^T x, with the structure and dtypes of `params`; d2 outer
        alone (the direct gradient) where the solve failed.
      report: how well the system was solved.

    Raises:
      ValueError: a leaf is not floating-point, `outer` or `inner` does not give a scalar, or
        `inner` has no forward-mode derivatives (a `jax.custom_vjp` inside may have none).
    """
    delta, params, outer, inner = _checked(delta, params, outer=outer, inner=inner)
    value, (to_delta, to_params) = jax.value_and_grad(outer, (0, 1))(delta, params)
    if isinstance(solver, Direct):
        return value, to_params, solver(lambda v: v, to_delta)[1]
    unit = power_of_two(to_delta)  # x and its products are in this unit, and so stay in range
    to_delta = scale(1 / unit, to_delta)
    with _forward_mode(inner, delta, params):
        along = _forward_over_reverse(inner, delta, params)
        # The primal pass is paid once; each product is then a tangent pass.
        slope, hessian = jax.linearize(lambda d: jax.grad(inner, 0)(d, params), delta)
        onto, curvature = (lambda v: v, 0.0) if ball is None else ball.tangent(delta, slope)
        goal = onto(to_delta)

        def border(v, image):  # Q (A + curvature) v, for a v that Q leaves alone
            return image if ball is None else onto(add(image, scale(curvature, v)))

        x, report = solver(lambda v: border(v, hessian(onto(v))), goal)
        x = onto(x)
        # The same pass gives A x, hence the exact residual; the solver's own, one product more, is
        # then dead code that XLA drops.
        image, mixed = along(x)
    report = with_residual(report, border(x, image), goal)
    return value, *_sum(to_params, scale(-unit, mixed), report, keep_diverged)


def hypergradient_jaxopt(
    outer: Objective,
    inner: Objective,
    delta: Tree,
    params: Tree,
    *,
    solver: Solver = DEFAULT,
    ball: Ball | None = None,
    keep_diverged: bool = False,
) -> tuple[jax.Array, Tree, Report]:
    """The same gradient by `jaxopt.implicit_diff.root_vjp` on the condition d1 inner = 0.

    Arguments and results as `hypergradient`; a second, independent route to compare with, and
    the one for functions that have no forward-mode derivatives. On the border of a ball the
    condition is project(delta - d1 inner) = delta, whose system is not symmetric: choose `GMRES`,
    `Dense` or `Neumann`.
    """
    delta, params, outer, inner = _checked(delta, params, outer=outer, inner=inner)
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
    unit = power_of_two(to_delta)
    goal = scale(1 / unit, to_delta)
    (implicit,) = root_vjp(condition, sol=delta, args=(params,), cotangent=goal, solve=solve)
    return value, *_sum(to_params, scale(unit, implicit), reports[0], keep_diverged)


def implicit_argmin(
    minimise: Callable[[Tree], Tree],
    inner: Objective,
    *,
    solver: Solver = DEFAULT,
) -> Callable[[Tree], Tree]:
    """`minimise(params) -> delta`, given the derivative of a minimum of `inner`.

    `jax.grad(lambda p: outer(implicit_argmin(minimise, inner)(p), p))` is then the
    hypergradient, whatever `minimise` does inside (it is not differentiated). By
    `lax.custom_root`, so it holds for values that `inner` closes over as for `params`, in reverse
    and forward mode, for derivatives of derivatives (`jax.hessian`, `jax.grad` of `jax.grad`),
    and under `jax.jit` and `jax.vmap`. There is no report here: a derivative is NaN where its
    linear solve failed.

    `minimise` and `inner` may close over anything; `inner` must have forward-mode derivatives.
    """

    def solve(hessian, b):
        x, report = solver(hessian, b)
        return jax.tree.map(lambda v: jnp.where(report.failed, jnp.nan, v), x)

    def tangent_solve(hessian, b):
        return lax.custom_linear_solve(hessian, b, solve, symmetric=True)

    def minimum(params):
        shapes = jax.eval_shape(minimise, params)
        guess = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)  # only its shapes count
        delta, given, objective = _checked(guess, params, inner=inner)
        _check_forward_mode(objective, delta, given)
        slope = jax.grad(objective)
        return lax.custom_root(
            lambda d: slope(d, given), delta, lambda *_: minimise(params), tangent_solve
        )

    return minimum


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

    start, params, outer = _checked(start, params, outer=outer)

    def run(p):
        def one(i, delta):
            return step(i, delta, p)

        body = jax.checkpoint(one) if checkpoint else one  # pyright: ignore[reportPrivateImportUsage]
        delta = lax.fori_loop(0, steps, body, start)
        return outer(delta, p), delta

    (value, delta), gradient = jax.value_and_grad(run, has_aux=True)(params)
    return value, gradient, delta


def needs_reverse_mode(inner: Objective, delta: Tree, params: Tree) -> str | None:
    """Why `hypergradient` cannot be used with `inner` and `hypergradient_jaxopt` can.

    None where `hypergradient` can. Only traces. What keeps it is as a rule a `jax.custom_vjp`
    that calls another one (or itself) in its forward pass: forward mode does not go through it.

    Raises:
      Exception: what JAX says where `inner` has no second derivatives by either way.
    """

    def reverse(d, p):
        slope, pull = jax.vjp(jax.grad(inner), d, p)
        return pull(slope)

    try:
        _forward_over_reverse(inner, delta, params)
    except Exception as error:  # of any kind: it is another for each primitive
        jax.eval_shape(reverse, delta, params)
        return str(error).strip().split("\n")[0] or repr(error)  # never empty: that says no
    return None


def _forward_over_reverse(
    inner: Objective, delta: Tree, params: Tree
) -> Callable[[Tree], tuple[Tree, Tree]]:
    """`x -> ((d11 inner) x, (d12 inner)^T x)`, traced.

    The derivative of both gradients along x (mixed derivatives commute) needs no memory of the
    backward pass.

    Raises:
      TypeError: a `jax.custom_vjp` has no forward mode. JAX says so only when the program is
        compiled; or, not compiled, also where the derivative is not used in the end.
    """

    def along(x):
        return jax.jvp(lambda d: jax.grad(inner, (0, 1))(d, params), (delta,), (x,))[1]

    program, shapes = jax.make_jaxpr(along, return_shape=True)(delta)
    used = [True] * len(jax.tree.leaves(shapes))
    alive, _ = dce_jaxpr(program.jaxpr, used, instantiate=True)
    if re.search(r"\bcustom_lin\b", str(alive)):  # what stands where a custom_vjp has no tangent
        raise TypeError("forward mode does not go through a jax.custom_vjp in it")

    def run(x):
        leaves = eval_jaxpr(alive, program.consts, *jax.tree.leaves(x))
        return jax.tree.unflatten(jax.tree.structure(shapes), leaves)

    return run


def _check_forward_mode(inner: Objective, delta: Tree, params: Tree) -> None:
    if reason := needs_reverse_mode(inner, delta, params):
        raise ValueError(
            f"inner has no forward-mode derivatives ({reason}): use hypergradient_jaxopt, which "
            "needs reverse mode only"
        )


@contextmanager
def _forward_mode(inner: Objective, delta: Tree, params: Tree):
    """Where something fails inside, say in one line if reverse mode would not."""
    try:
        yield
    except Exception:
        _check_forward_mode(inner, delta, params)
        raise


def _checked(delta: Tree, params: Tree, **objectives: Objective) -> tuple[Any, ...]:
    """Both as trees of arrays, and the objectives made to say where they give no scalar."""
    check_floating("delta", delta)
    check_floating("params", params)
    delta, params = jax.tree.map(jnp.asarray, (delta, params))
    return delta, params, *(_scalar(*named) for named in objectives.items())


def _scalar(name: str, objective: Objective) -> Objective:
    def checked(delta, params):
        value = objective(delta, params)
        found = [(jnp.result_type(x), jnp.shape(x)) for x in jax.tree.leaves(value)]
        single = jax.tree.structure(value) == jax.tree.structure(0) and found[0][1] == ()
        if not (single and jnp.issubdtype(found[0][0], jnp.floating)):
            shown = ", ".join(f"{dtype}{list(shape)}" for dtype, shape in found) or "nothing"
            raise ValueError(
                f"{name}(delta, params) gives {shown}: expected one floating-point scalar, "
                "nothing beside it"
            )
        return value

    return checked


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
