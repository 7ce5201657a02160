"""The optimisers' own rules; optax's are optax's."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ibau_jax import InputError
from ibau_jax.training.optimizers import Adam

SIZES = st.floats(1e-4, 1e2)


@given(SIZES, SIZES, st.sampled_from([(6,), (3, 5), (3, 3, 2, 4)]))
def test_small_values_take_small_steps(size, gradient, shape):
    rng = np.random.default_rng(0)
    params = {"layer": jnp.asarray(size * rng.normal(size=shape), jnp.float32)}
    gradients = {"layer": jnp.asarray(gradient * rng.normal(size=shape), jnp.float32)}
    moves = []
    for small in (None, 0.5):
        optimizer = Adam(1e-2, "cosine", clip=1.0, small=small)(10)
        state = optimizer.init(params)
        for _ in range(3):  # the schedule acts as well
            move, state = optimizer.update(gradients, state, params)
        moves.append(np.asarray(move["layer"]))
    free, shortened = moves
    share = 1.0
    if len(shape) > 1:
        share = min(1.0, np.mean(np.square(params["layer"])) / 0.5**2)
    np.testing.assert_allclose(shortened, share * free, rtol=1e-5)


def test_what_is_small_is_a_positive_number():
    with pytest.raises(InputError, match="small is 0: expected a positive number"):
        Adam(small=0)
