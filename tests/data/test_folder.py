"""Images of the user's own: class folders, pictures of all kinds, .npz files, pairs of sets."""

import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from ibau_jax import Dataset, InputError, load
from ibau_jax.data import Reader, data_info, load_both, load_given
from ibau_jax.data.images import centre
from ibau_jax.data.pair import halves, shared_rows

ANY = Reader(2, (None, None, 3))
RNG = np.random.default_rng(0)


def noise(height=4, width=4, channels=3, dtype=np.uint8):
    shape = (height, width, channels) if channels > 1 else (height, width)
    return RNG.integers(0, np.iinfo(dtype).max, shape, endpoint=True).astype(dtype)


def save(path: Path, pixels, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(path, **options)
    return path


def write_folder(folder: Path, data: Dataset, classes: list[str]) -> Path:
    """A data set whose pixels are n / 255 as PNGs in a folder for each class."""
    for row, (image, label) in enumerate(zip(data.images, data.labels, strict=True)):
        pixels = np.rint(image * 255).astype(np.uint8)
        save(
            folder / classes[label] / f"{row:04d}.png",
            pixels if pixels.shape[-1] == 3 else pixels[..., 0],
        )
    return folder


def two(folder: Path) -> Path:
    """A folder of the classes `a` and `b` with a picture each."""
    save(folder / "a" / "0.png", noise())
    save(folder / "b" / "0.png", noise())
    return folder


def refused(function, *arguments, **options) -> str:
    with pytest.raises(InputError) as error:
        function(*arguments, **options)
    assert "\n" not in str(error.value)
    return f"{error.value} --{error.value.argument}"


def read(folder: Path, reader: Reader = ANY, **options):
    return load_given(str(folder), reader, **options)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    labels=st.lists(st.integers(0, 2), min_size=1, max_size=12),
    height=st.integers(1, 9),
    width=st.integers(1, 9),
    channels=st.sampled_from([1, 3]),
    names=st.permutations(["cat", "Dog", "a b", "0", "10", "2", "é"]),
)
def test_a_folder_written_from_a_data_set_comes_back(
    tmp_path_factory, labels, height, width, channels, names
):
    tmp_path = tmp_path_factory.mktemp("folder")
    labels = np.sort(np.array([0, 1, 2, *labels], np.int32))  # each class, as folders are read
    pixels = RNG.integers(0, 256, (len(labels), height, width, channels))
    data = Dataset((pixels / np.float32(255)).astype(np.float32), labels)
    write_folder(tmp_path / "images", data, names[:3])
    (tmp_path / "classes.txt").write_text("\n".join(names[:3]) + "\n", "utf-8")
    reader = Reader(3, (height, width, channels), classes=tmp_path / "classes.txt")
    found = read(tmp_path / "images", reader)
    np.testing.assert_array_equal(found.data.images, data.images)
    np.testing.assert_array_equal(found.data.labels, data.labels)
    assert found.data.images.dtype == np.float32 and found.data.labels.dtype == np.int32
    assert found.own and found.classes == {name: i for i, name in enumerate(names[:3])}
    ordered = read(tmp_path / "images", Reader(3, (None, None, channels)))
    expected = sorted(names[:3])
    if all(name.isdigit() for name in names[:3]):
        expected = sorted(names[:3], key=int)
    assert list(ordered.classes) == expected


def test_numbers_are_sorted_as_numbers(tmp_path):
    for name in ("10", "9", "2", ".hidden"):
        save(tmp_path / name / "0.png", noise())
    found = read(tmp_path, Reader(3, (4, 4, 3)))
    assert found.classes == {"2": 0, "9": 1, "10": 2}
    assert "0 = '2', 1 = '9', 2 = '10'" in found.notes[0]
    assert "ImageFolder has 10, 2, 9" in found.notes[0]


def test_files_below_and_beside_the_classes(tmp_path):
    two(tmp_path)
    for name in ("a/deep/er/1.PNG", "a/.2.png", "b/.cache/3.png", "top.png"):
        save(tmp_path / name, noise())
    (tmp_path / "b" / "notes.txt").write_text("not an image")
    save(tmp_path.parent / "elsewhere" / "4.png", noise())
    (tmp_path / "b" / "link").symlink_to(tmp_path.parent / "elsewhere")
    found = read(tmp_path)
    assert found.data.labels.tolist() == [0, 0, 1, 1]
    (note,) = found.notes[1:]
    assert "left out" in note and "'top.png', 'b/notes.txt'" in note


def test_classes_by_a_file(tmp_path):
    two(tmp_path / "images")
    names = tmp_path / "names"
    names.write_text("\ufeffb\r\nnone\r\na\r\n\r\n", "utf-8")
    reader = Reader(3, (4, 4, 3), classes=names)
    found = read(tmp_path / "images", reader)
    assert found.classes == {"b": 0, "none": 1, "a": 2}
    assert found.data.labels.tolist() == [0, 2] and str(names) in found.notes[0]
    (tmp_path / "images" / "none").mkdir()  # known by its name, so that it shifts nothing
    assert read(tmp_path / "images", reader).data.labels.tolist() == [0, 2]
    (tmp_path / "images" / "other").mkdir()
    assert "no classes ('other')" in refused(read, tmp_path / "images", reader)
    wrong = {
        "a\nb": "2 names, and the model has 3",
        "a\n\nb": "an empty line",
        "a\nb\na": "'a' more",
    }
    for content, message in wrong.items():
        names.write_text(content)
        assert message in refused(read, tmp_path / "images", reader)
    names.write_bytes(b"\xff\xfe")
    assert "cannot read the names" in refused(read, tmp_path / "images", reader)
    names.unlink()
    assert "No such file or directory; expected" in refused(read, tmp_path / "images", reader)


def test_other_folders_than_the_classes_are_refused(tmp_path):
    two(tmp_path)
    message = refused(read, tmp_path, Reader(4, (4, 4, 3)))
    assert "2 folders ('a', 'b'), and the model has 4 outputs" in message
    assert message.endswith("--classes")
    (tmp_path / "c").mkdir()
    assert "3 folders ('a', 'b', 'c')" in refused(read, tmp_path)
    assert "without an image ('c')" in refused(read, tmp_path, Reader(3, (4, 4, 3)))


def test_splits_are_no_classes(tmp_path):
    save(tmp_path / "test" / "a" / "0.png", noise())
    save(tmp_path / "train" / "a" / "0.png", noise())
    assert f"for example {str(tmp_path / 'test')!r}" in refused(read, tmp_path)


def test_nothing_to_read(tmp_path):
    assert "has no image:" in refused(read, tmp_path)
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    assert "has no image:" in refused(read, tmp_path)
    (tmp_path / "a" / "x.heic").touch()
    assert "no image, but 'x.heic'" in refused(read, tmp_path)
    save(tmp_path / "flat" / "0.png", noise())
    assert "1 images and no folder" in refused(read, tmp_path / "flat")
    assert read(tmp_path / "flat", labelled=False).data.images.shape == (1, 4, 4, 3)
    assert "no image, but 'x.heic'" in refused(read, tmp_path / "a", labelled=False)


def test_circles_of_links_are_refused(tmp_path):
    two(tmp_path)
    (tmp_path / "b" / "up").symlink_to(tmp_path)
    assert "link to a folder above it" in refused(read, tmp_path)
    (tmp_path / "b" / "up").unlink()
    (tmp_path / "b" / "self").symlink_to(tmp_path / "b" / "self")
    assert "lead in a circle" in refused(read, tmp_path)


def test_files_that_cannot_be_used_are_told_together(tmp_path):
    two(tmp_path)
    good = (tmp_path / "a" / "0.png").read_bytes()
    (tmp_path / "a" / "1.png").write_bytes(good[: len(good) // 2])
    (tmp_path / "a" / "2.jpg").write_text("no picture")
    save(tmp_path / "a" / "3.jpg", Image.new("CMYK", (4, 4)))
    save(tmp_path / "a" / "4.png", Image.new("RGBA", (4, 4), (9, 9, 9, 254)))
    (tmp_path / "a" / "5.png").symlink_to(tmp_path / "nothing")
    os.mkfifo(tmp_path / "a" / "6.png")
    frames = [Image.fromarray(noise()) for _ in range(2)]
    save(tmp_path / "a" / "7.tif", frames[0], save_all=True, append_images=frames[1:])
    save(tmp_path / "a" / "8.tif", Image.fromarray(np.zeros((4, 4), np.float32)))
    save(tmp_path / "b" / "9.tif", Image.fromarray(np.zeros((4, 4), np.int32)))
    message = refused(read, tmp_path)
    assert message.startswith(f"9 of the 11 images in {str(tmp_path)!r} cannot be used (")
    for part in (
        "'a/1.png': ",
        "'a/2.jpg': no image that Pillow can read",
        "'a/3.jpg': mode CMYK",
        "'a/4.png': transparent",
        "'a/5.png': no such file",
        "'a/6.png': no regular file",
        "'a/7.tif': several frames",
        "'a/8.tif': mode F",
        "'b/9.tif': mode I",
    ):
        assert part in message
    for i in range(10, 14):
        (tmp_path / "b" / f"{i}.png").touch()
    assert "'b/11.png': no image that Pillow can read and 3 more)" in refused(read, tmp_path)


def test_several_sizes_are_refused_without_a_size(tmp_path):
    two(tmp_path)
    save(tmp_path / "b" / "1.png", noise(5, 4))
    message = refused(read, tmp_path)
    assert "4x4 (2 images), 5x4 (1 images)" in message and message.endswith("--image_size")
    found = read(tmp_path, Reader(2, (None, None, 3), image_size=3))
    assert found.data.images.shape == (3, 3, 3, 3)


def test_a_size_that_the_model_does_not_read(tmp_path):
    two(tmp_path)
    message = refused(read, tmp_path, Reader(2, (32, 32, 3)))
    assert "are 4x4 (height x width), and the model reads 32x32" in message
    assert "expected 32" in refused(read, tmp_path, Reader(2, (32, 32, 3), image_size=4))
    for size in (0, 5000):
        assert "1 to 4096" in refused(read, tmp_path, Reader(2, (None, None, 3), image_size=size))


def only(path: Path, channels=3, **options):
    """The picture of a file, and an opaque grey one beside it, through a folder of two classes."""
    folder = path.parent.parent
    save(folder / "b" / "0.png", noise(2, 2))
    reader = Reader(2, (None, None, channels), **options)
    return read(folder, reader).data.images[0]


def test_grey_and_colour(tmp_path):
    grey, colour = noise(2, 2, 1), noise(2, 2)
    path = tmp_path / "a" / "0.png"
    for kind in ("L", "P", "LA", "RGBA"):  # opaque
        save(path, Image.fromarray(grey).convert(kind))
        np.testing.assert_array_equal(
            only(path), np.repeat(grey[..., None], 3, -1) / np.float32(255)
        )
        np.testing.assert_array_equal(only(path, 1), grey[..., None] / np.float32(255))
    save(path, Image.fromarray(grey > 99))
    np.testing.assert_array_equal(only(path, 1)[..., 0], grey > 99)
    save(path, colour)
    expected = np.asarray(Image.fromarray(colour).convert("L")) / np.float32(255)
    np.testing.assert_array_equal(only(path, 1)[..., 0], expected)


def png48(path: Path, pixels: np.ndarray):
    """A PNG of 16 bits a colour (Pillow writes none), of uint16 [H, W, 3]."""
    height, width, _ = pixels.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    parts = (b"IHDR", struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0))
    chunks = parts, (b"IDAT", zlib.compress(rows)), (b"IEND", b"")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + b"".join(
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
            for kind, body in chunks
        )
    )


def test_sixteen_bits_are_scaled_and_not_clipped(tmp_path):
    deep = np.array([[0, 255], [256, 65535]], np.uint16)
    for ending in ("png", "pgm", "tif"):
        path = save(tmp_path / ending / "a" / f"0.{ending}", deep)
        np.testing.assert_array_equal(only(path, 1)[..., 0], deep / np.float32(65535))
        assert only(path).shape == (2, 2, 3) and np.ptp(only(path), -1).max() == 0
    path = tmp_path / "large" / "a" / "0.png"
    save(path, np.full((40, 30), 65535, np.uint16))
    save(tmp_path / "large" / "b" / "0.png", noise(30, 30))
    assert np.all(read(tmp_path / "large", Reader(2, (8, 8, 3), image_size=8)).data.images[0] == 1)
    colours = np.stack([deep, deep.T, deep], -1)
    path = tmp_path / "colours" / "a" / "0.png"
    png48(path, colours)
    np.testing.assert_allclose(only(path), colours / 65535, atol=1 / 255)


def test_exif_turns_only_where_it_is_asked_for(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels = noise(2, 2, 1)
    path = save(tmp_path / "a" / "0.png", pixels, exif=exif)
    np.testing.assert_array_equal(only(path, 1)[..., 0], pixels / np.float32(255))
    turned = np.rot90(pixels, -1)
    np.testing.assert_array_equal(only(path, 1, exif=True)[..., 0], turned / np.float32(255))


# Size of the image, N, and by hand: the size after torchvision's Resize(N) (shorter side N, the
# other int(N * longer / shorter)), and the corner of its CenterCrop(N): round((side - N) / 2), a
# half to the even number.
TORCHVISION = [
    ((120, 90), 32, (42, 32), (5, 0)),
    ((90, 120), 32, (32, 42), (0, 5)),
    ((101, 67), 33, (49, 33), (8, 0)),
    ((45, 32), 32, (45, 32), (6, 0)),  # 6.5
    ((32, 47), 32, (32, 47), (0, 8)),  # 7.5
    ((47, 32), 32, (47, 32), (8, 0)),  # 7.5
    ((20, 10), 32, (64, 32), (16, 0)),
    ((500, 375), 224, (298, 224), (37, 0)),
    ((8, 8), 8, (8, 8), (0, 0)),
]


@pytest.mark.parametrize(("given", "size", "resized", "corner"), TORCHVISION)
@pytest.mark.parametrize("mode", ["L", "RGB", "F"])
def test_resizing_is_that_of_torchvision(given, size, resized, corner, mode):
    image = Image.fromarray(noise(given[1], given[0])).convert(mode)
    left, top = corner
    expected = image.resize(resized, Image.Resampling.BILINEAR)
    expected = expected.crop((left, top, left + size, top + size))
    np.testing.assert_array_equal(np.asarray(centre(image, size)), np.asarray(expected))


def test_resizing_averages_where_it_shrinks(tmp_path):
    board = np.indices((64, 64)).sum(0) % 2 * 255  # without antialias black, white or a pattern
    path = save(tmp_path / "a" / "0.png", board.astype(np.uint8))
    np.testing.assert_allclose(only(path, 1, image_size=8), 0.5, atol=0.02)


# Arrays in a file.


def npz(path: Path, **arrays) -> Path:
    np.savez(path, **arrays)
    return path


PIXELS = noise(5, 4).transpose(2, 0, 1)[:, None].repeat(3, 1)  # three images [3, 3, 5, 4]
FLOATS = np.moveaxis(PIXELS, 1, -1) / np.float32(255)


@pytest.mark.parametrize(
    ("keys", "images"),
    [
        (("images", "labels"), PIXELS),
        (("x", "y"), np.moveaxis(PIXELS, 1, -1)),
        (("X", "y"), PIXELS[:, 0]),
        (("x_test", "y_test"), PIXELS[:, :1]),
        (("test_images", "test_labels"), FLOATS),
        (("images", "labels"), FLOATS.astype(np.float64)),
        (("images", "labels"), PIXELS.astype(np.uint16) * 257),
        (("images", "labels"), PIXELS.astype(np.uint16).astype(">u2") * 257),
    ],
)
@pytest.mark.parametrize(
    "labels",
    [
        np.array([1, 0, 1], np.int64),
        np.array([[1], [0], [1]], np.uint8),
        np.array([1, 0, 1], np.float32),
        np.eye(2, dtype=bool)[[1, 0, 1]],
        np.eye(2)[[1, 0, 1]],
    ],
)
def test_arrays_of_all_forms(tmp_path, keys, images, labels):
    path = npz(tmp_path / "d.npz", **dict(zip(keys, (images, labels), strict=True)))
    found = read(path)
    np.testing.assert_allclose(found.data.images, FLOATS, rtol=1e-6)
    assert found.data.images.dtype == np.float32 and found.data.labels.dtype == np.int32
    assert found.data.labels.tolist() == [1, 0, 1] and found.classes is None
    assert bool(found.notes) == (keys[0] != "images")


def test_arrays_are_fitted_as_pictures_are(tmp_path):
    images = np.stack([noise(9, 12) for _ in range(2)])
    labels = np.array([0, 1])
    for i in labels:
        save(tmp_path / "folder" / str(i) / "0.png", images[i])
    for channels, size in ((3, 5), (1, 5), (1, None)):
        reader = Reader(2, (None, None, channels), image_size=size)
        expected = read(tmp_path / "folder", reader).data.images
        same = read(npz(tmp_path / "d.npz", images=images, labels=labels), reader)
        np.testing.assert_array_equal(same.data.images, expected)
        floats = npz(tmp_path / "f.npz", images=images / 255, labels=labels)
        near = read(floats, reader).data.images
        np.testing.assert_allclose(near, expected, atol=1.6 / 255)  # 8 bits, rounded twice


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"pictures": PIXELS}, "holds 'pictures': expected images and labels by one of"),
        ({"images": PIXELS}, "holds 'images'"),
        ({}, "holds nothing"),
        ({"images": PIXELS.astype(np.int64)}, "is int64 (3, 3, 5, 4): expected uint8"),
        ({"images": PIXELS[0, 0]}, "expected images [N, H, W]"),
        ({"images": np.zeros((3, 5, 4, 4), np.uint8)}, "1 or 3 channels"),
        ({"images": PIXELS[:0]}, "at least one"),
        ({"images": FLOATS * 255}, "divide pixels by 255"),
        ({"images": FLOATS * np.nan}, "without NaN"),
        ({"labels": np.array([0, 1])}, "(2,): expected 3 whole numbers"),
        ({"labels": np.array([0, 1, 2])}, "and one is 2: expected classes of the model, 0 to 1"),
        ({"labels": np.array([0, -1, 1])}, "one is -1"),
        ({"labels": np.array([0, 0.5, 1])}, "one is 0.5"),
        ({"labels": np.array([0, np.nan, 1])}, "one is nan"),
        ({"labels": np.ones((3, 2))}, "not one-hot"),
        ({"labels": np.array(["a", "b", "c"])}, "expected 3 whole numbers"),
        ({"labels": np.array([0, 1, None])}, "cannot read"),
    ],
)
def test_arrays_that_are_no_images(tmp_path, arrays, message):
    whole = {"images": PIXELS, "labels": np.array([0, 1, 1])}
    given = arrays if not arrays or "pictures" in arrays else whole | arrays
    if message == "holds 'images'":
        given = arrays
    assert message in refused(read, npz(tmp_path / "d.npz", **given))


def test_files_that_are_no_npz(tmp_path):
    path = npz(tmp_path / "d.npz", images=PIXELS, labels=np.array([0, 1, 1]))
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    assert "cannot read" in refused(read, path)
    path.write_bytes(b"")
    assert "cannot read" in refused(read, path)
    with path.open("wb") as file:
        np.save(file, PIXELS)
    assert "no archive" in refused(read, path)
    (tmp_path / "d.tar").touch()
    assert "is a file: expected a folder" in refused(read, tmp_path / "d.tar")
    assert "there is no folder and no file" in refused(read, tmp_path / "none")
    unlabelled = read(npz(path, x=PIXELS), labelled=False)
    assert unlabelled.data.labels.tolist() == [0, 0, 0]


# Which images, and pairs of sets.

DIGITS = Reader(10, (32, 32, 3), data_info("digits"))


def test_a_split_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "test").mkdir()
    found = load_given("test", DIGITS)
    assert not found.own and len(found.data.labels) == 800
    assert found.notes == (
        "'test' is the split of digits; for the folder of this name write './test'",
    )
    assert "has no image" in refused(load_given, "./test", DIGITS)
    assert "unknown split 'tset'" in refused(load_given, "tset", DIGITS)
    assert "no folder and no file 'test[:9]'" in refused(load_given, "test[:9]", ANY)


def test_options_without_effect_are_refused(tmp_path):
    names = tmp_path / "names"
    for options in ({"image_size": 32}, {"classes": names}, {"exif": True}):
        message = refused(load_given, "test", Reader(10, (32, 32, 3), DIGITS.info, **options))
        assert "for split: expected" in message and message.endswith(f"--{next(iter(options))}")
    path = npz(tmp_path / "d.npz", images=PIXELS, labels=np.array([0, 1, 1]))
    assert "exif for npz" in refused(read, path, Reader(2, (None, None, 3), exif=True))


@given(st.lists(st.integers(0, 4), min_size=1, max_size=60), st.integers(0, 3))
def test_halves_are_stratified_and_seeded(labels, seed):
    labels = np.array(labels)
    first, second = halves(labels, seed)
    assert sorted([*first, *second]) == list(range(len(labels)))
    for label in np.unique(labels):
        counts = [int((labels[rows] == label).sum()) for rows in (first, second)]
        assert counts[0] - counts[1] in (0, 1)
    np.testing.assert_array_equal(first, halves(labels, seed)[0])


def test_half_of_a_folder_is_held_out(tmp_path):
    data = load("digits", "test[:100]")
    folder = str(write_folder(tmp_path / "digits", data, list("0123456789")))
    first, second = load_both(folder, None, DIGITS, seed=3)
    assert 0 < len(second.data.labels) <= len(first.data.labels) < 60
    assert not shared_rows(second.data.images, first.data.images).any()
    assert "is held out" in first.notes[-1] and second.notes == () and "half" in second.name
    other, _ = load_both(folder, None, DIGITS, seed=4)
    assert not np.array_equal(first.data.images, other.data.images)
    single = two(tmp_path / "few")
    assert "one image of each class" in refused(load_both, str(single), None, ANY)
    assert "nothing to measure by" in refused(load_both, str(single), None, ANY, labelled=False)
    unlabelled, split = load_both(folder, "test[400:]", DIGITS, labelled=False)
    assert unlabelled.own and not split.own and unlabelled.data.labels.max() == 0


def test_images_that_are_in_both_are_left_out(tmp_path):
    clean = load("digits", "test[:40]")
    folder = str(write_folder(tmp_path / "clean", clean, list("0123456789")))
    first, second = load_both(folder, "test[:60]", DIGITS)
    np.testing.assert_array_equal(second.data.images, load("digits", "test[40:60]").images)
    assert len(first.data.labels) == 40
    assert "40 of the 60 images to measure by are among the clean ones" in second.notes[-1]
    assert "all 9 images" in refused(load_both, folder, "test[3:12]", DIGITS)
    assert "leave the latter out" in refused(load_both, folder, f"{folder}/../clean", DIGITS)
    assert "share 5 images" in refused(load_both, "test[:9]", "test[4:]", DIGITS)
    assert not any(load_both("test[:9]", None, DIGITS)[1].notes)


def test_two_folders_must_have_the_same_classes(tmp_path):
    two(tmp_path / "one")
    two(tmp_path / "two")
    first, second = load_both(str(tmp_path / "one"), str(tmp_path / "two"), ANY)
    assert first.classes == second.classes == {"a": 0, "b": 1}
    os.rename(tmp_path / "two" / "a", tmp_path / "two" / "c")
    message = refused(load_both, str(tmp_path / "one"), str(tmp_path / "two"), ANY)
    assert "different classes (0 = 'a', 1 = 'b'; and 0 = 'b', 1 = 'c')" in message
    save(tmp_path / "large" / "a" / "0.png", noise(6, 6))
    save(tmp_path / "large" / "b" / "0.png", noise(6, 6))
    message = refused(load_both, str(tmp_path / "one"), str(tmp_path / "large"), ANY)
    assert "are 4x4, those to measure by 6x6" in message
    assert "not known here" in refused(load_both, None, str(tmp_path / "one"), ANY)
