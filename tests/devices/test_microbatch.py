"""Sums in microbatches: the same value and derivatives as of the whole batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ibau_jax.devices.microbatch import summed


def loss(delta, params, batch):
    x, y = batch
    return jnp.sum(jnp.tanh((x + delta) @ params["w"]) * y) + jnp.sum(params["b"] ** 2) * len(y)


@pytest.fixture
def case(x64):
    rng = np.random.default_rng(0)
    batch = (jnp.array(rng.normal(size=(6, 4))), jnp.array(rng.normal(size=6)))
    params = {"w": jnp.array(rng.normal(size=4)), "b": jnp.array(rng.normal(size=2))}
    return jnp.array(rng.normal(size=4)), params, batch


def close(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-11, atol=1e-13), a, b)


@pytest.mark.parametrize("size", [1, 2, 3, 6])
def test_value_and_derivatives(case, size):
    delta, params, batch = case
    split = summed(loss, size)
    close(split(*case), loss(*case))
    for argnums in (0, 1, (0, 1)):
        close(jax.grad(split, argnums)(*case), jax.grad(loss, argnums)(*case))

    def second(f):
        def gradient(d):
            return jax.grad(f, (0, 1))(d, params, batch)

        forward = jax.jvp(gradient, (delta,), (jnp.ones(4),))
        linear = jax.linearize(gradient, delta)[1](jnp.ones(4))
        return forward, linear, jax.hessian(f)(delta, params, batch)

    close(second(split), second(loss))
    close(
        jax.jit(jax.grad(lambda d: 3 * split(d, params, batch)))(delta), 3 * jax.grad(loss)(*case)
    )


def test_only_what_is_asked_for_is_differentiated(case):
    """The gradient in the parameters (the dear one) is not computed for the ascent."""
    delta, params, batch = case
    program = str(jax.make_jaxpr(jax.grad(summed(loss, 2)))(delta, params, batch))
    both = str(jax.make_jaxpr(jax.grad(summed(loss, 2), (0, 1)))(delta, params, batch))
    assert program.count("dot_general") < both.count("dot_general")
