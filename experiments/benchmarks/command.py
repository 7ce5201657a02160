"""Wall clock of `ibau defend`, from the command to the written report, by stages.

    python experiments/benchmarks/command.py [--before OTHER_CHECKOUT] [--preset untargeted]

Runs the command on a model of the zoo in a process of its own, the first time with an empty cache
of images and compiled programs and then with what is in it; with `--before` in turn with that of
another checkout (whose second run is as its first one where it keeps no programs). `work` is what
the defense took, `compile` what its programs took to be made or read, `rest` all else: imports,
images, evaluation, the report. Nothing else should run on the machine. Rows go to
`experiments/results/command.jsonl`. Needs CIFAR-10 (TFDS_DATA_DIR).
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from ibau_jax.results.rows import write_rows

HERE = Path(__file__).parents[2]
RESULTS = HERE / "experiments" / "results" / "command.jsonl"


@dataclass
class Settings:
    """Runs of one after the other."""

    before: Path | None = None
    """Another checkout of this repository, to compare with."""
    model: str = "cifar10-badnets"
    """Of `experiments/zoo/`."""
    preset: str = "untargeted"
    before_preset: str | None = None
    """What the other checkout calls it, where it has another name."""
    repeats: int = 3
    """Second runs of each."""
    out: Path = RESULTS


def run(checkout: Path, settings: Settings, cache: str) -> dict[str, float]:
    """Seconds of one run of the command of a checkout, whose programs are kept in `cache`."""
    model = HERE / "experiments" / "zoo" / f"{settings.model}.safetensors"
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, "-m", "ibau_jax", "defend", "--model", str(model), "--json"]
        preset = settings.preset if checkout == HERE else settings.before_preset
        command += ["--preset", preset or settings.preset, "--out", out]
        env = os.environ | {"PYTHONPATH": str(checkout), "IBAU_CACHE": cache}
        env = {k: v for k, v in env.items() if not k.startswith("JAX_COMPILATION_CACHE")}
        begin = time.perf_counter()
        done = subprocess.run(command, env=env, cwd=checkout, capture_output=True, text=True)
        wall = time.perf_counter() - begin
    if done.returncode:
        raise SystemExit(done.stderr)
    found = json.loads(done.stdout)
    work, compiling = found["seconds"], found["compile_seconds"]
    return {"wall": wall, "work": work, "compile": compiling, "rest": wall - work - compiling}


def main(settings: Settings) -> None:
    """Measure, write the rows, print the medians."""
    checkouts = {"now": HERE} | ({"before": settings.before} if settings.before else {})
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(1 + settings.repeats):
            for name, checkout in checkouts.items():
                seconds = run(checkout, settings, str(Path(folder) / name))
                which = "first" if number == 0 else "second"
                rows.append({"checkout": name, "run": which, **seconds})
                told = ", ".join(f"{k} {v:.1f} s" for k, v in seconds.items())
                print(f"{name}, {which} run: {told}", file=sys.stderr, flush=True)
    commits = {name: commit(checkout) for name, checkout in checkouts.items()}
    common = {"model": settings.model, "preset": settings.preset}
    write_rows(
        settings.out, [{**common, **row, "commit": commits[row["checkout"]]} for row in rows]
    )
    for name in checkouts:
        second = [row["wall"] for row in rows if (row["checkout"], row["run"]) == (name, "second")]
        print(f"{name}: second run {statistics.median(second):.1f} s in the median")


def commit(checkout: Path) -> str:
    git = ["git", "-C", str(checkout), "rev-parse", "--short", "HEAD"]
    return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__, config=(tyro.conf.OmitArgPrefixes,)))
