"""The paper's Figures 1, 3, 4 and 5 from rows, with matplotlib; no JAX here.

Figure 2 (the triggers) is drawn from the models: `triggers.py`.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

Row = dict[str, Any]
COLOURS = {"acc": "tab:blue", "asr": "tab:red"}
LABELS = {"acc": "ACC", "asr": "ASR"}
NAMES = {
    "ibau": "I-BAU (default)",
    "ibau-published": "I-BAU (published)",
    "naive": "naive heuristic",
}


def curve(row: Row, name: str) -> np.ndarray:
    """ACC, ASR or another value over the rounds of a run, 0 before the first; a fraction."""
    return np.array([one[name] for one in row["rounds"]], float)


def asr_by_trigger(row: Row) -> dict[str, np.ndarray]:
    """The ASR of each trigger over the rounds, a fraction; of a single one by the name `ASR`."""
    each = [one.get("by_attack") or {"ASR": one["asr"]} for one in row["rounds"]]
    return {name: np.array([one[name] for one in each], float) for name in each[0]}


def figure1(rows: Sequence[Row]) -> Figure:
    """ACC and ASR over the iterations of many runs: the naive heuristic and I-BAU."""
    methods = ("naive", "ibau-published", "ibau")
    figure, axes = panels(methods)
    for axis, method in zip(axes, methods, strict=True):
        runs = [row for row in rows if row["cell"]["method"] == method]
        for name in COLOURS:
            draw_band(axis, [curve(row, name) for row in runs], name)
        finish(axis, f"{NAMES[method]}, {len(runs)} runs")
    return figure


def draw_band(axis: Axes, curves: list[np.ndarray], name: str) -> None:
    """The mean of runs, and from their lowest to their highest."""
    if not curves:
        return
    least = min(map(len, curves))
    values = 100 * np.stack([one[:least] for one in curves])
    steps = np.arange(least)
    axis.plot(steps, values.mean(0), color=COLOURS[name], marker="o", label=LABELS[name])
    axis.fill_between(steps, values.min(0), values.max(0), color=COLOURS[name], alpha=0.2, lw=0)


def figure4(rows: Sequence[Row]) -> Figure:
    """All-to-all over the rounds, both data sets."""
    return over_rounds(rows, "all-to-all")


def figure5(rows: Sequence[Row]) -> Figure:
    """Seven targets over the rounds, each trigger, both data sets."""
    return over_rounds(rows, "seven-target")


def over_rounds(rows: Sequence[Row], scenario: str) -> Figure:
    keys = list(dict.fromkeys((row["cell"]["model"], row["cell"]["method"]) for row in rows))
    figure, axes = panels(keys)
    for axis, (model, method) in zip(axes, keys, strict=True):
        (row, *_) = [
            r for r in rows if (r["cell"]["model"], r["cell"]["method"]) == (model, method)
        ]
        axis.plot(100 * curve(row, "acc"), color=COLOURS["acc"], marker=".", label="ACC")
        for name, values in asr_by_trigger(row).items():
            colour = COLOURS["asr"] if name == "ASR" else None
            axis.plot(100 * values, color=colour, marker=".", lw=1, label=name)
        finish(axis, f"{model}\n{NAMES.get(method, method)}")
    figure.suptitle(scenario)
    return figure


def figure3(rows: Sequence[Row]) -> Figure:
    """t-SNE of the flatten layer, before and after: dots clean, crosses with the trigger."""
    figure, axes = panels(rows)
    for axis, row in zip(axes, rows, strict=True):
        points, labels = np.array(row["points"]), np.array(row["labels"])
        triggered = np.array(row["triggered"], bool)
        for marks, marker in ((~triggered, "o"), (triggered, "x")):
            where = points[marks]
            axis.scatter(
                *where.T, c=labels[marks], cmap="tab10", marker=marker, s=10, vmin=0, vmax=9
            )
        axis.set(xticks=[], yticks=[], title=row["title"])
    return figure


def panels(items: Sequence[Any]) -> tuple[Figure, list[Axes]]:
    """One picture for each item, beside each other."""
    count = max(1, len(items))
    figure = Figure(figsize=(3.6 * count, 3.4), layout="constrained")
    return figure, list(figure.subplots(1, count, squeeze=False).flat)[: len(items)]


def finish(axis: Axes, title: str) -> None:
    axis.axhline(20, color="grey", lw=0.8, ls=":")
    axis.set(title=title, xlabel="round", ylim=(-3, 103), ylabel="%")
    axis.title.set_fontsize(9)
    if axis.get_legend_handles_labels()[0]:
        axis.legend(fontsize=6, loc="center right")


FIGURES = {"figure1": figure1, "figure3": figure3, "figure4": figure4, "figure5": figure5}
