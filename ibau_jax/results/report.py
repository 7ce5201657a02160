"""One self-contained HTML file: numbers, curves and pictures, nothing from the network."""

import base64
import html
import io
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
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

_STYLE = """
:root { --ink: #1b1f24; --dim: #6a737d; --line: #d8dee4; --good: #1a7f37; --bad: #cf222e; }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); max-width: 60rem;
       margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; margin-bottom: .2rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
p.dim, figcaption { color: var(--dim); font-size: .9rem; }
table { border-collapse: collapse; } th, td { padding: .3rem .8rem; text-align: right;
       border-bottom: 1px solid var(--line); } th { font-weight: 600; }
.cards { display: flex; flex-wrap: wrap; gap: 1rem; margin: 1rem 0; }
.card { border: 1px solid var(--line); border-radius: 8px; padding: .7rem 1.1rem; min-width: 9rem; }
.card b { display: block; font-size: 1.5rem; } .card span { color: var(--dim); font-size: .9rem; }
.strip { display: flex; flex-wrap: wrap; gap: .9rem; } figure { margin: 0; width: 7rem; }
figure img { width: 7rem; height: 7rem; image-rendering: pixelated; border: 1px solid var(--line); }
figcaption { line-height: 1.35; overflow-wrap: anywhere; }
.good { color: var(--good); } .bad { color: var(--bad); }
img.plot { max-width: 100%; }
pre { background: #f6f8fa; padding: .8rem; overflow-x: auto; font-size: .85rem; }
"""


def write_report(folder: str | Path) -> Path:
    """Make `report.html` from the rows and arrays in `folder`; returns its path."""
    rows, pictures = read_rows(folder), read_pictures(folder)
    path = Path(folder) / HTML
    write_text(path, render(rows, pictures))
    return path


def render(rows: list[Row], pictures: Pictures | None) -> str:
    """The page, as text. `rows`: round 0 is the model as given."""
    before, after = rows[0], rows[-1]
    told = defaultdict(lambda: "-", {k: shown(v) for k, v in after.items()})
    title = "{defense} on {dataset} ({attack})".format_map(told)
    told["rounds"] = str(len(rows) - 1)
    about = (
        "Preset {preset}, seed {seed}, {n_clean} clean images, {rounds} round(s); measured on {n} "
        "other images, on {device}."
    ).format_map(told)
    parts = [
        f"<h1>{html.escape(title)}</h1><p class=dim>{html.escape(about)}</p>",
        _flagged(after),
        _cards(before, after),
        "<h2>Rounds</h2>",
        f"<img class=plot alt='ACC and ASR over rounds' src='{_curve(rows)}'>",
        _table(rows),
        _by_attack(before, after),
    ]
    if pictures is not None:
        parts += [_perturbations(rows, pictures), _predictions(after, pictures)]
    settings = "\n".join(f"{shown(k)}: {shown(v)}" for k, v in _mapping(after, "config").items())
    used = ", ".join(f"{k} {v}" for k, v in _mapping(after, "versions").items())
    parts.append(
        f"<h2>Settings</h2><pre>{html.escape(settings)}</pre>"
        f"<p class=dim>{_escaped(used)}; model {_escaped(told['model_hash'])}</p>"
    )
    return (
        "<!doctype html><html lang=en><meta charset=utf-8>"
        "<meta name=viewport content='width=device-width, initial-scale=1'>"
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style>"
        f"<body>{''.join(parts)}</body></html>\n"
    )


def _escaped(value: Any) -> str:
    """The text of a value of unknown origin, for HTML."""
    return html.escape(shown(value))


def _mapping(row: Row, name: str) -> dict[str, Any]:
    found = row.get(name)
    return found if isinstance(found, dict) else {}


def _class_name(row: Row, label: Any) -> str:
    """The name of a class of a row's data set; its number where there is none."""
    dataset = row.get("dataset")
    # A list, since what a row holds need not be hashable.
    names = DATASETS[dataset].class_names if dataset in list(DATASETS) else ()
    known = isinstance(label, int | np.integer) and 0 <= label < len(names)
    return names[label] if known else shown(label)


def _flagged(row: Row) -> str:
    """Which labels a defense holds for targets, where it looks for them."""
    flagged = row.get("flagged")
    if not isinstance(flagged, list):
        return ""
    found = ", ".join(f"{shown(label)} ({_class_name(row, label)})" for label in flagged)
    told = f"Labels held for targets: {found}." if found else "No label stands out: none changed."
    return f"<p>{html.escape(told)}</p>"


def _cards(before: Row, after: Row) -> str:
    meanings = (
        ("acc", "ACC", "accuracy on clean images"),
        ("asr", "ASR", "triggered images that get the target"),
        ("asr_excl", "ASR excl.", "the same without target-class images"),
        ("ra", "RA", "triggered images that get their true label"),
    )
    cards = [
        f"<div class=card title='{meaning}'><span>{name}</span>"
        f"<b>{text(before.get(key))} &rarr; {text(after.get(key))}</b></div>"
        for key, name, meaning in meanings
        if number(after.get(key)) is not None
    ]
    return f"<div class=cards>{''.join(cards)}</div>"


def _table(rows: list[Row]) -> str:
    columns = (
        *(("acc", "ACC", 3), ("asr", "ASR", 3), ("asr_excl", "ASR excl.", 3), ("ra", "RA", 3)),
        *(("der", "DER", 3), ("delta_norm", "|delta|", 2), ("residual", "residual", 3)),
        ("seconds", "seconds", 1),
    )
    used = [c for c in columns if any(number(row.get(c[0])) is not None for row in rows)]
    head = "".join(f"<th>{name}</th>" for name in ("round", *(name for _, name, _ in used)))
    body = []
    for round_, row in zip(rounds(rows), rows, strict=True):
        cells = ["before" if round_ == 0 else str(round_)]
        cells += [text(row.get(key), digits) for key, _, digits in used]
        body.append("<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in cells) + "</tr>")
    return f"<table><tr>{head}</tr>{''.join(body)}</table>"


def _by_attack(before: Row, after: Row) -> str:
    """The ASR of each attack, where there are several."""
    earlier, later = _mapping(before, "by_attack"), _mapping(after, "by_attack")
    if not later:
        return ""
    body = "".join(
        f"<tr><td>{_escaped(name)}</td><td>{text(earlier.get(name))}</td><td>{text(asr)}</td></tr>"
        for name, asr in later.items()
    )
    head = "<tr><th>ASR of each attack</th><th>before</th><th>after</th></tr>"
    return f"<table>{head}{body}</table>"


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


def _perturbations(rows: list[Row], pictures: Pictures) -> str:
    figures = []
    names = str(rows[0].get("attack")).split(", ")
    if len(names) != len(pictures.triggers):  # a name with a comma
        names = [f"attack {i + 1}" for i in range(len(pictures.triggers))]
    for trigger, name in zip(pictures.triggers, names, strict=True):
        figures.append(_figure(trigger, f"the true trigger: {_escaped(name)}"))
    norms = {n: row.get("delta_norm") for n, row in zip(rounds(rows), rows, strict=True)}
    for i, delta in enumerate(np.nan_to_num(pictures.deltas), start=1):
        largest = float(np.abs(delta).max(initial=0)) or 1.0
        caption = f"found in round {i}: norm {text(norms.get(i), 2)}, largest {largest:.2f}"
        figures.append(_figure(0.5 + 0.5 * delta / largest, html.escape(caption)))
    for picture, caption in zip(pictures.found, pictures.captions, strict=True):
        figures.append(_figure(picture, _escaped(caption)))
    about = ""
    if len(pictures.deltas):
        about = (
            "A perturbation is scaled so that grey is zero and its largest value is white or "
            "black. It may be any that fools the model, so it need not look like the trigger."
        )
    elif len(pictures.found):
        about = "What the defense reconstructed for a label."
    return (
        f"<h2>Trigger and what was found</h2><p class=dim>{about}</p>"
        f"<div class=strip>{''.join(figures)}</div>"
    )


def _predictions(row: Row, pictures: Pictures) -> str:
    triggered = len(pictures.triggered) > 0
    figures = []
    for image, label, before, after in zip(
        pictures.triggered if triggered else pictures.images,
        pictures.labels,
        pictures.before,
        pictures.after,
        strict=True,
    ):
        caption = f"true: {html.escape(_class_name(row, label))}"
        for when, found in (("before", before), ("after", after)):
            mark = "good" if found == label else "bad"
            caption += (
                f"<br>{when}: <span class={mark}>{html.escape(_class_name(row, found))}</span>"
            )
        figures.append(_figure(image, caption))
    what = "Triggered images" if triggered else "Images"
    return f"<h2>{what} and predictions</h2><div class=strip>{''.join(figures)}</div>"


def _figure(image: np.ndarray, caption: str) -> str:
    """A picture [H, W, C] in [0, 1] with a caption that is HTML already."""
    stream = io.BytesIO()
    Image.fromarray(pixels(image)).save(stream, "PNG")
    uri = _data_uri(stream.getvalue(), "image/png")
    return f"<figure><img alt='' src='{uri}'><figcaption>{caption}</figcaption></figure>"


def _data_uri(content: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
