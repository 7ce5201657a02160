"""Messages between devices in an outer step, from the compiled program, and what they predict.

    python experiments/benchmarks/collectives.py [--json]

Compiles the preset `untargeted` for the paper's VGG on eight forced CPU devices and reads the
all-reduces from the HLO. The times for more devices are a prediction on paper, from these
messages, the FLOPs (`roofline.py`), and the rates given as arguments; nothing of it is measured.

    step(N) = FLOPs / (N rate) + messages * latency * log2(N) + 2 (N - 1) / N * bytes / bandwidth
"""

import json
import math
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

RESULTS = Path(__file__).parents[1] / "results"
SIZES = {"f32": 4, "s32": 4, "u32": 4, "pred": 1}


@dataclass
class Settings:
    """Count and predict."""

    rate: float = 10e12
    """FLOP/s that a device achieves on this model (assumed)."""
    latency: float = 5e-6
    """Seconds of a message for each doubling of the devices (assumed)."""
    bandwidth: float = 50e9
    """Bytes a second between devices (assumed)."""
    json: bool = False
    """One JSON object on stdout."""
    out: Path = RESULTS / "collectives.jsonl"


def messages(batch_size: int) -> tuple[list[int], list[int], int]:
    """Bytes of each all-reduce written in an ascent and in an outer step; products at run time."""
    import jax
    import numpy as np

    from ibau_jax import Dataset, IBAUConfig
    from ibau_jax.devices.mesh import devices
    from ibau_jax.models.architectures import build
    from ibau_jax.models.model import evaluation_logits
    from ibau_jax.unlearning.batches import make_batches, resolve
    from ibau_jax.unlearning.ibau import ibau

    on, rng = devices(), np.random.default_rng(0)
    images = rng.uniform(size=(batch_size, 32, 32, 3)).astype(np.float32)
    clean = Dataset(images, rng.integers(0, 10, batch_size).astype(np.int32))
    module = build("vgg", 10)
    variables = jax.jit(module.init)(jax.random.key(0), images[:1])
    logits, params = evaluation_logits(module, variables), variables["params"]
    config = resolve(IBAUConfig.untargeted(), logits, params, images, len(on.all))
    batches, numbers = make_batches(clean, config, on)
    algorithm = ibau(logits, config, len(numbers), on.axis)
    state = on.replicate(algorithm.init(params, jax.random.key(0)))
    zero, first = on.replicate((np.zeros((32, 32, 3), np.float32), np.int32(0)))
    ascend = on.compile(algorithm.ascend, state.params, batches, first, rows=(1,))
    descend = on.compile(algorithm.descend, state, zero, batches, first, rows=(2,))
    delta, _ = ascend(state.params, batches, first)
    _, step = descend(state, delta, batches, first)
    return sizes(ascend.as_text()), sizes(descend.as_text()), int(on.one(step.report.steps))


def sizes(program: str) -> list[int]:
    """Bytes of each all-reduce that a program has, as written (one in a loop counts once)."""
    found = []
    for line in program.splitlines():
        head, mark, _ = line.partition(" all-reduce(")
        if mark:
            shapes = re.findall(r"(\w+)\[([\d,]*)\]", head.partition("=")[2])
            found.append(
                sum(SIZES[t] * math.prod(map(int, filter(None, n.split(",")))) for t, n in shapes)
            )
    return found


def main(settings: Settings) -> None:
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
    from roofline import forward_flops

    from ibau_jax.results.rows import write_rows

    ascent, written, products = messages(100)
    # Normal CG writes three products and runs two of them in a loop.
    count = len(written) - 3 + products
    total = sum(written) + (products - 3) * min(written)
    rows = []
    for batch in (100, 4096):
        # Outer loss on the batch; on 10 images a primal pass (2), products (2 each), mixed (6).
        work = forward_flops() * (3 * batch + 10 * (2 + 2 * products + 6))
        for n in (1, 8, 64, 512):
            seconds = work / n / settings.rate
            if n > 1:
                seconds += count * settings.latency * math.log2(n)
                seconds += 2 * (n - 1) / n * total / settings.bandwidth
            rows.append(
                {
                    "batch": batch,
                    "devices": n,
                    "gflop": work / 1e9,
                    "messages": count,
                    "bytes": total,
                    "ascent_bytes": ascent,
                    "written_bytes": written,
                    "predicted_seconds": seconds,
                    "predicted_speedup": work / settings.rate / seconds,
                }
            )
    write_rows(settings.out, rows)
    if settings.json:
        print(json.dumps({"rows": rows}))
        return
    print(f"ascent step: all-reduces of {ascent} bytes; outer step as written: {written}")
    print(f"outer step as run: {count} all-reduces, {total} bytes ({products} products)")
    print("| batch | devices | predicted ms a step | predicted speedup |\n|---|---|---|---|")
    for r in rows:
        seconds, speedup = r["predicted_seconds"], r["predicted_speedup"]
        print(f"| {r['batch']} | {r['devices']} | {seconds * 1e3:.2f} | {speedup:.1f} |")


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Settings, description=__doc__)))
