"""The implicit hypergradient on any pytrees; this module imports nothing else of the package.

For delta(params) = argmin inner(delta, params), the gradient of outer(delta(params), params) is

    d2 outer - (d12 inner)^T (d11 inner)^-1 d1 outer                            (paper eq. 4)

Line 7 of the paper's Algorithm 1 has a plus where equation (4) has this minus; the derivation
from equations (2) and (3) and the published code both give the minus.

Three choices are separate: the two functions, the linear solver, and the route by which the
products are formed (`hypergradient`: `jax.linearize` and `jax.jvp`; `hypergradient_jaxopt`:
`jaxopt.implicit_diff.root_vjp`).
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import lax

Tree = Any
MatVec = Callable[[Tree], Tree]
Objective = Callable[[Tree, Tree], jax.Array]


class Report(NamedTuple):
    """How well the linear system was solved.

    Attributes:
      residual: ||b - A x|| / ||b||, scalar; 0 where b is 0.
      steps: products with A that were spent on the solution, int32 scalar.
    """

    residual: jax.Array
    steps: jax.Array


class Solver(Protocol):
    """`solve(matvec, b) -> (x, report)` with `matvec(x)` near `b`; x and b have one structure."""

    def __call__(self, matvec: MatVec, b: Tree) -> tuple[Tree, Report]: ...


@dataclass(frozen=True)
class Neumann:
    """x = step * sum_{j < terms} (I - step A)^j b, the published fixed point (`--K`, 5 terms).

    Converges when every eigenvalue of step * A lies between 0 and 2. The published loop
    starts from zero and so spends its first product on a zero vector; here `terms` terms cost
    `terms - 1` products (and one more to know the residual).
    """

    terms: int = 5
    step: float = 0.1

    def __call__(self, matvec: MatVec, b: Tree) -> tuple[Tree, Report]:
        def advance(_, total):  # v <- v - step A v + b
            return jax.tree.map(lambda v, a, c: v - self.step * a + c, total, matvec(total), b)

        total = lax.fori_loop(0, self.terms - 1, advance, b)
        x = scale(self.step, total)
        return x, Report(_residual(matvec(x), b), jnp.int32(self.terms - 1))


@dataclass(frozen=True)
class NormalCG:
    """Conjugate gradients on (A A + damping I) x = A b for a symmetric A of any signature.

    With damping this is the regularised least-squares solution, which leaves the flat
    directions of A alone; each step costs two products with A.
    """

    steps: int = 10
    damping: float = 0.0
    tolerance: float = 1e-6

    def __call__(self, matvec: MatVec, b: Tree) -> tuple[Tree, Report]:
        def normal(x):
            return add(matvec(matvec(x)), scale(self.damping, x))

        rhs = matvec(b)
        goal = self.tolerance**2 * dot(rhs, rhs)

        def unfinished(state):
            _, _, _, squared, step = state
            return (step < self.steps) & (squared > goal)

        def advance(state):
            x, residual, direction, squared, step = state
            image = normal(direction)
            curvature = dot(direction, image)  # may underflow to 0 where rhs is tiny
            length = jnp.where(curvature > 0, squared / jnp.maximum(curvature, 1e-38), 0.0)
            x = add(x, scale(length, direction))
            residual = add(residual, scale(-length, image))
            fresh = dot(residual, residual)
            return x, residual, add(residual, scale(fresh / squared, direction)), fresh, step + 1

        start = (scale(0.0, b), rhs, rhs, dot(rhs, rhs), jnp.int32(0))
        x, _, _, _, steps = lax.while_loop(unfinished, advance, start)
        return x, Report(_residual(matvec(x), b), 2 * steps + 1)


@dataclass(frozen=True)
class Direct:
    """x = 0: the direct gradient alone, which is what Danskin's theorem would give."""

    def __call__(self, matvec: MatVec, b: Tree) -> tuple[Tree, Report]:
        del matvec
        return scale(0.0, b), Report(jnp.sign(dot(b, b)), jnp.int32(0))


def hypergradient(
    outer: Objective,
    inner: Objective,
    delta: Tree,
    params: Tree,
    *,
    solver: Solver = Neumann(),  # noqa: B008  (frozen)
) -> tuple[jax.Array, Tree, Report]:
    """The implicit hypergradient of `outer` at `delta`, a (near) stationary point of `inner`.

    Args:
      outer: `outer(delta, params) -> scalar`, what the parameters minimise.
      inner: `inner(delta, params) -> scalar`, what delta minimises (for I-BAU minus the loss).
      delta: pytree of arrays.
      params: pytree of arrays.
      solver: how (d11 inner) x = d1 outer is solved.

    Returns:
      value: `outer(delta, params)`.
      gradient: d2 outer - (d12 inner)^T x, with the structure of `params`.
      report: how well the system was solved.
    """
    value, (to_delta, to_params) = jax.value_and_grad(outer, (0, 1))(delta, params)
    if isinstance(solver, Direct):
        return value, to_params, solver(lambda x: x, to_delta)[1]
    # The primal pass is paid once; each product is then a tangent pass.
    _, matvec = jax.linearize(lambda d: jax.grad(inner, 0)(d, params), delta)
    x, report = solver(matvec, to_delta)
    # (d12 inner)^T x as the derivative of the parameters' gradient along x (mixed derivatives
    # commute): forward over reverse, which needs no memory of the backward pass. The same pass
    # gives A x, hence the exact residual; the solver's own, one product more, is then dead
    # code that XLA drops.
    _, (image, mixed) = jax.jvp(lambda d: jax.grad(inner, (0, 1))(d, params), (delta,), (x,))
    report = report._replace(residual=_residual(image, to_delta))
    return value, jax.tree.map(jnp.subtract, to_params, mixed), report


def hypergradient_jaxopt(
    outer: Objective,
    inner: Objective,
    delta: Tree,
    params: Tree,
    *,
    solver: Solver = Neumann(),  # noqa: B008  (frozen)
) -> tuple[jax.Array, Tree, Report]:
    """The same gradient by `jaxopt.implicit_diff.root_vjp` on the condition d1 inner = 0.

    Arguments and results as `hypergradient`; a second, independent route to compare with.
    """
    with warnings.catch_warnings():  # no longer developed, and says so: imported here only
        warnings.simplefilter("ignore", DeprecationWarning)
        from jaxopt.implicit_diff import root_vjp

    reports = []

    def solve(matvec, b):
        x, report = solver(matvec, b)
        reports.append(report)
        return x

    value, (to_delta, to_params) = jax.value_and_grad(outer, (0, 1))(delta, params)
    (implicit,) = root_vjp(
        jax.grad(inner, 0), sol=delta, args=(params,), cotangent=to_delta, solve=solve
    )
    return value, add(to_params, implicit), reports[0]


def dot(a: Tree, b: Tree) -> jax.Array:
    """Inner product of two pytrees."""
    return sum(jax.tree.leaves(jax.tree.map(lambda x, y: jnp.vdot(x, y), a, b)), jnp.zeros(()))


def add(a: Tree, b: Tree) -> Tree:
    """a + b, leaf by leaf."""
    return jax.tree.map(jnp.add, a, b)


def scale(factor: float | jax.Array, tree: Tree) -> Tree:
    """factor * tree, leaf by leaf."""
    return jax.tree.map(lambda x: factor * x, tree)


def _residual(image: Tree, b: Tree) -> jax.Array:
    difference = add(image, scale(-1.0, b))
    size = dot(b, b)
    return jnp.where(size > 0, jnp.sqrt(dot(difference, difference) / size), 0.0)
