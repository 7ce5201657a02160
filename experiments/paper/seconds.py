"""The paper's Table 6, seconds until a defense takes effect, from the rows of `race.py`; no JAX."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from statistics import mean
from typing import Any

from paper.published import SECONDS
from paper.tables import SHORT, heads, line

Row = dict[str, Any]
METHODS = ("neural-cleanse", "deepinspect", "tabor", "fine-pruning", "nad", "ibau")


def first_effect(
    looks: Iterable[Sequence[float]], before: float, asr: float = 0.2, drop: float = 0.1
) -> float | None:
    """The seconds of the first look whose ASR is below `asr` with at most `drop` of ACC lost.

    With less accuracy the paper calls a defense a failure (marks of Table 1). None: never.

    Args:
      looks: seconds, ACC, ASR.
      before: ACC of the given model.
    """
    for spent, acc, success in looks:
        if success < asr and acc >= before - drop:
            return spent
    return None


def effective(row: Row) -> float | None:
    """Seconds until it takes effect, of a row of `race.py`; None: never."""
    return first_effect(row["looks"], row["acc_before"])


def cells(rows: Iterable[Row]) -> list[Row]:
    """The cells of Table 6 for JSON: the mean over the cases in which a method took effect."""
    found = defaultdict(list)
    for row in rows:
        dataset = row["cell"]["model"].partition("-")[0]
        found[dataset, row["cell"]["method"]].append(effective(row))
    listed = []
    for dataset, paper in SECONDS.items():
        for method in METHODS:
            took = found.get((dataset, method), [])
            worked = [seconds for seconds in took if seconds is not None]
            listed.append(
                {
                    **{"dataset": dataset, "defense": method, "cases": len(took)},
                    **{"effective": len(worked), "seconds": mean(worked) if worked else None},
                    "paper_seconds": paper[method],
                    "status": "run" if took else "not run",
                }
            )
    return listed


def markdown(rows: Sequence[Row]) -> str:
    """Table 6: seconds, in how many cases, and how many times I-BAU's; the paper's beside."""
    listed = {(one["dataset"], one["defense"]): one for one in cells(rows)}
    head = ["method"]
    for dataset in SECONDS:
        head += [f"{dataset}, s", "cases", "of I-BAU's", "paper, s", "of I-BAU's"]
    lines = heads(*head)
    for method in METHODS:
        values = [SHORT[method]]
        for dataset, paper in SECONDS.items():
            one, own = listed[dataset, method], listed[dataset, "ibau"]["seconds"]
            took = one["seconds"]
            values += [
                "not run" if not one["cases"] else "never" if took is None else f"{took:.1f}",
                f"{one['effective']} of {one['cases']}",
                f"{took / own:.1f}" if took and own else "",
                f"{paper[method]:.1f}",
                f"{paper[method] / paper['ibau']:.1f}",
            ]
        lines.append(line(values))
    machines = sorted({row["machine"] for row in rows if row.get("machine")})
    return "\n".join([*lines, "", *(f"On {name}." for name in machines)])
