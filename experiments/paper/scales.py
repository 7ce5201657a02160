"""How large the tables and figures are made: `smoke`, `cpu` (what is committed), `paper`."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grid import RESULTS


@dataclass(frozen=True)
class Scale:
    """A scale.

    Attributes:
      dataset: what stands in for CIFAR-10 and GTSRB; None: they themselves.
      preset: of the defenses that are not I-BAU; None: their default.
      rounds, images: of each run, in place of the cell's.
      each: of the cells of a table or figure, so many of each method; None: all.
    """

    dataset: str | None = None
    preset: str | None = None
    rounds: int | None = None
    images: int | None = None
    each: int | None = None


SCALES = {
    "smoke": Scale("digits", rounds=1, images=100, each=1),
    "cpu": Scale(),
    "paper": Scale(preset="paper"),
}


def rows_folder(scale: str, out: Path) -> Path:
    """Where the rows are: those of `cpu` are committed."""
    return RESULTS if scale == "cpu" else out / scale


def thinned(cells: Sequence[Any], scale: Scale, methods: Sequence[str] = ()) -> list[Any]:
    """The cells that a scale runs, of these methods (none: of all)."""
    kept, counts = [], dict.fromkeys([cell.method for cell in cells], 0)
    for cell in cells:
        counts[cell.method] += 1
        few = scale.each is None or counts[cell.method] <= scale.each
        if few and (not methods or cell.method in methods):
            kept.append(cell)
    return kept
