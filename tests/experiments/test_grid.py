"""Grids: resumed wherever they were killed, whatever happened to the file."""

import errno
import json
import random
import signal
import subprocess
import sys
import time
from dataclasses import dataclass

import pytest
from conftest import on_devices


@dataclass(frozen=True)
class Cell:
    name: str
    seed: int = 0


CELLS = [Cell("a"), Cell("b", 1), Cell("a", 2)]


def measured(cell):
    return {"value": [cell.seed, cell.name], "missing": float("nan")}


def test_what_is_there_is_left_out(script, tmp_path, capsys):
    grid, path, asked = script("grid"), tmp_path / "new" / "rows.jsonl", []

    def measure(cell):
        asked.append(cell)
        return measured(cell) if cell.name == "a" else None

    grid.fill(path, CELLS, measure, lambda row: str(row["value"]))
    assert "a 2 [2, 'a']" in capsys.readouterr().err
    assert [row["cell"] for row in grid.read(path)] == [
        {"name": "a", "seed": 0},
        {"name": "a", "seed": 2},
    ]
    grid.fill(path, [*CELLS, Cell("a")], measure)  # b is asked for again, a is not
    assert asked == [*CELLS, CELLS[1]]
    assert grid.select(grid.read(path), CELLS) == grid.read(path)
    assert grid.select(grid.read(path), CELLS[2:]) == grid.read(path)[1:]


@pytest.mark.parametrize("damage", [b'{"cell": {"na', b"\x00\xff\n", b"7\n", b"[" * 9999 + b"\n"])
def test_a_damaged_line_is_left_out(script, tmp_path, damage, capsys):
    grid, path = script("grid"), tmp_path / "rows.jsonl"
    grid.append(path, {"cell": {"name": "a", "seed": 0}, "value": 1})
    with path.open("ab") as file:
        file.write(damage)
    grid.fill(path, CELLS, measured)
    assert "line 2 is damaged" in capsys.readouterr().err
    found = grid.read(path)
    assert [row["cell"]["seed"] for row in found] == [0, 1, 2] and found[0]["value"] == 1


def test_a_full_disk_is_waited_for(script, tmp_path, monkeypatch, capsys):
    grid, path = script("grid"), tmp_path / "rows.jsonl"
    grid.append(path, {"cell": 1})
    before, full = path.read_bytes(), [True, True]

    def sync(number):
        if full:
            full.pop()
            raise OSError(errno.ENOSPC, "No space left on device")

    waits = []
    monkeypatch.setattr(grid.os, "fsync", sync)
    monkeypatch.setattr(grid.time, "sleep", lambda s: waits.append((s, path.read_bytes())))
    grid.append(path, {"cell": 2})
    assert [s for s, _ in waits] == [60, 60] and all(there == before for _, there in waits)
    assert [row["cell"] for row in grid.read(path)] == [1, 2]
    assert "No space left" in capsys.readouterr().err


def test_the_time_that_is_left(script):
    clock = script("grid").clock
    assert [clock(s) for s in (5, 100, 3599, 7300)] == ["1 min", "2 min", "1 h 0 min", "2 h 2 min"]


PROGRAM = """
import sys, time
from dataclasses import dataclass
from pathlib import Path
sys.path.insert(0, sys.argv[2])
import grid

@dataclass(frozen=True)
class Cell:
    number: int

def measure(cell):
    time.sleep(0.03)
    return {"value": cell.number**2, "long": "x" * 100_000}

grid.fill(Path(sys.argv[1]), [Cell(i) for i in range(60)], measure)
"""


def test_a_grid_that_is_killed_ten_times_is_the_same(script, tmp_path):
    grid, draw = script("grid"), random.Random(0)
    command = [sys.executable, "-c", PROGRAM]
    killed = tmp_path / "killed.jsonl"

    def start():
        where = str(grid.__file__).rpartition("/")[0]
        return subprocess.Popen(
            [*command, str(killed), where], env=on_devices(1), stderr=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )  # fmt: skip

    for _ in range(10):
        process, before = start(), len(grid.read(killed))
        deadline = time.monotonic() + 60
        while len(grid.read(killed)) < before + 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(draw.uniform(0, 0.1))
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert 20 <= len(grid.read(killed)) < 60
    assert start().wait() == 0
    rows = [{k: v for k, v in row.items() if k != "wall_seconds"} for row in grid.read(killed)]
    wanted = [{"cell": {"number": i}, "value": i * i, "long": "x" * 100_000} for i in range(60)]
    assert rows == json.loads(json.dumps(wanted))
