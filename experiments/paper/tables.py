"""The paper's Tables 1 to 5 from the rows of `cells.jsonl`, beside its own figures; no JAX here."""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import mean
from typing import Any

from cells import columns, seeds_of, split

from paper.published import SEVEN, SEVEN_ASR, TABLES, Figure

Row = dict[str, Any]
FAILED_ASR, FAILED_ACC = 20.0, 10.0  # points: the paper's failures
CLOSE = 2.0  # points: "comparable" with the best baseline; the paper names no number
RUN, NOT_RUN = "run", "not run"
OURS = ("ibau", "ibau-published")
CONTROL = "finetune"
PRESETS = {"ibau": "default", "ibau-published": "published", "none": None}  # None: as given
MODEL_RATIO = {"-0.05": 0.05, "-0.005": 0.005}


@dataclass(frozen=True)
class Entry:
    """A cell of a table: means over the seeds, in per cent; None: not run or not measured.

    Attributes:
      given: ACC and ASR of the poisoned model.
      by_attack: the ASR of each trigger, where there are several.
      paper: the paper's figure; None: it has none.
    """

    case: str
    method: str
    seeds: tuple[int, ...]
    acc: float | None
    asr: float | None
    asr_excl: float | None
    ra: float | None
    der: float | None
    given: Figure
    by_attack: dict[str, float]
    paper: Figure | None
    found_none: bool = False

    @property
    def status(self) -> str:
        return RUN if self.acc is not None else NOT_RUN

    @property
    def asr_fails(self) -> bool:
        return self.asr is not None and self.asr >= FAILED_ASR

    @property
    def acc_fails(self) -> bool:
        fall = (self.given.acc or 0) - (self.acc or 0)
        return self.acc is not None and fall > FAILED_ACC

    @property
    def works(self) -> bool:
        return self.status == RUN and not (self.asr_fails or self.acc_fails)


def entries(name: str, rows: Iterable[Row]) -> list[Entry]:
    """Every cell of a table, whether it was run or not."""
    runs = defaultdict(list)
    for row in rows:
        cell = row["cell"]
        if cell["rounds"] is None:
            runs[cell["model"], cell["images"], cell["method"]].append(row)
    found = []
    for case, figures in TABLES[name].items():
        model, images = split(case)
        of_model = [row for key, group in runs.items() if key[0] == model for row in group]
        given = of_model[0]["rounds"][0] if of_model else None
        for method in columns(name):
            group = sorted(runs[model, images, method], key=lambda row: row["cell"]["seed"])
            group = [row for row in group if row["cell"]["seed"] in seeds_of(method)]
            last = [row["rounds"][-1] for row in group]
            if method == "none":
                last = [given] if given else []
            values = {k: average(last, k) for k in ("acc", "asr", "asr_excl", "ra", "der")}
            found.append(
                Entry(
                    case,
                    method,
                    tuple(row["cell"]["seed"] for row in group),
                    given=Figure(average([given], "acc"), average([given], "asr"))
                    if given
                    else Figure(None, None),
                    by_attack=by_attack(last),
                    paper=figures.get(method),
                    found_none=bool(group) and all(row.get("flagged") == [] for row in group),
                    **values,
                )
            )
    return found


def average(rounds: list[Row], name: str) -> float | None:
    """Of a value, in per cent; None where it is missing."""
    values = [one[name] for one in rounds if one.get(name) is not None]
    return 100 * mean(values) if values else None


def by_attack(rounds: list[Row]) -> dict[str, float]:
    found = [one["by_attack"] for one in rounds if one.get("by_attack")]
    return {name: 100 * mean(one[name] for one in found) for name in found[0]} if found else {}


def best_baselines(row: list[Entry]) -> tuple[Entry | None, Entry | None]:
    """Of one case, the working baseline of the highest ACC, and that of the lowest ASR."""
    working = [e for e in row if e.works and e.method not in ("none", *OURS, CONTROL)]
    if not working:
        return None, None
    return (
        max(working, key=lambda e: e.acc if e.acc is not None else -1),
        min(working, key=lambda e: e.asr if e.asr is not None else 101),
    )


def marks(row: list[Entry]) -> dict[str, tuple[str, str]]:
    """For ACC and ASR of each method of one case: `failed`, `best`, `comparable` or nothing.

    The paper's marks: an ASR not below 20 %, an ACC more than 10 points lower; the best baseline
    among those that do not fail; I-BAU comparable to it or better. The paper does not say how near
    "comparable" is: `CLOSE` points here, or, where no baseline works, that I-BAU does.
    """
    best_acc, best_asr = best_baselines(row)
    found = {}
    for e in row:
        acc = "failed" if e.acc_fails else "best" if e is best_acc else ""
        asr = "failed" if e.asr_fails else "best" if e is best_asr else ""
        if e.method in OURS and e.status == RUN:
            if not acc and (best_acc is None or (e.acc or 0) >= (best_acc.acc or 0) - CLOSE):
                acc = "comparable"
            if not asr and (best_asr is None or (e.asr or 0) <= (best_asr.asr or 0) + CLOSE):
                asr = "comparable"
        found[e.method] = (acc, asr)
    return found


def cells(name: str, rows: Iterable[Row], preset: str = "cpu") -> list[Row]:
    """A table as `ibau reproduce --json` prints it; fractions.

    Args:
      preset: of the defenses that are not I-BAU.
    """
    listed = []
    for e in entries(name, rows):
        model, images = split(e.case)
        dataset, _, attack = model.partition("-")
        ratio = next((r for end, r in MODEL_RATIO.items() if attack.endswith(end)), 0.2)
        attack = attack.removesuffix("-0.005").removesuffix("-0.05")
        several = attack in ("all-to-all", "seven-target")
        defense = "ibau" if e.method in OURS else e.method
        listed.append(
            {
                "dataset": dataset,
                "attack": "badnets" if attack == "all-to-all" else attack,
                "scenario": attack if several else "one-target",
                "defense": defense,
                "preset": PRESETS.get(e.method, preset),
                "poison_ratio": ratio,
                "n_clean": images or 5000,
                "seeds": list(e.seeds),
                **{k: fraction(getattr(e, k)) for k in ("acc", "asr", "asr_excl")},
                "paper_acc": fraction(e.paper.acc) if e.paper else None,
                "paper_asr": fraction(e.paper.asr) if e.paper else None,
                "status": e.status,
            }
        )
    return listed


def fraction(value: float | None) -> float | None:
    return None if value is None else round(value / 100, 6)


SHORT = {
    **{"none": "No defense", "neural-cleanse": "NC", "deepinspect": "DI", "tabor": "TABOR"},
    **{"fine-pruning": "FP", "nad": "NAD", "dp-sgd": "DP", "ibau": "I-BAU (default)"},
    **{"ibau-published": "I-BAU (published)", "finetune": "Fine-tuning"},
}
STYLE = {"failed": "~~{}~~", "best": "*{}*", "comparable": "**{}**", "": "{}"}
LEGEND = (
    "Our ACC / ASR in per cent (the paper's in brackets). ~~Struck~~: a failure in the paper's "
    "sense (ASR not below 20 %, ACC more than 10 points lower); *best baseline* that works; "
    f"**I-BAU** within {CLOSE:.0f} points of it or better. ×: no trigger was detected."
)


def markdown(name: str, rows: Iterable[Row]) -> str:
    """A table with the paper's figures and marks."""
    found = by_case(entries(name, rows))
    lines = heads("case", *(SHORT[method] for method in columns(name)))
    for case, row in found.items():
        marked = marks(row)
        lines.append(line([case, *(text(e, marked[e.method]) for e in row)]))
    lines += ["", means(found)]
    if name == "table3":
        lines += ["", triggers(found)]
    return "\n".join(lines)


def by_case(listed: list[Entry]) -> dict[str, list[Entry]]:
    found: dict[str, list[Entry]] = {}
    for e in listed:
        found.setdefault(e.case, []).append(e)
    return found


def text(e: Entry, mark: tuple[str, str]) -> str:
    """One cell of the table."""
    paper = ""
    if e.paper is not None:
        pair = "×" if e.paper.acc is None else f"{e.paper.acc:.1f} / {e.paper.asr:.1f}"
        paper = f" ({pair})"
    if e.status == NOT_RUN:
        return NOT_RUN + paper
    pair = [STYLE[m].format(f"{v:.1f}") for m, v in zip(mark, (e.acc, e.asr), strict=True)]
    return f"{' / '.join(pair)}{' ×' if e.found_none else ''}{paper}"


def means(found: dict[str, list[Entry]]) -> str:
    """The mean fall of ACC and the mean ASR of each column, ours and the paper's, cases paired."""
    lines = heads("mean of", "cases", "fall of ACC", "paper", "ASR", "paper")
    names = [e.method for e in next(iter(found.values()))]
    before = {case: row[0] for case, row in found.items()}
    for method in names[1:]:
        listed = [e for row in found.values() for e in row if e.method == method]
        ran = [e for e in listed if e.status == RUN]
        if not ran:
            continue
        falls = [(e.given.acc or 0) - (e.acc or 0) for e in ran]
        values = [f"{mean(falls):.1f}", "", f"{mean(e.asr or 0 for e in ran):.1f}", ""]
        papers = [(e.paper, before[e.case].paper) for e in ran]
        pairs = [(p, b) for p, b in papers if p and b and p.acc is not None]
        if pairs and len(pairs) == len(ran):
            values[1] = f"{mean((b.acc or 0) - (p.acc or 0) for p, b in pairs):.1f}"
            values[3] = f"{mean(p.asr or 0 for p, _ in pairs):.1f}"
        lines.append(line([SHORT[method], f"{len(ran)} of {len(listed)}", *values]))
    return "\n".join(lines)


def excluding(name: str, rows: Iterable[Row]) -> str:
    """The other convention: the ASR without the images of the target's own class."""
    found = by_case(entries(name, rows))
    lines = heads("case", *(SHORT[method] for method in columns(name)))
    for case, row in found.items():
        shown = (NOT_RUN if e.asr_excl is None else f"{e.asr_excl:.1f}" for e in row)
        lines.append(line([case, *shown]))
    return "\n".join(lines)


def triggers(found: dict[str, list[Entry]]) -> str:
    """Table 3's ASR of each trigger."""
    lines = []
    for case, row in found.items():
        lines += heads(case, *(SHORT[e.method] for e in row))
        for trigger in SEVEN:
            cells = []
            for e in row:
                paper = SEVEN_ASR[case].get(e.method, {})
                ours = f"{e.by_attack[trigger]:.1f}" if trigger in e.by_attack else NOT_RUN
                theirs = paper.get(trigger)
                known = "" if trigger not in paper else f" ({'×' if theirs is None else theirs})"
                cells.append(ours + known)
            lines.append(line([trigger, *cells]))
        lines.append("")
    return "\n".join(lines).rstrip()


def line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def heads(*names: str) -> list[str]:
    """The first two lines of a table."""
    return [line(names), line(["---"] * len(names))]
