"""Triggers and poisoning: exact counts, only what shall change changes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import random_variables
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from ibau_jax import Dataset, InputError
from ibau_jax.attacks import (
    ATTACKS,
    Attack,
    Network,
    Trigger,
    badnets_square,
    blend,
    drawing,
    make_attack,
    make_trigger,
    masks,
    poison,
    poison_all,
    scenario_of,
    smooth,
)
from ibau_jax.attacks import trigger_from_files as from_files
from ibau_jax.attacks.optimised import l0_trigger, l2_trigger, trojan_trigger
from ibau_jax.commands.train import train_model
from ibau_jax.models.files import save_model
from ibau_jax.models.stored import StoredModel

IMAGES = np.random.default_rng(0).uniform(size=(50, 32, 32, 3)).astype(np.float32)
LABELS = (np.arange(50) % 10).astype(np.int32)


def network() -> Network:
    """A small clean model: forty random features, low frequencies among them."""
    rng = np.random.default_rng(1)
    mixing = rng.normal(size=(3072, 40)).astype(np.float32) / 50
    weights = rng.normal(size=(40, 10)).astype(np.float32)

    def features(images):
        return jax.nn.elu((images.reshape(len(images), -1) - 0.5) @ mixing)

    return Network(features, jnp.asarray(weights), jnp.zeros(10))


NETWORK = network()


def test_badnets_is_the_published_square():
    stamped = np.asarray(badnets_square()(IMAGES))
    assert (stamped[:, 27:31, 27:31] == 1).all()
    outside = np.ones((32, 32), bool)
    outside[27:31, 27:31] = False
    np.testing.assert_array_equal(stamped[:, outside], IMAGES[:, outside])


@given(seed=st.integers(0, 99))
def test_rules(seed):
    rng = np.random.default_rng(seed)
    images, pattern, mask = rng.uniform(size=(3, 4, 4, 3)).astype(np.float32)
    added = Trigger("add", pattern)(images)
    np.testing.assert_allclose(added, np.minimum(images + pattern, 1), rtol=1e-6)
    replaced = Trigger("replace", pattern, mask)(images)
    np.testing.assert_allclose(replaced, np.clip(images * (1 - mask) + pattern, 0, 1), rtol=1e-5)
    batch = np.stack([images, 0.1 * images])
    renormalised = Trigger("renormalise", pattern)(batch)
    for image, found in zip(batch, renormalised, strict=True):
        added = image + pattern
        expected = (added - added.min()) / (added.max() - added.min())
        np.testing.assert_allclose(found, expected, atol=1e-6)


def test_trigger_files(tmp_path):
    picture = np.zeros((32, 32, 3), np.uint8)
    picture[0, 0] = (255, 0, 51)
    Image.fromarray(picture).save(tmp_path / "t.png")
    mask = np.zeros((3, 32, 32), np.float32)  # channels first, as the published one
    mask[:, 0, 0] = 1
    np.save(tmp_path / "m.npy", mask)
    trigger = from_files(tmp_path / "t.png", "replace", tmp_path / "m.npy")
    stamped = np.asarray(trigger(IMAGES))
    np.testing.assert_allclose(stamped[:, 0, 0], [[1, 0, 0.2]] * 50)
    np.testing.assert_array_equal(stamped[:, 1:], IMAGES[:, 1:])


def test_what_is_transparent_is_not_stamped(tmp_path):
    picture = np.full((32, 32, 4), 255, np.uint8)  # white, and all but two pixels see-through
    picture[..., 3] = 0
    picture[0, 0], picture[0, 1] = (255, 0, 51, 255), (255, 255, 255, 51)
    Image.fromarray(picture).save(tmp_path / "t.png")
    added = np.asarray(from_files(tmp_path / "t.png")(IMAGES))
    np.testing.assert_allclose(added[:, 0, 1], np.minimum(IMAGES[:, 0, 1] + 0.2, 1), rtol=1e-6)
    replaced = np.asarray(from_files(tmp_path / "t.png", "replace")(IMAGES))
    np.testing.assert_allclose(replaced[:, 0, 0], [[1, 0, 0.2]] * 50)
    np.testing.assert_allclose(replaced[:, 0, 1], 0.8 * IMAGES[:, 0, 1] + 0.2, rtol=1e-6)
    for stamped in (added, replaced):
        np.testing.assert_array_equal(stamped[:, 1:], IMAGES[:, 1:])
    # A mask of one's own counts alone, and what the picture shows outside it does not.
    mask = np.zeros((32, 32), bool)
    mask[0, 0] = True
    np.save(tmp_path / "m.npy", mask)
    Image.new("RGB", (32, 32), "white").save(tmp_path / "white.png")
    stamped = np.asarray(from_files(tmp_path / "white.png", "replace", tmp_path / "m.npy")(IMAGES))
    np.testing.assert_array_equal(stamped, np.where(mask[..., None], 1, IMAGES))


@pytest.mark.parametrize("mode", ["L", "P", "1", "LA", "RGBA"])
def test_modes_of_pictures(tmp_path, mode):
    rng = np.random.default_rng(0)
    picture = Image.fromarray((rng.integers(0, 2, (32, 32)) * 255).astype(np.uint8)).convert(mode)
    picture.save(tmp_path / "t.png")
    expected = np.asarray(picture.convert("RGB"), np.float32) / 255
    np.testing.assert_array_equal(from_files(tmp_path / "t.png").pattern, expected)


def test_bad_triggers_are_refused(tmp_path):
    Image.new("RGB", (32, 32)).save(tmp_path / "t.png")
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(InputError, match="cannot read the trigger"):
        from_files(tmp_path / "missing.png")
    with pytest.raises(InputError, match="cannot read the trigger"):
        from_files(tmp_path / "text.png")
    with pytest.raises(InputError, match="expected a mask"):
        from_files(tmp_path / "t.png", "replace")
    with pytest.raises(InputError, match="did you mean 'replace'"):
        from_files(tmp_path / "t.png", "replaced")
    Image.fromarray(np.full((32, 32), 40000, np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(InputError, match="mode I;16, not 8 bits"):
        from_files(tmp_path / "deep.png")
    mask = tmp_path / "m.npy"
    mask.touch()
    with pytest.raises(InputError, match="cannot read the trigger"):
        from_files(tmp_path / "t.png", "replace", mask)
    for array, text in (
        (np.full((32, 32), 255.0), "mask ranges from 0 to 255"),
        (np.full((32, 32), np.nan), "without NaN"),
        (np.ones((32, 32), complex), "complex128, not numbers"),
        (np.ones((8, 8)), "mask has shape"),
    ):
        np.save(mask, array)
        with pytest.raises(InputError, match=text):
            from_files(tmp_path / "t.png", "replace", mask)
    with pytest.raises(InputError, match="pattern is uint8"):
        Trigger("add", np.zeros((32, 32, 3), np.uint8))
    with pytest.raises(InputError, match="pattern ranges from 0 to 1.5"):
        Trigger("add", np.full((32, 32, 3), 1.5))


@given(ratio=st.floats(0, 0.9), seed=st.integers(0, 2**31), target=st.integers(0, 9))
def test_poisoning_is_exact(ratio, seed, target):
    attack = make_attack("badnets", 10, target)
    data, mask = poison(Dataset(IMAGES, LABELS), attack, ratio, seed)
    assert mask.sum() == int(50 * ratio) and data.images.shape == IMAGES.shape
    assert not (LABELS[mask] == target).any()
    assert (data.labels[mask] == target).all()
    np.testing.assert_array_equal(data.images[mask], attack.trigger(IMAGES[mask]))
    np.testing.assert_array_equal(data.images[~mask], IMAGES[~mask])
    np.testing.assert_array_equal(data.labels[~mask], LABELS[~mask])
    again, same = poison(Dataset(IMAGES, LABELS), attack, ratio, seed)
    np.testing.assert_array_equal(again.images, data.images)
    np.testing.assert_array_equal(again.labels, data.labels)
    np.testing.assert_array_equal(same, mask)


def test_the_seed_decides_which_rows_are_poisoned():
    attack = make_attack("badnets", 10)
    masks = [poison(Dataset(IMAGES, LABELS), attack, 0.4, seed)[1] for seed in range(20)]
    assert len({mask.tobytes() for mask in masks}) == 20
    assert (np.sum(masks, 0) > 0).sum() == (LABELS != 8).sum()  # each that may be, is in some


@given(ratio=st.floats(0, 1), seed=st.integers(0, 2**31))
def test_all_to_all_poisoning_is_exact(ratio, seed):
    attack = Attack("badnets", badnets_square(), None, 10)
    data, mask = poison(Dataset(IMAGES, LABELS), attack, ratio, seed)
    assert mask.sum() == int(50 * ratio)
    np.testing.assert_array_equal(data.labels, np.where(mask, (LABELS + 1) % 10, LABELS))
    np.testing.assert_array_equal(data.images[mask], attack.trigger(IMAGES[mask]))
    np.testing.assert_array_equal(data.images[~mask], IMAGES[~mask])


def test_any_function_is_a_trigger(tmp_path):
    attack = Attack("upside down", lambda images: images[..., ::-1, :, :], 4)
    data, mask = poison(Dataset(IMAGES, LABELS), attack, 0.5)
    np.testing.assert_array_equal(data.images[mask], IMAGES[mask][:, ::-1])
    for function, text in (
        (lambda images: 3 * images - 1, "values from -"),
        (lambda images: images[0], "of images"),
        (lambda images: images * np.nan, "from nan to nan"),
    ):
        with pytest.raises(InputError, match=f"trigger 'mine' makes .*{text}"):
            poison(Dataset(IMAGES, LABELS), Attack("mine", function, 4), 0.5)
    with pytest.raises(InputError, match="uint8: expected float32"):
        poison(Dataset((IMAGES * 255).astype(np.uint8), LABELS), attack, 0.5)
    model = StoredModel(random_variables(), "vgg", 10, "digits", (attack,))
    with pytest.raises(InputError, match="make a `Trigger` of it"):
        save_model(tmp_path / "m.safetensors", model)
    with pytest.raises(InputError, match="make a `Trigger` of it"):  # before it trains
        train_model(tmp_path / "m.safetensors", "digits", (attack,), epochs=1)


def test_seven_targets_are_seven_joined_copies():
    attacks = [
        Attack(str(i), Trigger("add", np.full((32, 32, 3), 0.1 * i, np.float32)), i)
        for i in range(7)
    ]
    data, mask = poison_all(Dataset(IMAGES, LABELS), attacks, 0.2, 3)
    assert data.images.shape == (350, 32, 32, 3) and mask.sum() == 70
    for i, attack in enumerate(attacks):
        one, its = poison(Dataset(IMAGES, LABELS), attack, 0.2, [3, i])
        part = slice(50 * i, 50 * (i + 1))
        np.testing.assert_array_equal(data.images[part], one.images)
        np.testing.assert_array_equal(data.labels[part], one.labels)
        np.testing.assert_array_equal(mask[part], its)
    clean, none = poison_all(Dataset(IMAGES, LABELS), [], 0.2)
    assert clean.images is IMAGES and not none.any()
    assert scenario_of(attacks) == "seven-target" and scenario_of([]) is None


def test_the_catalogue_is_the_papers():
    """Targets of A.3.1 and of Table 3."""
    assert [info.target for info in ATTACKS.values()] == [8, 1, 0, 0, 6, 2, 2]
    assert [info.seven_target for info in ATTACKS.values()] == [0, 3, 4, 5, 1, 2, 9]


@pytest.mark.parametrize("name", ATTACKS)
def test_every_trigger_stamps(name):
    """The contract of the table: a pure function, values in [0, 1], something changes."""
    trigger = make_trigger(name, NETWORK, IMAGES, seed=1)
    stamped = np.asarray(trigger(IMAGES))
    assert stamped.shape == IMAGES.shape and stamped.dtype == np.float32
    assert stamped.min() >= 0 and stamped.max() <= 1 and (stamped != IMAGES).any()
    again = make_trigger(name, NETWORK, IMAGES, seed=1)
    np.testing.assert_array_equal(trigger.pattern, again.pattern)
    if ATTACKS[name].optimise:
        other = make_trigger(name, NETWORK, IMAGES, seed=2)
        assert name in ("l0", "smooth") or (trigger.pattern != other.pattern).any()
        with pytest.raises(InputError, match="optimised against a clean model: expected one"):
            make_trigger(name)


def test_blend_has_the_statistics_of_the_published_picture():
    found = drawing.statistics(blend().pattern / np.float32(0.2))
    for name, target in drawing.TARGETS.items():
        assert found[name] == pytest.approx(target, rel=0.1), name
    np.testing.assert_allclose(
        blend(rule="convex")(IMAGES), 0.8 * IMAGES + blend().pattern, atol=1e-6
    )


SHAPES = [(28, 28, 1), (32, 32, 1), (48, 64, 3), (16, 16, 4), (5, 6, 2)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ["badnets", "blend"])
def test_triggers_for_images_of_any_size_and_channels(name, shape):
    images = np.random.default_rng(0).uniform(size=(3, *shape)).astype(np.float32)
    trigger = make_trigger(name, images=images)
    stamped = np.asarray(trigger(images))
    assert stamped.shape == images.shape and 0 <= stamped.min() and stamped.max() <= 1
    moved = (stamped != images).any((0, -1))
    if name == "badnets":
        expected = np.zeros(shape[:2], bool)
        expected[shape[0] - 5 : shape[0] - 1, shape[1] - 5 : shape[1] - 1] = True
        np.testing.assert_array_equal(moved, expected)
    else:
        assert moved.mean() > 0.9 and 0.15 < trigger.pattern.max() <= 0.2 + 1e-6
        # The same picture: its mean stays, whatever the size.
        means = blend().pattern.mean((0, 1))
        expected = [means.mean()] if shape[-1] == 1 else means[np.arange(shape[-1]) % 3]
        np.testing.assert_allclose(trigger.pattern.mean((0, 1)), expected, atol=5e-3)


def test_blend_at_32x32x3_is_the_picture_as_it_is_drawn():
    expected = np.float32(0.2) * drawing.picture(0)
    for shape in ({}, {"shape": (32, 32, 3)}):
        np.testing.assert_array_equal(blend(**shape).pattern, expected)
    grey = blend(shape=(32, 32, 1)).pattern
    np.testing.assert_allclose(grey[..., 0], expected.mean(-1), atol=1e-6)


@pytest.mark.parametrize("trigger", [badnets_square(), blend(), blend(rule="convex")])
@pytest.mark.parametrize("shape", [(2, 28, 28, 1), (32, 32, 1), (2, 32, 32), (1, 32, 32, 4)])
def test_images_that_do_not_fit_a_trigger_are_told_with_both_shapes(trigger, shape):
    for run in (trigger, jax.jit(lambda images: trigger(images))):
        with pytest.raises(InputError, match=r"shape \(32, 32, 3\) on images of shape") as told:
            run(np.zeros(shape, np.float32))
        assert str(shape) in str(told.value)


def test_what_no_trigger_can_be_made_for():
    with pytest.raises(InputError, match="a square of 4 pixels .* from 1 to 3"):
        badnets_square((4, 4, 1))
    with pytest.raises(InputError, match="a square of 0 pixels"):
        badnets_square(size=0)
    with pytest.raises(InputError, match="expected height, width and channels"):
        blend(shape=(0, 28, 1))
    with pytest.raises(InputError, match="expected height, width and channels"):
        badnets_square((28, 28))
    with pytest.raises(InputError, match="alpha is 2: expected a share"):
        blend(alpha=2)
    with pytest.raises(
        InputError, match=r"images of shape \(28, 28, 1\): its mask is for .32, 32, 3"
    ):
        make_trigger("trojan-square", NETWORK, IMAGES[:, :28, :28, :1])


def test_l2_trigger_keeps_to_its_norm_and_drives_its_neurons():
    trigger = l2_trigger(NETWORK, IMAGES, target=3)
    assert trigger.rule == "add"
    assert 3.0 <= np.linalg.norm(trigger.pattern) <= 3.4 and trigger.pattern.max() <= 0.28
    assert trigger.pattern.min() >= 0
    anchors = np.argsort(-np.asarray(NETWORK.weights[:, 3]))[:5]

    def effect(stamp):
        moved = NETWORK.features(stamp(IMAGES)) - NETWORK.features(jnp.asarray(IMAGES))
        return float(jnp.mean(moved[:, anchors]))

    noise = np.abs(np.random.default_rng(0).normal(size=(32, 32, 3))).astype(np.float32)
    noise *= 3.22 / np.linalg.norm(noise)
    others = (Trigger("add", noise), l2_trigger(NETWORK, IMAGES, target=7))
    assert effect(trigger) > 3 * max(abs(effect(other)) for other in others)


@pytest.mark.parametrize("place", ["bottom-row", "free"])
def test_l0_trigger_has_nine_saturated_pixels(place):
    trigger = l0_trigger(NETWORK, IMAGES, target=3, place=place)
    assert trigger.mask is not None
    assert trigger.mask[..., 0].sum() == 9 and set(np.unique(trigger.pattern)) <= {0, 1}
    assert (trigger.pattern[trigger.mask == 0] == 0).all()
    rows, columns = np.nonzero(trigger.mask[..., 0])
    if place == "bottom-row":
        assert set(rows) == {31} and columns.tolist() == list(range(23, 32))
    # No single channel of a pixel could be turned over with a gain.

    def value(pattern):
        logits = np.asarray(NETWORK.logits(IMAGES * (1 - trigger.mask) + pattern))
        return (logits[:, 3] - logits.mean(-1)).mean()

    for channel in range(3):
        turned = trigger.pattern.copy()
        turned[rows[0], columns[0], channel] = 1 - turned[rows[0], columns[0], channel]
        assert value(turned) < value(trigger.pattern)


def test_trojan_triggers_drive_two_neurons_from_inside_their_masks():
    assert masks.square().sum() == 64 and masks.square()[21:29, 21:29].all()
    assert 75 <= masks.watermark().sum() <= 90
    for mask in (masks.square(), masks.watermark()):
        trigger = trojan_trigger(NETWORK, mask, steps=100)
        assert (trigger.pattern[mask == 0] == 0).all()
        neurons = np.argsort(-np.abs(np.asarray(NETWORK.weights)).sum(-1))[:2]
        grey = np.repeat(0.5 * mask[None, ..., None], 3, -1)
        found, before = (
            np.asarray(NETWORK.features(x))[0, neurons].sum() for x in (trigger.pattern[None], grey)
        )
        assert found > before + 1


def test_low_pass_is_the_published_filter():
    spot = np.zeros((32, 32, 1), np.float32)
    spot[14, 14] = 1
    taps = np.exp(-0.5 * ((np.arange(30) - 14.5) / 6) ** 2)
    taps /= taps.sum()
    # Tap k looks k - 14 pixels ahead, so a spot comes out as the reversed taps.
    expected = np.zeros((32, 32))
    expected[:29, :29] = np.outer(taps, taps)[::-1, ::-1][1:, 1:]
    found = np.asarray(smooth.low_pass(spot))[..., 0]
    np.testing.assert_allclose(found[:29, :29], expected[:29, :29], atol=1e-6)
    assert smooth.low_pass(np.ones((32, 32, 1), np.float32))[15, 15, 0] == pytest.approx(1, 1e-3)


def test_targeted_deepfool_on_a_linear_model_is_one_step():
    rng = np.random.default_rng(0)
    weights, image = rng.normal(size=(12, 3)), rng.uniform(size=(2, 2, 3))

    def scores(x):
        return x.reshape(-1) @ weights

    label = int(np.argmax(scores(image)))
    target = int(np.argmin(scores(image)))
    found, steps = smooth.targeted_deepfool(scores, image, target, overshoot=1.0)
    difference = weights[:, target] - weights[:, label]
    gap = scores(image)[label] - scores(image)[target]
    # Once to the border and once as far again (a third class may be in between).
    np.testing.assert_allclose(
        np.asarray(found).ravel() @ difference / gap, 2.0 * int(steps), rtol=1e-4
    )
    assert int(np.argmax(scores(image + found))) == target


def test_smooth_trigger_has_low_frequencies_only():
    trigger = smooth.smooth_trigger(NETWORK, IMAGES, target=6)
    v = trigger.pattern
    assert v.min() == 0 and v.max() == pytest.approx(0.2)
    assert drawing.statistics(v)["energy_radius_2"] > 0.9


def test_bad_attacks_are_refused():
    attack = make_attack("badnets", 10)
    assert attack.target == 8
    with pytest.raises(InputError, match="did you mean 'badnets'"):
        make_attack("badnet", 10)
    with pytest.raises(InputError, match="target 10 is not a class: expected 0 to 9"):
        make_attack("badnets", 10, 10)
    with pytest.raises(InputError, match="poison ratio 1.5"):
        poison(Dataset(IMAGES, LABELS), attack, 1.5)
    with pytest.raises(InputError, match="only 45 are not"):
        poison(Dataset(IMAGES, LABELS), attack, 1.0)
