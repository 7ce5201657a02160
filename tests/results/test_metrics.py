"""ACC, ASR, ASR without target-class images, RA and DER on logits made by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ibau_jax import Dataset, InputError
from ibau_jax.attacks import Attack, Trigger
from ibau_jax.models.predict import predict, probabilities
from ibau_jax.results.metrics import Metrics, defense_effectiveness, evaluator

# One pixel says the class; the trigger adds to it, so the "model" reads image * 10.
PATTERN = np.full((1, 1, 1), 0.1, np.float32)


def logits(params, images):
    return -((jnp.arange(10) - 10 * images.reshape(-1, 1) - params) ** 2)


def images_of(classes):
    return np.array(classes, np.float32).reshape(-1, 1, 1, 1) / 10


def test_by_hand():
    data = Dataset(images_of([0, 1, 2, 3, 3]), np.array([0, 1, 2, 3, 7]))
    attack = Attack("up", Trigger("add", PATTERN), target=3)
    found = evaluator(logits, data, [attack])(0.0)
    # Clean predictions 0 1 2 3 3; triggered 1 2 3 4 4.
    assert found == Metrics(acc=0.8, asr=0.2, asr_excl=0.25, ra=0.0, n=5)
    assert evaluator(logits, data)(0.0) == Metrics(0.8, None, None, None, 5)
    # A model that undoes the trigger recovers the true labels.
    assert evaluator(logits, data, [attack])(-1.0).ra == 0.75


@pytest.mark.parametrize("batch_size", [1, 2, 3, 7, 100])
def test_batch_size_does_not_matter(batch_size):
    classes = np.arange(7)
    np.testing.assert_array_equal(predict(logits, batch_size)(0.0, images_of(classes)), classes)


def test_all_batches_are_in_the_precision_that_was_set(x64):
    """They are computed in threads, which do not see what was set with `with`."""
    draw = np.random.default_rng(0)
    weights, images = draw.normal(size=(4, 3)), draw.uniform(size=(50, 4))
    with jax.default_matmul_precision("highest"):
        found = probabilities(lambda w, x: x @ w, 20)(weights, images)
    powers = np.exp(images @ weights)
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, powers / powers.sum(-1, keepdims=True), rtol=1e-14)


def test_empty_split_is_refused():
    with pytest.raises(InputError, match="empty"):
        evaluator(logits, Dataset(images_of([]), np.array([])))


def test_der():
    before = Metrics(0.9, 1.0, 1.0, 0.0, 10)
    assert defense_effectiveness(before, Metrics(0.9, 0.0, 0.0, 0.9, 10)) == 1
    assert defense_effectiveness(before, before) == 0.5
    # A fall of ACC lowers it: BackdoorBench's code has a plus in one place.
    fallen = Metrics(0.7, 0.0, 0.0, 0.7, 10)
    assert defense_effectiveness(before, fallen) == pytest.approx(0.9)
    assert defense_effectiveness(Metrics(0.9, None, None, None, 1), fallen) is None
