"""Messages between devices in an outer step, from the compiled program, and what they predict.

    python experiments/benchmarks/collectives.py [--json]

Compiles the presets `default` and `untargeted` for the paper's VGG on eight forced CPU devices and
reads the all-reduces from the HLO. The times for more devices are a prediction on paper, from these
messages, the FLOPs (`roofline.py`), and the rates given as arguments. A step is an outer one with
its share of the ascents (one step of them on average).

    step(N) = max(host, FLOPs / (N rate) + messages * latency * log2(N)
                        + 2 (N - 1) / N * bytes / bandwidth)

Only `host` is measured, here: the time that Python and JAX take until both calls return, on one CPU
device. An accelerator computes while the host makes the next calls, so the larger one counts.
"""

import json
import math
import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import tyro

RESULTS = Path(__file__).parents[1] / "results"
PRESETS = ("default", "untargeted")
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
    host: str = ""
    """Measure the host's time of this preset alone."""
    json: bool = False
    """One JSON object on stdout."""
    out: Path = RESULTS / "collectives.jsonl"


def programs(preset: str, batch_size: int, widths: tuple[int, ...] | None, side: int = 32):
    """Both programs of a preset for a VGG, with arguments: `ascend`, `descend`, their own."""
    import jax
    import numpy as np

    from ibau_jax import Dataset, IBAUConfig
    from ibau_jax.devices.mesh import devices
    from ibau_jax.models.architectures import build
    from ibau_jax.models.model import evaluation_logits
    from ibau_jax.unlearning.batches import make_batches, make_mixtures, resolve
    from ibau_jax.unlearning.ibau import ibau
    from ibau_jax.unlearning.objective import Aim

    on, rng = devices(), np.random.default_rng(0)
    images = rng.uniform(size=(batch_size, side, side, 3)).astype(np.float32)
    clean = Dataset(images, rng.integers(0, 10, batch_size).astype(np.int32))
    module = build("vgg", 10, **({"widths": widths} if widths else {}))
    variables = jax.jit(module.init)(jax.random.key(0), images[:1])
    logits, params = evaluation_logits(module, variables), variables["params"]
    config = IBAUConfig() if preset == "default" else IBAUConfig.untargeted()
    config = replace(config, batch_size=batch_size)
    config = resolve(config, logits, params, images, len(on.all))
    aim, taught = None, None
    if config.searched:

        def teach(images):
            return np.full((len(images), 10), 0.1, np.float32)

        taught, zero = teach(images), np.zeros((side, side, 3), np.float32)
        rule = np.zeros(10, np.int32)
        pool, rules = np.stack([zero] * 9), np.stack([rule] * 9)
        aim = on.replicate(Aim(rule, zero, pool, rules, np.int32(9), np.float32(1)))
    batches, numbers = make_batches(clean, config, on, taught)
    if config.mixed:
        batches = batches._replace(mixed=make_mixtures(clean, config, 0, teach, on))
    algorithm = ibau(logits, config, len(numbers), on.axis)
    state = on.replicate(algorithm.init(params, jax.random.key(0)))
    delta, first = on.replicate((np.zeros((side, side, 3), np.float32), np.int32(0)))
    arguments = (state.params, batches, first, aim), (state, delta, batches, first, aim)
    ascend = on.compile(algorithm.ascend, *arguments[0], rows=(1,))
    descend = on.compile(algorithm.descend, *arguments[1], rows=(2,))
    return (ascend, arguments[0]), (descend, arguments[1])


def messages(preset: str, batch_size: int) -> tuple[list[int], list[int], int]:
    """Bytes of each all-reduce written in an ascent and in an outer step; products at run time."""
    (ascend, _), (descend, arguments) = programs(preset, batch_size, None)
    _, step = descend(*arguments)
    products = int(step.report.steps.addressable_data(0))
    return sizes(ascend.as_text()), sizes(descend.as_text()), products


def host_seconds(preset: str, steps: int = 100) -> float:
    """Of the calls of an outer step and a 25th of an ascent, until they return."""
    import jax

    (ascend, of_ascent), (descend, (state, *rest)) = programs(preset, 10, (2, 2, 2), 8)
    totals = []
    for _ in range(5):
        total = 0.0
        for i in range(steps):
            started = time.perf_counter()
            result = ascend(*of_ascent) if i % 25 == 0 else None
            state, step = descend(state, *rest)
            total += time.perf_counter() - started
            jax.block_until_ready((result, state, step))
        totals.append(total / steps)
    return min(totals)


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


def predicted(preset: str, host: float, settings: Settings) -> list[dict]:
    """Rows of a preset, of two batch sizes and some numbers of devices."""
    from roofline import forward_flops

    ascent, written, products = messages(preset, 100)
    # Normal CG writes three products and runs two of them in a loop.
    count = len(written) - 3 + products
    total = sum(written) + (products - 3) * min(written)
    rows = []
    for batch in (100, 4096):
        # Outer loss on the batch, and on half as many mixtures; a step of an ascent (2); on 10
        # images a primal pass (2), products (2 each), mixed (6).
        seen = 1.5 * batch if preset == "default" else batch
        work = forward_flops() * (3 * seen + 2 * batch + 10 * (2 + 2 * products + 6))
        for n in (1, 8, 64, 512):
            seconds = work / n / settings.rate
            if n > 1:
                seconds += (count + len(ascent)) * settings.latency * math.log2(n)
                seconds += 2 * (n - 1) / n * (total + sum(ascent)) / settings.bandwidth
            seconds = max(seconds, host)
            rows.append(
                {
                    "preset": preset,
                    "batch": batch,
                    "devices": n,
                    "gflop": work / 1e9,
                    "messages": count,
                    "bytes": total,
                    "ascent_bytes": ascent,
                    "written_bytes": written,
                    "host_seconds": host,
                    "predicted_seconds": seconds,
                    "predicted_speedup": work / settings.rate / seconds,
                }
            )
    return rows


def main(settings: Settings) -> None:
    if settings.host:  # in a process of one device
        print(host_seconds(settings.host))
        return
    hosts = {}
    for preset in PRESETS:
        command = [sys.executable, __file__, "--host", preset]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        hosts[preset] = float(done.stdout)
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
    from ibau_jax.results.rows import write_rows

    rows = [row for preset in PRESETS for row in predicted(preset, hosts[preset], settings)]
    write_rows(settings.out, rows)
    if settings.json:
        print(json.dumps({"rows": rows}))
        return
    for preset in PRESETS:
        row = next(row for row in rows if row["preset"] == preset)
        print(
            f"{preset}: ascent step: all-reduces of {row['ascent_bytes']} bytes; outer step as "
            f"written: {row['written_bytes']}, as run: {row['messages']}, {row['bytes']} bytes; "
            f"host: {1e3 * row['host_seconds']:.2f} ms"
        )
    print("| preset | batch | devices | predicted ms a step | predicted speedup |")
    print("|---|---|---|---|---|")
    for r in rows:
        seconds, speedup = r["predicted_seconds"], r["predicted_speedup"]
        print(
            f"| {r['preset']} | {r['batch']} | {r['devices']} | {seconds * 1e3:.2f} | "
            f"{speedup:.1f} |"
        )


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Settings, description=__doc__)))
