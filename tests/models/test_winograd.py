"""Winograd's convolutions: values and derivatives of any order against XLA's own."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

from ibau_jax.models import winograd

ENDS = st.tuples(st.integers(-1, 4), st.integers(-1, 4))


def plain(x, kernel, padding):
    names = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(x, kernel, (1, 1), padding, dimension_numbers=names)


def derivatives(convolve, x, kernel, padding):
    """Value, gradients, and products with the Hessian, in the images and in the kernel."""

    def height(x, kernel):
        return jnp.sum(jnp.sin(convolve(x, kernel, padding)))

    slopes = jax.grad(height, (0, 1))
    tangents = jnp.cos(x), jnp.cos(kernel)
    forward = jax.jvp(slopes, (x, kernel), tangents)
    back = jax.vjp(slopes, x, kernel)[1](tangents)
    return convolve(x, kernel, padding), forward, back


def assert_close(found, expected, bound=1e-11):
    def compare(a, b):
        assert a.shape == b.shape and a.dtype == b.dtype
        np.testing.assert_allclose(a, b, atol=bound * max(1, np.abs(b).max(initial=0)))

    jax.tree.map(compare, found, expected)


@settings(max_examples=4)
@given(st.integers(4, 9), st.integers(4, 9), ENDS, ENDS, st.integers(1, 3), st.integers(1, 3))
def test_every_size_and_padding(height, width, rows, columns, channels, outputs):
    if height + sum(rows) < 3 or width + sum(columns) < 3:
        return
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        x = jnp.asarray(rng.normal(size=(2, height, width, channels)))
        kernel = jnp.asarray(rng.normal(size=(3, 3, channels, outputs)))
        found, expected = (
            jax.jit(partial(derivatives, f, padding=(rows, columns)))(x, kernel)
            for f in (winograd.convolve, plain)
        )
        assert_close(found, expected)


@pytest.mark.parametrize("axes", [(0, None), (3, None), (None, 1), (0, 4)])
@pytest.mark.parametrize("inside", [False, True])
def test_mapped(axes, inside, x64):
    """Over images, kernels or both (grouped convolutions), within a derivative or around it."""
    rng = np.random.default_rng(1)
    shapes = [2, 6, 5, 3], [3, 3, 3, 4]
    for shape, axis in zip(shapes, axes, strict=True):
        if axis is not None:
            shape.insert(axis, 3)
    x, kernel = (jnp.asarray(rng.normal(size=shape)) for shape in shapes)
    padding = ((1, 1), (0, 2))

    def mapped(convolve):
        def one(x, kernel):
            return convolve(x, kernel, padding)

        if inside:
            return jax.grad(lambda *args: jnp.sum(jnp.sin(jax.vmap(one, axes)(*args))), (0, 1))
        return jax.vmap(jax.grad(lambda *args: jnp.sum(jnp.sin(one(*args))), (0, 1)), axes)

    assert_close(*(jax.jit(mapped(f))(x, kernel) for f in (winograd.convolve, plain)))


def test_called_at_once_and_rounding():
    """Without `jit`; in 32 bits errors stay near those of plain sums (2e-7 of the values' size)."""
    rng = np.random.default_rng(2)
    x = np.maximum(rng.normal(size=(4, 16, 16, 128)), -0.9).astype(np.float32)
    kernel = (0.05 * rng.normal(size=(3, 3, 128, 32))).astype(np.float32)
    padding = ((1, 1), (1, 1))
    found = np.asarray(winograd.convolve(jnp.asarray(x), jnp.asarray(kernel), padding))
    with jax.enable_x64(True):
        exact = np.asarray(plain(x.astype(np.float64), kernel.astype(np.float64), padding))
    errors = (found - exact) / exact.std()
    assert np.sqrt(np.mean(errors**2)) < 1.5e-6 and np.abs(errors).max() < 2e-5


def test_what_it_is_for():
    kernel, around = (3, 3, 16, 16), ((1, 1), (1, 1))
    assert winograd.suits((5, 4, 4, 16), kernel, around)
    assert not winograd.suits((5, 3, 4, 16), kernel, around)  # less than a tile
    assert not winograd.suits((5, 4, 4, 3), (3, 3, 3, 10), around)
    assert winograd.suits((5, 4, 4, 3), (3, 3, 3, 11), around)
    assert not winograd.suits((5, 4, 4, 16), (3, 5, 16, 16), around)


def test_a_program_and_its_derivatives_hold_nothing_else():
    x, kernel = np.ones((1, 4, 4, 2), np.float32), np.ones((3, 3, 2, 2), np.float32)
    program = str(
        jax.make_jaxpr(partial(derivatives, winograd.convolve, padding=((1, 1), (1, 1))))(x, kernel)
    )
    assert "dot_general" not in program and "conv_general" not in program
    assert program.count("winograd_correlate") >= 3
