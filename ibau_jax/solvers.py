"""Linear solvers for the hypergradient: `solve(matvec, b) -> (x, report)` on any pytree.

`matvec` is a symmetric linear map A on trees of b's structure; the inner Hessian of a saddle
point may have eigenvalues of either sign. All work inside `jit`, `vmap`, loops and `pmap`.

No solver hides a failure. `report.failed` is true where a value was not finite, or where x
leaves a larger residual than x = 0 would; the caller decides what to do (`hypergradient` falls
back to the direct gradient). An x that is not finite is never returned: it is zero instead.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import lax
from jax.flatten_util import ravel_pytree

Tree = Any
MatVec = Callable[[Tree], Tree]


class Report(NamedTuple):
    """How well the linear system was solved.

    Attributes:
      residual: ||b - A x|| / ||b||, scalar; 0 where b is 0, infinite where it is not a number or
        x was not finite.
      steps: products with A that were spent on the solution, int32 scalar.
      finite: bool scalar, whether x came out finite (x is zero where not).
      contraction: ratio of the norms of the last two terms of a Neumann series, scalar: an
        estimate of its factor per term, above 1 where it diverges. None for other solvers, and
        for one term alone.
      dropped: bool scalar, set by `hypergradient`: x was not used, the gradient is the direct
        one. None before.
    """

    residual: jax.Array
    steps: jax.Array
    finite: jax.Array
    contraction: jax.Array | None = None
    dropped: jax.Array | None = None

    @property
    def failed(self) -> jax.Array:
        """Whether x is not finite or leaves a larger residual than x = 0, bool scalar."""
        return self.residual > 1 + 1e-3  # rounding around 1 is no failure


class Solver(Protocol):
    """`solve(matvec, b) -> (x, report)` with `matvec(x)` near `b`; x and b have one structure."""

    def __call__(self, matvec: MatVec, b: Tree) -> tuple[Tree, Report]: ...


@dataclass(frozen=True)
class Neumann:
    """x = step * sum_{j < terms} (I - step A)^j b, the published fixed point (`--K`, 5 terms).

    Converges when every eigenvalue of step * A lies between 0 and 2; the error then falls by
    the factor max |1 - step * eigenvalue| a term. The published loop starts from zero and so
    spends its first product on a zero vector; here `terms` terms cost `terms - 1` products.
    """

    terms: int = 5
    step: float = 0.1

    def __call__(self, matvec: MatVec, b: Tree) -> tuple[Tree, Report]:
        def advance(_, state):
            total, term, _ = state
            fresh = add(term, scale(-self.step, matvec(term)))
            return add(total, fresh), fresh, term

        total, term, before = lax.fori_loop(0, self.terms - 1, advance, (b, b, b))
        contraction = _ratio(norm(term), norm(before)) if self.terms > 1 else None
        return finish(matvec, scale(self.step, total), b, self.terms - 1, contraction)


@dataclass(frozen=True)
class CG:
    """Conjugate gradients, for a positive definite A; a step costs one product.

    On an A with eigenvalues of both signs the steps may grow without bound: use `NormalCG` or
    `GMRES` there. Stops where the residual is below `tolerance` (relative to b).
    """

    steps: int = 10
    tolerance: float = 1e-6

    def __call__(self, matvec: MatVec, b: Tree) -> tuple[Tree, Report]:
        x, steps = _conjugate_gradients(matvec, b, self.steps, self.tolerance)
        return finish(matvec, x, b, steps)


@dataclass(frozen=True)
class NormalCG:
    """Conjugate gradients on (A A + damping I) x = A b for a symmetric A of any signature.

    With damping this is the regularised least-squares solution, which leaves the flat
    directions of A alone; a step costs two products with A, and the right-hand side one.
    """

    steps: int = 10
    damping: float = 0.0
    tolerance: float = 1e-6

    def __call__(self, matvec: MatVec, b: Tree) -> tuple[Tree, Report]:
        def normal(x):
            return add(matvec(matvec(x)), scale(self.damping, x))

        x, steps = _conjugate_gradients(normal, matvec(b), self.steps, self.tolerance)
        return finish(matvec, x, b, 2 * steps + 1)


@dataclass(frozen=True)
class GMRES:
    """The x of least residual in the Krylov space of `steps` dimensions, for any A.

    Keeps `steps + 1` vectors of b's size. No restarts.
    """

    steps: int = 10

    def __call__(self, matvec: MatVec, b: Tree) -> tuple[Tree, Report]:
        basis, hessenberg = arnoldi(matvec, b, self.steps)
        goal = jnp.zeros(self.steps + 1, basis.dtype).at[0].set(norm(b))
        # least squares by SVD: exact also where the space stopped growing (columns of zeros)
        weights = jnp.linalg.lstsq(hessenberg, goal)[0]
        x = ravel_pytree(b)[1](weights @ basis[:-1])
        return finish(matvec, x, b, self.steps)


@dataclass(frozen=True)
class Dense:
    """The exact solution, by the matrix of A: a product for each element of b, size^2 memory.

    For small problems and for tests. A singular A is reported as failed.
    """

    limit: int = 4096

    def __call__(self, matvec: MatVec, b: Tree) -> tuple[Tree, Report]:
        flat, unravel = ravel_pytree(b)
        if flat.size > self.limit:
            raise ValueError(
                f"a dense solve of {flat.size} unknowns: expected at most {self.limit} "
                "(Dense(limit=...)); use NormalCG or GMRES"
            )
        rows = jax.vmap(lambda v: ravel_pytree(matvec(unravel(v)))[0])(
            jnp.eye(flat.size, dtype=flat.dtype)
        )
        return finish(matvec, unravel(jnp.linalg.solve(rows.T, flat)), b, flat.size)


@dataclass(frozen=True)
class Direct:
    """x = 0: the direct gradient alone, which is what Danskin's theorem would give."""

    def __call__(self, matvec: MatVec, b: Tree) -> tuple[Tree, Report]:
        del matvec
        return finish(lambda x: x, zeros_like(b), b, 0)


def finish(
    matvec: MatVec, x: Tree, b: Tree, steps: int | jax.Array, contraction: jax.Array | None = None
) -> tuple[Tree, Report]:
    """What every solver returns: x, zero where it is not finite, and its report.

    The residual costs one product more; XLA drops it where nobody reads it.
    """
    finite = all_finite(x)
    x = jax.tree.map(lambda v: jnp.where(finite, v, jnp.zeros_like(v)), x)
    report = Report(jnp.zeros(()), jnp.int32(steps), finite, contraction)
    return x, with_residual(report, matvec(x), b)


def with_residual(report: Report, image: Tree, b: Tree) -> Report:
    """The report with the residual that follows from `image`, which is A x."""
    residual = _ratio(norm(add(b, scale(-1.0, image))), norm(b))
    usable = report.finite & ~jnp.isnan(residual)
    return report._replace(residual=jnp.where(usable, residual, jnp.inf))


def arnoldi(matvec: MatVec, start: Tree, steps: int) -> tuple[jax.Array, jax.Array]:
    """Orthonormal basis [steps + 1, n] of the Krylov space, and A in it [steps + 1, steps].

    Where the space stops growing the remaining vectors are zero. For a symmetric A the square
    part is tridiagonal and its eigenvalues approach A's extreme ones (Lanczos).
    """
    flat, unravel = ravel_pytree(start)
    tiny = 10 * jnp.finfo(flat.dtype).eps

    def advance(j, state):
        basis, hessenberg = state
        image = ravel_pytree(matvec(unravel(basis[j])))[0]
        size = jnp.linalg.norm(image)
        first = basis @ image
        image = image - first @ basis
        second = basis @ image  # once more: rounding of the first is worth a digit in ten
        image = image - second @ basis
        length = jnp.linalg.norm(image)
        grows = length > tiny * size
        fresh = jnp.where(grows, image / jnp.where(grows, length, 1), 0)
        column = (first + second).at[j + 1].set(jnp.where(grows, length, 0))
        return basis.at[j + 1].set(fresh), hessenberg.at[:, j].set(column)

    basis = jnp.zeros((steps + 1, flat.size), flat.dtype)
    size = jnp.linalg.norm(flat)
    basis = basis.at[0].set(flat / jnp.where(size > 0, size, 1))
    hessenberg = jnp.zeros((steps + 1, steps), flat.dtype)
    return lax.fori_loop(0, steps, advance, (basis, hessenberg))


def _conjugate_gradients(matvec: MatVec, b: Tree, steps: int, tolerance: float):
    """x and the number of steps, for a positive definite `matvec` from x = 0."""
    goal = tolerance**2 * dot(b, b)

    def unfinished(state):
        _, _, _, squared, step = state
        return (step < steps) & (squared > goal)

    def advance(state):
        x, residual, direction, squared, step = state
        image = matvec(direction)
        curvature = dot(direction, image)  # may underflow to 0 where b is tiny
        length = jnp.where(curvature == 0, 0.0, squared / jnp.where(curvature == 0, 1, curvature))
        x = add(x, scale(length, direction))
        residual = add(residual, scale(-length, image))
        fresh = dot(residual, residual)
        return x, residual, add(residual, scale(fresh / squared, direction)), fresh, step + 1

    start = (zeros_like(b), b, b, dot(b, b), jnp.int32(0))
    x, _, _, _, done = lax.while_loop(unfinished, advance, start)
    return x, done


def dot(a: Tree, b: Tree) -> jax.Array:
    """Inner product of two pytrees."""
    return jnp.asarray(sum(jax.tree.leaves(jax.tree.map(lambda x, y: jnp.vdot(x, y), a, b))))


def norm(tree: Tree) -> jax.Array:
    """Euclidean norm of a pytree."""
    return jnp.sqrt(dot(tree, tree))


def add(a: Tree, b: Tree) -> Tree:
    """a + b, leaf by leaf."""
    return jax.tree.map(jnp.add, a, b)


def scale(factor: float | jax.Array, tree: Tree) -> Tree:
    """factor * tree, leaf by leaf."""
    return jax.tree.map(lambda x: factor * x, tree)


def zeros_like(tree: Tree) -> Tree:
    """Zeros of the same structure."""
    return jax.tree.map(jnp.zeros_like, tree)


def all_finite(tree: Tree) -> jax.Array:
    """Whether no leaf holds a NaN or an infinite value, bool scalar."""
    flags = [jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]
    return jnp.all(jnp.stack(flags))


def _ratio(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.where(b == 0, 0.0, a / jnp.where(b == 0, 1, b))
