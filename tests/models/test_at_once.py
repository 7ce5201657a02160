"""How many images are differentiated at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ibau_jax.models import at_once as module
from ibau_jax.models.at_once import at_once, divisor
from ibau_jax.models.convolution import convolve

KERNEL = np.zeros((3, 3, 3, 4), np.float32)
ON_CPU = jax.default_backend() == "cpu"


def products(params, images):
    return convolve(images, params, "patches").mean((1, 2))


def convolution(params, images):
    return convolve(images, params, "lax").mean((1, 2))


@pytest.mark.skipif(not ON_CPU, reason="an accelerator takes all")
@pytest.mark.parametrize("side, most", [(28, 10), (32, 10), (64, 2), (96, 1), (224, 1)])
def test_on_a_cpu_the_pixels_decide(side, most):
    assert at_once(products, KERNEL, np.zeros((2, side, side, 3), np.float32)) == most
    assert at_once(convolution, KERNEL, np.zeros((2, side, side, 3), np.float32)) is None


def test_the_memory_decides(monkeypatch):
    """An image's program holds 8 x 8 x 4 numbers of the convolution and a few more."""
    data = np.zeros((100, 8, 8, 3), np.float32)
    one = 8 * 8 * 4 * 4
    monkeypatch.setattr(module, "MEMORY", 30 * one * module.KEPT)
    found = at_once(convolution, KERNEL, data)
    assert found is not None and 15 <= found <= 30
    assert at_once(convolution, KERNEL, data[:10]) is None
    monkeypatch.setattr(module, "MEMORY", 1)
    assert at_once(convolution, KERNEL, data) == 1
    assert at_once(products, KERNEL, data) == 1


def test_a_loop_counts_as_often_as_it_runs():
    def loop(times):
        def logits(params, images):
            step = lambda x, _: (jnp.tanh(x * params), None)  # noqa: E731
            return jax.lax.scan(step, images, None, times)[0].mean((1, 2))

        return jax.make_jaxpr(logits)(jnp.ones(()), np.zeros((1, 8, 8, 3), np.float32))

    few, many = (module._bytes_of(loop(times)) for times in (1, 11))
    assert many - few == 10 * 2 * 8 * 8 * 3 * 4


def test_divisors():
    assert [divisor(20, most) for most in (None, 1, 3, 10, 99)] == [None, 1, 2, 10, 20]
