"""The GTSRB builder, on archives in the official layout that the test makes."""

import csv
import io
import zipfile

import numpy as np
import pytest
from PIL import Image

from ibau_jax.data.datasets import DATASETS
from ibau_jax.data.images import crop
from ibau_jax.data.tfds import prepare, read
from ibau_jax.errors import InputError

FIELDS = ["Filename", "Width", "Height", "Roi.X1", "Roi.Y1", "Roi.X2", "Roi.Y2"]
CLASSES = (0, 7, 42)


def frame(label: int, number: int) -> np.ndarray:
    """A grey frame with a sign of one colour, 5 pixels from each border."""
    image = np.full((40 + number, 50, 3), 128, np.uint8)
    image[5:-5, 5:-5] = (label, 200, 10 * number)
    return image


def ppm(image: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "PPM")
    return stream.getvalue()


def row(name: str, image: np.ndarray) -> dict:
    height, width = image.shape[:2]
    return dict(zip(FIELDS, (name, width, height, 5, 5, width - 5, height - 5), strict=True))


def table(rows: list[dict]) -> str:
    stream = io.StringIO()
    writer = csv.DictWriter(stream, list(rows[0]), delimiter=";")
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue()


@pytest.fixture
def archives(tmp_path):
    folder = tmp_path / "archives"
    folder.mkdir()
    with zipfile.ZipFile(folder / "GTSRB_Final_Training_Images.zip", "w") as archive:
        for label in CLASSES:
            base, rows = f"GTSRB/Final_Training/Images/{label:05d}", []
            for number in range(4):
                name = f"{number // 2:05d}_{number % 2:05d}.ppm"
                archive.writestr(f"{base}/{name}", ppm(frame(label, number)))
                rows.append(row(name, frame(label, number)) | {"ClassId": label})
            archive.writestr(f"{base}/GT-{label:05d}.csv", table(rows))
    rows = []
    with zipfile.ZipFile(folder / "GTSRB_Final_Test_Images.zip", "w") as archive:
        for number, label in enumerate(CLASSES):
            name = f"{number:05d}.ppm"
            archive.writestr(f"GTSRB/Final_Test/Images/{name}", ppm(frame(label, number)))
            rows.append(row(name, frame(label, number)))
        archive.writestr("GTSRB/Final_Test/Images/GT-final_test.test.csv", table(rows))
    with zipfile.ZipFile(folder / "GTSRB_Final_Test_GT.zip", "w") as archive:
        labelled = [r | {"ClassId": c} for r, c in zip(rows, CLASSES, strict=True)]
        archive.writestr("GT-final_test.csv", table(labelled))
    return folder


def test_builder_prepares_what_the_loader_reads(archives, tmp_path):
    prepare("gtsrb", tmp_path / "data", archives)
    images, labels = read("gtsrb", "train", tmp_path / "data")
    assert images.shape == (12, 32, 32, 3) and images.dtype == np.uint8
    assert sorted(labels.tolist()) == sorted([*CLASSES] * 4)
    # Every pixel is the sign: the grey border is cropped away.
    assert (images[..., 1] == 200).all()
    assert (images[..., 0] == labels[:, None, None]).all()
    images, labels = read("gtsrb", "test", tmp_path / "data")
    assert sorted(labels.tolist()) == sorted(CLASSES)
    assert (images[..., 0] == labels[:, None, None]).all()


def test_missing_archive_is_named(archives, tmp_path):
    (archives / "GTSRB_Final_Test_GT.zip").unlink()
    with pytest.raises(InputError, match="GTSRB_Final_Test_GT.zip"):
        prepare("gtsrb", tmp_path / "data", archives)


def test_unprepared_names_the_command(tmp_path):
    with pytest.raises(InputError, match="ibau prepare gtsrb"):
        read("gtsrb", "test", tmp_path)


def test_damaged_files_are_told(archives, tmp_path, monkeypatch):
    monkeypatch.setenv("IBAU_CACHE", str(tmp_path / "cache"))
    folder = prepare("gtsrb", tmp_path / "data", archives)
    for file in folder.glob("gtsrb-test.array_record*"):
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(InputError, match="damaged"):
        read("gtsrb", "test", tmp_path / "data")


def test_crop_is_the_region():
    image = np.zeros((64, 64, 3), np.uint8)
    image[16:48, 32:64] = np.arange(32)[:, None, None]
    assert (crop(image, np.array([0.25, 0.5, 0.75, 1.0])) == image[16:48, 32:64]).all()


def test_sizes_are_the_official_ones():
    assert DATASETS["gtsrb"].sizes == {"train": 39_209, "test": 12_630}
