"""The plots of `results.html`, which can be hovered (bokeh); from rows, no JAX here."""

from collections.abc import Iterable, Sequence
from itertools import cycle
from typing import Any

from bokeh.models import ColumnDataSource, HoverTool
from bokeh.palettes import Category10, Category20
from bokeh.plotting import figure

from paper.figures import NAMES, asr_by_trigger, curve
from paper.tables import OURS, RUN, SHORT, entries

Row = dict[str, Any]
TOOLS = "pan,wheel_zoom,box_zoom,reset"


def table_plot(name: str, title: str, rows: Iterable[Row]) -> Any:
    """ACC and ASR of every cell of a table: ours filled, the paper's hollow."""
    plot = figure(
        title=title,
        x_axis_label="ASR, %",
        y_axis_label="ACC, %",
        width=760,
        height=420,
        tools=TOOLS,
    )
    found = entries(name, rows)
    methods = list(dict.fromkeys(e.method for e in found))
    for method, colour in zip(methods, Category20[20], strict=False):
        of_method = [e for e in found if e.method == method]
        ours = [(e.case, e.acc, e.asr, str(len(e.seeds))) for e in of_method if e.status == RUN]
        theirs = [
            (e.case, e.paper.acc, e.paper.asr, "")
            for e in of_method
            if e.paper and e.paper.acc is not None
        ]
        for points, who, fill in ((ours, "measured", colour), (theirs, "paper", None)):
            if not points:
                continue
            columns = dict(
                zip(("case", "acc", "asr", "seeds"), zip(*points, strict=True), strict=True)
            )
            data = {name: list(values) for name, values in columns.items()}
            data |= {"who": [who] * len(points), "method": [SHORT[method]] * len(points)}
            plot.scatter(
                "asr",
                "acc",
                source=ColumnDataSource(data),
                size=11 if method in OURS else 7,
                marker="star" if method in OURS else "circle",
                line_color=colour,
                fill_color=fill,
                legend_label=SHORT[method],
            )
    plot.add_tools(
        HoverTool(
            tooltips=[
                ("", "@method, @case (@who)"),
                ("ACC / ASR", "@acc{0.0} / @asr{0.0}"),
                ("seeds", "@seeds"),
            ]
        )
    )
    finish(plot)
    return plot


def curves_plot(title: str, rows: Sequence[Row]) -> Any:
    """ACC (full) and ASR (dashed) of each run over its rounds."""
    plot = figure(
        title=title, x_axis_label="round", y_axis_label="%", width=760, height=420, tools=TOOLS
    )
    keys = list(dict.fromkeys((row["cell"]["model"], row["cell"]["method"]) for row in rows))
    colours = dict(zip(keys, cycle(Category10[10])))
    for row in rows:
        model, method = row["cell"]["model"], row["cell"]["method"]
        name = f"{model}, {NAMES.get(method, method)}"
        for what, values in ({"ACC": curve(row, "acc")} | asr_by_trigger(row)).items():
            data = {
                "round": list(range(len(values))),
                "value": (100 * values).tolist(),
                "what": [what] * len(values),
                "name": [f"{name}, seed {row['cell']['seed']}"] * len(values),
            }
            plot.line(
                "round",
                "value",
                source=ColumnDataSource(data),
                color=colours[model, method],
                line_dash="solid" if what == "ACC" else "dashed",
                legend_label=name,
            )
    plot.add_tools(
        HoverTool(tooltips=[("", "@name"), ("round", "@round"), ("@what", "@value{0.0} %")])
    )
    finish(plot)
    return plot


def finish(plot: Any) -> None:
    """A legend beside the plot, whose entries hide what they stand for."""
    if plot.legend:
        plot.legend.click_policy = "hide"
        plot.legend.label_text_font_size = "8pt"
        plot.add_layout(plot.legend[0], "right")
