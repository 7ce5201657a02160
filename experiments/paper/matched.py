"""Table 1's selection of a round.

I-BAU's result is reported "when the ACC falls to the same level as the most effective baseline":
the paper's rule looks at the accuracy of the test images. Beside it stands what a user gets, who
has no test images: the last round.
"""

from collections.abc import Iterable
from typing import Any

from paper.tables import OURS, SHORT, Entry, best_baselines, by_case, entries, heads, line

Row = dict[str, Any]


def nearest_round(rounds: list[Row], acc: float) -> Row:
    """Of the rounds from the first on, the one whose ACC is nearest to `acc` (a fraction)."""
    return min(rounds[1:], key=lambda one: abs(one["acc"] - acc))


def markdown(rows: Iterable[Row], name: str = "table1") -> str:
    """Both selections, seed 0, for the cases in which a baseline works."""
    rows = list(rows)
    head = ["case", "most effective baseline", "ACC", "preset", "round by the paper's rule"]
    lines = heads(*head, "last round")
    for case, row in by_case(entries(name, rows)).items():
        _, best = best_baselines(row)
        if best is None or best.acc is None:
            continue
        for method in OURS:
            run = _run(rows, case, method)
            if run is None:
                continue
            matched = nearest_round(run["rounds"], best.acc / 100)
            chosen = f"{matched['round']}: {_pair(matched)}"
            values = [case, _named(best), f"{best.acc:.1f}", SHORT[method], chosen]
            lines.append(
                line([*values, f"{run['rounds'][-1]['round']}: {_pair(run['rounds'][-1])}"])
            )
    return "\n".join(lines)


def _named(e: Entry) -> str:
    return f"{SHORT[e.method]}, ASR {e.asr:.1f}"


def _run(rows: list[Row], case: str, method: str) -> Row | None:
    cell = {"model": case, "method": method, "seed": 0, "images": None, "rounds": None}
    return next((row for row in rows if row["cell"] == cell), None)


def _pair(one: Row) -> str:
    return f"{100 * one['acc']:.1f} / {100 * one['asr']:.1f}"
