"""One round of the published I-BAU: ours against a plain PyTorch program of the same algorithm.

    [GLIBC_TUNABLES=glibc.malloc.hugetlb=1] python experiments/benchmarks/round_vs_torch.py \
        --checkpoint badnets_8_02_ckpt.pth [--json]

Needs CIFAR-10 (TFDS_DATA_DIR) and PyTorch (extra `torch`). Same weights, same 5000 images, same
two threads. Rounds alternate, ours and PyTorch's, each in a process of its own (their threads
would disturb each other in one); a process times its round and nothing else, ours apart from
compilation. ACC and ASR of both are measured by our evaluator. With the variable both sides have
large pages of memory, as `ibau` has by itself where Linux allows it (`commands.start`).

The PyTorch side is written from the paper and from the description of the published code, as its
users would write it: eager, the graph of the inner gradient built once an outer step and used by
all its products, the first product of the published loop (with a zero vector) left out as ours
leaves it out.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import tyro

from ibau_jax import IBAUConfig, load, unlearn
from ibau_jax.attacks import Attack, badnets_square
from ibau_jax.commands.start import VALUE, VARIABLE
from ibau_jax.models.architectures import build
from ibau_jax.models.model import evaluation_logits
from ibau_jax.models.torch_import import convert_pth
from ibau_jax.results.metrics import evaluator
from ibau_jax.results.rows import write_rows

RESULTS = Path(__file__).parents[1] / "results"
TARGET = 8  # of the published BadNets checkpoint


@dataclass
class Settings:
    """Alternating pairs of rounds."""

    checkpoint: Path
    """Published PyTorch checkpoint of the BadNets model."""
    pairs: int = 5
    images: int = 5000
    """Size of the clean set, in batches of 100."""
    json: bool = False
    """One JSON object on stdout."""
    out: Path = RESULTS / "round_vs_torch.jsonl"
    side: Literal["ours", "torch"] | None = None
    """Run one round of one side in this process (what the script calls itself with)."""
    seed: int = 0


def ours(settings: Settings, variables, clean) -> tuple[dict, float, float]:
    import jax

    logits = evaluation_logits(build("vgg", 10), variables)
    config = IBAUConfig.published("cifar10")
    key = jax.random.key(settings.seed)
    result = unlearn(logits, variables["params"], clean, config=config, key=key)
    return result.params, result.seconds, result.compile_seconds


def torch_round(modules, clean, seed: int, batch_size: int = 100) -> float:
    """A round in PyTorch, of the modules and on the device where they are; its seconds."""
    import torch
    from torch.autograd import grad
    from torch.nn.functional import cross_entropy
    from torch_vgg import logits

    params = list(modules.parameters())
    place = params[0].device

    def model(x):
        return logits(modules, x)

    x = torch.from_numpy(np.asarray(clean.images).transpose(0, 3, 1, 2).copy()).to(place)
    y = torch.from_numpy(np.asarray(clean.labels).astype(np.int64)).to(place)
    batches = list(zip(x.split(batch_size), y.split(batch_size), strict=True))
    draw = np.random.default_rng(seed)

    started = time.perf_counter()
    delta = torch.zeros_like(x[:1], requires_grad=True)
    for images, _ in batches:  # the ascent: one pass, rate 10
        with torch.no_grad():
            labels = model(images).argmax(1)
        inner = -cross_entropy(model(images + delta), labels) + 0.001 * (delta**2).sum()
        (slope,) = grad(inner, delta)
        delta = (delta - 10 * slope).detach().requires_grad_()
    with torch.no_grad():
        delta *= min(1.0, 10 / float(delta.norm()))

    optimizer = torch.optim.Adam(params, lr=1e-3)
    first, truth = batches[0]
    for images, labels in batches:
        patched = torch.zeros(len(images), 1, 1, 1, device=place)
        patched[draw.integers(len(images))] = 1
        outer = cross_entropy(model(images + patched * delta), labels)
        to_delta, *direct = grad(outer, [delta, *params])
        inner = -cross_entropy(model(first + delta), truth) + 0.001 * (delta**2).sum()
        (slope,) = grad(inner, delta, create_graph=True)
        v = to_delta
        for _ in range(4):
            (product,) = grad(slope, delta, v, retain_graph=True)
            v = v - 0.1 * product + to_delta
        mixed = grad(slope, params, v, allow_unused=True)
        for parameter, d, m in zip(params, direct, mixed, strict=True):
            parameter.grad = d if m is None else d - 0.1 * m
        optimizer.step()
    if place.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def pytorch(settings: Settings, clean) -> tuple[dict, float, float]:
    """The round in PyTorch; parameters come back in our layout."""
    import torch
    from torch_vgg import torch_vgg

    modules = torch_vgg(inplace=False)  # as its rows were measured
    content = torch.load(settings.checkpoint, map_location="cpu", weights_only=True)
    modules.load_state_dict(content["net"])
    seconds = torch_round(modules.eval(), clean, settings.seed)
    # Through a file, since that is where the layouts are translated.
    cleaned = settings.out.with_suffix(f".{settings.seed}.pth")
    cleaned.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"net": modules.state_dict()}, cleaned)
    variables, _, _ = convert_pth(cleaned)
    cleaned.unlink()
    return variables["params"], seconds, 0.0


def one(settings: Settings) -> dict:
    """A round in this process."""
    clean = load("cifar10", f"test[:{settings.images}]")
    variables, _, _ = convert_pth(settings.checkpoint)
    if settings.side == "ours":
        params, seconds, compile_seconds = ours(settings, variables, clean)
    else:
        params, seconds, compile_seconds = pytorch(settings, clean)
    logits = evaluation_logits(build("vgg", 10), variables)
    attack = Attack("badnets", badnets_square(), TARGET)
    found = evaluator(logits, load("cifar10", "test[5000:]"), [attack])(params)
    measured = {"acc": found.acc, "asr": found.asr, "asr_excl": found.asr_excl}
    times = {"seconds": seconds, "compile_seconds": compile_seconds}
    asked = os.environ.get(VARIABLE) == VALUE
    row = {"side": settings.side, "seed": settings.seed, "large_pages": asked}
    return {**row, **times, **measured}


def main(settings: Settings) -> None:
    if settings.side is not None:
        print(json.dumps(one(settings)))
        return
    rows, pairs = [], []
    for seed in range(settings.pairs):
        pair = []
        for side in ("ours", "torch"):
            arguments = [f"--side={side}", f"--seed={seed}", f"--images={settings.images}"]
            arguments += [f"--checkpoint={settings.checkpoint}", f"--out={settings.out}"]
            done = subprocess.run(
                [sys.executable, __file__, *arguments],
                check=True,
                stdout=subprocess.PIPE,
                text=True,
            )
            pair.append(json.loads(done.stdout.splitlines()[-1]))
            print(pair[-1], file=sys.stderr, flush=True)
        rows += pair
        pairs.append(pair[0]["seconds"] / pair[1]["seconds"])
        write_rows(settings.out, rows)
    summary = {"ratio": statistics.median(pairs), "pairs": pairs, "images": settings.images}
    for side in ("ours", "torch"):
        of_side = [row for row in rows if row["side"] == side]
        for key in ("seconds", "compile_seconds", "acc", "asr", "asr_excl"):
            summary[f"{side}_{key}"] = statistics.median(row[key] for row in of_side)
    if settings.json:
        print(json.dumps(summary))
    else:
        print("\n".join(f"{k}: {v}" for k, v in summary.items()))


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
