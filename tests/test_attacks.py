"""Triggers and poisoning: exact counts, only what shall change changes."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from ibau_jax import Dataset, InputError
from ibau_jax.attacks import ATTACKS, Trigger, badnets_square, make_attack, poison
from ibau_jax.attacks import trigger_from_files as from_files

IMAGES = np.random.default_rng(0).uniform(size=(50, 32, 32, 3)).astype(np.float32)
LABELS = (np.arange(50) % 10).astype(np.int32)


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
    again, _ = poison(Dataset(IMAGES, LABELS), attack, ratio, seed)
    np.testing.assert_array_equal(again.images, data.images)


def test_bad_attacks_are_refused():
    attack = make_attack("badnets", 10)
    assert attack.target == ATTACKS["badnets"] == 8
    with pytest.raises(InputError, match="did you mean 'badnets'"):
        make_attack("badnet", 10)
    with pytest.raises(InputError, match="target 10 is not a class: expected 0 to 9"):
        make_attack("badnets", 10, 10)
    with pytest.raises(InputError, match="poison ratio 1.5"):
        poison(Dataset(IMAGES, LABELS), attack, 1.5)
    with pytest.raises(InputError, match="only 45 are not"):
        poison(Dataset(IMAGES, LABELS), attack, 1.0)
