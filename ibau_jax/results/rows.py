"""Results on disk: `rows.jsonl` (one JSON object a line), tables, and the arrays of a report."""

import json
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ibau_jax.errors import InputError, printable
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

    They may be of another version, so that a value may be missing or of another kind.

    Raises:
      InputError: there are none, or they are no JSON objects.
    """
    for path in (Path(folder) / ROWS, Path(folder) / PARTIAL):
        if path.is_file():
            try:
                lines = path.read_text("utf-8").splitlines()
                rows = [json.loads(line) for line in lines if line.strip()]
                if odd := [row for row in rows if not isinstance(row, dict)]:
                    raise ValueError(f"expected a JSON object a line, found {repr(odd[0])[:60]}")
            except (ValueError, RecursionError) as error:
                raise InputError(
                    f"{str(path)!r} is damaged: {error}; run 'ibau defend' again"
                ) from error
            if rows:
                return rows
    raise InputError(
        f"no results in {str(folder)!r}: expected a file {ROWS} with at least one row; "
        "'ibau defend' and 'ibau demo' write one"
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
    """The arrays of a report; None where a run was interrupted before it wrote them.

    Raises:
      InputError: the file is damaged, or holds arrays that do not fit each other.
    """
    path = Path(folder) / ARRAYS
    if not path.is_file():
        return None
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            found = Pictures(**{name: stored[name] for name in Pictures._fields if name in stored})
        _check_pictures(found)
    except Exception as error:  # a damaged zip raises several types
        raise InputError(f"{str(path)!r} is damaged: {error}; run 'ibau defend' again") from error
    return found


def _check_pictures(found: Pictures) -> None:
    """Raise `ValueError` where arrays are not as `Pictures` says."""
    for name in ("triggers", "deltas", "images", "triggered", "found"):
        array = getattr(found, name)
        image = array.ndim == 4 and array.shape[-1] in (1, 3) and array.dtype.kind in "fui"
        if array.size and not image:
            raise ValueError(
                f"{name} is {array.dtype} {array.shape}, expected numbers [N, H, W, 1 or 3]"
            )
    shown = len(found.triggered) or len(found.images)
    for name in ("labels", "before", "after"):
        array = getattr(found, name)
        if array.shape != (shown,) or (shown and array.dtype.kind not in "iu"):
            raise ValueError(
                f"{name} is {array.dtype} {array.shape}, expected whole numbers ({shown},)"
            )
    if found.captions.shape != (len(found.found),):
        raise ValueError(f"captions have shape {found.captions.shape}, not ({len(found.found)},)")


def table(rows: list[Row]) -> Table:
    """ACC, ASR and the rest over the rounds, for the terminal; a dash for what is missing."""
    told = {k: shown(rows[-1].get(k)) for k in ("defense", "preset", "dataset", "attack")}
    # As `Text`: in a plain string rich would look for markup.
    title = Text("{defense} ({preset}) on {dataset}, {attack}".format(**told))
    built = Table(title=title, title_justify="left")
    for name in ("round", "ACC", "ASR", "ASR excl.", "RA", "DER", "|delta|", "seconds"):
        built.add_column(name, justify="right")
    for number, row in zip(rounds(rows), rows, strict=True):
        cells = [text(row.get(k)) for k in ("acc", "asr", "asr_excl", "ra", "der")]
        round_ = "before" if number == 0 else str(number)
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


def rounds(rows: list[Row]) -> list[int]:
    """The number of each row's round; its place where the row does not tell."""
    found = [row.get("round") for row in rows]
    return [n if type(n) is int and 0 <= n < 10**6 else i for i, n in enumerate(found)]


def number(value: Any) -> float | None:
    """A finite number of a row; None where it is missing or something else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if abs(value) < 1e300 else None  # also false for NaN


def text(value: Any, digits: int = 3) -> str:
    """A number for a table; a dash where there is none."""
    found = number(value)
    if found is None:
        return "-"
    return f"{found:.{digits}f}" if abs(found) < 1e6 else f"{found:.3e}"


def shown(value: Any) -> str:
    """A name or a number of a row for people, in one line; a dash where there is none."""
    return "-" if value is None else printable(value)


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
    found = np.rint(np.clip(np.nan_to_num(image), 0, 1) * 255).astype(np.uint8)
    return np.repeat(found, 3, axis=-1) if found.shape[-1] == 1 else found
