"""Linear solvers for the hypergradient: `solve(matvec, b) -> (x, report)` on any pytree.

`matvec` is a symmetric linear map A on trees of b's structure; the inner Hessian of a saddle
point may have eigenvalues of either sign. All work inside `jit`, `vmap`, loops and `pmap`.

No solver hides a failure. `report.failed` is true where a value was not finite, or where x
leaves no smaller residual than x = 0 would; the caller decides what to do (`hypergradient` falls
back to the direct gradient). An x that is not finite is never returned: it is zero instead.

The size of b does not matter, nor the dtypes of its leaves: every solver is given b divided by
a power of two near its largest entry, all leaves in one dtype of at least 32 bits (`_in_units`).
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import lax
from jax.flatten_util import ravel_pytree

Tree = Any
MatVec = Callable[[Tree], Tree]
GAIN = 1e-3  # a residual within this of the one of x = 0 is rounding: nothing gained


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
      by_choice: x is 0 because nothing else was wanted (`Direct`): that it gains nothing is then
        no failure.
    """

    residual: jax.Array
    steps: jax.Array
    finite: jax.Array
    contraction: jax.Array | None = None
    dropped: jax.Array | None = None
    by_choice: bool | jax.Array = False

    @property
    def failed(self) -> jax.Array:
        """Whether x gained nothing: not finite, or (within 0.1 %) no nearer than x = 0. Bool."""
        return self.residual > jnp.where(self.by_choice, 1 + GAIN, 1 - GAIN)


class Solver(Protocol):
    """`solve(matvec, b) -> (x, report)` with `matvec(x)` near `b`; x and b have one structure."""

    def __call__(self, matvec: MatVec, b: Tree) -> tuple[Tree, Report]: ...


class Solution(NamedTuple):
    """What the method of a solver gives: x, and its part of the report."""

    x: Tree
    steps: int | jax.Array
    contraction: jax.Array | None = None


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
        return _in_units(self._solve, matvec, b)

    def _solve(self, matvec: MatVec, b: Tree) -> Solution:
        def advance(_, state):
            total, term, _ = state
            fresh = add(term, scale(-self.step, matvec(term)))
            return add(total, fresh), fresh, term

        total, term, before = lax.fori_loop(0, self.terms - 1, advance, (b, b, b))
        contraction = _ratio(norm(term), norm(before)) if self.terms > 1 else None
        return Solution(scale(self.step, total), self.terms - 1, contraction)


@dataclass(frozen=True)
class CG:
    """Conjugate gradients, for a positive definite A; a step costs one product.

    On an A with eigenvalues of both signs the steps may grow without bound: use `NormalCG` or
    `GMRES` there. Stops where the residual is below `tolerance` (relative to b).
    """

    steps: int = 10
    tolerance: float = 1e-6

    def __call__(self, matvec: MatVec, b: Tree) -> tuple[Tree, Report]:
        return _in_units(self._solve, matvec, b)

    def _solve(self, matvec: MatVec, b: Tree) -> Solution:
        return Solution(*_conjugate_gradients(matvec, b, self.steps, self.tolerance))


@dataclass(frozen=True)
class NormalCG:
    """Conjugate gradients on (A A + damping I) x = A b for a symmetric A of any signature.

    That minimises ||b - A x||^2 + damping ||x||^2: with damping it is the regularised
    least-squares solution, which leaves the flat directions of A alone, and without it they wait
    until the others are solved. The residual falls with each step, on a singular A as well. A
    step costs two products with A, and the right-hand side one.
    """

    steps: int = 10
    damping: float = 0.0
    tolerance: float = 1e-6

    def __call__(self, matvec: MatVec, b: Tree) -> tuple[Tree, Report]:
        return _in_units(self._solve, matvec, b)

    def _solve(self, matvec: MatVec, b: Tree) -> Solution:
        slope = matvec(b)
        # A in units of its own size on b (or of the damping's), so that A A stays in range.
        unit = _power_of_two(jnp.maximum(_ratio(norm(slope), norm(b)), math.sqrt(self.damping)))

        def product(v):
            return scale(1 / unit, matvec(v))

        # XLA makes damping / (unit * unit) of it, which without damping may be 0 / 0.
        damping = self.damping / unit / unit if self.damping else jnp.zeros_like(unit)
        y, steps = _least_squares(product, b, scale(1 / unit, slope), damping, self)
        return Solution(scale(1 / unit, y), 2 * steps + 1)


@dataclass(frozen=True)
class GMRES:
    """The x of least residual in the Krylov space of `steps` dimensions, for any A.

    Keeps `steps + 1` vectors of b's size. No restarts.
    """

    steps: int = 10

    def __call__(self, matvec: MatVec, b: Tree) -> tuple[Tree, Report]:
        return _in_units(self._solve, matvec, b)

    def _solve(self, matvec: MatVec, b: Tree) -> Solution:
        basis, hessenberg = arnoldi(matvec, b, self.steps)
        goal = jnp.zeros(self.steps + 1, basis.dtype).at[0].set(norm(b))
        # least squares by SVD: exact also where the space stopped growing (columns of zeros)
        weights = jnp.linalg.lstsq(hessenberg, goal)[0]
        return Solution(ravel_pytree(b)[1](weights @ basis[:-1]), self.steps)


@dataclass(frozen=True)
class Dense:
    """The exact solution, by the matrix of A: a product for each element of b, size^2 memory.

    For small problems and for tests. A singular A is reported as failed.
    """

    limit: int = 4096

    def __call__(self, matvec: MatVec, b: Tree) -> tuple[Tree, Report]:
        return _in_units(self._solve, matvec, b)

    def _solve(self, matvec: MatVec, b: Tree) -> Solution:
        flat, unravel = ravel_pytree(b)
        if flat.size > self.limit:
            raise ValueError(
                f"a dense solve of {flat.size} unknowns: expected at most {self.limit} "
                "(Dense(limit=...)); use NormalCG or GMRES"
            )
        rows = jax.vmap(lambda v: ravel_pytree(matvec(unravel(v)))[0])(
            jnp.eye(flat.size, dtype=flat.dtype)
        )
        return Solution(unravel(jnp.linalg.solve(rows.T, flat)), flat.size)


@dataclass(frozen=True)
class Direct:
    """x = 0: the direct gradient alone, which is what Danskin's theorem would give."""

    def __call__(self, matvec: MatVec, b: Tree) -> tuple[Tree, Report]:
        x, report = _in_units(lambda _, b: Solution(zeros_like(b), 0), lambda v: v, b)
        return x, report._replace(by_choice=True)


def _in_units(
    method: Callable[[MatVec, Tree], Solution], matvec: MatVec, b: Tree
) -> tuple[Tree, Report]:
    """What every solver returns: the x of `method`, zero where it is not finite, and its report.

    The method sees b in units of its own size and in one dtype, so that no square of a tiny or
    huge b leaves the range of numbers and no loop changes the dtype of what it carries.

    The residual costs one product more; XLA drops it where nobody reads it.
    """
    check_floating("b", b)
    unit = power_of_two(b)
    wide = _wide(b)

    def product(v):
        return _cast(matvec(like(b, v)), wide)

    rhs = scale(1 / unit, _cast(b, wide))
    x, steps, contraction = method(product, rhs)
    result = like(b, scale(unit, x))
    finite = all_finite(result)
    x, result = jax.tree.map(lambda v: jnp.where(finite, v, 0), (x, result))
    report = Report(jnp.zeros(()), jnp.int32(steps), finite, contraction)
    return result, with_residual(report, product(x), rhs)


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
        size = norm(image)
        first = basis @ image
        image = image - first @ basis
        second = basis @ image  # once more: rounding of the first is worth a digit in ten
        image = image - second @ basis
        length = norm(image)
        grows = length > tiny * size
        fresh = jnp.where(grows, image / jnp.where(grows, length, 1), 0)
        column = (first + second).at[j + 1].set(jnp.where(grows, length, 0))
        return basis.at[j + 1].set(fresh), hessenberg.at[:, j].set(column)

    basis = jnp.zeros((steps + 1, flat.size), flat.dtype)
    size = norm(flat)
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
        curvature = dot(direction, image)  # 0 where A is not definite after all
        length = jnp.where(curvature == 0, 0.0, squared / jnp.where(curvature == 0, 1, curvature))
        x = add(x, scale(length, direction))
        residual = add(residual, scale(-length, image))
        fresh = dot(residual, residual)
        return x, residual, add(residual, scale(fresh / squared, direction)), fresh, step + 1

    start = (zeros_like(b), b, b, dot(b, b), jnp.int32(0))
    x, _, _, _, done = lax.while_loop(unfinished, advance, start)
    return x, done


def _least_squares(matvec: MatVec, b: Tree, slope: Tree, damping: jax.Array, limits: NormalCG):
    """x and the number of steps; `slope` is A b, A being symmetric.

    Conjugate gradients on the normal equations, with b - A x carried along and A applied to that
    (CGLS; Björck, "Numerical Methods for Least Squares Problems", 1996): rounding
    does not make the residual grow, as it does where A A is applied to the directions.
    """
    unit = power_of_two(slope)
    residual, slope = scale(1 / unit, b), scale(1 / unit, slope)
    goal = limits.tolerance**2 * dot(slope, slope)

    def unfinished(state):
        _, _, _, squared, step = state
        return (step < limits.steps) & (squared > goal)

    def advance(state):
        x, residual, direction, squared, step = state
        image = matvec(direction)
        curvature = dot(image, image) + damping * dot(direction, direction)
        length = jnp.where(curvature == 0, 0.0, squared / jnp.where(curvature == 0, 1, curvature))
        x = add(x, scale(length, direction))
        residual = add(residual, scale(-length, image))
        slope = add(matvec(residual), scale(-damping, x))
        fresh = dot(slope, slope)
        return x, residual, add(slope, scale(fresh / squared, direction)), fresh, step + 1

    start = (zeros_like(b), residual, slope, dot(slope, slope), jnp.int32(0))
    x, _, _, _, done = lax.while_loop(unfinished, advance, start)
    return scale(unit, x), done


def check_floating(name: str, tree: Tree) -> None:
    """Raise `ValueError` where a leaf is no real floating-point number, or there is no leaf."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    for path, leaf in leaves:
        try:
            dtype = jnp.result_type(leaf)
        except TypeError:
            dtype = type(leaf).__name__
        if isinstance(dtype, str) or not jnp.issubdtype(dtype, jnp.floating):
            raise ValueError(
                f"{name}{jax.tree_util.keystr(path)} is {dtype}: expected floating leaves; convert "
                "it, or close over what is not to be differentiated"
            )
    if not leaves:
        raise ValueError(f"{name} is {tree!r}: expected at least one floating leaf")


def power_of_two(tree: Tree) -> jax.Array:
    """The power of two near the largest |entry|, scalar of at least 32 bits; 1 where that is 0.

    Dividing by it and multiplying with it are exact. 1 as well where an entry is not finite.
    """
    largest = [jnp.max(jnp.abs(lax.stop_gradient(x)), initial=0) for x in jax.tree.leaves(tree)]
    return _power_of_two(functools.reduce(jnp.maximum, _cast(largest, _wide(tree))))


def _power_of_two(size: jax.Array) -> jax.Array:
    size, kind = lax.stop_gradient(size), jnp.finfo(size.dtype)
    usable = (size > 0) & jnp.isfinite(size)
    least = float(kind.tiny)  # its inverse is a number as well
    bounded = jnp.clip(jnp.where(usable, size, 1), least, 1 / least)
    return lax.reduce_precision(bounded, kind.nexp, 0)


def _wide(tree: Tree):
    """The dtype to compute in: that of all leaves together, of at least 32 bits."""
    return jnp.result_type(jnp.float32, *jax.tree.leaves(tree))


def _cast(tree: Tree, dtype: Any) -> Tree:
    return jax.tree.map(lambda x: jnp.asarray(x, dtype), tree)


def like(model: Tree, tree: Tree) -> Tree:
    """`tree` with the dtypes of `model`, leaf by leaf."""
    return jax.tree.map(lambda m, x: jnp.asarray(x, jnp.result_type(m)), model, tree)


def dot(a: Tree, b: Tree) -> jax.Array:
    """Inner product of two pytrees, added up in at least 32 bits."""
    wide = jnp.promote_types(_wide(a), _wide(b))
    products = jax.tree.map(lambda x, y: jnp.vdot(x, y, preferred_element_type=wide), a, b)
    return jnp.asarray(sum(jax.tree.leaves(products)), wide)


def norm(tree: Tree) -> jax.Array:
    """Euclidean norm of a pytree, also where its square is out of range; derivative 0 at 0."""
    unit = power_of_two(tree)
    scaled = scale(1 / unit, _cast(tree, _wide(tree)))
    squared = dot(scaled, scaled)
    root = jnp.where(squared == 0, 0, jnp.sqrt(jnp.where(squared == 0, 1, squared)))
    return unit * root


def add(a: Tree, b: Tree) -> Tree:
    """a + b, leaf by leaf."""
    return jax.tree.map(jnp.add, a, b)


def scale(factor: float | jax.Array, tree: Tree) -> Tree:
    """factor * tree, leaf by leaf, in the dtype of the leaf."""
    return jax.tree.map(lambda x: (factor * x).astype(jnp.result_type(x)), tree)


def zeros_like(tree: Tree) -> Tree:
    """Zeros of the same structure."""
    return jax.tree.map(jnp.zeros_like, tree)


def all_finite(tree: Tree) -> jax.Array:
    """Whether no leaf holds a NaN or an infinite value, bool scalar."""
    flags = [jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]
    return jnp.all(jnp.stack(flags))


def _ratio(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.where(b == 0, 0.0, a / jnp.where(b == 0, 1, b))
