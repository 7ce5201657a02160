"""Achieved GFLOP/s of each stage of a round against the machine's matrix-product rate.

    python experiments/benchmarks/roofline.py [--json]

The paper's VGG with random weights, a batch of 100, the settings of the preset `published`.
FLOPs are those that the algorithm needs: F is a forward pass (two for each multiply-add of the
convolutions and the dense layer); a gradient in the images takes 2 F, in images and parameters
3 F, a product with the linearised inner gradient 2 F, its primal pass 2 F, the mixed product 6 F
without the primal parameter gradient. Stages that run inside one program are told apart by
differences: a product is a quarter of nine Neumann terms minus five.

Stages take turns, and each row is the median over the turns.
"""

import json
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import tyro

from ibau_jax import IBAUConfig
from ibau_jax.results.rows import write_rows

RESULTS = Path(__file__).parents[1] / "results"


@dataclass
class Settings:
    """A row for each stage."""

    images: int = 100
    microbatch: int | None = None
    """Images differentiated at a time; default: what `unlearn` would take."""
    repeats: int = 7
    json: bool = False
    """One JSON object on stdout."""
    out: Path = RESULTS / "roofline.jsonl"
    """The plot goes beside it (.png)."""


def forward_flops(widths=(32, 64, 128), size: int = 32, classes: int = 10) -> float:
    """FLOPs of a forward pass of one image."""
    total, inputs = 0, 3
    for width in widths:
        total += 2 * size**2 * 9 * (inputs + width) * width
        inputs, size = width, size // 2
    return total + 2 * size**2 * inputs * classes


def measure(settings: Settings) -> list[dict]:
    import jax
    import jax.numpy as jnp

    from ibau_jax.hypergradient import Direct, Neumann, hypergradient
    from ibau_jax.models.architectures import build
    from ibau_jax.models.model import evaluation_logits
    from ibau_jax.unlearning.batches import Batch, resolve
    from ibau_jax.unlearning.objective import make_inner, make_loss

    count = settings.images
    rng = np.random.default_rng(0)
    module = build("vgg", 10)
    variables = jax.jit(module.init)(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    logits, params = evaluation_logits(module, variables), variables["params"]
    images = jnp.array(rng.uniform(size=(count, 32, 32, 3)), jnp.float32)
    config = replace(IBAUConfig.published("cifar10"), microbatch=settings.microbatch or "auto")
    config = resolve(config, logits, params, images)
    batch = Batch(
        images=images,
        labels=jnp.array(rng.integers(0, 10, count)),
        weights=jnp.full(count, 1 / count, jnp.float32),
        patched=jnp.zeros(count, jnp.float32).at[0].set(1),
    )
    delta = jnp.array(rng.normal(size=(32, 32, 3)) * 0.1, jnp.float32)
    loss = make_loss(logits, config)
    inner = make_inner(loss, config)

    def step(solver):
        return lambda d, p, b: hypergradient(
            lambda d, p: loss(d, p, b), lambda d, p: inner(d, p, b), d, p, solver=solver
        )[:2]

    size = 2048
    square = jnp.array(rng.normal(size=(size, size)), jnp.float32)
    programs = {
        "matrix": (jax.jit(jnp.matmul), (square, square)),
        "forward": (jax.jit(loss), (delta, params, batch)),
        "ascent": (jax.jit(jax.value_and_grad(inner)), (delta, params, batch)),
        "direct": (jax.jit(step(Direct())), (delta, params, batch)),
        "five": (jax.jit(step(Neumann(5, 0.1))), (delta, params, batch)),
        "nine": (jax.jit(step(Neumann(9, 0.1))), (delta, params, batch)),
    }
    compiled = {k: (f.lower(*a).compile(), a) for k, (f, a) in programs.items()}
    turns: dict[str, list[float]] = {k: [] for k in compiled}
    for _ in range(settings.repeats + 1):
        for name, (run, arguments) in compiled.items():
            started = time.perf_counter()
            jax.block_until_ready(run(*arguments))
            turns[name].append(time.perf_counter() - started)
    seconds = {k: float(np.median(v[1:])) for k, v in turns.items()}

    product = (seconds["nine"] - seconds["five"]) / 4
    rest = seconds["five"] - 4 * product - seconds["direct"]
    work = forward_flops() * count / 1e9
    stages = [
        ("matrix product 2048^3", 2 * size**3 / 1e9, seconds["matrix"]),
        ("forward pass", work, seconds["forward"]),
        ("ascent step: gradient in the images", 2 * work, seconds["ascent"]),
        ("outer loss: gradient in images and parameters", 3 * work, seconds["direct"]),
        ("product with the inner Hessian", 2 * work, product),
        ("primal pass and mixed product", 8 * work, rest),
        ("outer step, 5 Neumann terms", 19 * work, seconds["five"]),
    ]
    top = stages[0][1] / stages[0][2]
    return [
        {
            "stage": name,
            "gflop": flops,
            "seconds": spent,
            "gflops_per_second": flops / spent,
            "share_of_matrix_rate": flops / spent / top,
        }
        for name, flops, spent in stages
    ]


def plot(rows: list[dict], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3), layout="constrained")
    axes = figure.subplots()
    bars = axes.barh([r["stage"] for r in rows], [r["gflops_per_second"] for r in rows])
    axes.bar_label(bars, [f"{r['seconds'] * 1e3:.0f} ms" for r in rows], padding=3, fontsize=8)
    axes.axvline(rows[0]["gflops_per_second"], color="0.5", linestyle="--")
    axes.invert_yaxis()
    axes.set(xlabel="GFLOP/s (dashed: the machine's matrix products)")
    figure.savefig(path, dpi=120)


def main(settings: Settings) -> None:
    rows = measure(settings)
    write_rows(settings.out, rows)
    plot(rows, settings.out.with_suffix(".png"))
    if settings.json:
        print(json.dumps({"rows": rows}))
        return
    for row in rows:
        print(
            f"{row['stage']:46s} {row['gflop']:7.1f} GFLOP {row['seconds'] * 1e3:8.1f} ms "
            f"{row['gflops_per_second']:7.1f} GFLOP/s {row['share_of_matrix_rate']:6.1%}"
        )


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Settings, description=__doc__)))
