"""The hypergradient in float64: closed form, finite differences, unrolling, every route.

Problems are drawn by hypothesis; the functions under test are compiled once and take the drawn
arrays as arguments.
"""

from functools import cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.test_util import check_grads

from ibau_jax.hypergradient import (
    CG,
    GMRES,
    Ball,
    Dense,
    Direct,
    Neumann,
    NormalCG,
    hypergradient,
    hypergradient_jaxopt,
    implicit_argmin,
    unrolled,
)

ROUTES = {"explicit": hypergradient, "jaxopt": hypergradient_jaxopt}
EXACT = {
    "dense": Dense(),
    "cg": CG(steps=12, tolerance=1e-14),
    "normal-cg": NormalCG(steps=60, tolerance=1e-15),
    "gmres": GMRES(steps=5),
    "neumann": Neumann(terms=600, step=0.25),
}
DENSE = EXACT["dense"]
seeds = st.integers(0, 2**31)


@pytest.fixture(autouse=True)
def double(x64):
    """Every test here is in float64."""


class Problem(NamedTuple):
    """inner and outer as functions of drawn arrays, and the minimum of inner."""

    inner: object
    outer: object
    solution: object


def quadratic(data) -> Problem:
    """inner = 1/2 d'Ad - d'Bp with A = A' > 0, so delta(p) = A^-1 B p; outer is not linear."""
    a, b, c = data

    def inner(delta, p):
        return 0.5 * delta @ a @ delta - delta @ (b @ p)

    def outer(delta, p):
        return jnp.sum(jnp.sin(delta) * c) + jnp.sum(p**3) + delta @ (b @ p)

    return Problem(inner, outer, lambda p: jnp.linalg.solve(a, b @ p))


def network(data) -> Problem:
    """inner: a small tanh network, strongly convex in delta thanks to a square."""
    w1, w2, c = data

    def inner(delta, p):
        return w2 @ jnp.tanh(w1 @ (delta + p[:5])) + 1.5 * jnp.sum(delta**2) + p[5] * delta[0]

    def outer(delta, p):
        return jnp.sum((delta - p[:5]) ** 2) * jnp.exp(p[5]) + jnp.sum(jnp.sin(delta) * c)

    def solution(p):
        def newton(_, delta):
            slope, curvature = jax.grad(inner)(delta, p), jax.hessian(inner)(delta, p)
            return delta - jnp.linalg.solve(curvature, slope)

        return jax.lax.fori_loop(0, 20, newton, jnp.zeros(5))

    return Problem(inner, outer, solution)


def draw(family, seed: int):
    """Arrays for a problem with 5 unknowns and 6 parameters, and the parameters."""
    rng = np.random.default_rng(seed)
    if family is quadratic:
        root = rng.normal(size=(5, 5))
        values = root @ root.T / 5 + np.eye(5)
        data = (values, rng.normal(size=(5, 6)), rng.normal(size=5))
    else:
        data = (rng.normal(size=(6, 5)) / 3, rng.normal(size=6) / 3, rng.normal(size=5))
    return tuple(jnp.array(d) for d in data), jnp.array(rng.normal(size=6) / 2)


FAMILIES = pytest.mark.parametrize("family", [quadratic, network])


@cache
def compiled(family, solver, route="explicit"):
    """`(data, params, delta) -> (value, gradient, report)`."""

    def run(data, params, delta):
        inner, outer, _ = family(data)
        return ROUTES[route](outer, inner, delta, params, solver=solver)

    return jax.jit(run)


@cache
def exact(family):
    """`(data, params) -> (delta, gradient)`, by differentiating the solution itself.

    For the quadratic through its closed form, for the network through the dense inverse.
    """

    def run(data, params):
        inner, outer, solution = family(data)
        delta = solution(params)
        curvature = jax.hessian(inner)(delta, params)
        mixed = jax.jacobian(jax.grad(inner), 1)(delta, params)
        to_delta, to_params = jax.grad(outer, (0, 1))(delta, params)
        if family is quadratic:
            return delta, jax.grad(lambda p: outer(solution(p), p))(params)
        return delta, to_params - mixed.T @ jnp.linalg.solve(curvature, to_delta)

    return jax.jit(run)


@cache
def value_at_solution(family):
    def run(data, params):
        _, outer, solution = family(data)
        return outer(solution(params), params)

    return jax.jit(run)


@FAMILIES
@pytest.mark.parametrize("name", EXACT)
@given(seed=seeds)
def test_every_solver_gives_the_exact_gradient(family, name, seed):
    data, params = draw(family, seed)
    delta, expected = exact(family)(data, params)
    value, gradient, report = compiled(family, EXACT[name])(data, params, delta)
    np.testing.assert_allclose(gradient, expected, rtol=1e-7, atol=1e-8)
    np.testing.assert_allclose(value, value_at_solution(family)(data, params), rtol=1e-10)
    assert report.residual < 1e-7 and not report.failed and not report.dropped


@FAMILIES
@given(seed=seeds)
def test_equals_central_differences(family, seed):
    data, params = draw(family, seed)
    delta, _ = exact(family)(data, params)
    _, gradient, _ = compiled(family, DENSE)(data, params, delta)
    value = partial(value_at_solution(family), data)
    step = 1e-5  # the error of a central difference, step^2, meets rounding, 1e-16 / step
    for i, unit in enumerate(np.eye(len(params))):
        slope = (value(params + step * unit) - value(params - step * unit)) / (2 * step)
        np.testing.assert_allclose(gradient[i], slope, rtol=1e-6, atol=1e-6)


@cache
def by_unrolling(family, checkpoint, steps=400):
    def run(data, params):
        inner, outer, _ = family(data)

        def step(_, delta, p):
            return delta - 0.1 * jax.grad(inner)(delta, p)

        return unrolled(outer, step, jnp.zeros(5), params, steps=steps, checkpoint=checkpoint)

    return jax.jit(run)


@FAMILIES
@pytest.mark.parametrize("checkpoint", [False, True])
@given(seed=seeds)
def test_equals_unrolling_with_enough_steps(family, checkpoint, seed):
    data, params = draw(family, seed)
    value, through, delta = by_unrolling(family, checkpoint)(data, params)
    _, gradient, _ = compiled(family, DENSE)(data, params, delta)
    np.testing.assert_allclose(gradient, through, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(value, value_at_solution(family)(data, params), rtol=1e-8)


@given(seed=seeds)
def test_unrolling_a_few_steps_is_a_neumann_series(seed):
    """From the minimum, T steps of rate a give the series of T terms with step a."""
    data, params = draw(quadratic, seed)

    def run(data, params):
        inner, outer, solution = quadratic(data)
        start = jax.lax.stop_gradient(solution(params))

        def step(_, delta, p):
            return delta - 0.1 * jax.grad(inner)(delta, p)

        return unrolled(outer, step, start, params, steps=5)[1], start

    through, delta = jax.jit(run)(data, params)
    _, gradient, _ = compiled(quadratic, Neumann(5, 0.1))(data, params, delta)
    np.testing.assert_allclose(gradient, through, rtol=1e-8, atol=1e-10)


@FAMILIES
@pytest.mark.parametrize(
    "solver", [Neumann(1, 0.05), Neumann(4, 0.05), NormalCG(3, 0.1), GMRES(3), CG(2), Direct()]
)
@given(seed=seeds)
def test_routes_agree_to_rounding_also_away_from_the_minimum(family, solver, seed):
    data, params = draw(family, seed)
    delta = jnp.array(np.random.default_rng(seed + 1).normal(size=5))
    one = compiled(family, solver)(data, params, delta)
    two = compiled(family, solver, "jaxopt")(data, params, delta)
    np.testing.assert_allclose(one[1], two[1], rtol=1e-8, atol=1e-10)
    np.testing.assert_allclose(one[2].residual, two[2].residual, rtol=1e-7, atol=1e-9)
    assert int(one[2].steps) == int(two[2].steps)


@FAMILIES
@given(seed=seeds)
def test_jax_grad_of_an_implicit_minimum_is_the_hypergradient(family, seed):
    data, params = draw(family, seed)
    delta, expected = exact(family)(data, params)
    np.testing.assert_allclose(
        through_minimum(family)(data, params), expected, rtol=1e-7, atol=1e-8
    )


@cache
def through_minimum(family):
    def run(data, params):
        inner, outer, solution = family(data)

        def minimise(p):  # a while loop: no reverse mode of its own
            return jax.lax.while_loop(
                lambda d: jnp.all(d == 0), lambda _: solution(p), jnp.zeros(5)
            )

        best = implicit_argmin(minimise, inner, solver=DENSE)
        return jax.grad(lambda p: outer(best(p), p))(params)

    return jax.jit(run)


@given(seed=seeds)
def test_the_sign_is_the_minus_of_equation_4(seed):
    data, params = draw(quadratic, seed)
    delta, expected = exact(quadratic)(data, params)
    _, gradient, _ = compiled(quadratic, DENSE)(data, params, delta)
    _, direct, _ = compiled(quadratic, Direct())(data, params, delta)
    plus = 2 * direct - gradient  # line 7 of Algorithm 1 as printed
    gap = np.linalg.norm(direct - expected)  # what the implicit term is worth here
    assert np.linalg.norm(gradient - expected) < 1e-6 * gap
    np.testing.assert_allclose(np.linalg.norm(plus - expected), 2 * gap, rtol=1e-6)


@given(seed=seeds)
def test_one_neumann_term_is_one_mixed_product(seed):
    data, params = draw(network, seed)
    delta = jnp.array(np.random.default_rng(seed).normal(size=5))
    inner, outer, _ = network(data)
    _, gradient, report = compiled(network, Neumann(1, 0.1))(data, params, delta)
    to_delta, to_params = jax.grad(outer, (0, 1))(delta, params)
    mixed = jax.jacobian(jax.grad(inner), 1)(delta, params)
    np.testing.assert_allclose(
        gradient, to_params - 0.1 * mixed.T @ to_delta, rtol=1e-8, atol=1e-12
    )
    assert int(report.steps) == 0


def test_structure_of_the_trees_does_not_matter():
    data, params = draw(network, 5)
    inner, outer, solution = network(data)
    delta = solution(params)
    for solver in (Neumann(4, 0.05), CG(3), NormalCG(2, 0.1), GMRES(2), Dense()):
        _, flat, _ = hypergradient(outer, inner, delta, params, solver=solver)

        def tree(f):
            return lambda d, p: f(jnp.concatenate([d[0], d[1]["x"]]), jnp.concatenate(p))

        split_delta, split_params = (delta[:2], {"x": delta[2:]}), [params[:1], params[1:]]
        _, nested, _ = hypergradient(
            tree(outer), tree(inner), split_delta, split_params, solver=solver
        )
        assert isinstance(nested, list)
        np.testing.assert_allclose(jnp.concatenate(nested), flat, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("solver", [Neumann(4, 0.05), NormalCG(3, 0.1), GMRES(3), Dense()])
def test_batching_by_vmap_equals_a_loop(solver):
    data, params = draw(network, 6)
    inner, outer, solution = network(data)
    many = jnp.stack([params, 2 * params, -params])

    def gradient(p):
        return hypergradient(outer, inner, solution(p), p, solver=solver)[1]

    batched = jax.jit(jax.vmap(gradient))(many)
    np.testing.assert_allclose(batched, jnp.stack([gradient(p) for p in many]), rtol=1e-8)


def test_a_failed_solve_falls_back_to_the_direct_gradient():
    data, params = draw(quadratic, 8)
    inner, outer, solution = quadratic(data)
    delta = solution(params)
    direct = hypergradient(outer, inner, delta, params, solver=Direct())[1]
    for route in ROUTES.values():
        diverging = Neumann(5, 10.0)
        _, gradient, report = route(outer, inner, delta, params, solver=diverging)
        assert report.failed and report.dropped and report.residual > 1
        np.testing.assert_array_equal(gradient, direct)
        _, gradient, report = route(
            outer, inner, delta, params, solver=diverging, keep_diverged=True
        )
        assert report.failed and not report.dropped
        assert np.linalg.norm(gradient - direct) > np.linalg.norm(direct)
        for keep in (False, True):  # what is not finite is never used
            overflow = Neumann(400, 10.0)
            _, gradient, report = route(
                outer, inner, delta, params, solver=overflow, keep_diverged=keep
            )
            assert report.failed and report.dropped and report.residual == np.inf
            np.testing.assert_array_equal(gradient, direct)


def test_a_hessian_that_is_not_finite_falls_back_too():
    def inner(delta, p):  # the second derivative of |d|^1.5 is infinite at 0
        return jnp.sum(jnp.abs(delta) ** 1.5) * p[0] + jnp.sum(delta * p)

    def outer(delta, p):
        return jnp.sum(delta * p) + jnp.sum(p**2) + jnp.sum(delta)

    params = jnp.array([1.0, 2.0])
    for solver in (Neumann(), CG(), NormalCG(), GMRES(2), Dense()):
        _, gradient, report = hypergradient(outer, inner, jnp.zeros(2), params, solver=solver)
        assert report.failed and report.dropped
        np.testing.assert_array_equal(gradient, 2 * params)


@FAMILIES
def test_the_objectives_of_these_tests_are_differentiable(family):
    data, params = draw(family, 7)
    inner, outer, solution = family(data)
    for f in (inner, outer):
        check_grads(f, (solution(params), params), order=2)


# On the border of a ball


@cache
def on_ball(ball: Ball, steps=4000):
    """`(data, params, start) -> delta`: minimum of the quadratic in the ball, by projection."""

    def run(data, params, start):
        inner, _, _ = quadratic(data)

        def step(_, delta):
            return ball.project(delta - 0.05 * jax.grad(inner)(delta, params))

        return jax.lax.fori_loop(0, steps, step, start)

    return jax.jit(run)


@cache
def constrained(ball: Ball, solver, route="explicit"):
    def run(data, params, delta):
        inner, outer, _ = quadratic(data)
        return ROUTES[route](outer, inner, delta, params, solver=solver, ball=ball)

    return jax.jit(run)


BALLS = pytest.mark.parametrize(
    "ball", [Ball(0.3), Ball(50.0), Ball(0.1, "linf"), Ball(50.0, "linf")], ids=str
)


@BALLS
@given(seed=seeds)
def test_on_the_border_it_equals_central_differences(ball, seed):
    data, params = draw(quadratic, seed)
    _, outer, _ = quadratic(data)
    delta = on_ball(ball)(data, params, jnp.zeros(5))
    _, gradient, report = constrained(ball, GMRES(5))(data, params, delta)
    assert report.residual < 1e-8
    step = 1e-6
    for i, unit in enumerate(np.eye(len(params))):
        up, down = params + step * unit, params - step * unit
        ends = [outer(on_ball(ball)(data, p, delta), p) for p in (up, down)]
        slope = (ends[0] - ends[1]) / (2 * step)
        np.testing.assert_allclose(gradient[i], slope, rtol=2e-4, atol=2e-5)


@BALLS
@given(seed=seeds)
def test_on_the_border_the_routes_agree(ball, seed):
    """The symmetric system against implicit differentiation of delta = project(delta - slope)."""
    data, params = draw(quadratic, seed)
    delta = on_ball(ball)(data, params, jnp.zeros(5))
    _, one, _ = constrained(ball, GMRES(5))(data, params, delta)
    _, two, _ = constrained(ball, Dense(), "jaxopt")(data, params, delta)
    np.testing.assert_allclose(one, two, rtol=1e-5, atol=1e-6)


def test_on_the_border_the_plain_formula_is_wrong():
    data, params = draw(quadratic, 11)
    ball = Ball(0.3)
    delta = on_ball(ball)(data, params, jnp.zeros(5))
    assert abs(jnp.linalg.norm(delta) - 0.3) < 1e-9
    _, right, _ = constrained(ball, GMRES(5))(data, params, delta)
    _, plain, _ = compiled(quadratic, DENSE)(data, params, delta)
    assert np.linalg.norm(plain - right) > 0.1 * np.linalg.norm(right)


def test_inside_the_ball_the_border_changes_nothing():
    data, params = draw(quadratic, 12)
    delta = quadratic(data).solution(params)
    for ball in (Ball(100.0), Ball(100.0, "linf")):
        _, one, _ = constrained(ball, NormalCG(3, 0.1))(data, params, delta)
        _, two, _ = compiled(quadratic, NormalCG(3, 0.1))(data, params, delta)
        np.testing.assert_allclose(one, two, rtol=1e-12)


@given(seed=seeds, radius=st.sampled_from([0.5, 3.0]), norm=st.sampled_from(["l2", "linf"]))
def test_projection_is_the_nearest_point(seed, radius, norm):
    ball = Ball(radius, norm)
    rng = np.random.default_rng(seed)
    point = jnp.array(rng.normal(size=4) * rng.uniform(0, 3))
    near = ball.project(point)
    others = np.stack([ball.project(jnp.array(v)) for v in rng.normal(size=(20, 4)) * 2])
    distance = np.linalg.norm(np.asarray(point) - others, axis=1).min()
    assert np.linalg.norm(point - near) <= distance + 1e-12
    np.testing.assert_allclose(ball.project(near), near, rtol=1e-12)
