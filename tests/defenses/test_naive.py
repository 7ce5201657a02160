"""DeepFool, universal perturbations, and training against them, on models small enough to check."""

from dataclasses import replace
from itertools import pairwise

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ibau_jax import Dataset, InputError
from ibau_jax.defenses.deepfool import Universal, chunks, deepfool, make_search
from ibau_jax.defenses.naive import PRESETS, Naive, naive
from ibau_jax.models.model import Classifier, evaluation_logits
from ibau_jax.training.optimizers import Adam
from ibau_jax.unlearning.batches import shuffled

KEY = jax.random.key(0)
SMALL = Naive(rounds=2, images=16, batch_size=8)


def flat():
    """A linear model of four classes, images 4x5x2, and its own labels, all about as many."""
    rng = np.random.default_rng(1)
    images = rng.uniform(size=(24, 4, 5, 2)).astype(np.float32)
    w = rng.normal(size=(40, 4)).astype(np.float32)
    params = {"w": w, "b": -np.mean(images.reshape(24, -1) @ w, 0)}

    def logits(params, images):
        return images.reshape(len(images), -1) @ params["w"] + params["b"]

    return logits, params, Dataset(images, logits(params, images).argmax(-1).astype(np.int32))


def closed_form(params, image, candidates=10):
    """1.02 times the way to the nearest hyperplane of a linear model, in float64."""
    w, b = params["w"].astype(float), params["b"].astype(float)
    f = image.ravel() @ w + b
    order = np.argsort(-f)[:candidates]
    ways = []
    for k in order[1:]:
        normal = w[:, k] - w[:, order[0]]
        ways.append((f[order[0]] - f[k]) / (normal @ normal) * normal)
    return 1.02 * min(ways, key=np.linalg.norm).reshape(image.shape)


@pytest.mark.parametrize("candidates", [10, 2])
def test_deepfool_goes_to_the_nearest_hyperplane(candidates):
    logits, params, data = flat()
    run = jax.jit(lambda image: deepfool(logits, params, image, candidates=candidates))
    for image in data.images:
        found = run(image)
        expected = closed_form(params, image, candidates)
        np.testing.assert_allclose(found.delta, expected, rtol=2e-3, atol=2e-6)
        assert (int(found.steps), bool(found.fooled)) == (1, True)
    # The fixture can tell the two apart: the nearest border is not always that of the second best.
    assert any(
        not np.allclose(closed_form(params, x), closed_form(params, x, 2)) for x in data.images
    )


def curved(_, x):
    """Two classes, one pixel: the second where it is above 1."""
    return jnp.stack([jnp.zeros(len(x)), jnp.log(x[:, 0, 0, 0])], -1)


@pytest.mark.parametrize(("max_steps", "steps", "fooled"), [(10, 5, True), (4, 4, False)])
def test_deepfool_repeats_where_logits_are_curved(max_steps, steps, fooled):
    found = deepfool(curved, None, jnp.full((1, 1, 1), 0.05), max_steps=max_steps)
    x = 0.05
    for _ in range(steps):  # Newton's method for log x = 0, 2 % further
        x -= 1.02 * np.log(x) * x
    assert (x > 1) == fooled
    assert (int(found.steps), bool(found.fooled)) == (steps, fooled)
    np.testing.assert_allclose(found.delta, x - 0.05, rtol=1e-5)


def test_deepfool_takes_no_step_from_another_label():
    logits, params, data = flat()
    found = deepfool(logits, params, data.images[0], label=(data.labels[0] + 1) % 4)
    assert (int(found.steps), bool(found.fooled)) == (0, True)
    assert not np.asarray(found.delta).any()


def test_deepfool_says_that_nothing_moves():
    logits, params, data = flat()
    still = {"w": np.zeros_like(params["w"]), "b": np.arange(4, dtype=np.float32)}
    found = deepfool(logits, still, data.images[0])
    assert (int(found.steps), bool(found.fooled)) == (10, False)
    assert not np.asarray(found.delta).any()


def ball(v, norm, radius):
    if norm == "linf":
        return np.sign(v) * np.minimum(np.abs(v), radius)
    return v * min(1, radius / max(np.linalg.norm(v), 1e-12))


@pytest.mark.parametrize("norm, radius", [("l2", 10.0), ("l2", 0.2), ("linf", 0.02)])
def test_the_search_is_that_of_the_paper(norm, radius):
    logits, params, data = flat()
    config = Universal(norm, radius, fooling_rate=1.0)
    ticks = []
    search = make_search(logits, params, data.images, config)
    found = search(params, data.images, np.random.default_rng(3), ticks.append)

    rng, v = np.random.default_rng(3), np.zeros(data.images.shape[1:])
    for _ in range(2):
        for i in rng.permutation(len(data.images)):
            x = data.images[i] + v
            if np.argmax(logits(params, x[None])) == data.labels[i]:
                v = ball(v + closed_form(params, x), norm, radius)
    np.testing.assert_allclose(found.delta, v, rtol=1e-3, atol=1e-5)
    size = np.abs(v).max() if norm == "linf" else np.linalg.norm(v)
    assert size < radius * (1 + 1e-6)
    if radius < 1:
        assert size > 0.9 * radius  # so the ball does matter
    now = np.asarray(logits(params, data.images + np.asarray(found.delta))).argmax(-1)
    assert found.fooling_rate == np.mean(now != data.labels) < 1
    assert (found.passes, found.unconverged) == (2, 0)
    assert ticks == [1] * 2 * chunks(24) == [1] * 6


def test_the_search_ends_when_enough_images_are_fooled():
    logits, params, data = flat()
    search = make_search(logits, params, data.images, Universal(fooling_rate=0.6))
    for seed, passes in ((2, 1), (0, 2)):  # after one pass 71 % and 42 % are
        found = search(params, data.images, np.random.default_rng(seed), lambda n: None)
        now = np.asarray(logits(params, data.images + np.asarray(found.delta))).argmax(-1)
        assert found.passes == passes
        assert found.fooling_rate == np.mean(now != data.labels) >= 0.6


def test_each_round_fools_the_model_that_the_last_one_left():
    """Fooling is a change of the prediction: all true labels are wrong here, nobody asks."""
    logits, params, data = flat()
    models = []
    result = naive(
        logits,
        params,
        Dataset(data.images, (data.labels + 1) % 4),
        config=Naive(images=24, batch_size=8, outer_optimizer=Adam(0.05)),
        key=KEY,
        evaluate=lambda p: models.append(p) or {},
    )
    for before, delta, record in zip(models, result.deltas, result.history, strict=False):
        was, now = (logits(before, x).argmax(-1) for x in (data.images, data.images + delta))
        assert record["fooling_rate"] == np.mean(np.asarray(was != now)) > 0
    assert len(models) == 6
    assert all(np.abs(a["w"] - b["w"]).max() > 0.01 for a, b in pairwise(models))
    jax.tree.map(np.testing.assert_array_equal, models[-1], result.params)


def test_images_that_deepfool_cannot_move_are_counted():
    _, params, data = flat()
    images = np.array(data.images)
    images[:, 0, 0, 0] = 0
    images[[1, 4, 7, 9, 20], 0, 0, 0] = 1  # the model gives these class 0, whatever else they show
    weights = np.array(params["w"])
    weights[0] = 0

    def logits(w, x):
        plain = x.reshape(len(x), -1) @ w
        return jnp.where(x[:, :1, 0, 0] > 0.5, jnp.eye(4)[0], plain)

    config = Universal(fooling_rate=1.0, passes=3)
    search = make_search(logits, weights, images, config)
    found = search(weights, images, np.random.default_rng(0), lambda n: None)
    assert (found.unconverged, found.passes) == (5 * 3, 3)
    assert np.isfinite(found.delta).all() and np.asarray(found.delta).any()


def test_steps_that_do_not_get_there_are_not_added():
    images = np.full((13, 1, 1, 1), 0.05, np.float32)
    search = make_search(curved, None, images, Universal(max_steps=4, passes=1))
    found = search(None, images, np.random.default_rng(0), lambda n: None)
    assert (found.unconverged, found.fooling_rate, float(found.delta.sum())) == (13, 0, 0)


def test_a_round_is_a_pass_of_adam_on_patched_clipped_images():
    logits, params, data = flat()
    result = naive(
        logits,
        params,
        data,
        config=Naive(rounds=1, images=24, batch_size=8, outer_optimizer=Adam(0.05)),
        key=KEY,
    )
    optimizer = optax.adam(0.05)
    expected, state, losses = params, optimizer.init(params), []
    assert (data.images + result.deltas[0]).max() > 1
    clean = shuffled(data, jax.random.split(KEY, 3)[1])  # the order of the batches
    for i in range(0, 24, 8):
        x = np.clip(clean.images[i : i + 8] + result.deltas[0], 0, 1)

        def loss(p, x=x, y=clean.labels[i : i + 8]):
            return -jnp.mean(jax.nn.log_softmax(logits(p, x))[np.arange(8), y])

        value, gradient = jax.value_and_grad(loss)(expected)
        updates, state = optimizer.update(gradient, state)
        expected = optax.apply_updates(expected, updates)
        losses.append(value)
    assert result.history[0]["loss"] == pytest.approx(np.mean(losses), rel=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
        result.params,
        expected,
    )


def test_a_share_of_a_batch_carries_the_perturbation():
    logits, params, data = flat()
    config = Naive(rounds=1, images=24, batch_size=24, share=0.01)
    result = naive(logits, params, data, config=config, key=KEY)
    patched = np.clip(data.images + result.deltas[0], 0, 1)
    losses = []
    for i in range(24):  # one of the images, whichever
        images = np.array(data.images)
        images[i] = patched[i]
        rows = jax.nn.log_softmax(logits(params, images))
        losses.append(-float(jnp.mean(rows[np.arange(24), data.labels])))
    assert np.isclose(result.history[0]["loss"], losses, rtol=1e-5).sum() == 1


def test_each_round_draws_images_anew():
    logits, params, data = flat()
    config = Naive(rounds=5, images=1, outer_optimizer=Adam(1e-9))
    result = naive(logits, params, data, config=config, key=KEY)
    expected = np.stack([closed_form(params, image) for image in data.images])
    gaps = np.abs(result.deltas[:, None] - expected).max((2, 3, 4))
    assert (gaps.min(1) < 1e-4).all() and len(set(gaps.argmin(1))) >= 3
    norms = [record["delta_norm"] for record in result.history]
    np.testing.assert_allclose(norms, [np.linalg.norm(d) for d in result.deltas], rtol=1e-5)


class Normed(nn.Module):
    """Batch norm and one dense layer, with the arguments of a `VGG`."""

    @nn.compact
    def __call__(self, images, train=False, weights=None, features=False):
        x = images.reshape(len(images), -1)
        return nn.Dense(4)(nn.BatchNorm(use_running_average=not train)(x))


def test_keeps_the_contract():
    _, _, clean = flat()
    module = Normed()
    variables = module.init(KEY, clean.images)
    before = jax.tree.map(np.array, variables)
    seen, told = [], []

    def evaluate(params):
        seen.append(jax.tree.structure(params))
        return {"acc": 0.5, "asr": None}

    def run(key, **options):
        model = Classifier(module)
        return naive(model, variables, clean, config=SMALL, key=key, **options)

    running = naive.run(Classifier(module), variables, clean, config=SMALL, key=KEY, progress=True)
    for record in running:
        record.row.update(evaluate(record.params))
        told.append(record.row)
    one = running.result()
    assert jax.tree.structure(one.params) == jax.tree.structure(variables) == seen[0]
    assert len(set(seen)) == 1 and len(seen) == 3
    assert [r["round"] for r in told] == [0, 1, 2] and one.history == told[1:]
    kept = ("delta_norm", "fooling_rate", "unconverged", "passes", "loss", "seconds", "acc")
    assert all(name in record for record in one.history for name in kept)
    assert one.deltas.shape == (2, 4, 5, 2) and not one.found
    assert one.seconds == pytest.approx(sum(r["seconds"] for r in one.history))
    assert one.compile_seconds > 0
    for a, b in zip(jax.tree.leaves(variables), jax.tree.leaves(before), strict=True):
        np.testing.assert_array_equal(a, b)  # what was given is left alone
    jax.tree.map(  # evaluation mode: statistics stay
        np.testing.assert_array_equal, one.params["batch_stats"], variables["batch_stats"]
    )
    assert not np.array_equal(
        one.params["params"]["Dense_0"]["kernel"], variables["params"]["Dense_0"]["kernel"]
    )
    again, other = run(KEY), run(jax.random.key(1))
    np.testing.assert_array_equal(one.deltas, again.deltas)
    jax.tree.map(np.testing.assert_array_equal, one.params, again.params)
    assert not np.array_equal(one.deltas, other.deltas)

    plain = naive(
        evaluation_logits(module, variables), variables["params"], clean, config=SMALL, key=KEY
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
        plain.params,
        one.params["params"],
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Naive(rounds=0), "rounds is 0: expected a whole number of at least 1"),
        (lambda: Naive(images=0), "images is 0: expected a positive number"),
        (lambda: Naive(share=0.0), "share is 0.0: expected a share"),
        (lambda: Naive(outer_optimizer=-1.0), "outer_optimizer is -1.0: expected for example Adam"),
        (lambda: Universal(norm="l3"), "unknown norm 'l3'"),
        (lambda: Universal(radius=0.0), "radius is 0.0: expected a positive number"),
        (lambda: Universal(fooling_rate=1.5), "fooling_rate is 1.5: expected a share"),
        (lambda: Universal(candidates=1), "candidates is 1: expected at least 2"),
        (lambda: Universal(overshoot=-0.1), "overshoot is -0.1: expected 0 or"),
    ],
)
def test_wrong_settings_are_refused(make, message):
    with pytest.raises(InputError, match=message):
        make()


def test_presets():
    assert list(PRESETS) == ["cpu", "paper"]
    assert PRESETS["paper"]("cifar10") == Naive(
        rounds=5,
        images=500,
        universal=Universal("l2", 10.0, 0.8, 2, 10, 10, 0.02),
        batch_size=100,
        share=0.01,
        outer_optimizer=Adam(1e-3),
    )
    assert PRESETS["cpu"]("cifar10") == naive.config


def test_a_rate_that_is_too_large_is_told():
    logits, params, data = flat()
    with pytest.raises(InputError, match="rate=1e\\+38.*; choose a smaller rate"):
        naive(logits, params, data, config=replace(SMALL, outer_optimizer=Adam(1e38)), key=KEY)
