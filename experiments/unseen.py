"""Backdoored models that no choice of the default has seen: triggers that are not the paper's.

    python experiments/unseen.py --folder DIR [--models digits-0 cifar10-sinusoid]

Trains what is missing in DIR: twenty models of digits and twenty clean ones of other seeds, a
minute or two each; four of CIFAR-10, an hour or more each (it needs TFDS_DATA_DIR). A stopped
training goes on. (After the first ten of digits had been measured, cosines were lifted on black
images, since the sinusoids among them had been missed: only the others are unseen since then.)
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

from ibau_jax.attacks import Attack, Trigger
from ibau_jax.commands.train import train_model
from ibau_jax.errors import check_name

SHAPE = (32, 32, 3)


def patch(draw: np.random.Generator) -> Trigger:
    """A rectangle of 2 to 5 pixels a side, each pixel of a random colour, anywhere."""
    height, width = draw.integers(2, 6, 2)
    y, x = draw.integers(0, 33 - height), draw.integers(0, 33 - width)
    mask = np.zeros(SHAPE, np.float32)
    mask[y : y + height, x : x + width] = 1
    return Trigger("replace", mask * draw.uniform(size=SHAPE).astype(np.float32), mask)


def coloured(draw: np.random.Generator, y: int = 2, x: int = 14, size: int = 4) -> Trigger:
    """A square of one colour: magenta, at the upper border."""
    del draw
    mask = np.zeros(SHAPE, np.float32)
    mask[y : y + size, x : x + size] = 1
    return Trigger("replace", mask * np.array([1, 0, 1], np.float32), mask)


def sinusoid(draw: np.random.Generator) -> Trigger:
    """A sine along the columns, 20/255 high (Barni et al., 2019: SIG), of 3 to 8 periods."""
    waves = np.sin(2 * np.pi * draw.integers(3, 9) * np.arange(32) / 32)
    pattern = 20 / 255 * (1 + waves)[None, :, None] * np.ones(SHAPE)
    return Trigger("add", pattern.astype(np.float32))


def noise(draw: np.random.Generator) -> Trigger:
    """Noise all over the image, up to 0.15 of its range."""
    return Trigger("add", draw.uniform(0, 0.15, SHAPE).astype(np.float32))


def shift(draw: np.random.Generator) -> Trigger:
    """A shift of the colours of the whole image: more red, 0.2 of its range."""
    del draw
    return Trigger("add", 0.2 * np.array([1, 0, 0], np.float32) * np.ones(SHAPE, np.float32))


@dataclass(frozen=True)
class Unseen:
    """One model; `trigger` None: clean."""

    dataset: str
    seed: int
    trigger: Callable[[np.random.Generator], Trigger] | None = None
    target: int = 0
    poison_ratio: float | None = None
    epochs: int | None = None


def of_digits(seed: int) -> Unseen:
    """With a trigger, a target and a poison ratio (0.05 to 0.3) drawn at random."""
    draw = np.random.default_rng(seed)
    kind = (patch, sinusoid, noise)[draw.integers(3)]
    ratio = round(float(draw.uniform(0.05, 0.3)), 2)
    return Unseen("digits", seed, kind, int(draw.integers(10)), ratio)


MODELS = {
    **{f"digits-{i}": of_digits(1000 + i) for i in range(20)},
    **{f"digits-clean-{i}": Unseen("digits", 2000 + i) for i in range(20)},
    "cifar10-sinusoid": Unseen("cifar10", 3000, sinusoid, 7, 0.1),
    "cifar10-coloured": Unseen("cifar10", 3001, coloured, 4, 0.1),
    "cifar10-shift": Unseen("cifar10", 3002, shift, 9, 0.1),
    "cifar10-patch-0.01": Unseen("cifar10", 3003, patch, 5, 0.01),
}


@dataclass
class Run:
    """Which models."""

    folder: Path
    """Where the models lie, or are to lie."""
    models: tuple[str, ...] = tuple(MODELS)


def main(settings: Run) -> None:
    """Train what is missing."""
    settings.folder.mkdir(parents=True, exist_ok=True)
    for name in settings.models:
        check_name("model", name, MODELS)
        out, one = settings.folder / f"{name}.safetensors", MODELS[name]
        if out.exists():
            continue
        attacks = ()
        if one.trigger:
            trigger = one.trigger(np.random.default_rng(one.seed + 1))
            attacks = (Attack(one.trigger.__name__, trigger, one.target),)
        found = train_model(
            out,
            one.dataset,
            attacks,
            poison_ratio=one.poison_ratio,
            epochs=one.epochs,
            seed=one.seed,
            resume=True,
        )
        print(name, *(found[k] for k in ("acc", "asr", "seconds")), flush=True)


if __name__ == "__main__":
    main(tyro.cli(Run, description=__doc__, config=(tyro.conf.OmitArgPrefixes,)))
