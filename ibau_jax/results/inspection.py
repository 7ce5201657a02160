"""The report of `ibau inspect`: one self-contained HTML file."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ibau_jax.files import write_text
from ibau_jax.results.report import class_name, figure_of, template
from ibau_jax.results.rows import HTML, text


def write_inspection(
    folder: str | Path, found: Mapping[str, Any], pictures: Mapping[str, np.ndarray]
) -> Path:
    """Make `report.html` of the JSON of `ibau inspect` and pictures [H, W, C] by their captions."""
    path = Path(folder) / HTML
    write_text(path, render(found, pictures))
    return path


def render(found: Mapping[str, Any], pictures: Mapping[str, np.ndarray]) -> str:
    """The page."""
    levels, row = found["levels"], dict(found)

    def line(label: Mapping[str, Any]) -> dict[str, Any]:
        strength = [text(label["strength"][kind], 2) for kind in levels]
        name = f"{label['label']} ({class_name(row, label['label'])})"
        cells = [name, *strength, text(label["score"], 2)]
        return {"cells": cells, "flagged": label["label"] in found["flagged"]}

    return template("inspection.html.jinja").render(
        title=f"Inspection of {Path(found['model']).name}",
        about=f"{found['n_clean']} clean images of {found['dataset']}, seed {found['seed']}, "
        f"{found['seconds']:.0f} seconds.",
        verdict=found["verdict"],
        flagged=", ".join(f"{i} ({class_name(row, i)})" for i in found["flagged"]) or "none",
        reason=found["reason"],
        head=["label", *levels, "score"],
        labels=[line(label) for label in found["labels"]],
        levels=["level", *(text(level, 2) for level in levels.values()), "1.00"],
        found=[figure_of(picture, caption) for caption, picture in pictures.items()],
        rule=found["rule"],
        model_hash=found["model_hash"],
    )
