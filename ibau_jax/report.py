"""Results on disk: `rows.jsonl` (one JSON object a line), tables, and the arrays of a report."""

import json
import math
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from rich.console import Console
from rich.table import Table

from ibau_jax.errors import InputError
from ibau_jax.files import atomic_path, to_json, write_text

ROWS, ARRAYS, HTML = "rows.jsonl", "report.npz", "report.html"
CLEANED = "cleaned.safetensors"
FOUND = "found"  # a folder of pictures
PARTIAL = "rows.partial.jsonl"  # while a run goes on: earlier results stay until it ends
Row = dict[str, Any]


class Pictures(NamedTuple):
    """Arrays of a report; H, W, C are those of the images, values in [0, 1].

    Attributes:
      triggers: the true triggers as pictures [K, H, W, C], or empty where none is known.
      deltas: perturbation at the end of each round [rounds, H, W, C], any range.
      images: a few clean test images [N, H, W, C].
      triggered: the same with a trigger, each in turn, [N, H, W, C], or empty.
      labels: true labels int [N].
      before, after: predictions for `triggered` (for `images` where there is none) int [N].
      found: triggers that a defense reconstructed, as pictures [K, H, W, C] in [0, 1].
      captions: text [K], of these.
    """

    triggers: np.ndarray
    deltas: np.ndarray
    images: np.ndarray
    triggered: np.ndarray
    labels: np.ndarray
    before: np.ndarray
    after: np.ndarray
    found: np.ndarray = np.empty((0, 1, 1, 1))
    captions: np.ndarray = np.empty(0, str)


def write_rows(path: str | Path, rows: Iterable[Row]) -> None:
    """Write rows, one strict JSON object a line, whole or not at all."""
    write_text(path, "".join(to_json(row) + "\n" for row in rows))


def read_rows(folder: str | Path) -> list[Row]:
    """The rows of a finished run in `folder`, else those of an interrupted one.

    Raises:
      InputError: there are none, or they are damaged.
    """
    for path in (Path(folder) / ROWS, Path(folder) / PARTIAL):
        if path.is_file():
            try:
                rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
            except ValueError as error:
                raise InputError(
                    f"{str(path)!r} is damaged: {error}; run 'ibau defend' again"
                ) from error
            if rows:
                return rows
    raise InputError(
        f"no results in {str(folder)!r}: expected a file {ROWS} with at least one row; "
        "make one with 'ibau defend --out' or 'ibau demo --out'"
    )


def write_pictures(folder: str | Path, pictures: Pictures) -> None:
    """Write the arrays of a report to `folder`, and what was found as pictures too."""
    for picture, caption in zip(pictures.found, pictures.captions, strict=True):
        name = str(caption).partition(":")[0].replace(" ", "-")
        with atomic_path(Path(folder) / FOUND / f"{name}.png") as temporary:
            Image.fromarray(pixels(picture)).save(temporary, "PNG")
    with atomic_path(Path(folder) / ARRAYS) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, **pictures._asdict())


def read_pictures(folder: str | Path) -> Pictures | None:
    """The arrays of a report; None where a run was interrupted before it wrote them."""
    path = Path(folder) / ARRAYS
    if not path.is_file():
        return None
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            return Pictures(**{name: stored[name] for name in Pictures._fields if name in stored})
    except Exception as error:  # a damaged zip raises several types
        raise InputError(f"{str(path)!r} is damaged: {error}; run 'ibau defend' again") from error


def table(rows: list[Row]) -> Table:
    """ACC, ASR and the rest over the rounds, for the terminal."""
    last = rows[-1]
    title = f"{last['defense']} ({last['preset']}) on {last['dataset']}, {last['attack']}"
    built = Table(title=title, title_justify="left")
    for name in ("round", "ACC", "ASR", "ASR excl.", "RA", "DER", "|delta|", "seconds"):
        built.add_column(name, justify="right")
    for row in rows:
        cells = [text(row.get(k)) for k in ("acc", "asr", "asr_excl", "ra", "der")]
        round_ = "before" if row["round"] == 0 else str(row["round"])
        norm, seconds = text(row.get("delta_norm"), 2), text(row.get("seconds"), 1)
        built.add_row(round_, *cells, norm, seconds)
    return built


def print_table(rows: list[Row], console: Console) -> None:
    """Print `table(rows)` and, if any, what the numbers mean."""
    console.print(table(rows))
    console.print(
        "ACC: clean accuracy. ASR: triggered images that get the target (excl.: without images "
        "of the target class). RA: triggered images that get their true label.",
        style="dim",
    )


def text(value: float | None, digits: int = 3) -> str:
    """A number for a table; a dash where there is none."""
    return "-" if value is None or not math.isfinite(value) else f"{value:.{digits}f}"


def versions() -> dict[str, str]:
    """Versions of what a result depends on."""
    found = {}
    for package in ("ibau_jax", "jax", "jaxlib", "flax", "optax", "jaxopt", "numpy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # run from a source folder without installing
            found[package] = "unknown"
    return found


def pixels(image: np.ndarray) -> np.ndarray:
    """A picture [H, W, C] in [0, 1] as uint8 [H, W, 3]."""
    found = np.rint(np.clip(image, 0, 1) * 255).astype(np.uint8)
    return np.repeat(found, 3, axis=-1) if found.shape[-1] == 1 else found
