"""The doors of the hypergradient: sizes, dtypes, closures, and functions that cannot be used.

Float32 as a user has it, but where a test says otherwise.
"""

import inspect
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

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
    needs_reverse_mode,
    unrolled,
)
from ibau_jax.hypergradient.solvers import norm

ROUTES = {"explicit": hypergradient, "jaxopt": hypergradient_jaxopt}
SOLVERS = {
    "cg": CG(steps=8),
    "normal-cg": NormalCG(steps=20),
    "gmres": GMRES(4),
    "dense": Dense(),
    "neumann": Neumann(200, 0.3),
}


def outer(d, p):
    return jnp.sum(d)


def saddle(d, p):
    """Its stationary point for p is (p_0, -p_1); the gradient of the outer loss is (1, -1)."""
    return 0.5 * (d[0] ** 2 - d[1] ** 2) - d @ p


SADDLE = (jnp.array([1.0, -2.0]), jnp.array([1.0, 2.0]))


# A solve that gained nothing


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(
    "solver", [CG(), GMRES(1), NormalCG(2, damping=1e4), Neumann(5, 1e-5)], ids=str
)
def test_a_solve_that_gained_nothing_has_failed(route, solver):
    """Its residual is 1, or 0.9999 and a bit."""
    _, gradient, report = ROUTES[route](outer, saddle, *SADDLE, solver=solver)
    assert 0.999 < report.residual <= 1.001 and report.finite
    assert report.failed and report.dropped
    np.testing.assert_array_equal(gradient, [0, 0])  # the direct gradient
    _, kept, report = ROUTES[route](outer, saddle, *SADDLE, solver=solver, keep_diverged=True)
    assert report.failed and not report.dropped
    assert np.abs(kept).max() < 1e-3


@pytest.mark.parametrize("route", ROUTES)
def test_no_gain_by_choice_is_no_failure(route):
    _, gradient, report = ROUTES[route](outer, saddle, *SADDLE, solver=Direct())
    assert report.residual == 1 and not report.failed
    np.testing.assert_array_equal(gradient, [0, 0])

    def nothing(d, p):  # its slope in delta is zero: the system has the solution zero
        return jnp.sum(p**2) + 0 * jnp.sum(d)

    for solver in SOLVERS.values():
        _, gradient, report = ROUTES[route](nothing, saddle, *SADDLE, solver=solver)
        assert report.residual == 0 and not report.failed and not report.dropped
        np.testing.assert_array_equal(gradient, 2 * SADDLE[1])


def test_the_default_solver_is_right_on_any_symmetric_system():
    """Against the dense solution (the pseudo-inverse where A is singular), 1e-2 to 1e2 in size."""
    for function in (hypergradient, hypergradient_jaxopt, implicit_argmin):
        assert inspect.signature(function).parameters["solver"].default == NormalCG(steps=50)
    solve = jax.jit(lambda a, b: NormalCG(steps=50)(lambda v: a @ v, b))
    rng = np.random.default_rng(0)
    for size in (0.01, 1.0, 100.0):
        for _ in range(10):
            basis, _ = np.linalg.qr(rng.normal(size=(8, 8)))
            values = size * rng.uniform(0.5, 4, 8) * rng.choice([-1, 0, 1], 8, p=[0.4, 0.2, 0.4])
            a, b = basis * values @ basis.T, rng.normal(size=8)
            x, report = solve(a.astype(np.float32), b.astype(np.float32))
            exact = np.linalg.pinv(a, rcond=1e-6) @ b
            assert np.linalg.norm(x - exact) < 2e-5 * np.linalg.norm(exact)
            assert not report.failed
    _, gradient, report = hypergradient(outer, saddle, *SADDLE)
    np.testing.assert_allclose(gradient, [1, -1], rtol=1e-5)


# Sizes


@cache
def scaled(route, solver, constrained):
    """`(outer size, inner size) -> (gradient, report)` of a quadratic problem, float32."""
    a = jnp.array([[2.0, 0.5, 0.0], [0.5, 1.5, 0.2], [0.0, 0.2, 1.0]])
    delta = jnp.array([0.6, -0.8, 0.0])

    def run(size, steepness):
        def inner(d, p):  # with a slope along delta: on the ball of radius 1 it presses outwards
            return steepness * (0.5 * d @ a @ d - d @ (a @ delta) - d @ delta - d @ (p - 1))

        def objective(d, p):
            return size * (jnp.sum(d * jnp.arange(1.0, 4)) + d @ p + 0.5 * p @ p)

        ball = Ball(1.0) if constrained else None
        return ROUTES[route](objective, inner, delta, jnp.ones(3), solver=solver, ball=ball)[1:]

    return jax.jit(run)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("name", SOLVERS)
@given(exponent=st.floats(-36, 36))
def test_the_size_of_the_outer_loss_only_scales_the_gradient(route, name, exponent):
    """delta = (0.6, -0.8, 0): direct term delta + p, x = A^-1 (2, 3, 4), d12 inner = -I."""
    size = np.float32(10.0**exponent)
    a = np.array([[2.0, 0.5, 0.0], [0.5, 1.5, 0.2], [0.0, 0.2, 1.0]])
    exact = np.array([1.6, 0.2, 1.0]) + np.linalg.solve(a, [2.0, 3.0, 4.0])
    gradient, report = scaled(route, SOLVERS[name], False)(size, np.float32(1))
    np.testing.assert_allclose(np.float64(gradient) / size, exact, rtol=2e-5)
    assert report.residual < 1e-4 and not report.failed and not report.dropped


@pytest.mark.parametrize(
    ("name", "constrained"),
    [("cg", False), ("normal-cg", False), ("gmres", False), ("dense", False)]
    + [("normal-cg", True), ("gmres", True)],  # singular across the border: not for Dense
)
@given(exponents=st.tuples(st.floats(-30, 30), st.floats(-30, 30)))
@example(exponents=(0.0, -20.0))
@example(exponents=(0.0, 20.0))
def test_the_size_of_the_inner_loss_does_not_matter(name, constrained, exponents):
    """Its argmin is the same, on the border of a ball too: slopes of 1e-30 press as others do."""
    size, steepness = (np.float32(10.0**e) for e in exponents)
    run = scaled("explicit", SOLVERS[name], constrained)
    exact, _ = run(np.float32(1), np.float32(1))
    if abs(sum(e * s for e, s in zip(exponents, (1, -1), strict=True))) > 36:
        return  # x itself is out of the range of float32
    gradient, report = run(size, steepness)
    np.testing.assert_allclose(np.float64(gradient) / size, exact, rtol=1e-4, atol=1e-5)
    assert report.residual < 1e-4 and not report.failed


def test_the_border_of_a_ball_counts_in_the_test_above():
    free, _ = scaled("explicit", Dense(), False)(np.float32(1), np.float32(1))
    bound, _ = scaled("explicit", GMRES(4), True)(np.float32(1), np.float32(1))
    assert np.linalg.norm(free - bound) > 0.5


@pytest.mark.parametrize("size", [1e-30, 1e-19, 1.0, 1e19, 1e30])
def test_solvers_alone_do_not_mind_the_size_either(size):
    a = jnp.array([[2.0, 0.5], [0.5, 1.5]])
    b = jnp.array([1.0, -2.0])
    exact = np.linalg.solve(a, b)
    for solver in SOLVERS.values():
        x, report = solver(lambda v: a @ v, size * b)
        np.testing.assert_allclose(np.float64(x) / size, exact, rtol=1e-4)
        assert report.residual < 1e-4 and not report.failed
    np.testing.assert_allclose(np.float64(norm({"b": size * b})) / size, 5**0.5, rtol=1e-6)


# Dtypes and trees


@pytest.mark.parametrize("wide", [False, True], ids=["x32", "x64"])
@pytest.mark.parametrize(
    ("route", "solver", "ball"),
    [
        ("explicit", CG(4), None),
        ("explicit", NormalCG(4), Ball(100.0)),
        ("explicit", NormalCG(4), Ball(100.0, "linf")),
        ("explicit", GMRES(3), None),
        ("explicit", Dense(), None),
        ("explicit", Neumann(40, 0.25), None),
        ("jaxopt", CG(4), None),
    ],
)
def test_leaves_of_many_dtypes_and_none(wide, route, solver, ball):
    """A tree with a leaf of each dtype, and none: the gradient has those of the parameters."""
    with jax.enable_x64(wide):
        kinds = [jnp.float16, jnp.bfloat16, jnp.float32, jnp.float64 if wide else jnp.float32]
        delta = {str(i): jnp.array([0.5, -0.25], k) for i, k in enumerate(kinds)} | {"no": None}
        params = {str(i): jnp.array([0.25, 0.5], k) for i, k in enumerate(reversed(kinds))}
        params["no"] = None

        def single(tree):
            return jnp.stack([tree[str(i)].astype(jnp.float32) for i in range(4)])

        def inner(d, p):  # curvatures 2 and 1; d12 inner = -diag(1, 3)
            x, weights = single(d), jnp.array([1.0, 3.0], jnp.float32)
            return jnp.sum(x[:, 0] ** 2 + 0.5 * x[:, 1] ** 2) - jnp.sum(x * weights * single(p))

        def objective(d, p):
            return jnp.sum(single(d))

        run = jax.jit(lambda d, p: ROUTES[route](objective, inner, d, p, solver=solver, ball=ball))
        _, gradient, report = run(delta, params)
        assert gradient["no"] is None
        assert [gradient[str(i)].dtype for i in range(4)] == list(reversed(kinds))
        assert not report.failed
        for i in range(4):  # 1 / 2, and 3 / 1
            found = np.asarray(gradient[str(i)], np.float64)
            np.testing.assert_allclose(found, [0.5, 3], rtol=2e-2)


def test_a_system_in_another_precision_than_its_right_hand_side():
    with jax.enable_x64(True):
        a, b = jnp.array([[2.0, 0.5], [0.5, 1.5]]), jnp.array([1.0, 2.0], jnp.float32)
        for solver in SOLVERS.values():
            x, _ = solver(lambda v: a @ v, b)
            assert x.dtype == jnp.float32
            np.testing.assert_allclose(x, np.linalg.solve(a, b), rtol=1e-5)


WRONG = {
    r"delta is int32: expected floating leaves": lambda d, p: (outer, saddle, d.astype(int), p),
    r"params\['n'\] is int32: expected floating": lambda d, p: (
        outer,
        lambda d, p: saddle(d, p["w"]),
        d,
        {"w": p, "n": jnp.arange(2)},
    ),
    r"params\[0\] is complex64: expected floating": lambda d, p: (outer, saddle, d, [p + 0j]),
    r"params\[1\] is str: expected floating": lambda d, p: (outer, saddle, d, [p, "name"]),
    r"delta is None: expected at least one": lambda d, p: (outer, saddle, None, p),
    r"^outer\(delta, params\) gives float32\[\], int32\[\]: expected one floating": lambda d, p: (
        lambda d, p: (jnp.sum(d), jnp.int32(3)),
        saddle,
        d,
        p,
    ),
    r"^inner\(delta, params\) gives float32\[2\]: expected one floating": lambda d, p: (
        outer,
        lambda d, p: d * p,
        d,
        p,
    ),
    r"^inner\(delta, params\) gives int32\[\]: expected": lambda d, p: (
        outer,
        lambda d, p: jnp.sum(d > p),
        d,
        p,
    ),
    r"^outer\(delta, params\) gives nothing: expected": lambda d, p: (
        lambda d, p: None,
        saddle,
        d,
        p,
    ),
}


@pytest.mark.parametrize("message", WRONG)
@pytest.mark.parametrize("route", ROUTES)
def test_what_cannot_be_used_is_said_in_a_line(message, route):
    outer_, inner_, delta, params = WRONG[message](*SADDLE)
    with pytest.raises(ValueError, match=message) as caught:
        ROUTES[route](outer_, inner_, delta, params)
    assert "\n" not in str(caught.value)


def test_the_others_say_it_as_well():
    delta, params = SADDLE
    with pytest.raises(ValueError, match=r"^outer\(delta, params\) gives float32\[2\]"):
        unrolled(lambda d, p: d, lambda i, d, p: d, delta, params, steps=1)
    with pytest.raises(ValueError, match=r"^inner\(delta, params\) gives float32\[2\]"):
        implicit_argmin(lambda p: delta, lambda d, p: d)(params)
    with pytest.raises(ValueError, match="params is int32"):
        implicit_argmin(lambda p: delta, saddle)(jnp.arange(2))
    with pytest.raises(ValueError, match=r"b\['x'\] is int32: expected floating"):
        CG()(lambda v: v, {"x": jnp.arange(2)})


# Closures


@pytest.mark.parametrize("solver", [NormalCG(), Dense()], ids=str)
def test_an_implicit_minimum_has_derivatives_in_what_is_closed_over(solver, x64):
    """The minimum is p / q. q reaches it through `inner` alone, p through its argument."""

    def minimum(q, p):
        def inner(d, p):
            return jnp.sum(0.5 * q * d**2 - p * d)

        def minimise(p):  # no derivative of its own in reverse
            return jax.lax.while_loop(lambda d: jnp.all(d == 0), lambda d: p / q, 0 * p)

        return implicit_argmin(minimise, inner, solver=solver)(p)

    def value(q, p=2.0):
        return jnp.sum(minimum(q, jnp.array([p])) ** 2)  # p^2 / q^2

    q, p = 3.0, 2.0
    first, second = -2 * p**2 / q**3, 6 * p**2 / q**4
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9)  # noqa: E731
    close(value(q), p**2 / q**2)
    close(jax.grad(value)(q), first)
    close(jax.jit(jax.grad(value))(q), first)
    close(jax.jvp(value, (q,), (1.0,))[1], first)
    close(jax.grad(value, 1)(q, p), 2 * p / q**2)
    close(jax.hessian(value)(q), second)
    close(jax.grad(jax.grad(value))(q), second)
    close(jax.grad(jax.grad(value, 1))(q, p), -4 * p / q**3)
    many = jnp.array([1.0, 3.0, -2.0])
    close(jax.vmap(jax.grad(value))(many), -2 * p**2 / many**3)
    close(jax.grad(lambda q: jnp.sum(jax.vmap(value)(q * many)))(1.0), -2 * np.sum(p**2 / many**2))


def test_the_derivative_of_an_implicit_minimum_is_nan_where_its_solve_failed():
    delta, params = SADDLE
    best = implicit_argmin(lambda p: delta, saddle, solver=CG())
    assert np.isnan(jax.grad(lambda p: outer(best(p), p))(params)).all()
    best = implicit_argmin(lambda p: delta, saddle)
    np.testing.assert_allclose(jax.grad(lambda p: outer(best(p), p))(params), [1, -1], rtol=1e-5)


@pytest.mark.parametrize("route", ROUTES)
def test_a_hypergradient_of_functions_with_closures(route, x64):
    """Gradient in p of (p / q)^2 is 2 p / q^2; q is a tracer of jit, vmap and forward mode."""

    def gradient(q):
        def inner(d, p):
            return jnp.sum(0.5 * q * d**2 - p * d)

        def squares(d, p):
            return jnp.sum(d**2)

        p = jnp.array([2.0])
        return ROUTES[route](squares, inner, p / q, p, solver=Dense())[1][0]

    q = jnp.array([1.0, 3.0, -2.0])
    np.testing.assert_allclose(jax.jit(gradient)(q[1]), 4 / 9, rtol=1e-12)
    np.testing.assert_allclose(jax.vmap(gradient)(q), 4 / q**2, rtol=1e-12)
    moved = jax.jvp(gradient, (q[1],), (1.0,))[1]
    np.testing.assert_allclose([moved, jax.grad(gradient)(q[1])], -8 / 27, rtol=1e-9)


# Functions with derivatives of their own


@jax.custom_vjp
def exp(x):
    return jnp.exp(x)


def _forward(x):
    y = exp(x)  # it calls itself and keeps the result: forward mode does not go through
    return y, y


exp.defvjp(_forward, lambda y, cotangent: (y * cotangent,))


@jax.custom_vjp
def square(x):
    return x**2


# It calls itself, but its derivatives do not depend on what comes of that.
square.defvjp(lambda x: (square(x), x), lambda x, cotangent: (2 * x * cotangent,))


@pytest.mark.parametrize("compiled", [False, True])
def test_a_custom_vjp_without_forward_mode_is_said_and_has_a_route(compiled):
    def bowl(d, p):  # its minimum is log p, its curvature p: the gradient is 1 / p
        return jnp.sum(exp(d)) - d @ p

    params = jnp.array([2.0, 4.0])
    wrap = jax.jit if compiled else lambda function: function
    uses = (
        lambda d, p: hypergradient(outer, bowl, d, p)[1],
        lambda d, p: jax.grad(lambda p: outer(implicit_argmin(lambda p: d, bowl)(p), p))(p),
    )
    for use in uses:
        with pytest.raises(ValueError, match="custom_vjp.*: use hypergradient_jaxopt") as caught:
            wrap(use)(jnp.log(params), params)
        assert str(caught.value).startswith("inner has no forward-mode derivatives")
    route = wrap(lambda d, p: hypergradient_jaxopt(outer, bowl, d, p)[1:])
    gradient, report = route(jnp.log(params), params)
    np.testing.assert_allclose(gradient, 1 / params, rtol=1e-5)
    assert not report.failed
    assert hypergradient(outer, bowl, params, params, solver=Direct())[2].residual == 1
    assert "custom_vjp" in needs_reverse_mode(bowl, params, params)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_custom_vjp_with_forward_mode_is_used(compiled):
    def bowl(d, p):
        return 0.5 * jnp.sum(square(d)) - d @ p

    wrap = jax.jit if compiled else lambda function: function
    run = wrap(lambda d, p: hypergradient(outer, bowl, d, p)[1])
    np.testing.assert_allclose(run(SADDLE[1], SADDLE[1]), [1, 1], rtol=1e-6)
    assert needs_reverse_mode(bowl, SADDLE[1], SADDLE[1]) is None


def test_the_errors_of_ones_own_function_stay_as_they_are():
    def broken(d, p):
        raise TypeError("my own")

    with pytest.raises(TypeError, match="^my own"):
        hypergradient(outer, broken, *SADDLE)
