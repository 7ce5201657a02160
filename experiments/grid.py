"""Fills grids: what is not in a row file yet is measured, one cell after the other.

A cell is a frozen dataclass, and its row a JSON object in one line, appended when it is done. So a
killed run loses the cell in progress and no other, and goes on when it is started again. A line
that is no row (of a machine that went down, of an editor) is left out, and its cell measured again.
While the disk is full the run waits. Many processes may append to one file.
"""

import errno
import fcntl
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ibau_jax.files import make_folder, to_json

Row = dict[str, Any]
RESULTS = Path(__file__).parent / "results"
ZOO = Path(__file__).parent / "zoo"
WAIT = 60.0  # seconds, while the disk is full


def commit() -> str:
    """Of this source; empty where there is no git."""
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    return subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()


def read(path: Path) -> list[Row]:
    """The rows written so far, none where there is no file."""
    rows = []
    lines = path.read_bytes().split(b"\n") if path.is_file() else []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError("no JSON object")
            rows.append(row)
        except (ValueError, RecursionError):
            note(f"{path}: line {number} is damaged and left out")
    return rows


def append(path: Path, row: Row) -> None:
    """Add a row, whole; waits while the disk is full."""
    make_folder(path.parent)
    line = to_json(row).encode() + b"\n"
    while True:
        with path.open("a+b", buffering=0) as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            end = file.seek(0, os.SEEK_END)
            cut = end > 0 and os.pread(file.fileno(), 1, end - 1) != b"\n"
            try:
                whole = b"\n" * cut + line  # on a line of its own, after one that was cut off
                if file.write(whole) == len(whole):
                    os.fsync(file.fileno())
                    return
                problem = os.strerror(errno.ENOSPC)
            except OSError as error:
                problem = str(error.strerror or error)
            file.truncate(end)
        note(f"{path}: {problem}; trying again in {WAIT:.0f} s")
        time.sleep(WAIT)


def fill(
    path: Path,
    cells: Sequence[Any],
    measure: Callable[[Any], Row | None],
    told: Callable[[Row], str] = lambda row: "",
) -> None:
    """Measure the cells that `path` has no row of.

    Args:
      cells: frozen dataclasses of JSON's values; of one kind, as `measure` takes them.
      measure: the fields of a cell's row beside `cell` and `wall_seconds`; None: it cannot be
        measured here, and is left out.
      told: what is said of a row when it is done.
    """
    done = {key(row["cell"]): row for row in read(path) if "cell" in row}
    todo = [cell for cell in dict.fromkeys(cells) if key(asdict(cell)) not in done]
    spent = [row["wall_seconds"] for row in done.values() if row.get("wall_seconds")]
    for number, cell in enumerate(todo):
        # Another process may have measured it since.
        if any(key(row.get("cell")) == key(asdict(cell)) for row in read(path)):
            continue
        left = len(todo) - number
        rest = f", about {clock(left * sum(spent) / len(spent))} left" if spent else ""
        note(f"{left} of {len(cells)} cells to do{rest}; now {words(cell)}")
        started = time.monotonic()
        found = measure(cell)
        if found is None:
            note(f"left out: {words(cell)}")
            continue
        row = {"cell": asdict(cell), "wall_seconds": round(time.monotonic() - started, 1), **found}
        spent.append(row["wall_seconds"])
        append(path, row)
        note(f"{words(cell)} {told(row)}")


def key(cell: Any) -> str:
    """A cell of a row, to compare it by."""
    return json.dumps(cell, sort_keys=True)


def words(cell: Any) -> str:
    """A cell in a line: its values, without those that say nothing."""
    return " ".join(str(v) for v in asdict(cell).values() if v not in (None, (), ""))


def select(rows: Iterable[Row], cells: Iterable[Any]) -> list[Row]:
    """The rows of these cells, in their order."""
    found = {key(row.get("cell")): row for row in rows}
    return [found[k] for cell in cells if (k := key(asdict(cell))) in found]


def clock(seconds: float) -> str:
    """A time that is left, for people."""
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{max(1, minutes)} min"


def note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
