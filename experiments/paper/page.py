"""`RESULTS.md` and `results.html`: everything that the paper measures, from rows; no JAX here."""

import base64
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bokeh.embed import components
from bokeh.resources import Resources
from cells import GRIDS
from grid import select
from jinja2 import Template
from markdown_it import MarkdownIt

from paper import differences, matched, plots, seconds, tables
from paper.published import TABLES

Row = dict[str, Any]
EXCLUDING = (
    "The ASR above counts every triggered image, as the paper's does, also those of the target's "
    "own class. Here it is over images of other classes, in per cent (nothing of the paper's "
    "figures corresponds)."
)
CLAIMS = Path(__file__).with_name("claims.md")
TITLES = {
    "table1": "Table 1: CIFAR-10, one trigger",
    "table2": "Table 2: GTSRB, one trigger",
    "table3": "Table 3: seven triggers, seven targets",
    "table4": "Table 4: poison ratios (Trojan WM, CIFAR-10)",
    "table5": "Table 5: clean images (Trojan WM, CIFAR-10)",
}
FIGURES = {
    "figure1": "Figure 1: the naive heuristic and I-BAU over the rounds",
    "figure2": "Figure 2: the triggers",
    "figure3": "Figure 3: t-SNE of the flatten layer",
    "figure4": "Figure 4: all-to-all over the rounds",
    "figure5": "Figure 5: seven targets over the rounds",
}


def markdown(
    rows: list[Row], timed: list[Row], after: list[Row], pictures: Mapping[str, str]
) -> str:
    """The page.

    Args:
      rows: of `cells.jsonl`.
      timed: of `steps.jsonl` (Table 6).
      after: of `after.jsonl`.
      pictures: figure -> path of its picture, as the page names it.
    """
    parts = [CLAIMS.read_text().rstrip(), "## Tables", tables.LEGEND, coverage(rows)]
    for name, title in TITLES.items():
        parts += [f"### {title}", tables.markdown(name, rows)]
        if name == "table1":
            parts += [matched.__doc__ or "", matched.markdown(rows)]
    parts += ["### Table 6: seconds until a defense takes effect", seconds.markdown(timed)]
    parts += ["### Far from the paper", differences.__doc__ or "", differences.markdown(rows)]
    parts += ["### ASR excl.", EXCLUDING]
    for name, title in TITLES.items():
        parts += [title, tables.excluding(name, rows)]
    parts.append("## Figures")
    for name, title in FIGURES.items():
        where = pictures.get(name)
        parts += [f"### {title}", f"![{title}]({where})" if where else "Not run."]
    parts += ["## After-effects", after_effects(after), false_alarms(rows)]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def coverage(rows: list[Row]) -> str:
    """How many cells of each table were run; the others say so."""
    found = []
    for name in TABLES:
        wanted = GRIDS[name]
        found.append(f"{name} {len(select(rows, wanted))} of {len(wanted)}")
    return f"Runs (a cell of a table is one to three): {', '.join(found)}."


def after_effects(rows: list[Row]) -> str:
    """Re-learning, and what a search finds in the cleaned model."""
    lines = [
        "A model is cleaned, then fine-tuned for one epoch on 100 images of which five carry the "
        "trigger (re-learning); a search as that of `ibau inspect` on the cleaned model comes to "
        "so much of a target's level.",
        "",
        *tables.heads("model", "defense", "ACC / ASR cleaned", "after re-learning", "search"),
    ]
    for row in rows:
        cell = row["cell"]
        pairs = [
            f"{100 * row[f'acc_{when}']:.1f} / {100 * row[f'asr_{when}']:.1f}"
            for when in ("cleaned", "again")
        ]
        lines.append(tables.line([cell["model"], cell["method"], *pairs, f"{row['nearest']:.2f}"]))
    return "\n".join(lines) if rows else "Not run."


def false_alarms(rows: list[Row]) -> str:
    """What a clean model loses."""
    found = select(rows, GRIDS["false-alarm"])
    lines = [
        "A model without a backdoor through the same defenses, ACC before and after:",
        "",
        *tables.heads("model", "defense", "before", "after", "verdict"),
    ]
    for row in found:
        values = [f"{100 * one['acc']:.1f}" for one in (row["rounds"][0], row["rounds"][-1])]
        cell = row["cell"]
        lines.append(tables.line([cell["model"], cell["method"], *values, row.get("verdict", "")]))
    return "\n".join(lines) if found else "Clean models: not run."


def html(text: str, rows: list[Row], pictures: Mapping[str, Path]) -> str:
    """The page as one file: its Markdown, the pictures, and plots that can be hovered."""
    parser = MarkdownIt("commonmark").enable(["table", "strikethrough"])
    body = parser.render(text)
    for path in pictures.values():
        data = base64.b64encode(path.read_bytes()).decode()
        body = body.replace(f'src="{path.name}"', f'src="data:image/png;base64,{data}"')
    drawn = [plots.table_plot(name, title, rows) for name, title in TITLES.items()]
    for name in ("figure1", "figure4", "figure5"):
        if found := select(rows, GRIDS[name]):
            drawn.append(plots.curves_plot(FIGURES[name], found))
    program, divisions = components(drawn)
    scripts = Resources(mode="inline", components=["bokeh"]).render_js()
    template = Template(Path(__file__).with_name("page.html.jinja").read_text())
    return template.render(scripts=scripts, body=body, plots=divisions, program=program)
