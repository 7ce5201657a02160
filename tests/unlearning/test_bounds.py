"""The theorems as numbers: measured errors under them, norms against dense matrices."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import random_variables
from hypothesis import given
from hypothesis import strategies as st

from ibau_jax import Dataset, InputError
from ibau_jax.hypergradient import Dense, Neumann, hypergradient
from ibau_jax.models.convolution import convolve
from ibau_jax.models.model import evaluation_logits
from ibau_jax.models.vgg import VGG
from ibau_jax.unlearning.bounds import (
    Convergence,
    linear_bound,
    margin_risk,
    network_bound,
    spectral_norm,
    two_one_norm,
    vgg_bound,
    vgg_layers,
)


class Quadratic(NamedTuple):
    """inner = 1/2 d'Ad - d'Bp, outer = 1/2 |d - c|^2 + d'Ep."""

    a: jax.Array
    b: jax.Array
    c: jax.Array
    e: jax.Array

    def inner(self, d, p):
        return 0.5 * d @ self.a @ d - d @ (self.b @ p)

    def outer(self, d, p):
        return 0.5 * jnp.sum((d - self.c) ** 2) + d @ (self.e @ p)


@partial(jax.jit, static_argnums=0)
def both(t: int, step, given: Quadratic, delta, best, p):
    """The hypergradient of t terms at `delta`, and the exact one at `best`; compiled once a t."""
    series = Neumann(t, step)
    _, measured, _ = hypergradient(
        given.outer, given.inner, delta, p, solver=series, keep_diverged=True
    )
    return measured, hypergradient(given.outer, given.inner, best, p, solver=Dense())[1]


@pytest.mark.parametrize("t", [1, 2, 5, 10, 20, 40])
@given(seed=st.integers(0, 2**31))
def test_theorem_1_bounds_the_measured_error(t, seed):
    """Of a quadratic problem every constant is known."""
    with jax.enable_x64(True):
        rng = np.random.default_rng(seed)
        basis, _ = np.linalg.qr(rng.normal(size=(4, 4)))
        a = basis @ np.diag(rng.uniform(0.5, 3, size=4)) @ basis.T
        b, e, c = rng.normal(size=(4, 3)), rng.normal(size=(4, 3)), rng.normal(size=4)
        p = rng.normal(size=3)
        best = np.linalg.solve(a, b @ p)
        radius = float(np.linalg.norm(best))
        values = np.linalg.eigvalsh(a)
        constants = Convergence(
            mu=values[0],
            smoothness=values[-1],
            outer_delta=1.0,
            outer_params=np.linalg.norm(e, 2),
            slope=2 * radius + np.linalg.norm(e @ p - c),
            mixed=np.linalg.norm(b, 2),
            radius=radius,
        )
        delta = np.zeros(4)
        for _ in range(t):
            delta = delta - constants.step * (a @ delta - b @ p)
        measured, exact = both(t, constants.step, Quadratic(a, b, c, e), delta, best, p)
        error = np.linalg.norm(measured - exact)
        assert error <= constants.bound(t) + 1e-12  # rounding
        assert constants.factor < 1 and constants.bound(t + 1) < constants.bound(t)


def test_the_drift_terms_of_theorem_1_by_hand():
    found = Convergence(1.0, 3.0, 0.5, 0.25, 2.0, 4.0, 10.0, 0.1, 0.2, 0.3)
    step, q = 0.5, 0.5
    c1 = (0.25 + 0.5 * 4 * step / (1 - q)) * 10
    c2 = 2 * 10 * (3 * 0.3 + 0.2 * step) + 0.1 * 2 * 4 * 10 * step**2 / (1 - q)
    c3 = 2 * 4 * step / (1 - q)
    expected = (c1 + c2 * (1 - q**3) / (1 - q)) * q**3 + c3 * q**3
    assert found.bound(3) == pytest.approx(expected)


@pytest.mark.parametrize("size", [4, 7])
def test_norms_of_a_convolution_are_those_of_its_matrix(size):
    kernel = jnp.array(np.random.default_rng(0).normal(size=(3, 3, 2, 5)), jnp.float32)
    inputs = np.eye(size * size * 2, dtype=np.float32).reshape(-1, size, size, 2)
    matrix = np.asarray(convolve(jnp.array(inputs), kernel)).reshape(size * size * 2, -1)
    found = spectral_norm(lambda x: convolve(x, kernel), (1, size, size, 2))
    assert found == pytest.approx(np.linalg.norm(matrix, 2), rel=1e-3)
    assert found != pytest.approx(np.linalg.norm(kernel.reshape(-1, 5), 2), rel=0.05)
    by_units = np.linalg.norm(matrix, axis=0).sum()
    assert two_one_norm(kernel, size) == pytest.approx(by_units, rel=1e-4)


def test_folded_layers_are_the_layers_of_the_model():
    """Each layer's map, with the model's shift and ELU, gives the model's logits."""
    variables = random_variables(7, seed=1)
    x = jnp.array(np.random.default_rng(1).uniform(size=(2, 32, 32, 3)), jnp.float32)
    logits = jax.jit(evaluation_logits(VGG(7, conv="lax"), variables))
    expected = logits(variables["params"], x)
    *convolutions, last = vgg_layers(variables)
    for i, layer in enumerate(convolutions):
        assert layer.shape == (1, *x.shape[1:])
        w, s = variables["params"][layer.name], variables["batch_stats"][layer.name]
        gain = w["scale"] / np.sqrt(s["var"] + 1e-5)
        x = jax.nn.elu(layer.linear(x) + (w["bias"] - s["mean"]) * gain + w["offset"])
        assert layer.units == x[0].size
        if i % 2:
            x = x.reshape(2, x.shape[1] // 2, 2, x.shape[2] // 2, 2, -1).max((2, 4))
    logits = last.linear(x.reshape(2, -1)) + variables["params"]["classifier"]["bias"]
    np.testing.assert_allclose(logits, expected, rtol=1e-3, atol=1e-3)


def test_margin_risk_counts_those_that_do_not_lead_by_the_margin():
    logits = np.array([[3.0, 1, 0], [1, 1.5, 0], [0, 2, 5], [5, 0, 0]])
    labels = np.array([0, 1, 2, 1])
    assert margin_risk(logits, labels, 0.0) == 0.25
    assert margin_risk(logits, labels, 1.0) == 0.5
    assert margin_risk(logits, labels, 2.0) == 0.75  # not above by more than 2


def test_the_generalisation_bounds_by_hand_and_in_n():
    found = linear_bound(0.1, 2.0, 3.0, 1.0, 400, 0.05)
    assert found.complexity == pytest.approx(2 * 2 * 4 / 20)
    assert found.confidence == pytest.approx(3 * np.sqrt(np.log(20) / 800))
    assert found.total == pytest.approx(0.1 + found.complexity + found.confidence)
    assert not linear_bound(0.1, 0.1, 1.0, 1.0, 10**6, 0.05).vacuous
    assert found.vacuous == (found.total >= 1)

    keywords = dict(widest=50, first_width=20, data_norm=9.0, radius=2.0, margin=0.5, xi=0.1)
    found = network_bound(0.2, np.array([2.0, 3.0]), np.array([5.0, 7.0]), n=100, **keywords)
    first = 5 * (1 + 20 * 10 * 2.0)
    ratio = ((first / 2) ** (2 / 3) + (7 / 3) ** (2 / 3)) ** 1.5
    data = (9 + 10) * np.sqrt(np.log(2 * 50 * 150))
    assert found.complexity == pytest.approx(
        8 / 100 + 48 * np.log(100) * data / (0.5 * 100) * 6 * ratio
    )
    with pytest.raises(InputError, match="xi is 1.5"):
        network_bound(0.2, np.ones(1), np.ones(1), n=100, **{**keywords, "xi": 1.5})


def test_the_bound_of_a_real_network_is_vacuous_and_says_so():
    variables = random_variables()
    rng = np.random.default_rng(0)
    images = rng.uniform(size=(20, 32, 32, 3)).astype(np.float32)
    clean = Dataset(images, rng.integers(0, 10, 20).astype(np.int32))
    logits = evaluation_logits(VGG(10), variables)
    found = vgg_bound(variables, logits, clean, np.zeros((32, 32, 3)), radius=10.0)
    assert found.vacuous and found.total > 1e3
    assert [row["layer"] for row in found.details["layers"]] == [
        *(f"conv{i}" for i in range(1, 7)),
        "classifier",
    ]
    assert all(row["two_one"] >= row["spectral"] > 0 for row in found.details["layers"])
