"""Tables of the cells that were measured, as Markdown, for the pages of `experiments/` and README.

    python experiments/tables.py compared|presets|holds|unseen|few|false-alarm

`compared`: all defenses on the published models and seven of the zoo (`baselines.md`). `presets`:
those of I-BAU on the published models (README). `holds`: the default on every model, `unseen`: on
those that no choice has seen (`default.md`). Rows: `experiments/results/cells.jsonl`, of
`experiments/measure.py`. The paper's own tables: `ibau reproduce table1`.
"""

import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate
from statistics import mean
from typing import Any

from cells import COMPARED, GRIDS, METHODS, PUBLISHED
from grid import RESULTS, read, select
from paper.published import TABLES, Figure
from paper.seconds import first_effect
from paper.tables import heads, line

Row = dict[str, Any]
CELLS = RESULTS / "cells.jsonl"
# The case of the paper's tables that a published model is of.
CASES = {
    "BadNets": ("table1", "cifar10-badnets"),
    "l2": ("table1", "cifar10-l2"),
    "Trojan WM": ("table1", "cifar10-trojan-watermark"),
    "GTSRB BadNets": ("table2", "gtsrb-badnets"),
    "GTSRB Trojan WM": ("table2", "gtsrb-trojan-watermark"),
}


def compared(rows: Sequence[Row]) -> list[str]:
    """All defenses on the twelve models, seed 0, after the last round; then their means."""
    runs = {(row["cell"]["model"], row["cell"]["method"]): row for row in of_seed(rows, 0)}
    lines = heads(
        *("model", "defense", "ACC", "paper", "ASR", "paper", "ASR excl.", "RA", "DER"),
        *("flagged", "seconds", "to take effect"),
    )
    for model in COMPARED:
        of_model = [runs[model, m] for m in METHODS if (model, m) in runs]
        if of_model:
            lines.append(line([model, "none", *figures(of_model[0]["rounds"][0], paper(model))]))
        for row in of_model:
            method = row["cell"]["method"]
            flagged = ", ".join(map(str, row["flagged"])) or "×" if "flagged" in row else ""
            values = figures(row["rounds"][-1], paper(model, method))[:-3]
            lines.append(line([model, method, *values, flagged, *seconds(row)]))
    return [*lines, "", *means(rows)]


def means(rows: Iterable[Row]) -> list[str]:
    """The mean of each defense over the models and seeds that have its rows.

    A model's fall is from its own figures before, so that defenses with other models compare.
    """
    lines = heads(
        *("defense", "runs", "models", "fall of ACC", "ASR", "ASR excl.", "RA", "DER"),
        *("seconds", "failed"),
    )
    groups = defaultdict(list)
    for row in rows:
        groups[row["cell"]["method"]].append(row)
    for method in METHODS:
        if not (group := groups.get(method)):
            continue
        last = [row["rounds"][-1] for row in group]
        falls = [fall(row) for row in group]
        spent = [whole(row) for row in group if row["alone"]]
        failed = sum(one["asr"] >= 0.2 or f > 0.1 for one, f in zip(last, falls, strict=True))
        values = [mean(falls), *(mean(one[k] for one in last) for k in ("asr", "asr_excl", "ra"))]
        values.append(mean(one["der"] for one in last))
        models = len({row["cell"]["model"] for row in group})
        shown = [f"{value:.3f}" for value in values]
        lines.append(
            line(
                [
                    *(method, str(len(group)), str(models), *shown),
                    *(f"{mean(spent):.0f}" if spent else "", str(failed)),
                ]
            )
        )
    return lines


def presets(rows: Sequence[Row]) -> list[str]:
    """The presets of I-BAU on the published models: means over the seeds."""
    lines = heads(
        *("model", "preset", "seeds", "rounds", "ACC before", "ACC", "ASR", "ASR excl.", "seconds")
    )
    for model in PUBLISHED:
        for method in METHODS:
            group = [
                r for r in rows if (r["cell"]["model"], r["cell"]["method"]) == (model, method)
            ]
            if not group:
                continue
            last = [row["rounds"][-1] for row in group]
            spent = [whole(row) for row in group if row["alone"]]
            lines.append(
                line(
                    [
                        *(model, group[0]["preset"], str(len(group)), str(last[0]["round"])),
                        f"{mean(row['rounds'][0]['acc'] for row in group):.3f}",
                        *(spread([one[k] for one in last]) for k in ("acc", "asr", "asr_excl")),
                        f"{mean(spent):.0f}" if spent else "",
                    ]
                )
            )
    return lines


def holds(rows: Sequence[Row]) -> list[str]:
    """The default on every model, run by run, with what it says of itself."""
    lines = heads(
        *("model", "seed", "images", "as given", "after", "ASR excl.", "RA", "DER"),
        *("unlearned", "verdict"),
    )
    for row in rows:
        cell, first, last = row["cell"], row["rounds"][0], row["rounds"][-1]
        pair = [f"{o['acc']:.3f} / {number(o.get('asr'))}".rstrip(" /") for o in (first, last)]
        lines.append(
            line(
                [
                    *(cell["model"], str(cell["seed"]), str(row["n_clean"]), *pair),
                    *(number(last.get(k)) for k in ("asr_excl", "ra", "der")),
                    *(", ".join(map(str, row.get("flagged", []))), row.get("verdict", "")),
                ]
            )
        )
    return lines


def paper(model: str, method: str = "none") -> Figure | None:
    """What the paper has of a published model; None: nothing."""
    if model not in CASES:
        return None
    table, case = CASES[model]
    return TABLES[table][case].get(method)


def figures(one: Row, theirs: Figure | None) -> list[str]:
    acc, asr = theirs or (None, None)
    values = [number(one["acc"]), percent(acc), number(one["asr"]), percent(asr)]
    return [*values, *(number(one.get(k)) for k in ("asr_excl", "ra", "der")), "", "", ""]


def of_seed(rows: Iterable[Row], seed: int) -> list[Row]:
    return [row for row in rows if row["cell"]["seed"] == seed]


def fall(row: Row) -> float:
    return row["rounds"][0]["acc"] - row["rounds"][-1]["acc"]


def whole(row: Row) -> float:
    """Seconds of all rounds; compilation and evaluation apart."""
    return sum(one["seconds"] for one in row["rounds"])


def effective(row: Row) -> float | None:
    """Seconds until a defense takes effect, looked at after rounds; None: never.

    `race.py` looks at every fifth step.
    """
    spent = accumulate(one["seconds"] for one in row["rounds"])
    looks = [(s, one["acc"], one["asr"]) for s, one in zip(spent, row["rounds"], strict=True)]
    return first_effect(looks, row["rounds"][0]["acc"])


def seconds(row: Row) -> tuple[str, str]:
    """Of the whole run, and until it took effect; empty where another job ran beside."""
    if not row["alone"]:
        return "", ""
    took = effective(row)
    return f"{whole(row):.0f}", "never" if took is None else f"{took:.0f}"


def spread(values: Sequence[float]) -> str:
    """The mean, and from the lowest to the highest."""
    more = f" ({min(values):.3f} to {max(values):.3f})" if len(values) > 1 else ""
    return f"{mean(values):.3f}{more}"


def number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def percent(value: float | None) -> str:
    return "" if value is None else f"{value / 100:.3f}"


VIEWS: dict[str, Callable[[Sequence[Row]], list[str]]] = {
    **{"compared": compared, "presets": presets},
    **{"holds": holds, "unseen": holds, "few": holds, "false-alarm": means},
}


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1] not in VIEWS:
        raise SystemExit(__doc__)
    wanted = select(read(CELLS), GRIDS[sys.argv[1]])
    print("\n".join(VIEWS[sys.argv[1]](wanted)))
