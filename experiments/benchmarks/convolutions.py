"""What the rewriting of convolutions (`models/rewrite.py`) does on a CPU: ratios before / after.

    python experiments/benchmarks/convolutions.py [--json]

Programs: four steps of a `fori_loop` with a derivative of a small ResNet in each, on ten images,
channels last (flax's layers) and channels first (`lax.conv` as models from PyTorch have it).
Rounds: one round of `unlearn` with `IBAUConfig.untargeted()` on 200 images, of the ResNet and of
the paper's VGG; as flax's layers, as they are rewritten, and the VGG also as the package has it
(`models/vgg.py`, its products written by hand). Random weights: cost does not depend on them.

Forms take turns, in one process; a row has the medians over the turns, and the median of the
ratios of a turn. The rows of `results/convolutions.jsonl` are of three turns, on two cores that
were shared with two long experiments and with test suites (load 2 to 6): read ratios, and no
seconds. A ratio of 0.9 between the two forms of the VGG is noise: their products are the same.
"""

import contextlib
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import tyro

from ibau_jax import Dataset, IBAUConfig, unlearn
from ibau_jax.models import VGG, Classifier
from ibau_jax.models.rewrite import with_products
from ibau_jax.models.vgg import elu, max_pool
from ibau_jax.results.rows import write_rows

RESULTS = Path(__file__).parents[1] / "results"


@dataclass
class Settings:
    """A row for each program and each form of a round."""

    turns: int = 5
    images: int = 200
    """Of the clean set of a round."""
    only: str = ""
    """Rows whose name has this in it."""
    json: bool = False
    """One JSON object on stdout."""
    out: Path = RESULTS / "convolutions.jsonl"


class Conv(nn.Module):
    """Of [N, H, W, C], or of [N, C, H, W] where `first`."""

    width: int
    size: int = 3
    stride: int = 1
    first: bool = False

    @nn.compact
    def __call__(self, x):
        if not self.first:
            size, stride = (self.size,) * 2, self.stride
            return nn.Conv(self.width, size, stride, use_bias=False)(x)
        shape = (self.width, x.shape[1], self.size, self.size)
        kernel = self.param("kernel", nn.initializers.he_uniform(1, 0), shape)
        return jax.lax.conv(x, kernel, (self.stride, self.stride), "SAME")


class ResNet(nn.Module):
    """A block at each of three sizes; channels last or `first`."""

    width: int = 16
    first: bool = False

    @nn.compact
    def __call__(self, images):
        def norm(x):
            return nn.BatchNorm(True, axis=1 if self.first else -1)(x)

        x = images.transpose(0, 3, 1, 2) if self.first else images
        x = nn.relu(norm(Conv(self.width, first=self.first)(x)))
        for i, stride in enumerate((1, 2, 2)):
            width = self.width * 2**i
            y = nn.relu(norm(Conv(width, 3, stride, self.first)(x)))
            y = norm(Conv(width, first=self.first)(y))
            if x.shape != y.shape:
                x = norm(Conv(width, 1, stride, self.first)(x))
            x = nn.relu(x + y)
        return nn.Dense(10)(x.mean((2, 3) if self.first else (1, 2)))


class FlaxVGG(nn.Module):
    """`VGG` of flax's layers."""

    @nn.compact
    def __call__(self, x):
        for width in (32, 64, 128):
            for _ in range(2):
                x = elu(nn.BatchNorm(True)(nn.Conv(width, (3, 3))(x)))
            x = max_pool(x)
        return nn.Dense(10)(x.reshape(len(x), -1))


def drawn(images: int) -> Dataset:
    rng = np.random.default_rng(0)
    pictures = rng.uniform(size=(images, 32, 32, 3)).astype(np.float32)
    return Dataset(pictures, rng.integers(0, 10, images).astype(np.int32))


def programs(module: nn.Module) -> Iterator[tuple[str, list[Callable[[], Any]]]]:
    """A name, and the program as it was and rewritten, compiled at its first call."""
    images, labels = drawn(10)
    variables: Any = jax.jit(module.init)(jax.random.key(0), images[:1])
    params, fixed = variables["params"], {"batch_stats": variables["batch_stats"]}

    def logits(params, images):
        return module.apply({"params": params, **fixed}, images)

    def steps(logits, derivative, start):
        def loss(delta, params):
            found = jax.nn.log_softmax(logits(params, images + delta))
            return -jnp.take_along_axis(found, labels[:, None], 1).mean()

        def step(_, x):
            return jax.tree.map(lambda a, b: a - 0.01 * b, x, derivative(loss, x))

        program = jax.jit(lambda x: jax.lax.fori_loop(0, 4, step, x))
        return lambda: program(start)

    def product(loss, delta):
        slope = lambda delta: jax.grad(loss)(delta, params)  # noqa: E731
        return jax.jvp(slope, (delta,), (jnp.ones_like(delta),))[1]

    zero = jnp.zeros(images.shape[1:])
    derivatives = {
        "gradient in delta": (lambda loss, delta: jax.grad(loss)(delta, params), zero),
        "product with the Hessian": (product, zero),
        "gradient in the parameters": (lambda loss, p: jax.grad(loss, 1)(zero, p), params),
    }
    for name, (derivative, start) in derivatives.items():
        yield name, [steps(f, derivative, start) for f in (logits, with_products(logits))]


def compare(runs: list[Callable[[], Any]], turns: int) -> tuple[list[float], float, list[float]]:
    """Median seconds of each run, the median of first / last, and seconds of first calls."""

    def seconds(run):
        started = time.perf_counter()
        jax.block_until_ready(run())
        return time.perf_counter() - started

    first = [seconds(run) for run in runs]
    rows = [[seconds(run) for run in runs] for _ in range(turns)]
    medians = [statistics.median(column) for column in zip(*rows, strict=True)]
    return medians, statistics.median(row[0] / row[-1] for row in rows), first


@contextlib.contextmanager
def not_rewritten() -> Iterator[None]:
    with mock.patch("ibau_jax.models.model.on_cpu", lambda function: function):
        yield


def rounds(model: str, settings: Settings) -> Iterator[dict[str, Any]]:
    """Of each form of a model: seconds of a round, and how many times those of the first form."""
    vgg = model == "vgg"
    other: nn.Module = FlaxVGG() if vgg else ResNet()
    forms: dict[str, tuple[nn.Module, int | str | None, bool]] = {
        "rewritten, as unlearn takes it": (other, "auto", True),
        "rewritten, whole batch": (other, None, True),
        "lax.conv, whole batch": (other, None, False),
    }
    if vgg:
        forms = {"by hand": (VGG(10), "auto", True), **forms}
    clean = drawn(settings.images)
    variables = {
        name: jax.jit(module.init)(jax.random.key(0), clean.images[:1])
        for name, (module, _, _) in forms.items()
    }
    turns: dict[str, list[float]] = {name: [] for name in forms}
    compiled: dict[str, float] = {}
    for _ in range(settings.turns):
        for name, (module, microbatch, rewritten) in forms.items():
            config: Any = replace(IBAUConfig.untargeted(), rounds=1, microbatch=microbatch)
            with contextlib.nullcontext() if rewritten else not_rewritten():
                result = unlearn(
                    Classifier(module), variables[name], clean, config=config, key=jax.random.key(0)
                )
            turns[name].append(result.seconds)
            compiled.setdefault(name, result.compile_seconds)
    base = next(iter(turns.values()))
    for name, spent in turns.items():
        ratios = [a / b for a, b in zip(spent, base, strict=True)]
        yield {
            "model": model,
            "program": f"round of unlearn, {settings.images} images",
            "form": name,
            "seconds": statistics.median(spent),
            "ratio": statistics.median(ratios),
            "compile_seconds": compiled[name],
        }


def measure(settings: Settings) -> Iterator[dict[str, Any]]:
    for model, module in (("resnet, NHWC", ResNet()), ("resnet, NCHW", ResNet(first=True))):
        if settings.only not in model:
            continue
        for name, runs in programs(module):
            (before, after), ratio, first = compare(runs, settings.turns)
            yield {
                "model": model,
                "program": f"{name}, four steps in fori_loop",
                "before_ms": before * 1e3,
                "after_ms": after * 1e3,
                "ratio": ratio,
                "compile_seconds": [a - b for a, b in zip(first, (before, after), strict=True)],
            }
    for model in ("vgg", "resnet"):
        if settings.only in model:
            yield from rounds(model, settings)


def main(settings: Settings) -> None:
    rows = []
    for row in measure(settings):
        rows.append(row)
        print(row if not settings.json else json.dumps(row), file=sys.stderr, flush=True)
        write_rows(settings.out, rows)
    if settings.json:
        print(json.dumps({"rows": rows}))


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
