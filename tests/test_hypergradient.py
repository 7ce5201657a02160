"""The hypergradient in float64: closed form, finite differences, unrolling, two routes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.test_util import check_grads

from ibau_jax.hypergradient import (
    Direct,
    Neumann,
    NormalCG,
    hypergradient,
    hypergradient_jaxopt,
)

ROUTES = (hypergradient, hypergradient_jaxopt)
EXACT = NormalCG(steps=200, tolerance=1e-14)


def quadratic(seed: int, size: int = 5, extra: int = 4):
    """inner = 1/2 d'Ad - d'Bp with A = A' > 0, so delta(p) = A^-1 B p; outer is not linear."""
    rng = np.random.default_rng(seed)
    root = rng.normal(size=(size, size))
    a = jnp.array(root @ root.T / size + np.eye(size))
    b, c = jnp.array(rng.normal(size=(size, extra))), jnp.array(rng.normal(size=size))
    params = jnp.array(rng.normal(size=extra))

    def inner(delta, p):
        return 0.5 * delta @ a @ delta - delta @ (b @ p)

    def outer(delta, p):
        return jnp.sum(jnp.sin(delta) * c) + jnp.sum(p**3) + delta @ (b @ p)

    def solution(p):
        return jnp.linalg.solve(a, b @ p)

    return inner, outer, solution, params, a


@pytest.fixture(autouse=True)
def double(x64):
    """Every test here is in float64."""


@given(seed=st.integers(0, 2**31))
@pytest.mark.parametrize("route", ROUTES)
def test_equals_the_gradient_of_the_closed_form(route, seed):
    inner, outer, solution, params, _ = quadratic(seed)
    value, gradient, report = route(outer, inner, solution(params), params, solver=EXACT)
    exact = jax.grad(lambda p: outer(solution(p), p))(params)
    np.testing.assert_allclose(gradient, exact, rtol=1e-8, atol=1e-10)
    np.testing.assert_allclose(value, outer(solution(params), params))
    assert report.residual < 1e-8


@given(seed=st.integers(0, 2**31))
def test_equals_central_differences(seed):
    inner, outer, solution, params, _ = quadratic(seed)
    _, gradient, _ = hypergradient(outer, inner, solution(params), params, solver=EXACT)
    step = 1e-5  # the error of a central difference, step^2, meets rounding, 1e-16 / step
    for i, unit in enumerate(np.eye(len(params))):
        up, down = params + step * unit, params - step * unit
        slope = (outer(solution(up), up) - outer(solution(down), down)) / (2 * step)
        np.testing.assert_allclose(gradient[i], slope, rtol=1e-6, atol=1e-6)


@given(seed=st.integers(0, 2**31))
def test_equals_unrolling(seed):
    """Differentiating through many inner steps gives the same (on a small network)."""
    rng = np.random.default_rng(seed)
    w1, w2 = jnp.array(rng.normal(size=(6, 4)) / 2), jnp.array(rng.normal(size=6) / 2)
    params = {"a": jnp.array(rng.normal(size=4)), "b": jnp.array(0.3)}

    def inner(delta, p):  # strongly convex thanks to the square
        return jnp.sum(jnp.tanh(w1 @ (delta + p["a"])) * w2) + 2 * jnp.sum(delta**2)

    def outer(delta, p):
        return jnp.sum((delta - p["a"]) ** 2) * jnp.exp(p["b"]) + jnp.sum(jnp.sin(delta))

    def ascend(p):
        def step(_, delta):
            return delta - 0.2 * jax.grad(inner)(delta, p)

        return jax.lax.fori_loop(0, 120, step, jnp.zeros(4))

    unrolled = jax.grad(lambda p: outer(ascend(p), p))(params)
    _, gradient, _ = hypergradient(outer, inner, ascend(params), params, solver=EXACT)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-8), gradient, unrolled
    )


@given(seed=st.integers(0, 2**31), terms=st.integers(1, 6))
def test_routes_agree_for_a_truncated_series(seed, terms):
    inner, outer, _, params, _ = quadratic(seed)
    delta = jnp.array(np.random.default_rng(seed + 1).normal(size=5))
    for solver in (Neumann(terms, 0.05), NormalCG(terms, 0.1), Direct()):
        one = hypergradient(outer, inner, delta, params, solver=solver)
        two = hypergradient_jaxopt(outer, inner, delta, params, solver=solver)
        np.testing.assert_allclose(one[1], two[1], rtol=1e-9, atol=1e-11)
        np.testing.assert_allclose(one[2].residual, two[2].residual, rtol=1e-7, atol=1e-9)
        assert int(one[2].steps) == int(two[2].steps)


def test_the_sign_is_the_minus_of_equation_4():
    inner, outer, solution, params, _ = quadratic(3)
    delta = solution(params)
    exact = jax.grad(lambda p: outer(solution(p), p))(params)
    _, gradient, _ = hypergradient(outer, inner, delta, params, solver=EXACT)
    _, direct, _ = hypergradient(outer, inner, delta, params, solver=Direct())
    plus = 2 * direct - gradient  # line 7 of Algorithm 1 as printed
    assert np.linalg.norm(plus - exact) > 0.1 * np.linalg.norm(exact)


def test_one_neumann_term_is_one_mixed_product():
    inner, outer, _, params, _ = quadratic(4)
    delta = jnp.ones(5)
    _, gradient, report = hypergradient(outer, inner, delta, params, solver=Neumann(1, 0.1))
    to_delta, to_params = jax.grad(outer, (0, 1))(delta, params)
    mixed = jax.jacobian(jax.grad(inner), 1)(delta, params)
    np.testing.assert_allclose(gradient, to_params - 0.1 * mixed.T @ to_delta, rtol=1e-10)
    assert int(report.steps) == 0


@given(seed=st.integers(0, 2**31), terms=st.integers(1, 8))
def test_neumann_is_the_published_recursion(seed, terms):
    """v <- (I - step A) v + u from zero, then step * v: as many terms as the published K."""
    _, _, _, _, a = quadratic(seed)
    b = jnp.array(np.random.default_rng(seed).normal(size=5))
    v = jnp.zeros(5)
    for _ in range(terms):
        v = v - 0.1 * a @ v + b
    x, report = Neumann(terms, 0.1)(lambda x: a @ x, b)
    np.testing.assert_allclose(x, 0.1 * v, rtol=1e-10)
    np.testing.assert_allclose(
        report.residual, np.linalg.norm(b - a @ x) / np.linalg.norm(b), rtol=1e-9
    )


@given(seed=st.integers(0, 2**31))
def test_normal_cg_solves_indefinite_systems(seed):
    rng = np.random.default_rng(seed)
    basis, _ = np.linalg.qr(rng.normal(size=(6, 6)))
    a = jnp.array(basis @ np.diag([-3.0, -1, 0.5, 1, 2, 4]) @ basis.T)
    b = jnp.array(rng.normal(size=6))
    x, report = NormalCG(steps=60, tolerance=1e-13)(lambda x: a @ x, b)
    np.testing.assert_allclose(x, np.linalg.solve(a, b), rtol=1e-6, atol=1e-8)
    assert report.residual < 1e-8
    damped, _ = NormalCG(steps=60, damping=0.5, tolerance=1e-13)(lambda x: a @ x, b)
    np.testing.assert_allclose(damped, np.linalg.solve(a @ a + 0.5 * np.eye(6), a @ b), rtol=1e-6)


def test_normal_cg_of_the_identity_and_of_zero():
    """The converged step is kept (a known mistake elsewhere returns zeros), and 0 is no NaN."""
    b = jnp.arange(1.0, 4.0)
    x, _ = NormalCG()(lambda x: x, b)
    np.testing.assert_allclose(x, b)
    x, report = NormalCG()(lambda x: x, jnp.zeros(3))
    assert not x.any() and report.residual == 0 and int(report.steps) == 1


def test_structure_of_the_trees_does_not_matter():
    inner, outer, solution, params, _ = quadratic(5)
    delta = solution(params)
    _, flat, _ = hypergradient(outer, inner, delta, params, solver=Neumann(4, 0.05))

    def tree(f):
        return lambda d, p: f(jnp.concatenate([d[0], d[1]["x"]]), jnp.concatenate(p))

    split_delta, split_params = (delta[:2], {"x": delta[2:]}), [params[:1], params[1:]]
    _, nested, _ = hypergradient(
        tree(outer), tree(inner), split_delta, split_params, solver=Neumann(4, 0.05)
    )
    np.testing.assert_allclose(jnp.concatenate(nested), flat, rtol=1e-10)


def test_works_under_jit_and_vmap():
    inner, outer, solution, params, _ = quadratic(6)
    many = jnp.stack([params, 2 * params, -params])

    def gradient(p):
        return hypergradient(outer, inner, solution(p), p, solver=NormalCG(3, 0.1))[1]

    batched = jax.jit(jax.vmap(gradient))(many)
    np.testing.assert_allclose(batched, jnp.stack([gradient(p) for p in many]), rtol=1e-9)


def test_the_objectives_of_these_tests_are_differentiable():
    inner, outer, solution, params, _ = quadratic(7)
    for f in (inner, outer):
        check_grads(f, (solution(params), params), order=2)
