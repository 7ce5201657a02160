"""Whatever images and labels are given: a result, or one line that says what is wrong."""

import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from ibau_jax import Dataset, InputError
from ibau_jax.attacks import Attack, Trigger, badnets_square, blend, poison
from ibau_jax.data import check_data
from ibau_jax.results.metrics import evaluator

DTYPES = st.sampled_from(
    [np.float16, np.float32, np.float64, jnp.bfloat16, np.uint8, np.int64, bool, complex, object]
)
SHAPES = npst.array_shapes(min_dims=0, max_dims=5, min_side=0, max_side=6)
SCALES = st.sampled_from([(0, 1), (0, 255), (-2, 2), (0, 1 / 255), (0, np.inf), (0, 0)])


@st.composite
def images(draw):
    """Mostly images, in all dtypes, shapes and ranges; as arrays or as lists."""
    shape = draw(st.one_of(st.just((3, 6, 6, 3)), st.just((2, 32, 32, 1)), SHAPES))
    low, high = draw(SCALES)
    rng = np.random.default_rng(draw(st.integers(0, 9)))
    with np.errstate(all="ignore"):
        values = (low + (high - low) * rng.uniform(size=shape)).astype(draw(DTYPES))
    return values.tolist() if draw(st.booleans()) and values.dtype.kind != "V" else values


LABELS = st.one_of(
    npst.arrays(
        st.sampled_from([np.int8, np.int32, np.uint64, np.float32, bool]),
        st.sampled_from([2, 3, (3, 1)]),
        elements={"min_value": 0, "max_value": 1},
    ),
    st.lists(st.integers(-1, 2**40), max_size=3),
    st.none(),
)
TRIGGERS = st.sampled_from(
    [badnets_square(), badnets_square((6, 6, 3), 2), blend(), lambda x: x, lambda x: x + 1]
)


def logits(params, images):
    return jnp.stack([images.mean((1, 2, 3)), 1 - images.mean((1, 2, 3))], -1) * params


def or_refused(function):
    """Its result; None where it says in one line what it was given."""
    try:
        return function()
    except InputError as error:
        assert str(error) and "\n" not in str(error)
        return None


@settings(max_examples=80)
@given(images(), LABELS, TRIGGERS, st.integers(-1, 2))
def test_a_result_or_one_line(images, labels, trigger, target):
    data = Dataset(images, labels)
    checked = or_refused(lambda: check_data(data))
    if checked is not None:
        assert checked.images.dtype == np.float32 and checked.labels.dtype == np.int32
        assert 0 <= checked.images.min() <= checked.images.max() <= 1
    attack = Attack("mine", trigger, target)
    found = or_refused(lambda: evaluator(logits, data, [attack], batch_size=4)(jnp.float32(1)))
    if found is not None:
        assert 0 <= found.acc <= 1 and 0 <= found.asr <= 1 and found.n == len(labels)
    poisoned = or_refused(lambda: poison(data, attack, 0.5))
    assert poisoned is None or poisoned[0].images.shape == checked.images.shape
    stamped = or_refused(lambda: attack.stamp(images))
    assert stamped is None or 0 <= stamped.min(initial=0) <= stamped.max(initial=0) <= 1


@given(st.sampled_from(["pattern", "mask"]), images())
def test_triggers_of_any_arrays(what, array):
    array = np.asarray(array)
    one = np.zeros((6, 6, 3), np.float32)
    arrays = {"pattern": one, "mask": one} | {what: array}
    found = or_refused(lambda: Trigger("replace", **arrays))
    assert found is None or found.pattern.shape == found.mask.shape
