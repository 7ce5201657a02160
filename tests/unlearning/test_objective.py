"""The objective of the preset `default`: what is marked, where it leads, what is asked of it."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ibau_jax import Dataset, IBAUConfig
from ibau_jax.unlearning.batches import (
    UNTARGETED,
    Batch,
    make_batches,
    make_mixtures,
    mixtures,
)
from ibau_jax.unlearning.objective import Aim, aimed, make_inner, make_leading, make_loss, spread

CONFIG = replace(IBAUConfig(), microbatch=None)
RNG = np.random.default_rng(0)
W = RNG.normal(size=(12, 3)).astype(np.float32)


def logits(params, images):
    return images.reshape(len(images), -1) @ params


def batch_of(real: int, padding: int = 0) -> Batch:
    count = real + padding
    images = RNG.uniform(0.2, 0.8, (count, 3, 4, 1)).astype(np.float32)
    weights = (np.r_[np.ones(real), np.zeros(padding)] / real).astype(np.float32)
    taught = np.asarray(jax.nn.softmax(RNG.normal(size=(count, 3)).astype(np.float32)))
    labels = jnp.asarray(np.arange(count) % 3)
    return Batch(images, labels, weights, 0 * weights, taught=taught)


def aim_of(size: int) -> Aim:
    """Delta leads to label 1; the pool by turns to label 2 and from y to y + 1."""
    pool = np.zeros((4, 3, 4, 1), np.float32)
    pool[:, 1, 2] = np.arange(1, 5)[:, None] / 100  # tells which one it is
    rules = np.array([[2, 2, 2], [1, 2, 0]] * 2)
    return Aim(jnp.full(3, 1), 0 * pool[0], jnp.asarray(pool), jnp.asarray(rules), size)


@given(real=st.integers(1, 40), size=st.integers(0, 4), seed=st.integers(0, 99))
def test_what_is_marked(real, size, seed):
    batch, aim = batch_of(real, 43 - real), aim_of(size)  # of one shape, compiled once
    found = spread(jax.random.key(seed), batch, aim, CONFIG)
    patched, added = np.asarray(found.patched), np.asarray(found.added)
    carries = np.abs(added).sum((1, 2, 3)) > 0
    assert patched.sum() == max(1, int(0.05 * real + 1e-4))
    both = max(1, int(0.15 * real + 1e-4))
    assert carries.sum() == (both - patched.sum() if size else 0)
    assert not np.any(carries & (patched > 0)) and not np.any((carries | (patched > 0))[real:])
    which = np.rint(added.sum((1, 2, 3)) * 100).astype(int) - 1
    assert np.all(which[carries] < size) and np.all((added[carries] > 0).sum((1, 2, 3)) == 1)
    wanted = np.where(patched > 0, 1, UNTARGETED)
    wanted[carries] = np.asarray(aim.rules)[which[carries], np.asarray(batch.labels)[carries]]
    np.testing.assert_array_equal(found.towards, wanted)


def test_several_times_the_shares():
    found = spread(jax.random.key(0), batch_of(40), aim_of(4)._replace(times=np.float32(3)), CONFIG)
    carries = np.abs(found.added).sum((1, 2, 3)) > 0
    assert found.patched.sum() == 6 and carries.sum() == 18 - 6
    found = spread(jax.random.key(0), batch_of(40), aim_of(4)._replace(times=np.float32(9)), CONFIG)
    assert (np.abs(found.added).sum((1, 2, 3)) > 0).sum() == 40 - 18  # all, and no more


def test_half_of_the_searched_ones_are_shifted():
    config = replace(CONFIG, searched=0.9)
    found = spread(jax.random.key(0), batch_of(400), aim_of(4), config)
    places = [tuple(np.argwhere(a)[0][:2]) for a in np.asarray(found.added) if np.any(a)]
    stayed = sum(place == (1, 2) for place in places) / len(places)
    assert 0.45 < stayed < 0.65  # half, and a twelfth of the others
    assert len(set(places)) == 12


def test_the_loss_by_hand():
    batch = batch_of(3)._replace(
        added=np.full((3, 3, 4, 1), 0.1, np.float32), towards=jnp.array([UNTARGETED, 2, 2])
    )
    found = make_loss(logits, CONFIG)(jnp.zeros((3, 4, 1)), W, batch)
    p = np.asarray(jax.nn.softmax(logits(W, batch.images + 0.1)), np.float64)
    each = -np.log(p[np.arange(3), np.arange(3)]) / 2 - (batch.taught * np.log(p)).sum(1) / 2
    each[1] -= np.log(1 - p[1, 2])  # the first leads nowhere, the last to its own label
    np.testing.assert_allclose(found, each.mean(), rtol=1e-5)


def test_the_loss_of_mixtures_by_hand():
    """It is added with its weight, and neither delta nor a label reaches them."""
    mixed = batch_of(2)
    batch = batch_of(3)._replace(patched=jnp.ones(3))
    delta = np.full((3, 4, 1), 0.1, np.float32)
    loss = make_loss(logits, replace(CONFIG, mixed=0.7))
    found = loss(delta, W, batch._replace(mixed=mixed))
    p = np.asarray(jax.nn.softmax(logits(W, mixed.images)), np.float64)
    np.testing.assert_allclose(
        found - loss(delta, W, batch), -0.7 * (mixed.taught * np.log(p)).sum(1).mean(), rtol=1e-4
    )
    inner = make_inner(loss, CONFIG)
    assert inner(delta, W, batch._replace(mixed=mixed)) == inner(delta, W, batch)


@given(st.integers(1, 20), st.integers(0, 50))
def test_mixtures_use_each_image(count, number):
    """All pairs of a round differ from those of the next, and half as many use all images."""
    images = np.eye(count, dtype=np.float32)[:, :, None, None]
    mixed = mixtures(images, number, -(-count // 2))[:, :, 0, 0]
    assert mixed.dtype == images.dtype and np.all(mixed.sum(1) == 1)
    used = mixed.sum(0)
    assert np.all(used >= 0.5) and np.sum(used > 0.5) <= 1
    if count > 2:
        assert np.all(mixed.max(1) == 0.5)
    if count > 3:
        assert not np.array_equal(mixed, mixtures(images, number + 1, len(mixed))[:, :, 0, 0])


@given(st.integers(1, 40), st.integers(1, 13))
def test_a_batch_has_half_as_many_mixtures(count, size):
    images = np.linspace(0, 1, count, dtype=np.float32)[:, None, None, None]
    clean = Dataset(images, np.zeros(count, np.int32))
    config = replace(CONFIG, batch_size=size)
    batches, sizes = make_batches(clean, config)
    mixed = make_mixtures(clean, config, 3, lambda images: images[:, :, 0, 0])
    assert mixed.images.shape == (len(sizes), -(-size // 2), 1, 1, 1)
    np.testing.assert_array_equal(mixed.taught, mixed.images[:, :, :, 0, 0])
    np.testing.assert_allclose(mixed.weights.sum(1), 1, rtol=1e-5)


@pytest.mark.parametrize("rule", [[1, 1, 1], [1, 2, 0], [UNTARGETED] * 3])
def test_what_delta_minimises_by_hand(rule):
    batch = aimed(batch_of(6), jnp.array(rule))
    delta = 0.03 * RNG.normal(size=(3, 4, 1)).astype(np.float32)
    found = make_leading(logits, replace(CONFIG, penalty=0.5))(delta, W, batch)
    p = np.asarray(jax.nn.softmax(logits(W, batch.images + delta)), np.float64)
    labels, wanted = np.asarray(batch.labels), np.array(rule)[np.asarray(batch.labels)]
    each = -np.log(p[np.arange(6), wanted]) * (wanted != labels)
    if UNTARGETED in rule:
        each = np.log(p[np.arange(6), labels])
    np.testing.assert_allclose(found, each.mean() + 0.5 * (delta**2).sum(), rtol=1e-4)
