"""The search for universal perturbations towards each label."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import MODEL, SQUARE, clean, same, small_model
from hypothesis import given
from hypothesis import strategies as st

from ibau_jax import Dataset, InputError
from ibau_jax.unlearning import search as search_module
from ibau_jax.unlearning.batches import UNTARGETED
from ibau_jax.unlearning.geometries import (
    GEOMETRIES,
    Geometry,
    cosine,
    field,
    lift_of,
    pixels,
    sphere,
    square,
    window,
)
from ibau_jax.unlearning.grid import enlarged, on_grid, scale
from ibau_jax.unlearning.search import Search
from ibau_jax.unlearning.strength import height, rule_of, share

KEY = jax.random.key(0)
SHAPE = (7, 6, 2)
ALL = (*GEOMETRIES, square(3), field(0.1))


@pytest.mark.parametrize("geometry", ALL, ids=lambda geometry: geometry.name)
@given(seed=st.integers(0, 2**31))
def test_no_member_goes_farther_than_the_vertex(geometry, seed):
    keys = jax.random.split(jax.random.key(seed), 2)
    direction = jax.random.normal(keys[0], SHAPE)
    vertex = geometry.vertex(direction)
    if geometry.draw is None:
        members = jax.random.normal(keys[1], (50, *SHAPE))
        members /= jnp.linalg.norm(members.reshape(50, -1), axis=1)[:, None, None, None]
    else:
        members = geometry.draw(keys[1], 50, SHAPE)
    along = jnp.sum(members * direction, axis=(1, 2, 3))
    assert float(jnp.sum(vertex * direction)) >= float(along.max()) - 1e-3
    # A vertex is the farthest along itself: it belongs to the set.
    np.testing.assert_allclose(geometry.vertex(vertex), vertex, atol=1e-4)


@pytest.mark.parametrize("geometry", ALL, ids=lambda geometry: geometry.name)
def test_vertices_keep_the_precision_of_the_images(geometry, x64):
    for dtype in (np.float32, np.float64):
        assert geometry.vertex(jnp.ones(SHAPE, dtype)).dtype == dtype


def test_vertices_by_hand():
    direction = np.zeros((4, 5, 1), np.float32)
    direction[1, 2], direction[2, 3], direction[0, 0] = 3, -2, 2.5
    wanted = np.zeros_like(direction)
    wanted[1, 2], wanted[2, 3] = 1, -1
    np.testing.assert_array_equal(window(2).vertex(jnp.array(direction)), wanted)
    wanted[2, 3], wanted[0, 0] = 0, 1
    np.testing.assert_array_equal(pixels(2).vertex(jnp.array(direction)), wanted)
    np.testing.assert_allclose(
        sphere(2).vertex(jnp.array(direction)), 2 * direction / np.linalg.norm(direction), rtol=1e-6
    )
    assert not np.any(sphere(1).vertex(jnp.zeros(SHAPE)))  # and no NaN
    y = np.arange(8)[:, None, None] / 8 * np.ones((1, 8, 1))
    wave = (0.3 * np.cos(2 * np.pi * 2 * y + 1)).astype(np.float32)
    np.testing.assert_allclose(cosine(0.1).vertex(jnp.array(wave)), wave / 3, atol=1e-5)


def test_a_square_is_of_one_colour_where_it_goes_farthest():
    direction = np.zeros((4, 5, 2), np.float32)
    direction[0, 0] = 3, 3  # a window would be there, with either sign for each pixel
    direction[0, 1] = direction[1, 0] = direction[1, 1] = -1, -1
    direction[2:, 3:] = -1, 0.5
    wanted = np.zeros_like(direction)
    wanted[2:, 3:] = -1, 1
    np.testing.assert_array_equal(square(2).vertex(jnp.array(direction)), wanted)
    drawn = np.asarray(square(3).draw(KEY, 30, SHAPE))
    assert len(drawn) == 30 and all(len({tuple(p) for p in d[d.any(-1)]}) == 1 for d in drawn)


def test_fields_are_of_one_size_and_change_slowly():
    image = (32, 24, 3)
    drawn = np.asarray(field(0.05).draw(KEY, 30, image))
    np.testing.assert_allclose(np.sqrt((drawn**2).mean((1, 2, 3))), 0.05, rtol=1e-5)
    grey = np.ptp(drawn, axis=-1).max((1, 2)) < 1e-6
    assert 5 < grey.sum() < 25  # of one colour, some; of three the others
    steps = [np.abs(np.diff(drawn, axis=axis)).max((1, 2, 3)) for axis in (1, 2)]
    assert np.max(steps) < 0.25 * np.ptp(drawn)  # noise of that size: as much as all there is
    # A field is farthest along itself, and along a cosine of ten periods it goes nowhere.
    np.testing.assert_allclose(field(0.05).vertex(drawn[0]), drawn[0], atol=1e-6)
    fast = np.cos(np.pi * 20 * (np.arange(32) + 0.5) / 32)[:, None, None] * np.ones(image)
    np.testing.assert_allclose(field(0.05).vertex(jnp.asarray(fast + 0.1)), 0.05, atol=1e-5)
    assert not np.any(field(0.05).vertex(jnp.zeros(image)))  # and no NaN


def test_windows_larger_than_the_image_are_the_image():
    assert np.all(np.abs(window(9).vertex(jnp.ones(SHAPE))) == 1)
    assert np.all(np.abs(window(9).draw(KEY, 3, SHAPE)) == 1)
    assert np.all(pixels(100).vertex(jnp.ones(SHAPE)) == 1)


def test_random_windows_are_of_three_kinds():
    drawn = np.asarray(window(3).draw(KEY, 30, SHAPE))
    assert {int(n) for n in np.abs(drawn).sum((1, 2, 3))} == {3 * 3 * 2}
    kinds = [{tuple(p) for p in d[np.abs(d).sum(-1) > 0]} for d in drawn]
    assert all(len(kind) == 1 for kind in kinds[2::3])  # one colour
    assert all(a == b for kind in kinds[1::3] for a, b in kind)  # greys
    assert len({tuple(np.argwhere(d)[0]) for d in drawn}) > 10  # at many places


def test_random_windows_lie_in_each_corner():
    image = (32, 24, 3)
    places = (np.s_[:, :2, :2], np.s_[:, :2, -2:], np.s_[:, -2:, :2], np.s_[:, -2:, -2:])
    filled = np.asarray(window(5).draw(KEY, 300, image)) != 0
    assert all(1 < filled[corner].all((1, 2, 3)).sum() < 40 for corner in places)
    inside = filled[:, 8:-8, 8:-8].any((1, 2, 3)).sum()
    assert inside > 50 and all(one.sum() == 5 * 5 * 3 for one in filled)


@given(st.integers(0, 2**31))
def test_height(seed):
    logits = np.random.default_rng(seed).normal(scale=3, size=(4, 3)).astype(np.float32)
    true = np.array([0, 1, 2, 1])
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    away = np.log(1 - p[np.arange(4), true])
    np.testing.assert_allclose(height(logits, true, UNTARGETED), away, rtol=1e-3, atol=1e-4)
    towards = np.where(true == 1, 0, np.log(p[:, 1]))
    np.testing.assert_allclose(height(logits, true, 1), towards, rtol=1e-4, atol=1e-5)


def test_a_certain_model_has_a_slope():
    """The cross-entropy of the true label has none there."""
    logits, true = jnp.array([[40.0, 0, 0]]), jnp.array([0])
    for label in (1, UNTARGETED):
        slope = jax.grad(lambda z, label=label: jnp.sum(height(z, true, label)))(logits)
        assert abs(float(slope[0, 0])) > 0.5


def test_shares():
    given, true = np.array([1, 1, 0, 2]), np.array([1, 0, 0, 2])
    assert share(given, true, 1) == pytest.approx(1 / 3)
    assert share(given, true, UNTARGETED) == 0.25
    assert share(given[:1], true[:1], 1) == 0.0


def hidden(params, images):
    """Label 1 where more than two of four pixels in a corner are white; else label 0.

    At grey images its gradient is zero.
    """
    white = jnp.sum(jnp.clip(images[:, -2:, -2:, 0] * 4 - 3, 0, 1), axis=(1, 2))
    ones = jnp.ones(len(images))
    return params * jnp.stack([ones * 0.5, jax.nn.relu(white - 1.5), -ones], -1)


def test_random_starts_find_what_the_gradient_does_not_show():
    data = Dataset(np.full((20, 8, 8, 1), 0.5, np.float32), np.zeros(20, np.int32))
    from_zero = Geometry("from zero", window(2).vertex, None)
    search = Search(hidden, (from_zero, window(2), pixels(4)), starts=200)
    found = search(jnp.float32(10), data, [1, 2], key=KEY)
    np.testing.assert_array_equal(found.strength, [[0, 0], [1, 0], [1, 0]])
    np.testing.assert_array_equal(found.deltas[1, 0, -2:, -2:, 0], np.ones((2, 2)))
    assert found.given.shape == (3, 2, 10) and found.true.shape == (10,)


SEARCH = Search(MODEL, (window(3), pixels(9)), steps=5, starts=150)


@pytest.mark.parametrize("seed", [0, 1])
def test_the_label_of_a_backdoor_stands_out(seed):
    labels = [*range(10), UNTARGETED]
    found = SEARCH(small_model(seed, True), clean(), labels, key=KEY)
    strength = found.strength[0, :10]
    assert strength.argmax() == SQUARE.target and strength.max() > 0.8
    assert np.delete(strength, SQUARE.target).max() < strength.max() - 0.1
    of_clean = SEARCH(small_model(seed, False), clean(), labels, key=KEY).strength[0, :10]
    assert of_clean[SQUARE.target] < strength.max() - 0.3
    again = SEARCH(small_model(seed, True), clean(), labels, key=KEY)
    same(found, again)


def test_starts_are_looked_at_in_parts(monkeypatch):
    data, labels = clean(), [1, SQUARE.target]
    whole = SEARCH(small_model(0, True), data, labels, key=KEY)
    monkeypatch.setattr(search_module, "STARTS_A_CALL", 40)  # 150 starts: parts of 38 and of 37
    parts = SEARCH(small_model(0, True), data, labels, key=KEY)
    np.testing.assert_array_equal(parts.deltas, whole.deltas)
    np.testing.assert_array_equal(parts.strength, whole.strength)


def test_the_best_that_are_drawn():
    params, images = jnp.zeros(()), Dataset(clean().images, clean().labels % 3)

    def logits(params, images):  # label 1 by what is bright in a corner, label 2 by what is dark
        corner = images[:, -3:, -3:].mean((1, 2, 3))
        return params + jnp.stack([jnp.full(len(images), 0.1), corner, 0.2 - corner], -1)

    found = Search(logits, batch=10).drawn(
        params, images, [1, 2], square(3), key=KEY, starts=500, best=4
    )
    assert found.shape == (2, 4, 16, 16, 1)
    pictures = found.reshape(8, -1)
    assert ((pictures != 0).sum(1) == 9).all() and (np.ptp(pictures, 1) == 1).all()
    corners = found[:, :, -3:, -3:].mean((2, 3, 4))
    assert (corners[0] == 1).all() and (corners[1] == -1).all()


@pytest.mark.parametrize("height, width", [(64, 64), (70, 97)])
def test_large_images_are_searched_on_a_grid(height, width):
    """A trigger twice as large is found as a window of twice the size."""
    corner = np.zeros((height, width, 3), np.float32)
    corner[-6:, 4:10] = 1  # three pixels of the grid a side, whether or not it fits

    def logits(params, images):
        white = (images * corner).sum((1, 2, 3)) / corner.sum()
        ones = jnp.ones(len(images))
        return params * jnp.stack([0.9 * ones, white, -ones], -1)

    data = Dataset(np.full((20, height, width, 3), 0.5, np.float32), np.zeros(20, np.int32))
    found = Search(logits, (window(3),), starts=100)(jnp.float32(9), data, [1], key=KEY)
    delta = found.deltas[0, 0]
    assert found.strength == 1 and delta.shape == (height, width, 3)
    np.testing.assert_array_equal(delta, corner)
    squares = Search(logits).drawn(jnp.float32(9), data, [1], square(3), key=KEY, starts=9, best=2)
    assert squares.shape == (1, 2, height, width, 3)


@pytest.mark.parametrize(("ground", "lift"), [(0.0, 1), (1.0, -1), (0.5, 0)])
def test_waves_are_lifted_where_images_cut_them_off(ground, lift):
    """On a black ground a cosine only brightens, on a white one it only darkens."""
    images = np.full((20, 16, 16, 1), ground, np.float32)
    assert lift_of(images) == lift
    wave = 0.07 * np.cos(2 * np.pi * 2 * np.arange(16) / 16)[:, None] * np.ones((16, 1, 1))

    def logits(params, images):  # label 1 from most of the whole wave on
        found = ((images - ground) * wave).sum((1, 2, 3)) / (16 * 16 * 0.07**2 / 2)
        ones = jnp.ones(len(images))
        return params * jnp.stack([0.8 * ones, found, -ones], -1)

    data = Dataset(images, np.zeros(20, np.int32))
    found = Search(logits, (cosine(0.07),), starts=50)(jnp.float32(50), data, [1], key=KEY)
    assert found.strength == 1
    np.testing.assert_allclose(found.deltas[0, 0], wave + 0.07 * lift, atol=1e-4)


def test_only_images_of_many_black_or_white_values_lift():
    image = np.full((1, 10, 10, 1), 0.5, np.float32)
    for value, lift in ((0.0, 1.0), (1.0, -1.0)):
        few, many = image.copy(), image.copy()
        few[:, :2], many[:, :3] = value, value
        assert lift_of(few) == 0 and lift_of(many) == lift


@given(st.integers(1, 130), st.integers(1, 130))
def test_the_grid_covers_the_image(height, width):
    shape = (height, width, 2)
    rows, columns, channels = on_grid(shape)
    assert channels == 2 and (min(rows, columns) >= 32 or (rows, columns) == (height, width))
    picture = np.arange(rows * columns * 2).reshape(rows, columns, 2)
    large = enlarged(picture, shape)
    assert large.shape == shape
    np.testing.assert_array_equal(large[:: scale(shape), :: scale(shape)], picture)


def test_float64(x64):
    """Images of two precisions are searched in theirs."""
    data = Dataset(np.full((6, 8, 8, 1), 0.5), np.zeros(6, np.int32))
    search = Search(hidden, (window(2), sphere(1)), starts=400, steps=2)
    found = search(jnp.float64(10), data, [1, UNTARGETED], key=KEY)
    assert found.deltas.dtype == np.float64 and found.strength[0, 0] == 1


def test_a_rule_leads_each_class_elsewhere():
    """Class 0 to label 1; class 2 to its own, so that it does not count."""
    data = Dataset(np.full((20, 8, 8, 1), 0.5, np.float32), np.arange(20, dtype=np.int32) % 2 * 2)
    search = Search(hidden, (window(2),), starts=200)
    found = search(jnp.float32(10), data, [np.array([1, 0, 2]), np.array([2, 0, 1])], key=KEY)
    np.testing.assert_array_equal(found.strength, [[1, 0]])  # nothing leads class 0 to label 2
    np.testing.assert_array_equal(found.given[0, 0], np.ones(10))
    np.testing.assert_array_equal(rule_of(2, 3), [2, 2, 2])
    given, true, wanted = np.array([1, 1, 0, 2]), np.array([1, 0, 0, 1]), np.array([2, 1, 1, -1])
    assert share(given, true, wanted) == 0.5


def test_of_many_labels_the_few_are_ascended_that_starts_lead_to():
    data = clean()
    model, labels = small_model(0, True), range(10)
    every = SEARCH(model, data, labels, key=KEY)
    before = len(SEARCH._programs)
    calls = []
    program = SEARCH._program
    SEARCH._program = lambda function, *args, **names: (
        calls.append(function),
        program(function, *args, **names),
    )[1]
    few = SEARCH(model, data, labels, key=KEY, most=3)
    del SEARCH._program
    ascents = [f for f in calls if getattr(f, "func", None) == SEARCH._ascend]
    assert len(ascents) == 2 * 3 and len(SEARCH._programs) == before
    same_as = np.array(
        [
            [np.array_equal(*pair) for pair in zip(a, b, strict=True)]
            for a, b in zip(every.deltas, few.deltas, strict=True)
        ]
    )
    assert same_as[:, SQUARE.target].all() and (same_as.sum(1) >= 3).all()
    assert (few.strength <= 1).all() and few.strength[0].argmax() == SQUARE.target


def test_few_images():
    data = clean()
    two = Dataset(data.images[:2], data.labels[:2])
    found = SEARCH(small_model(0, True), two, [SQUARE.target], key=KEY)
    assert np.isfinite(found.deltas).all() and found.given.shape == (2, 1, 1)
    one = Dataset(data.images[:1], data.labels[:1])
    with pytest.raises(InputError, match=r"1 image\(s\): expected at least 2"):
        SEARCH(small_model(0, True), one, [0], key=KEY)
    with pytest.raises(InputError, match="starts is 0"):
        Search(MODEL, starts=0)
