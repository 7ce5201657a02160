"""Data sets, split strings and the cache of decoded images."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ibau_jax import InputError, load
from ibau_jax.data import (
    DATASETS,
    check_disjoint,
    check_images,
    missing_classes,
    note_missing,
    split_indices,
)
from ibau_jax.data.cache import cached

SIZES = {"train": 100, "test": 40}


def rows(spec):
    return [(name, list(part)) for name, part in split_indices(spec, SIZES)]


def test_split_strings():
    assert rows("test") == [("test", list(range(40)))]
    assert rows("test[:3]") == [("test", [0, 1, 2])]
    assert rows("test[38:]+train[:1]") == [("test", [38, 39]), ("train", [0])]
    assert rows("train[-2:]") == [("train", [98, 99])]
    assert rows("train[10%:13%]") == [("train", [10, 11, 12])]


@given(cut=st.integers(1, 39))
def test_the_two_sides_of_a_cut_are_the_whole(cut):
    (_, left), (_, right) = *rows(f"test[:{cut}]"), *rows(f"test[{cut}:]")
    assert left + right == list(range(40))
    check_disjoint(f"test[:{cut}]", f"test[{cut}:]", SIZES)
    with pytest.raises(InputError, match="share 1 images"):
        check_disjoint(f"test[:{cut}]", f"test[{cut - 1}:]", SIZES)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("test[5000:]", "is empty"),
        ("test[3:3]", "is empty"),
        ("valid", "unknown split 'valid'"),
        ("test[a:]", "cannot read the split"),
        ("", "cannot read the split"),
    ],
)
def test_bad_split_strings(spec, message):
    with pytest.raises(InputError, match=message):
        split_indices(spec, SIZES)


def test_missing_classes_by_hand():
    labels = np.array([3, 0, 3, 5], np.int32)
    assert missing_classes(labels, 6) == [1, 2, 4] and missing_classes(labels, 4) == [1, 2]
    assert note_missing(np.arange(6), 6) is None
    assert note_missing(labels, 6) == (
        "the clean set has no image of 3 of the 6 classes (1, 2, 4): the result may not hold for "
        "them, and fine-tuning may forget them"
    )
    assert "of 39 of the 43 classes (1, 2, 4, 6, 7, 8, 9, 10, 11, 12 and 29 more):" in str(
        note_missing(np.append(labels, 42), 43)
    )


def test_digits():
    data = load("digits", "train")
    assert data.images.shape == (997, 32, 32, 3) and data.images.dtype == np.float32
    assert data.labels.shape == (997,) and data.labels.dtype == np.int32
    assert data.images.min() >= 0 and 0.99 < data.images.max() <= 1
    assert set(data.labels.tolist()) == set(range(10))
    both = load("digits", "test[:400]+test[400:]")
    np.testing.assert_array_equal(both.images, load("digits", "test").images)


def test_unknown_data_set_tells_the_nearest():
    with pytest.raises(InputError, match="did you mean 'cifar10'"):
        load("cifar100", "test")


@pytest.mark.parametrize("info", DATASETS.values(), ids=DATASETS)
def test_default_splits_are_disjoint(info):
    check_disjoint(info.clean, info.split, info.sizes)


ARRAYS = (np.arange(24, dtype=np.uint8).reshape(2, 2, 2, 3), np.array([3, 1], np.int32))


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("IBAU_CACHE", str(tmp_path))
    return tmp_path / "key"


def test_cache_decodes_once_and_maps(cache):
    calls = []

    def decode():
        calls.append(1)
        return ARRAYS

    for _ in range(3):
        images, labels = cached("key", decode)
        np.testing.assert_array_equal(images, ARRAYS[0])
        np.testing.assert_array_equal(labels, ARRAYS[1])
        assert isinstance(images, np.memmap)
    assert len(calls) == 1


@pytest.mark.parametrize("how", ["flip", "cut", "no checks"])
def test_a_damaged_copy_is_made_again(cache, how, caplog):
    cached("key", lambda: ARRAYS)
    file = cache / ("checks.json" if how == "no checks" else "images.npy")
    content = bytearray(file.read_bytes())
    if how == "flip":
        content[-1] ^= 1
    file.write_bytes(
        content[: len(content) - (5 if how == "cut" else 0)] if how != "no checks" else b""
    )
    images, _ = cached("key", lambda: ARRAYS)
    np.testing.assert_array_equal(images, ARRAYS[0])
    assert "damaged" in caplog.text


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path, monkeypatch, caplog):
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    monkeypatch.setenv("IBAU_CACHE", str(blocked))
    images, _ = cached("key", lambda: ARRAYS)
    np.testing.assert_array_equal(images, ARRAYS[0])
    assert "no decoded copy" in caplog.text


def test_real_cifar10_is_in_the_official_order(cifar10):
    assert cifar10.images.shape == (10_000, 32, 32, 3)
    # The first labels of the official test_batch.
    assert cifar10.labels[:10].tolist() == [3, 8, 8, 0, 6, 6, 1, 6, 3, 1]
    assert np.bincount(cifar10.labels).tolist() == [1000] * 10


def test_images_that_cannot_be_read_and_do_not_say_why():
    class Mute:
        def __array__(self, *_, **__):
            raise ValueError

    with pytest.raises(InputError, match=r"images cannot be read as one array \(ValueError\(\)\)"):
        check_images(Mute())
