"""One self-contained HTML file: numbers, curves and pictures, nothing from the network."""

import base64
import functools
import io
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from PIL import Image

from ibau_jax.data import DATASETS
from ibau_jax.files import write_text
from ibau_jax.results.rows import (
    HTML,
    Pictures,
    Row,
    number,
    pixels,
    read_pictures,
    read_rows,
    rounds,
    shown,
    text,
)

NO_CHANGE = (
    "A perturbation is scaled so that grey is zero and its largest value is white or black. It may "
    "be any that fools the model, so it need not look like the trigger."
)
RECONSTRUCTED = "What the defense reconstructed for a label."


def write_report(folder: str | Path) -> Path:
    """Make `report.html` from the rows and arrays in `folder`; returns its path."""
    rows, pictures = read_rows(folder), read_pictures(folder)
    path = Path(folder) / HTML
    write_text(path, render(rows, pictures))
    return path


def render(rows: list[Row], pictures: Pictures | None) -> str:
    """The page, of the template beside this file. `rows`: round 0 is the model as given."""
    before, after = rows[0], rows[-1]
    told = defaultdict(lambda: "-", {k: shown(v) for k, v in after.items()})
    told["rounds"] = str(len(rows) - 1)
    about = (
        "Preset {preset}, seed {seed}, {n_clean} clean images, {rounds} round(s); measured on {n} "
        "other images, on {device}."
    ).format_map(told)
    values = {
        "title": "{defense} on {dataset} ({attack})".format_map(told),
        "about": about,
        "flagged": _flagged(after),
        "verdict": _verdict(after),
        "cards": _cards(before, after),
        "curve": _curve(rows),
        "table": _table(rows),
        "by_attack": _by_attack(before, after),
        "settings": "\n".join(
            f"{shown(k)}: {shown(v)}" for k, v in _mapping(after, "config").items()
        ),
        "images": _images(after),
        "versions": ", ".join(f"{k} {shown(v)}" for k, v in _mapping(after, "versions").items()),
        "model_hash": told["model_hash"],
        "perturbations": None,
    }
    if pictures is not None:
        deltas = len(pictures.deltas) > 0
        found = RECONSTRUCTED if len(pictures.found) else ""
        values |= {
            "perturbations": _perturbations(rows, pictures),
            "about_perturbations": NO_CHANGE if deltas else found,
            "what": "Triggered images" if len(pictures.triggered) else "Images",
            "predictions": _predictions(after, pictures),
        }
    return template("report.html.jinja").render(values)


@functools.cache
def template(name: str) -> Template:
    """One of the templates beside this file."""
    return Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined
    ).get_template(name)


def _mapping(row: Row, name: str) -> dict[str, Any]:
    found = row.get(name)
    return found if isinstance(found, dict) else {}


def class_name(row: Row, label: Any) -> str:
    """The name of a class of a row's images; its number where there is none."""
    if not isinstance(label, int | np.integer):
        return shown(label)
    return class_names(row).get(int(label), shown(label))


def class_names(row: Row) -> dict[int, str]:
    """Names by labels: those of the user's own images, else those of the row's data set."""
    own = _mapping(row, "classes")
    if own:
        return {label: shown(name) for name, label in own.items() if isinstance(label, int)}
    dataset = row.get("dataset")
    # A list, since what a row holds need not be hashable.
    return dict(enumerate(DATASETS[dataset].class_names)) if dataset in list(DATASETS) else {}


def named(row: Row, label: Any) -> str:
    """A label with the name of its class."""
    return f"{shown(label)} ({class_name(row, label)})"


def _images(row: Row) -> str | None:
    """Which images of the user's were used, and the labels of their classes."""
    classes = _mapping(row, "classes")
    if not classes:
        return None
    used = f"Clean images: {shown(row.get('clean'))}; measured on: {shown(row.get('split'))}."
    return f"{used} Classes: {', '.join(f'{n} = {name}' for n, name in class_names(row).items())}."


def _verdict(row: Row) -> str | None:
    """How a defense says that it ended, where it does."""
    if "verdict" not in row:
        return None
    return f"{shown(row['verdict'])}: {shown(row.get('reason'))}."


def _flagged(row: Row) -> str | None:
    """Which labels a defense holds for targets, where it looks for them."""
    flagged = row.get("flagged")
    if not isinstance(flagged, list):
        return None
    found = ", ".join(named(row, label) for label in flagged)
    return f"Labels held for targets: {found}." if found else "No label stands out: none changed."


def _cards(before: Row, after: Row) -> list[dict[str, str]]:
    meanings = (
        ("acc", "ACC", "accuracy on clean images"),
        ("asr", "ASR", "triggered images that get the target"),
        ("asr_excl", "ASR excl.", "the same without target-class images"),
        ("ra", "RA", "triggered images that get their true label"),
    )
    return [
        {
            "name": name,
            "meaning": meaning,
            "before": text(before.get(key)),
            "after": text(after.get(key)),
        }
        for key, name, meaning in meanings
        if number(after.get(key)) is not None
    ]


def _table(rows: list[Row]) -> dict[str, list]:
    columns = (
        *(("acc", "ACC", 3), ("asr", "ASR", 3), ("asr_excl", "ASR excl.", 3), ("ra", "RA", 3)),
        *(("der", "DER", 3), ("delta_norm", "|delta|", 2), ("residual", "residual", 3)),
        ("seconds", "seconds", 1),
    )
    used = [c for c in columns if any(number(row.get(c[0])) is not None for row in rows)]
    body = [
        ["before" if round_ == 0 else str(round_)]
        + [text(row.get(key), digits) for key, _, digits in used]
        for round_, row in zip(rounds(rows), rows, strict=True)
    ]
    return {"head": ["round", *(name for _, name, _ in used)], "body": body}


def _by_attack(before: Row, after: Row) -> list[tuple[str, str, str]]:
    """The ASR of each attack, where there are several."""
    earlier, later = _mapping(before, "by_attack"), _mapping(after, "by_attack")
    return [(shown(name), text(earlier.get(name)), text(asr)) for name, asr in later.items()]


def _curve(rows: list[Row]) -> str:
    """ACC, ASR and RA over rounds, as a data URI (SVG)."""
    from matplotlib.figure import Figure  # slow to import; no global state, no display

    figure = Figure(figsize=(7, 3), layout="constrained")
    axes = figure.subplots()
    places = rounds(rows)
    for key, name, style in (
        ("acc", "ACC", "o-"),
        ("asr", "ASR", "s-"),
        ("asr_excl", "ASR excl.", "s--"),
        ("ra", "RA", "^:"),
    ):
        values = [number(row.get(key)) for row in rows]
        if values[-1] is not None:
            heights = [v if v is not None and 0 <= v <= 1 else np.nan for v in values]
            axes.plot(places, heights, style, label=name)
    axes.set(xlabel="round", ylim=(-0.03, 1.03), xticks=places)
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    stream = io.BytesIO()
    figure.savefig(stream, format="svg")
    return _data_uri(stream.getvalue(), "image/svg+xml")


def _perturbations(rows: list[Row], pictures: Pictures) -> list[dict[str, Any]]:
    figures = []
    names = str(rows[0].get("attack")).split(", ")
    if len(names) != len(pictures.triggers):  # a name with a comma
        names = [f"attack {i + 1}" for i in range(len(pictures.triggers))]
    for trigger, name in zip(pictures.triggers, names, strict=True):
        figures.append(figure_of(trigger, f"the true trigger: {shown(name)}"))
    norms = {n: row.get("delta_norm") for n, row in zip(rounds(rows), rows, strict=True)}
    for i, delta in enumerate(np.nan_to_num(pictures.deltas), start=1):
        largest = float(np.abs(delta).max(initial=0)) or 1.0
        caption = f"found in round {i}: norm {text(norms.get(i), 2)}, largest {largest:.2f}"
        figures.append(figure_of(0.5 + 0.5 * delta / largest, caption))
    for picture, caption in zip(pictures.found, pictures.captions, strict=True):
        figures.append(figure_of(picture, shown(caption)))
    return figures


def _predictions(row: Row, pictures: Pictures) -> list[dict[str, Any]]:
    return [
        figure_of(
            image,
            f"true: {class_name(row, label)}",
            [
                {"when": when, "name": class_name(row, found), "right": found == label}
                for when, found in (("before", before), ("after", after))
            ],
        )
        for image, label, before, after in zip(
            pictures.triggered if len(pictures.triggered) else pictures.images,
            pictures.labels,
            pictures.before,
            pictures.after,
            strict=True,
        )
    ]


def figure_of(image: np.ndarray, caption: str, predictions: Sequence[Any] = ()) -> dict[str, Any]:
    """A picture [H, W, C] in [0, 1] for the template."""
    stream = io.BytesIO()
    Image.fromarray(pixels(image)).save(stream, "PNG")
    uri = _data_uri(stream.getvalue(), "image/png")
    return {"uri": uri, "caption": caption, "predictions": predictions}


def _data_uri(content: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
