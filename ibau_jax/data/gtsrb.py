"""TFDS builder of the German Traffic Sign Recognition Benchmark; needs no TensorFlow.

TFDS has no entry for GTSRB. This one reads the three official archives and stores each image
cropped to the annotated sign and resized (bilinear) to 32x32, which is what the paper's models
were trained on.
"""

import csv
import io
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from ibau_jax.data.images import resize

SITE = "https://sid.erda.dk/public/archives/daaeac0d7ce1152aea9b61d9f1e19370"
ARCHIVES = {
    "train": "GTSRB_Final_Training_Images.zip",
    "test": "GTSRB_Final_Test_Images.zip",
    "labels": "GTSRB_Final_Test_GT.zip",
}
WHOLE = tfds.features.BBox(ymin=0.0, xmin=0.0, ymax=1.0, xmax=1.0)


class Gtsrb(tfds.core.GeneratorBasedBuilder):
    """39,209 training and 12,630 test images of 43 classes of traffic signs, 32x32 RGB.

    Features: `image` uint8 [32, 32, 3], cropped to the sign; `label` 0 to 42 (official
    ClassId); `bbox`, the region of the sign in the stored image, here all of it.
    """

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "Official training and test sets, cropped to the sign."}

    def __init__(self, *, archives: str | Path | None = None, **options: Any):
        """`archives`: folder with the three official archives; None: they are downloaded."""
        self._archives = archives
        super().__init__(**options)

    def _info(self) -> tfds.core.DatasetInfo:
        features = tfds.features.FeaturesDict(
            {
                "image": tfds.features.Image(shape=(32, 32, 3), encoding_format="png"),
                "label": tfds.features.ClassLabel(num_classes=43),
                "bbox": tfds.features.BBoxFeature(),
            }
        )
        return tfds.core.DatasetInfo(
            builder=self,
            description=__doc__,
            features=features,
            supervised_keys=("image", "label"),
            homepage="https://benchmark.ini.rub.de/",
            citation=(
                "@article{Stallkamp2012, title={Man vs. computer: Benchmarking machine learning "
                "algorithms for traffic sign recognition}, author={Stallkamp, J. and Schlipsing, "
                "M. and Salmen, J. and Igel, C.}, journal={Neural Networks}, year={2012}}"
            ),
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        if self._archives is None:
            paths = dl_manager.download({k: f"{SITE}/{name}" for k, name in ARCHIVES.items()})
        else:
            paths = {k: Path(self._archives) / name for k, name in ARCHIVES.items()}
            for path in paths.values():
                if not path.is_file():
                    raise FileNotFoundError(f"expected the official archive {path}")
        return {
            "train": self._generate_examples(paths["train"]),
            "test": self._generate_examples(paths["test"], paths["labels"]),
        }

    def _generate_examples(
        self, images: Path, labels: Path | None = None
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        for folder, row, archive in annotations(images, labels):
            with Image.open(io.BytesIO(archive.read(f"{folder}{row['Filename']}"))) as picture:
                frame = np.asarray(picture.convert("RGB"))
            # Roi.X2 and Roi.Y2 are the first column and row outside the sign.
            left, top, right, bottom = (int(row[f"Roi.{c}"]) for c in ("X1", "Y1", "X2", "Y2"))
            sign = resize(frame[top:bottom, left:right])
            key = f"{row['ClassId']}/{row['Filename']}"
            stream = io.BytesIO()  # TFDS would encode an array with TensorFlow
            Image.fromarray(sign).save(stream, "PNG")
            stream.seek(0)
            yield key, {"image": stream, "label": int(row["ClassId"]), "bbox": WHOLE}


def annotations(
    images: str | Path, labels: str | Path | None = None
) -> Iterator[tuple[str, dict[str, str], zipfile.ZipFile]]:
    """Rows of the CSV files (`Filename;Width;Height;Roi.X1;...;ClassId`).

    Args:
      images: archive of images. That of the training set holds one CSV file a class.
      labels: for the test set, the archive with its CSV file with classes (the one beside the
        images has none).

    Yields:
      The folder of the image in the archive, its row, and the open archive.
    """
    with zipfile.ZipFile(images) as archive, zipfile.ZipFile(labels or images) as table:
        names = [n for n in table.namelist() if n.endswith(".csv")]
        if not names:
            raise ValueError(f"{table.filename} holds no CSV file of annotations")
        pictures = [n for n in archive.namelist() if n.endswith(".ppm")]
        shared = pictures[0].rpartition("/")[0] + "/" if pictures else ""
        for name in sorted(names):
            folder = shared if labels else name.rpartition("/")[0] + "/"
            content = io.TextIOWrapper(table.open(name), encoding="utf-8", newline="")
            for row in csv.DictReader(content, delimiter=";"):
                yield folder, row, archive
