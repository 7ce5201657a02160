"""Images a second of training: ours against a plain PyTorch loop of the same model.

    [GLIBC_TUNABLES=glibc.malloc.hugetlb=1] python experiments/benchmarks/train_vs_torch.py

All take Adam steps on the same batches of random images (training does not depend on them),
in turn in one process, compilation and first steps apart. `ours` is the step of `ibau train`, `lax`
the same with XLA's own convolutions. Rows go to `experiments/results/train_vs_torch.jsonl`.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

from ibau_jax.commands.start import VALUE, VARIABLE
from ibau_jax.results.rows import write_rows

# As `ibau` does where Linux allows it (`commands.start`); for both, since it is one process.
ASKED = os.environ.get(VARIABLE) == VALUE
RESULTS = Path(__file__).parents[1] / "results" / "train_vs_torch.jsonl"


@dataclass
class Settings:
    """Rounds of one after the other."""

    rounds: int = 5
    steps: int = 30
    batch_size: int = 64
    json: bool = False
    """One JSON object on stdout."""
    out: Path = RESULTS


def ours(
    settings: Settings, conv: str, images: np.ndarray, labels: np.ndarray
) -> Callable[[int], None]:
    import jax
    import jax.numpy as jnp

    from ibau_jax.models.architectures import build
    from ibau_jax.models.model import Classifier
    from ibau_jax.training.loop import Rows, TrainState, cross_entropy, make_step
    from ibau_jax.training.train import TrainConfig

    module, optimizer = build("vgg", 10, conv=conv), TrainConfig.paper().transform(1)
    variables = jax.jit(module.init)(jax.random.key(0), images[:1])
    state = TrainState(variables, optimizer.init(variables["params"]), jax.random.key(1))
    objective = cross_entropy(Classifier(module))
    step = jax.jit(make_step(objective, optimizer), donate_argnums=0)
    order = np.arange(len(labels)).reshape(-1, settings.batch_size)
    arguments = jnp.asarray(images), jnp.asarray(labels), Rows(jnp.asarray(order), None)

    def run(i: int) -> None:
        nonlocal state
        state, loss = step(state, *arguments, i % len(order))
        loss.block_until_ready()

    return run


def pytorch(
    settings: Settings, images: np.ndarray, labels: np.ndarray, device: str = "cpu"
) -> Callable[[int], None]:
    import torch
    from torch_vgg import logits, torch_vgg

    model = torch_vgg().to(device)
    optimizer, loss_of = torch.optim.Adam(model.parameters(), 0.05), torch.nn.CrossEntropyLoss()
    x = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2))).to(device)
    y = torch.from_numpy(labels).long().to(device)
    size = settings.batch_size

    def run(i: int) -> None:
        start = i * size % len(y)
        optimizer.zero_grad()
        loss = loss_of(logits(model, x[start : start + size]), y[start : start + size])
        loss.backward()
        optimizer.step()
        loss.item()

    return run


def main(settings: Settings) -> None:
    rng = np.random.default_rng(0)
    images = rng.uniform(size=(20 * settings.batch_size, 32, 32, 3)).astype(np.float32)
    labels = rng.integers(0, 10, len(images)).astype(np.int32)
    sides = {
        "ours": ours(settings, "auto", images, labels),
        "lax": ours(settings, "lax", images, labels),
        "torch": pytorch(settings, images, labels),
    }

    def rate(step: Callable) -> float:
        started = time.perf_counter()
        for i in range(settings.steps):
            step(i)
        return settings.steps * settings.batch_size / (time.perf_counter() - started)

    for step in sides.values():
        for i in range(2):  # compiles
            step(i)
    rows = []
    for _ in range(settings.rounds):
        rates = {name: rate(step) for name, step in sides.items()}
        rows.append({"batch_size": settings.batch_size, "large_pages": ASKED, **rates})
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    write_rows(settings.out, rows)
    found = {
        **{name: float(np.median([row[name] for row in rows])) for name in sides},
        "ours_to_torch": float(np.median([row["ours"] / row["torch"] for row in rows])),
        "ours_to_lax": float(np.median([row["ours"] / row["lax"] for row in rows])),
        "rounds": rows,
    }
    if settings.json:
        print(json.dumps(found))
    else:
        print(", ".join(f"{name} {found[name]:.0f}" for name in sides), "images a second")
        print(
            f"ours to PyTorch {found['ours_to_torch']:.2f}, to lax.conv {found['ours_to_lax']:.2f}"
        )


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
