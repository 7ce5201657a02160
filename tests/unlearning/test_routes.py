"""I-BAU on models that forward mode does not go through, and what a round says of its solves."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import random_variables

from ibau_jax import IBAUConfig, InputError, unlearn
from ibau_jax.defenses.ibau import choose_route
from ibau_jax.devices.mesh import devices
from ibau_jax.hypergradient import Direct, NormalCG
from ibau_jax.models.model import evaluation_logits
from ibau_jax.models.vgg import VGG

KEY = jax.random.key(0)
SMALL = replace(IBAUConfig.untargeted(), rounds=1, batch_size=8, inner_steps=3, hessian_images=4)


@jax.custom_vjp
def softly(x):
    return jnp.tanh(x)


def _forward(x):
    y = softly(x)  # it calls itself and keeps the result: forward mode does not go through
    return y, y


softly.defvjp(_forward, lambda y, cotangent: ((1 - y * y) * cotangent,))


def with_activation(logits, activation):
    return lambda params, images: activation(logits(params, images) / 4)


@pytest.mark.parametrize("microbatch", [None, 2])
def test_a_model_without_forward_mode_takes_the_other_route(linear, microbatch):
    """And is cleaned as the same model with forward mode is."""
    logits, params, clean = linear
    config = replace(SMALL, microbatch=microbatch)
    one, two = (
        unlearn(
            with_activation(logits, activation),
            params,
            clean,
            config=config,
            key=KEY,
            devices=devices(1),
        )
        for activation in (jnp.tanh, softly)
    )
    assert one.diagnostics == {}
    assert two.diagnostics["route"] == "jaxopt" and "custom_vjp" in two.diagnostics["route_reason"]
    assert np.abs(one.params["w"] - params["w"]).max() > 1e-3
    # Adam makes full steps of what is rounding: compare in the mean
    assert np.abs(one.params["w"] - two.params["w"]).mean() < 1e-5
    np.testing.assert_allclose(two.history[0]["outer_loss"], one.history[0]["outer_loss"], 1e-5)
    assert two.history[0]["failed_solves"] == one.history[0]["failed_solves"] == 0


def test_the_other_route_is_for_one_device(linear):
    logits, params, clean = linear
    model = with_activation(logits, softly)
    with pytest.raises(InputError, match="custom_vjp.*route 'jaxopt'.*one device, found 2"):
        choose_route(SMALL, model, params, clean, 2)
    with pytest.raises(InputError, match="the route 'jaxopt' computes on one device, found 2"):
        choose_route(replace(SMALL, route="jaxopt"), logits, params, clean, 2)
    direct = replace(SMALL, solver=Direct())  # first derivatives only: any number of devices
    assert choose_route(direct, model, params, clean, 2) == (direct, None)


@pytest.mark.parametrize("conv", ["patches", "lax"])
def test_our_own_model_keeps_its_route(linear, conv):
    """Its ELU is a custom_jvp, the microbatches a custom_vjp: forward mode goes through both."""
    _, _, clean = linear
    images = np.zeros((1, 32, 32, 3), np.float32)
    variables = random_variables()
    logits = evaluation_logits(VGG(10, conv=conv), variables)
    clean = clean._replace(images=images)
    for count in (1, 8):
        found = choose_route(SMALL, logits, variables["params"], clean, count)
        assert found == (SMALL, None)


def test_a_model_without_second_derivatives_is_refused(linear):
    logits, params, clean = linear

    def loop(params, images):  # no reverse mode
        start = logits(params, images)
        return jax.lax.while_loop(lambda y: jnp.any(y > 1), lambda y: y / 2, start)

    with pytest.raises(InputError, match="no second derivatives.*while_loop.*Direct") as caught:
        unlearn(loop, params, clean, config=SMALL, key=KEY)
    assert "\n" not in str(caught.value)


def test_solves_that_gain_nothing_are_counted(linear):
    """A damping far above the Hessian leaves residuals just below 1; zero by choice is no failure.

    The parameters are then those of the direct gradient.
    """
    logits, params, clean = linear
    idle = replace(SMALL, solver=NormalCG(2, damping=1e6))
    found = unlearn(logits, params, clean, config=idle, key=KEY)
    direct = unlearn(logits, params, clean, config=replace(SMALL, solver=Direct()), key=KEY)
    record, by_choice = found.history[0], direct.history[0]
    assert 0.999 < record["residual"] <= 1 + 1e-6
    assert record["failed_solves"] == record["fallbacks"] == 3  # batches of 8 from 24 images
    assert by_choice["residual"] == 1
    assert by_choice["failed_solves"] == by_choice["fallbacks"] == 0
    jax.tree.map(np.testing.assert_array_equal, found.params, direct.params)


def test_an_over_confident_model_has_its_systems_solved(linear):
    """Margins of about 50 leave slopes of 1e-20, whose squares float32 does not hold."""
    logits, params, clean = linear
    params = jax.tree.map(lambda a: 60 * a, params)
    config = replace(SMALL, solver=NormalCG(8), inner_steps=1, radius=1e-3)
    solved = unlearn(logits, params, clean, config=config, key=KEY).history[0]
    assert 0 < solved["residual"] < 0.9 and solved["failed_solves"] == 0
