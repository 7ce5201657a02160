"""Time and memory of one outer gradient as the number of inner steps T grows.

    python experiments/benchmarks/implicit_vs_unrolled.py [--json]

The same projected ascent of T steps on the paper's VGG (random weights: cost does not depend on
them), then the gradient of the outer loss in the parameters: by the implicit hypergradient
(damped normal CG, as in the preset `untargeted`), by reverse mode through the steps, and by reverse
mode with `jax.checkpoint` around each step. Every cell runs in a process of its own. Memory is
what XLA allocates for intermediate values (exact), and the process's largest resident set.
"""

import json
import resource
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import tyro

from ibau_jax import IBAUConfig
from ibau_jax.results.rows import write_rows

RESULTS = Path(__file__).parents[1] / "results"
METHODS = ("implicit", "unrolled", "unrolled, checkpoint")


@dataclass
class Settings:
    """A row for each method and number of inner steps."""

    steps: tuple[int, ...] = (1, 5, 10, 20, 50, 100)
    images: int = 20
    repeats: int = 3
    json: bool = False
    """One JSON object on stdout."""
    out: Path = RESULTS / "implicit_vs_unrolled.jsonl"
    """The plot goes beside it (.png)."""
    cell: tuple[str, int] | None = None
    """Run one method with one T in this process (what the script calls itself with)."""


def one(settings: Settings, method: str, steps: int) -> dict:
    import jax
    import jax.numpy as jnp

    from ibau_jax.hypergradient import NormalCG, hypergradient, unrolled
    from ibau_jax.models.architectures import build
    from ibau_jax.models.model import evaluation_logits
    from ibau_jax.unlearning.batches import Batch
    from ibau_jax.unlearning.objective import make_inner, make_loss

    count = settings.images
    rng = np.random.default_rng(0)
    module = build("vgg", 10)
    variables = jax.jit(module.init)(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    microbatch = 10 if jax.default_backend() == "cpu" else None
    config = replace(IBAUConfig.untargeted(), microbatch=microbatch)
    batch = Batch(
        images=jnp.array(rng.uniform(size=(count, 32, 32, 3)), jnp.float32),
        labels=jnp.array(rng.integers(0, 10, count)),
        weights=jnp.full(count, 1 / count, jnp.float32),
        patched=jnp.ones(count, jnp.float32),
    )
    loss = make_loss(evaluation_logits(module, variables), config)
    inner = make_inner(loss, config)

    def step(_, delta, params):
        slope = jax.grad(inner)(delta, params, batch)
        return config.ball.project(delta - 0.1 * slope)

    def outer(delta, params):
        return loss(delta, params, batch)

    def implicit(params, zero):
        delta = jax.lax.fori_loop(0, steps, lambda i, d: step(i, d, params), zero)
        return hypergradient(
            outer, lambda d, p: inner(d, p, batch), delta, params, solver=NormalCG(2, 0.1)
        )[:2]

    def through(params, zero):
        return unrolled(outer, step, zero, params, steps=steps, checkpoint="checkpoint" in method)[
            :2
        ]

    run = jax.jit(implicit if method == "implicit" else through)
    arguments = (variables["params"], jnp.zeros((32, 32, 3)))
    started = time.perf_counter()
    compiled = run.lower(*arguments).compile()
    compile_seconds = time.perf_counter() - started
    seconds = []
    for _ in range(settings.repeats):
        started = time.perf_counter()
        jax.block_until_ready(compiled(*arguments))
        seconds.append(time.perf_counter() - started)
    memory = compiled.memory_analysis()
    return {
        "method": method,
        "steps": steps,
        "seconds": float(np.median(seconds)),
        "compile_seconds": compile_seconds,
        "temporary_mb": None if memory is None else memory.temp_size_in_bytes / 1e6,
        "resident_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3,
    }


def plot(rows: list[dict], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.4), layout="constrained")
    panels = (("temporary_mb", "memory of intermediate values [MB]"), ("seconds", "seconds"))
    for axes, (key, title) in zip(figure.subplots(1, 2), panels, strict=True):
        for method, style in zip(METHODS, ("o-", "s--", "^:"), strict=True):
            chosen = [row for row in rows if row["method"] == method]
            axes.plot([r["steps"] for r in chosen], [r[key] for r in chosen], style, label=method)
        axes.set(xlabel="inner steps T", ylabel=title, xscale="log", yscale="log")
        axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)


def main(settings: Settings) -> None:
    if settings.cell is not None:
        print(json.dumps(one(settings, *settings.cell)))
        return
    rows = []
    for steps in settings.steps:
        for method in METHODS:
            command = [sys.executable, __file__, "--cell", method, str(steps)]
            command += [f"--images={settings.images}", f"--repeats={settings.repeats}"]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            rows.append(json.loads(done.stdout.splitlines()[-1]))
            print(rows[-1], file=sys.stderr, flush=True)
            write_rows(settings.out, rows)
    plot(rows, settings.out.with_suffix(".png"))
    if settings.json:
        print(json.dumps({"rows": rows, "images": settings.images}))


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
