"""FT-SAM, SAU, ANP, CLP: the formula of each step against NumPy, and small models cleaned."""

from dataclasses import replace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import MODEL, clean, measure, same, small_model

from ibau_jax import SGD, Dataset, InputError
from ibau_jax.defenses.anp import ANPConfig, anp, noisy
from ibau_jax.defenses.clp import CLPConfig, clp, sensitivity
from ibau_jax.defenses.finetune import Tuning
from ibau_jax.defenses.ft_sam import FTSAMConfig, ascent, ft_sam, sharpness_aware
from ibau_jax.defenses.sau import SAUConfig, divergence, search, shared_unlearning
from ibau_jax.models.model import Frozen
from ibau_jax.models.normed import normed_layers
from ibau_jax.unlearning.objective import not_that_label

KEY = jax.random.key(0)
SAM = FTSAMConfig(
    crop=0, flip=False, smoothing=0.0,
    tuning=Tuning(epochs=8, batch_size=32, optimizer=SGD(0.03, momentum=0.9, schedule="cosine")),
)  # fmt: skip


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


# --- FT-SAM


def test_the_ascent_is_the_largest_slope_in_the_neighbourhood():
    rng = np.random.default_rng(0)
    w = {"a": rng.normal(size=(3, 2)).astype(np.float32), "b": np.array([0.0, -2.0], np.float32)}
    g = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), w)
    e = ascent(w, g, 0.7)
    flat = [np.concatenate([np.ravel(t["a"]), t["b"]]) for t in (w, g, e)]
    scaled = np.abs(flat[0]) * flat[1]
    np.testing.assert_allclose(
        flat[2], 0.7 * flat[0] ** 2 * flat[1] / np.linalg.norm(scaled), rtol=1e-5
    )
    moved = flat[0] != 0
    assert np.linalg.norm(flat[2][moved] / flat[0][moved]) == pytest.approx(0.7, rel=1e-5)
    same(ascent(w, jax.tree.map(np.zeros_like, g), 0.7), jax.tree.map(np.zeros_like, w))


def test_the_gradient_is_that_of_the_neighbour(linear):
    logits, params, data = linear
    config = replace(SAM, smoothing=0.2)
    objective = sharpness_aware(Frozen(logits), config, 0.5, 3, None)
    images, labels = data

    def loss(params):
        wanted = 0.8 * np.eye(3)[labels] + 0.2 / 3
        return -jnp.mean(jnp.sum(wanted * jax.nn.log_softmax(logits(params, images)), -1))

    (value, _), found = jax.value_and_grad(objective, has_aux=True)(
        params, {}, images, labels, None, KEY
    )
    e = ascent(params, jax.grad(loss)(params), 0.5)
    expected = jax.grad(loss)(jax.tree.map(jnp.add, params, e))
    assert value == pytest.approx(float(loss(params)), rel=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7), found, expected
    )


def test_rho_grows_with_the_model(linear):
    logits, params, data = linear
    config = replace(SAM, tuning=replace(SAM.tuning, epochs=1), relative=1e-3)
    told = ft_sam(logits, params, data, config=config, key=KEY).diagnostics
    assert told["rho"] == pytest.approx(1e-3 * (60 * 3 + 3) ** 0.5)
    told = ft_sam(logits, params, data, config=replace(config, rho=0.3), key=KEY).diagnostics
    assert told["rho"] == 0.3


# --- SAU


def test_divergence_and_not_that_label_by_hand():
    rng = np.random.default_rng(1)
    one, two = rng.normal(size=(2, 5, 4)).astype(np.float32) * 3
    p, q = softmax(one), softmax(two)
    m = (p + q) / 2
    expected = ((p * np.log(p / m)).sum(-1) + (q * np.log(q / m)).sum(-1)) / 2
    np.testing.assert_allclose(divergence(one, two), expected, rtol=1e-4)
    labels = np.array([0, 1, 2, 3, 0])
    expected = -np.log(1 - p[np.arange(5), labels])
    np.testing.assert_allclose(not_that_label(one, labels), expected, rtol=1e-4)
    sure = np.array([[100.0, 0.0, 0.0]], np.float32)
    assert np.isfinite(not_that_label(sure, np.array([0])))[0], "1 - p rounds to 0 there"


def test_shared_examples_mislead_both_models(linear):
    logits, params, (images, labels) = linear
    model, variables = Frozen(logits), {"params": params}
    config = SAUConfig(radius=0.5, rate=0.2)
    added = search(model, variables, variables, images, labels, config)
    assert np.abs(added).max() <= 0.5
    misled = np.argmax(logits(params, np.clip(images + added, 0, 1)), -1) != labels
    assert misled.mean() > 0.5 > np.mean(np.argmax(logits(params, images), -1) != labels)


def test_the_objective_of_sau_by_hand(linear):
    logits, params, (images, labels) = linear
    config = SAUConfig(radius=0.5, rate=0.2, shared=0.3)
    given = {"params": params}
    tuned = jax.tree.map(lambda a: a * np.float32(0.9), params)
    objective = shared_unlearning(Frozen(logits), given, config, None)
    found, _ = objective(tuned, {}, images, labels, None, KEY)
    added = search(Frozen(logits), {"params": tuned}, given, images, labels, config)
    shown = np.clip(images + added, 0, 1)
    wrong = np.argmax(logits(params, shown), -1)
    rows = wrong != labels
    p = softmax(np.asarray(logits(tuned, shown)))[np.arange(len(labels)), wrong]
    plain = softmax(np.asarray(logits(tuned, images)))[np.arange(len(labels)), labels]
    expected = -np.log(plain).mean() + 0.3 * -np.log(1 - p[rows]).mean()
    assert found == pytest.approx(expected, rel=1e-4)


# --- ANP and CLP


class Flax(nn.Module):
    """A model of flax's own layers."""

    @nn.compact
    def __call__(self, x, train=False, weights=None, features=False):
        for width in (4, 6):
            x = nn.Conv(width, (3, 3))(x)
            x = nn.relu(nn.BatchNorm(use_running_average=not train)(x))
        return nn.Dense(3)(x.mean((1, 2)))


def test_normed_layers_of_ours_and_of_flax():
    ours = normed_layers(small_model(0, True))
    assert [layer.name for layer in ours] == ["conv1", "conv2", "conv3", "conv4"]
    assert ours[0].kernel == ("conv1", "kernel") and ours[0].offset == ("conv1", "offset")
    variables = Flax().init(KEY, jnp.zeros((1, 8, 8, 1)))
    theirs = normed_layers(variables)
    assert [layer.kernel for layer in theirs] == [("Conv_0", "kernel"), ("Conv_1", "kernel")]
    assert [layer.offset for layer in theirs] == [(f"BatchNorm_{i}", "bias") for i in (0, 1)]


def test_noise_is_on_scales_and_offsets():
    variables = small_model(0, True)
    layers = normed_layers(variables)[:1]
    rng = np.random.default_rng(0)
    masks, noise = {"conv1": rng.uniform(size=8)}, {"conv1": rng.normal(size=(2, 8))}
    found, before = (
        v["params"]["conv1"] for v in (noisy(variables, layers, masks, noise), variables)
    )
    one, two = noise["conv1"]
    np.testing.assert_allclose(found["scale"], before["scale"] * (masks["conv1"] + one), rtol=1e-5)
    np.testing.assert_allclose(found["offset"], before["offset"] * (1 + two), rtol=1e-5)
    same(found["kernel"], before["kernel"])


def test_sensitivity_is_the_largest_singular_value():
    rng = np.random.default_rng(0)
    kernel, gain = rng.normal(size=(3, 3, 5, 4)), rng.normal(size=4)
    expected = [
        np.linalg.svd(kernel[..., c].reshape(9, 5), compute_uv=False)[0] * abs(gain[c])
        for c in range(4)
    ]
    np.testing.assert_allclose(sensitivity(kernel, gain), expected, rtol=1e-6)


def test_clp_cuts_the_channel_that_stands_out():
    variables = jax.tree.map(np.array, small_model(0, False))
    variables["params"]["conv3"]["kernel"][..., 5] *= 50
    found = clp(MODEL, variables, clean(), key=KEY)
    assert 5 in found.diagnostics["pruned"]["conv3"]
    assert found.params["params"]["conv3"]["scale"][5] == 0
    assert found.params["params"]["conv3"]["offset"][5] == 0
    gentle = clp(MODEL, variables, clean(), key=KEY, config=CLPConfig(threshold=9.0))
    assert found.history[0]["channels"] > gentle.history[0]["channels"] == 0
    same(gentle.params, variables)


def test_models_without_batch_norm_are_refused(linear):
    for defense in (anp, clp):
        with pytest.raises(InputError, match="expected a Classifier whose variables have"):
            defense(*linear, key=KEY)
    with pytest.raises(InputError, match="1 clean images, 0 of them held back"):
        anp(MODEL, small_model(0, True), Dataset(clean().images[:1], clean().labels[:1]), key=KEY)


def test_anp_keeps_the_accuracy_it_is_told_to():
    variables = small_model(0, True)
    found = anp(MODEL, variables, clean(), config=ANPConfig(steps=60, drop=0.05), key=KEY)
    row = found.history[0]
    assert row["held_back_acc"] >= measure(variables)["acc"] - 0.15
    masks = np.concatenate([*found.diagnostics["masks"].values()])
    assert masks.min() >= 0 and masks.max() <= 1 and masks.min() < 1
    assert row["channels"] == (masks < row["threshold"]).sum()
