"""Losses that are read from the devices a chunk at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ibau_jax.devices.losses import CHUNK, Losses
from ibau_jax.devices.mesh import Devices


@pytest.fixture
def devices() -> Devices:
    return Devices(tuple(jax.devices()[:1]))


def step(devices: Devices, value: float):
    return devices.replicate(jnp.float32(value))


def test_they_are_read_a_chunk_at_a_time_and_in_their_order(devices):
    chunks = []
    losses = Losses(devices, lambda found: chunks.append(len(found)), [7.0])
    for i in range(2 * CHUNK + 3):
        losses.add(step(devices, i))
    assert chunks == [CHUNK, CHUNK]
    assert losses.read() == [7.0, *map(float, range(2 * CHUNK + 3))] and losses.finite
    assert losses.read() == losses.read() and chunks == [CHUNK, CHUNK, 3]


def test_one_that_is_not_finite_is_told_within_a_chunk(devices):
    def check(found):
        if not np.isfinite(found).all():
            raise ArithmeticError("not finite")

    losses = Losses(devices, check)
    with pytest.raises(ArithmeticError):
        for i in range(1, 100):
            losses.add(step(devices, np.nan if i == 3 else 0))
    assert i == CHUNK and not losses.finite
    earlier = Losses(devices)
    earlier.add(step(devices, np.inf))
    earlier.read()
    earlier.add(step(devices, 0))
    assert earlier.read()[1] == 0 and not earlier.finite


def test_nothing_is_waited_for_between_two_readings(devices, monkeypatch):
    read = []
    monkeypatch.setattr(Devices, "read", lambda self, tree: read.append(len(tree)) or tree)
    losses = Losses(devices)
    for _ in range(CHUNK - 1):
        losses.add(jnp.float32(1))
    assert not read
    losses.add(jnp.float32(1))
    assert read == [CHUNK]
