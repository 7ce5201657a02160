"""What a GPU has to show, part by part, in one run of a few minutes.

    python experiments/gpu_check.py pack                 # cifar10.npz, where TFDS has CIFAR-10
    python experiments/gpu_check.py run --data cifar10.npz [--parts defend roofline] [--again]

Each part appends a row to `experiments/results/gpu.jsonl` as it ends; a part that has a row of this
kind of device already is left out. A part that fails gives a row with its error, and the next goes
on. `--tiny` runs all parts with small sizes, on any backend, with random images.

JAX multiplies float32 on NVIDIA's cards in TF32 (ten bits) where it is not told otherwise: what is
measured both ways has `tf32` and `float32`.
"""

import gzip
import json
import os
import statistics
import sys
import tempfile
import time
import traceback
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch shares the card

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from grid import read

from ibau_jax import SGD, IBAUConfig, unlearn
from ibau_jax.data import Dataset, load
from ibau_jax.devices.mesh import Devices, devices
from ibau_jax.errors import check_name
from ibau_jax.hypergradient import CG, GMRES, Dense, NormalCG, hypergradient, hypergradient_jaxopt
from ibau_jax.models.files import load_model
from ibau_jax.models.model import evaluation_logits
from ibau_jax.results.metrics import evaluator
from ibau_jax.results.rows import write_rows
from ibau_jax.unlearning.batches import make_batches, resolve
from ibau_jax.unlearning.config import PRESETS
from ibau_jax.unlearning.ibau import ibau

HERE = Path(__file__).parent
sys.path.append(str(HERE / "benchmarks"))
ZOO = HERE / "zoo"
KEY = jax.random.key(0)
RATES = {"tf32": "default", "float32": "highest"}  # as jax.default_matmul_precision says it


@dataclass
class Settings:
    """Which parts, and on what."""

    data: Path | None = None
    """CIFAR-10's test set as `pack` makes it; without it random images are taken."""
    parts: tuple[str, ...] = ()
    """Default: all."""
    again: bool = False
    """Measure anew what is there already."""
    tiny: bool = False
    """Small sizes: shows that the parts run."""
    budget: float = 480
    """Seconds after which no further part begins."""
    out: Path = HERE / "results" / "gpu.jsonl"

    @property
    def images(self) -> int:
        return 100 if self.tiny else 5000


def timed(run: Callable[[], Any], repeats: int = 5) -> float:
    """Median seconds of `run`, after one that is not counted."""
    spent = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        jax.block_until_ready(run())
        spent.append(time.perf_counter() - started)
    return statistics.median(spent[1:])


@cache
def cifar10(path: Path | None, count: int) -> tuple[Dataset, Dataset]:
    """`count` clean images, and as many to evaluate on: the first and the last of the test set."""
    if path is None:
        draw = np.random.default_rng(0)
        pixels, labels = draw.uniform(size=(2 * count, 32, 32, 3)), draw.integers(0, 10, 2 * count)
    else:
        with np.load(path) as file:
            pixels, labels = file["images"] / np.float32(255), file["labels"]
    data = Dataset(pixels.astype(np.float32), labels.astype(np.int32))
    return Dataset(*(a[:count] for a in data)), Dataset(*(a[-count:] for a in data))


def badnets(settings: Settings):
    """The zoo's model, its logits, and the data."""
    model = load_model(ZOO / "cifar10-badnets.safetensors")
    logits = evaluation_logits(model.module, model.variables)
    return model, logits, *cifar10(settings.data, settings.images)


def step_of(settings: Settings, config: IBAUConfig, size: int, on: Devices | None = None):
    """The ascent and the outer step of one batch of `size` images, compiled, with arguments."""
    on = devices(1) if on is None else on
    model, logits, clean, _ = badnets(settings)
    more = -(-size // len(clean.labels))  # the images again, where a batch is larger than the set
    batch = Dataset(*(np.concatenate([a] * more)[:size] for a in clean))
    config = replace(config, batch_size=size, rounds=1, inner_steps=config.inner_steps or 5)
    params = jax.device_put(model.variables["params"], on.all[0])
    config = resolve(config, logits, params, batch.images, 1)
    batches, sizes = make_batches(batch, config, on)
    batches = jax.tree.map(lambda a: a[0], batches)  # of the one device
    algorithm = ibau(logits, config, len(sizes))
    state, delta = algorithm.init(params, KEY), jnp.full((32, 32, 3), 0.05)
    ascend = jax.jit(algorithm.ascend).lower(params, batches, 0).compile()
    descend = jax.jit(algorithm.descend).lower(state, delta, batches, 0).compile()
    return (
        partial(ascend, params, batches, 0),
        partial(descend, state, delta, batches, 0),
        (ascend, descend),
    )


def device(settings: Settings) -> dict:
    """The card, and what it reaches: large products, and a copy in its memory."""
    size = 256 if settings.tiny else 8192
    found: dict[str, Any] = {}
    square = jax.random.normal(KEY, (size, size))
    for name, precision in RATES.items():
        with jax.default_matmul_precision(precision):
            seconds = timed(partial(jax.jit(jnp.matmul), square, square))
        found[f"{name}_tflops"] = 2 * size**3 / seconds / 1e12
    half = square.astype(jnp.bfloat16)
    found["bfloat16_tflops"] = 2 * size**3 / timed(partial(jax.jit(jnp.matmul), half, half)) / 1e12
    seconds = timed(partial(jax.jit(lambda a: a + 1), jnp.zeros(size**2 * 4)))
    found["copied_gbytes_per_second"] = 2 * 4 * size**2 * 4 / seconds / 1e9
    return found


def hypergradients(settings: Settings) -> dict:
    """Against the derivative of the exact minimum, in float64: the largest relative error."""
    del settings
    found = {}
    with jax.enable_x64(True):
        draw = np.random.default_rng(0)
        size = 12
        square = draw.normal(size=(size, size))
        hessian = square @ square.T + np.eye(size)
        couple = draw.normal(size=(size, 5))

        def inner(x, p):
            return x @ hessian @ x / 2 - x @ jnp.sin(couple @ p) + 0.01 * jnp.sum(jnp.cosh(x))

        def outer(x, p):
            return jnp.sum(jnp.cos(x) * x) + jnp.sum(p**3)

        def argmin(p):  # Newton's steps, unrolled
            x = jnp.zeros(size)
            for _ in range(12):
                x = x - jnp.linalg.solve(jax.hessian(inner)(x, p), jax.grad(inner)(x, p))
            return x

        p = jnp.asarray(draw.normal(size=5))
        exact = jax.grad(lambda p: outer(argmin(p), p))(p)
        ends = [outer(argmin(p + s * e), p + s * e) for e in np.eye(5) for s in (1e-5, -1e-5)]
        numeric = (jnp.array(ends[::2]) - jnp.array(ends[1::2])) / 2e-5
        found["finite_differences"] = float(jnp.abs(numeric - exact).max() / jnp.abs(exact).max())
        solvers = CG(50), NormalCG(200), GMRES(12), Dense()
        x = argmin(p)
        for route in (hypergradient, hypergradient_jaxopt):
            for solver in solvers:
                gradient = route(outer, inner, x, p, solver=solver)[1]
                name = f"{route.__name__}_{type(solver).__name__}".lower()
                found[name] = float(jnp.abs(gradient - exact).max() / jnp.abs(exact).max())
    return found


def agreement(settings: Settings) -> dict:
    """An ascent and a hypergradient of `published` on this device, against the same on the CPU."""
    # Steps of size 1 along the gradient: what moved is the hypergradient itself.
    config = replace(PRESETS["published"]("cifar10"), outer_optimizer=SGD(1.0), inner_steps=1)

    def once(on: Devices | None = None) -> tuple:
        ascend, descend, _ = step_of(settings, config, 4 if settings.tiny else 20, on)
        before = badnets(settings)[0].variables["params"]
        moved = jax.tree.map(lambda a, b: np.asarray(a) - b, descend()[0].params, before)
        return np.asarray(ascend()[0]), np.concatenate([m.ravel() for m in jax.tree.leaves(moved)])

    expected = once(Devices((jax.devices("cpu")[0],)))
    found: dict[str, float] = {}
    for name, precision in RATES.items():
        with jax.default_matmul_precision(precision):
            for what, one, two in zip(("ascent", "step"), once(), expected, strict=True):
                found[f"{what}_{name}"] = float(np.linalg.norm(one - two) / np.linalg.norm(two))
    return found


def defend(settings: Settings) -> dict:
    """`untargeted` and `published` on the zoo's BadNets: ACC, ASR, seconds."""
    model, logits, clean, held_back = badnets(settings)
    measure = evaluator(logits, held_back, model.attacks)
    before = measure(model.variables["params"])
    found: dict[str, Any] = {"before": before.row()}
    found["evaluation"] = timed(partial(measure, model.variables["params"]), 3)
    for preset in ("untargeted", "published"):
        config = PRESETS[preset]("cifar10")
        config = replace(config, rounds=1, inner_steps=2) if settings.tiny else config
        for name, precision in RATES.items():
            with jax.default_matmul_precision(precision):
                result = unlearn(logits, model.variables["params"], clean, config=config, key=KEY)
            seconds = [row["seconds"] for row in result.history]
            found[f"{preset}_{name}"] = {
                **measure(result.params).row(),
                "rounds": len(seconds),
                "seconds_a_round": statistics.median(seconds),
                "compile_seconds": result.compile_seconds,
            }
    return found


def round_vs_torch(settings: Settings) -> dict:
    """A round of `published`: seconds of ours, of PyTorch's, and their ratio."""
    import torch
    from round_vs_torch import torch_round
    from torch_vgg import load_variables, torch_vgg

    model, logits, clean, _ = badnets(settings)
    place = "cuda" if jax.default_backend() == "gpu" else "cpu"
    config = PRESETS["published"]("cifar10")
    config = replace(config, rounds=1, batch_size=min(config.batch_size, settings.images))
    found: dict[str, Any] = {}
    for name, precision in RATES.items():
        torch.backends.cuda.matmul.allow_tf32 = name == "tf32"
        torch.backends.cudnn.allow_tf32 = name == "tf32"
        with jax.default_matmul_precision(precision):
            two = replace(config, rounds=2)
            result = unlearn(logits, model.variables["params"], clean, config=two, key=KEY)
            ours = result.history[-1]["seconds"]
        spent = []
        for _ in range(2):  # the first warms up
            modules = load_variables(torch_vgg(inplace=False), model.variables).to(place)
            spent.append(torch_round(modules, clean, seed=0, batch_size=config.batch_size))
        found |= {f"ours_{name}": ours, f"torch_{name}": spent[-1]}
        found[f"ratio_{name}"] = ours / spent[-1]
    return found


def train_vs_torch(settings: Settings) -> dict:
    """Images a second of training: ours and PyTorch's, at two batch sizes."""
    import torch
    import train_vs_torch as benchmark

    place = "cuda" if jax.default_backend() == "gpu" else "cpu"
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    steps, found = (2 if settings.tiny else 50), {}
    for size in (8,) if settings.tiny else (128, 1024):
        draw = np.random.default_rng(0)
        images = draw.uniform(size=(4 * size, 32, 32, 3)).astype(np.float32)
        labels = draw.integers(0, 10, len(images)).astype(np.int32)
        of = benchmark.Settings(batch_size=size)
        sides = {
            "ours": benchmark.ours(of, "auto", images, labels),
            "torch": benchmark.pytorch(of, images, labels, place),
        }
        for name, step in sides.items():

            def several(step=step):
                for i in range(steps):
                    step(i)

            found[f"{name}_{size}"] = steps * size / timed(several, 3)
        found[f"ratio_{size}"] = found[f"ours_{size}"] / found[f"torch_{size}"]
    return found


def memory(settings: Settings) -> dict:
    """Images a second and memory of an outer step of `untargeted`, by batch size.

    `peak_bytes` is of the process so far, what trying out kernels took included.
    """
    found: dict[str, Any] = {}
    for size in (8,) if settings.tiny else (100, 1000, 8000):
        ascend, descend, programs = step_of(settings, PRESETS["untargeted"]("cifar10"), size)
        for name, run, program in zip(("ascent", "step"), (ascend, descend), programs, strict=True):
            work = 5 * size if name == "ascent" else size
            found[f"{name}_{size}_images_per_second"] = work / timed(run)
            about = program.memory_analysis()
            found[f"{name}_{size}_bytes"] = about.temp_size_in_bytes if about else None
    stats = jax.local_devices()[0].memory_stats() or {}
    found["peak_bytes"] = stats.get("peak_bytes_in_use")
    return found


def roofline(settings: Settings) -> dict:
    """Achieved TFLOP/s by stage of `published` (see benchmarks/roofline.py)."""
    import roofline as benchmark

    found = {}
    for size in (8,) if settings.tiny else (100, 1000):
        for name, precision in RATES.items():
            with jax.default_matmul_precision(precision):
                rows = benchmark.measure(benchmark.Settings(images=size, repeats=3))
            for row in rows:
                what = row["stage"].split(":")[0].split(",")[0].replace(" ", "_")
                found[f"{what}_{size}_{name}"] = row["gflops_per_second"] / 1e3
    return found


def trace(settings: Settings) -> dict:
    """The ten kernels that an outer step of `untargeted` spends most in, in ms a step."""
    _, descend, _ = step_of(
        settings, PRESETS["untargeted"]("cifar10"), 20 if settings.tiny else 100
    )
    jax.block_until_ready(descend())
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(3):
                jax.block_until_ready(descend())
        (file,) = Path(folder).rglob("*.trace.json.gz")
        events = json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
    names = {e["pid"]: e["args"]["name"] for e in events if e.get("name") == "process_name"}
    spent: dict[str, float] = defaultdict(float)
    for event in events:
        on_card = "GPU" in names.get(event.get("pid"), "") or jax.default_backend() == "cpu"
        if on_card and "hlo_op" in event.get("args", {}):
            spent[event["name"][:60]] += event["dur"] / 3e3
    top = sorted(spent.items(), key=lambda item: -item[1])[:10]
    return {"all": sum(spent.values()), "wall": timed(descend) * 1e3, "top": dict(top)}


PARTS: dict[str, Callable[[Settings], dict]] = {
    part.__name__: part
    for part in (
        *(device, hypergradients, agreement, defend, round_vs_torch, train_vs_torch),
        *(roofline, memory, trace),
    )
}


def run(settings: Settings) -> int:
    """Run the parts, print them, and count those that failed."""
    kind, started = jax.devices()[0].device_kind, time.perf_counter()
    rows = read(settings.out)
    failed = 0
    for name in settings.parts or PARTS:
        check_name("part", name, PARTS)
        there = any((r["part"], r["device"]) == (name, kind) and "error" not in r for r in rows)
        if (there and not settings.again) or time.perf_counter() - started > settings.budget:
            print(f"{name}: left out", file=sys.stderr, flush=True)
            continue
        row: dict[str, Any] = {"part": name, "device": kind, "jax": jax.__version__}
        row["compilation_cache"] = "JAX_COMPILATION_CACHE_DIR" in os.environ
        begun = time.perf_counter()
        try:
            row |= PARTS[name](settings)
        except Exception as error:  # the next part may do
            traceback.print_exc()
            row["error"] = f"{type(error).__name__}: {error}"[:500]
            failed += 1
        row["seconds"] = time.perf_counter() - begun
        rows = [r for r in rows if (r["part"], r["device"]) != (name, kind)] + [row]
        write_rows(settings.out, rows)
        print(json.dumps(row), flush=True)
    return failed


def pack(out: Path = Path("cifar10.npz")) -> None:
    """Write CIFAR-10's test set (from TFDS) into one file, for a machine without TFDS."""
    data = load("cifar10", "test")
    pixels = np.rint(data.images * 255).astype(np.uint8)
    np.savez_compressed(out, images=pixels, labels=data.labels.astype(np.uint8))


if __name__ == "__main__":
    commands = {"run": run, "pack": pack}
    flat = (tyro.conf.OmitArgPrefixes,)
    sys.exit(tyro.extras.subcommand_cli_from_dict(commands, description=__doc__, config=flat))
