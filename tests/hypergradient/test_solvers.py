"""Every linear solver behind the one contract, in float64, against the dense solution."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ibau_jax.hypergradient import CG, GMRES, Dense, Direct, Neumann, NormalCG
from ibau_jax.hypergradient.solvers import arnoldi, norm

SIZE = 6
# Enough steps for a matrix of 6: exact up to rounding. The spectrum of `definite` is [0.5, 4].
DEFINITE = {
    "neumann": Neumann(terms=300, step=0.4),
    "cg": CG(steps=SIZE + 2, tolerance=1e-13),
    "normal-cg": NormalCG(steps=40, tolerance=1e-14),
    "gmres": GMRES(steps=SIZE),
    "dense": Dense(),
}
INDEFINITE = {k: DEFINITE[k] for k in ("normal-cg", "gmres", "dense")}
ALL = {**DEFINITE, "direct": Direct()}
seeds = st.integers(0, 2**31)


@pytest.fixture(autouse=True)
def double(x64):
    """Every test here is in float64."""


def system(seed: int, low: float = 0.5, high: float = 4.0, negative: int = 0):
    """A symmetric matrix with eigenvalues of size [low, high], some negative, and a vector."""
    rng = np.random.default_rng(seed)
    basis, _ = np.linalg.qr(rng.normal(size=(SIZE, SIZE)))
    values = rng.uniform(low, high, size=SIZE)
    values[:negative] *= -1
    return jnp.array(basis @ np.diag(values) @ basis.T), jnp.array(rng.normal(size=SIZE))


@cache
def compiled(solver):
    """`solve(a, b)`, compiled once for all the systems that hypothesis draws."""
    return jax.jit(lambda a, b: solver(lambda v: a @ v, b))


def relative(a, x, b):
    return np.linalg.norm(b - a @ x) / np.linalg.norm(b)


@pytest.mark.parametrize("name", DEFINITE)
@given(seed=seeds)
def test_solves_a_definite_system(name, seed):
    a, b = system(seed)
    x, report = compiled(DEFINITE[name])(a, b)
    np.testing.assert_allclose(x, np.linalg.solve(a, b), rtol=1e-7, atol=1e-9)
    np.testing.assert_allclose(report.residual, relative(a, x, b), atol=1e-12)
    assert not report.failed


@pytest.mark.parametrize("name", INDEFINITE)
@given(seed=seeds, negative=st.integers(1, SIZE))
def test_solves_an_indefinite_system(name, seed, negative):
    a, b = system(seed, negative=negative)
    x, report = compiled(INDEFINITE[name])(a, b)
    np.testing.assert_allclose(x, np.linalg.solve(a, b), rtol=1e-6, atol=1e-8)
    assert not report.failed


@given(seed=seeds, damping=st.sampled_from([0.01, 0.1, 2.0]))
def test_damping_is_regularised_least_squares(seed, damping):
    a, b = system(seed, negative=2)
    x, _ = compiled(NormalCG(steps=40, damping=damping, tolerance=1e-14))(a, b)
    exact = np.linalg.solve(a @ a + damping * np.eye(SIZE), a @ b)
    np.testing.assert_allclose(x, exact, rtol=1e-6, atol=1e-9)


@given(seed=seeds, steps=st.integers(1, SIZE))
def test_each_step_of_cg_and_gmres_is_optimal_in_its_krylov_space(seed, steps):
    """The textbook property, step by step: no iterate too early or too late, no old residual."""
    a, b = system(seed)
    space = np.stack([np.linalg.matrix_power(np.asarray(a), i) @ b for i in range(steps)], 1)
    basis, _ = np.linalg.qr(space)

    x, report = compiled(CG(steps=steps, tolerance=0.0))(a, b)
    exact = basis @ np.linalg.solve(basis.T @ a @ basis, basis.T @ b)  # least error in A's norm
    np.testing.assert_allclose(x, exact, rtol=1e-5, atol=1e-8)
    assert int(report.steps) == steps

    x, report = compiled(GMRES(steps=steps))(a, b)
    exact = basis @ np.linalg.lstsq(a @ basis, b, rcond=None)[0]  # least residual
    np.testing.assert_allclose(x, exact, rtol=1e-5, atol=1e-8)
    assert int(report.steps) == steps


@given(seed=seeds, steps=st.integers(1, SIZE), damping=st.sampled_from([0.0, 0.3]))
def test_each_step_of_normal_cg_is_optimal_in_its_krylov_space(seed, steps, damping):
    a, b = system(seed, low=0.7, high=2.0, negative=2)
    normal, rhs = np.asarray(a @ a + damping * np.eye(SIZE)), a @ b
    space = np.stack([np.linalg.matrix_power(normal, i) @ rhs for i in range(steps)], 1)
    basis, _ = np.linalg.qr(space)
    x, report = compiled(NormalCG(steps=steps, damping=damping, tolerance=0.0))(a, b)
    exact = basis @ np.linalg.solve(basis.T @ normal @ basis, basis.T @ rhs)
    np.testing.assert_allclose(x, exact, rtol=1e-5, atol=1e-7)
    assert int(report.steps) == 2 * steps + 1


@given(seed=seeds)
def test_gmres_needs_no_symmetry(seed):
    rng = np.random.default_rng(seed)
    a = jnp.array(3 * np.eye(SIZE) + rng.normal(size=(SIZE, SIZE)) / 2)
    b = jnp.array(rng.normal(size=SIZE))
    for solver in (GMRES(steps=SIZE), Dense()):
        x, _ = compiled(solver)(a, b)
        np.testing.assert_allclose(x, np.linalg.solve(a, b), rtol=1e-6, atol=1e-9)


@given(seed=seeds, terms=st.sampled_from([1, 2, 7, 40]), step=st.sampled_from([0.05, 0.2, 0.45]))
def test_neumann_falls_as_theory_says(seed, terms, step):
    """The error after K terms is (I - step A)^K times the solution: at most factor^K of it."""
    a, b = system(seed)
    exact = np.linalg.solve(a, b)
    values = np.linalg.eigvalsh(a)
    factor = np.abs(1 - step * values).max()
    x, report = compiled(Neumann(terms, step))(a, b)
    left = np.linalg.matrix_power(np.eye(SIZE) - step * np.asarray(a), terms) @ exact
    np.testing.assert_allclose(exact - x, left, rtol=1e-6, atol=1e-10)
    assert np.linalg.norm(exact - x) <= factor**terms * np.linalg.norm(exact) + 1e-10
    assert int(report.steps) == terms - 1
    if terms > 1:
        assert report.contraction <= factor + 1e-9
    else:
        assert report.contraction is None


def test_the_contraction_of_a_long_series_is_its_factor():
    a, b = system(1)
    _, report = Neumann(60, 0.3)(lambda v: a @ v, b)
    factor = np.abs(1 - 0.3 * np.linalg.eigvalsh(a)).max()
    np.testing.assert_allclose(report.contraction, factor, rtol=1e-3)


@given(seed=seeds, terms=st.sampled_from([1, 2, 5]))
def test_neumann_is_the_published_recursion(seed, terms):
    """v <- (I - step A) v + u from zero, then step * v: as many terms as the published K."""
    a, b = system(seed)
    v = jnp.zeros(SIZE)
    for _ in range(terms):
        v = v - 0.1 * a @ v + b
    x, report = compiled(Neumann(terms, 0.1))(a, b)
    np.testing.assert_allclose(x, 0.1 * v, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(report.residual, relative(a, x, b), rtol=1e-9)


@pytest.mark.parametrize("name", ALL)
def test_of_the_identity_and_of_zero(name):
    """A converged step is kept (a known mistake elsewhere returns zeros), and 0 is no NaN."""
    b = jnp.arange(1.0, 4.0)
    x, report = ALL[name](lambda v: v, b)
    if name == "direct":
        assert not x.any() and report.residual == 1 and int(report.steps) == 0
    else:
        np.testing.assert_allclose(x, b)
        assert report.residual < 1e-12
    x, report = ALL[name](lambda v: v, jnp.zeros(3))
    assert not x.any() and report.residual == 0 and not report.failed


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("where", ["matrix", "vector"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_value_that_is_not_finite_is_said_and_never_returned(name, where, value):
    a, b = system(2)
    if where == "matrix":
        a = a.at[1, 2].set(value)
    else:
        b = b.at[1].set(value)
    x, report = jax.jit(lambda: ALL[name](lambda v: a @ v, b))()
    assert np.isfinite(x).all()
    assert not np.isnan(report.residual)
    assert report.failed or (name == "direct" and where == "matrix")  # it never looks at A


def test_a_singular_dense_system_has_failed():
    x, report = Dense()(lambda v: jnp.zeros(3), jnp.ones(3))
    assert report.failed and np.isfinite(x).all()


def test_a_series_that_diverges_says_so():
    a, b = system(3, low=30, high=60)
    x, report = Neumann(5, 0.1)(lambda v: a @ v, b)
    assert report.failed and report.residual > 1 and np.isfinite(x).all()
    assert report.contraction > 1.5
    overflow, report = Neumann(800, 0.1)(lambda v: a @ v, b)
    assert report.failed and report.residual == np.inf and not overflow.any()


def test_a_dense_solve_that_is_too_large_is_refused():
    with pytest.raises(ValueError, match="5 unknowns: expected at most 4"):
        Dense(limit=4)(lambda v: v, jnp.ones(5))


@pytest.mark.parametrize("name", ALL)
def test_works_on_trees_under_jit_vmap_and_loops(name):
    a, b = system(4)
    solver = ALL[name]

    def tree(v):
        return {"x": v[:2], "y": [v[2:].reshape(2, 2)]}

    def flat(t):
        return jnp.concatenate([t["x"], t["y"][0].reshape(-1)])

    def solve(b):
        x, report = solver(lambda t: tree(a @ flat(t)), tree(b))
        return flat(x), report.residual

    expected = solver(lambda v: a @ v, b)[0]
    np.testing.assert_allclose(jax.jit(solve)(b)[0], expected, rtol=1e-8, atol=1e-12)
    many = jnp.stack([b, 2 * b, jnp.zeros(SIZE), -b])
    x, residual = jax.jit(jax.vmap(solve))(many)
    each = [solve(v) for v in many]
    np.testing.assert_allclose(x, jnp.stack([x for x, _ in each]), rtol=1e-8, atol=1e-12)
    np.testing.assert_allclose(residual, jnp.stack([r for _, r in each]), rtol=1e-3, atol=1e-12)
    looped = jax.lax.fori_loop(0, 2, lambda _, v: solve(v)[0], b)
    np.testing.assert_allclose(looped, solve(solve(b)[0])[0], rtol=1e-8, atol=1e-12)


krylov = jax.jit(lambda a, b, steps: arnoldi(lambda v: a @ v, b, steps), static_argnums=2)


@given(seed=seeds, steps=st.sampled_from([1, 4, SIZE + 3]))
def test_arnoldi_gives_an_orthonormal_basis_in_which_the_map_is_small(seed, steps):
    a, b = system(seed, negative=3)
    basis, small = krylov(a, b, steps)
    count = min(steps + 1, SIZE)
    np.testing.assert_allclose(basis[:count] @ basis[:count].T, np.eye(count), atol=1e-10)
    assert not basis[SIZE:].any()  # the space is full
    np.testing.assert_allclose(a @ basis[:-1].T, basis.T @ small, atol=1e-9)


@given(seed=seeds)
def test_arnoldi_stops_in_an_invariant_space(seed):
    """Of a vector with two eigencomponents, two products span everything."""
    a, _ = system(seed, negative=2)
    _, vectors = np.linalg.eigh(a)
    basis, _ = krylov(a, jnp.array(vectors[:, 0] + vectors[:, -1]), 4)
    assert [round(float(norm(row))) for row in basis] == [1, 1, 0, 0, 0]
