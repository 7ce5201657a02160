"""The report of `ibau inspect`: one self-contained HTML file."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from rich.table import Table

from ibau_jax.files import write_text
from ibau_jax.results.report import figure_of, named, template
from ibau_jax.results.rows import HTML, Row, text


def write_inspection(folder: str | Path, found: Row, pictures: Mapping[str, np.ndarray]) -> Path:
    """Make `report.html` of the JSON of `ibau inspect` and pictures [H, W, C] by their captions."""
    path = Path(folder) / HTML
    write_text(path, render(found, pictures))
    return path


def lines(found: Row) -> list[list[str]]:
    """The table of labels as text: its head, a line for each label, and the levels."""
    levels = found["levels"]
    body = [
        [
            named(found, label["label"]),
            *(text(label["strength"][kind], 2) for kind in levels),
            text(label["score"], 2),
        ]
        for label in found["labels"]
    ]
    last = ["level", *(text(level, 2) for level in levels.values()), "1.00"]
    return [["label", *levels, "score"], *body, last]


def table(found: Row) -> Table:
    """The same for the terminal."""
    head, *body = lines(found)
    built = Table(title="images of other labels that one perturbation leads to a label")
    for name in head:
        built.add_column(name, justify="right")
    for cells in body:
        built.add_row(*cells)
    return built


def render(found: Row, pictures: Mapping[str, np.ndarray]) -> str:
    """The page."""
    head, *labels, levels = lines(found)
    return template("inspection.html.jinja").render(
        title=f"Inspection of {Path(found['model']).name}",
        about=f"{found['n_clean']} clean images ({found['dataset']}: {found['clean']}), "
        f"seed {found['seed']}, {found['seconds']:.0f} seconds.",
        verdict=found["verdict"],
        target="none" if found["target"] is None else named(found, found["target"]),
        flagged=", ".join(named(found, i) for i in found["flagged"]) or "none",
        reason=found["reason"],
        head=head,
        labels=[
            {"cells": cells, "flagged": label["label"] in found["flagged"]}
            for cells, label in zip(labels, found["labels"], strict=True)
        ],
        levels=levels,
        found=[figure_of(picture, caption) for caption, picture in pictures.items()],
        rule=found["rule"],
        model_hash=found["model_hash"],
    )
