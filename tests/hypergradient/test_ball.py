"""Balls: sizes, projections and their derivatives, at zero, tiny and huge, in every dtype."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ibau_jax.hypergradient import GMRES, Ball, hypergradient_jaxopt, unrolled


def trees(d):
    return {"a": d[:1], "b": [d[1:]]}


@pytest.mark.parametrize("kind", ["l2", "linf"])
@pytest.mark.parametrize("size", [0.0, 1e-30, 1e-3])
def test_inside_a_ball_the_projection_is_the_identity_to_any_order(kind, size):
    ball, delta = Ball(2.0, kind), size * jnp.array([1.0, -2.0, 0.5])

    def project(d):
        found = ball.project(trees(d))
        return jnp.concatenate([found["a"], found["b"][0]])

    np.testing.assert_array_equal(project(delta), delta)
    np.testing.assert_array_equal(jax.jacrev(project)(delta), np.eye(3))
    np.testing.assert_array_equal(jax.jacfwd(project)(delta), np.eye(3))
    np.testing.assert_array_equal(jax.jacfwd(jax.jacrev(project))(delta), np.zeros((3, 3, 3)))


@pytest.mark.parametrize("kind", ["l2", "linf"])
def test_the_size_of_nothing_has_the_derivative_zero(kind):
    def size(d):
        return Ball(2.0, kind).size(trees(d))

    zero = jnp.zeros(3)
    for value in (size(zero), jax.grad(size)(zero), jax.jvp(size, (zero,), (zero + 1,))[1]):
        np.testing.assert_array_equal(value, 0)
    np.testing.assert_array_equal(jax.hessian(size)(zero), np.zeros((3, 3)))


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_size_and_projection_away_from_zero(scale):
    """(3, 0, -4) has norm 5; the projection's derivative is (I - n n') radius / size."""
    delta, n = scale * jnp.array([3.0, 0.0, -4.0]), np.array([0.6, 0.0, -0.8])
    size = Ball(1.0).size
    np.testing.assert_allclose(np.float64(size(delta)) / scale, 5, rtol=1e-6)
    np.testing.assert_allclose(jax.grad(size)(delta), n, rtol=1e-6)
    across = np.eye(3) - np.outer(n, n)
    np.testing.assert_allclose(np.float64(jax.hessian(size)(delta)) * scale, across / 5, atol=1e-6)
    ball = Ball(2 * scale)
    np.testing.assert_allclose(np.float64(ball.project(delta)) / scale, 2 * n, rtol=1e-6)
    for jacobian in (jax.jacrev, jax.jacfwd):
        np.testing.assert_allclose(jacobian(ball.project)(delta), across * 2 / 5, atol=1e-6)


@pytest.mark.parametrize("kind", ["l2", "linf"])
def test_steps_from_zero_are_unrolled_and_solved_through_a_projection(kind):
    """delta = p inside the ball; d/dp of sum(delta^2) is 2 p. Was NaN, from the norm at zero."""
    ball, p = Ball(5.0, kind), jnp.array([0.5, -1.0])

    def inner(d, p):
        return 0.5 * jnp.sum((d - p) ** 2)

    def squares(d, p):
        return jnp.sum(d**2)

    def step(_, d, p):
        return ball.project(d - 0.5 * jax.grad(inner)(d, p))

    _, gradient, delta = unrolled(squares, step, jnp.zeros(2), p, steps=30)
    np.testing.assert_allclose(delta, p, rtol=1e-5)
    np.testing.assert_allclose(gradient, 2 * p, rtol=1e-5)
    at_zero = hypergradient_jaxopt(
        lambda d, p: jnp.sum(d), inner, jnp.zeros(2), 0 * p, solver=GMRES(2), ball=ball
    )
    np.testing.assert_allclose(at_zero[1], [1, 1], rtol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("kind", ["l2", "linf"])
def test_a_projected_point_is_on_the_border_in_any_dtype(kind, dtype):
    """Its slope presses outwards: a move along it is taken away."""
    delta = Ball(0.3, kind).project(jnp.array([7.0, 7.1, 6.9], dtype))
    onto, _ = Ball(0.3, kind).tangent(delta, -delta)
    assert onto(delta).dtype == dtype
    assert np.abs(np.asarray(onto(delta), np.float32)).max() < 3e-3


def test_the_curvature_of_a_ball_has_the_dtype_of_delta():
    with jax.enable_x64(True):
        delta = jnp.ones(2, jnp.float32)
        for kind in ("l2", "linf"):
            onto, curvature = Ball(1.0, kind).tangent(delta, -delta)
            assert curvature.dtype == onto(delta).dtype == jnp.float32
