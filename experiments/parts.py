"""Parts of newer methods, each alone inside `unlearn`, all else as in the preset `untargeted`.

    python experiments/parts.py run [--models cifar10-l0] [--parts pam distilled]
    python experiments/parts.py table

On models of the zoo, evaluated on test[5000:7000] (these rows choose; they are no result). Needs
CIFAR-10 (TFDS_DATA_DIR). Rows go to `experiments/results/parts.jsonl` as they come; what is there
already is left out. With f0, w0 the given model and its parameters:

    default     nothing changed
    sam         outer gradient at w + e, e = rho T^2 g / ||T g||, T = |w|   (FT-SAM), rho 2
    pam         outer gradient at w + rho (w0 - w) / ||w0 - w||, rho 0.5    (PAM, NeurIPS 2024)
    not-that    patched images learn "not the label that f0 gives x + delta"        (SAU)
    shared      delta misleads f and f0 towards the same label: (CE_f + CE_f0) / 2 - JS     (SAU)
    distilled   half of the outer loss is against f0's probabilities of the clean image
    searched    distilled; a tenth of a batch carries what two searches found towards the target
                (which is given), and learns "not the target" too
    searched-not-that   the same; what carries delta learns "not the label that f0 gives" too
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import optax
import tyro
from grid import RESULTS as FOLDER
from grid import Row, fill, read
from zoo import prepare

from ibau_jax import IBAUConfig, load, unlearn
from ibau_jax.defenses.ft_sam import ascent
from ibau_jax.defenses.sau import divergence
from ibau_jax.errors import InputError, check_name
from ibau_jax.unlearning import ibau
from ibau_jax.unlearning.batches import Batch
from ibau_jax.unlearning.geometries import cosine, pixels, window
from ibau_jax.unlearning.objective import (
    clip_images,
    cross_entropy,
    in_parts,
    not_that_label,
    patch,
    patched_images,
)
from ibau_jax.unlearning.search import Search

RESULTS = FOLDER / "parts.jsonl"
MODELS = ("cifar10-badnets", "cifar10-trojan-watermark", "cifar10-l0")
Loss = Callable[..., jax.Array]
PLAIN, PLAIN_INNER = ibau.make_loss, ibau.make_inner


def moved(plain: Loss, step: Callable) -> Loss:
    """The loss whose gradient in the parameters is the one at params + step."""

    def loss(delta, params, batch):
        e = jax.lax.stop_gradient(step(delta, params, batch))
        return plain(delta, jax.tree.map(jnp.add, params, e), batch)

    return loss


def sam(logits, given, config, plain: Loss) -> Loss:
    del logits, given, config

    def step(delta, params, batch):
        return ascent(params, jax.grad(plain, argnums=1)(delta, params, batch), 2.0)

    return moved(plain, step)


def pam(logits, given, config, plain: Loss) -> Loss:
    del logits, config

    def step(delta, params, batch):
        del delta, batch
        back = jax.tree.map(jnp.subtract, given, params)
        size = optax.tree.norm(back)
        return jax.tree.map(lambda b: 0.5 * b / jnp.where(size > 0, size, 1), back)

    return moved(plain, step)


def not_that(logits, given, config, plain: Loss) -> Loss:
    del plain

    def loss(delta, params, batch):
        images = patched_images(delta, batch, config)
        found, wrong = logits(params, images), jnp.argmax(logits(given, images), -1)
        misled = (batch.patched > 0) & (wrong != batch.labels)
        usual = jnp.where(batch.patched > 0, 0, cross_entropy(found, batch.labels))
        return jnp.sum(batch.weights * jnp.where(misled, not_that_label(found, wrong), usual))

    return in_parts(loss, config)


def half_taught(found, of_given, batch: Batch) -> jax.Array:
    """Half against f0's probabilities of the clean image, half against the label: [N]."""
    taught = optax.losses.softmax_cross_entropy(found, jax.nn.softmax(of_given))
    return (taught + cross_entropy(found, batch.labels)) / 2


def distilled(logits, given, config, plain: Loss) -> Loss:
    del plain

    def loss(delta, params, batch):
        found = logits(params, patched_images(delta, batch, config))
        return jnp.sum(batch.weights * half_taught(found, logits(given, batch.images), batch))

    return in_parts(loss, config)


def shared(logits, given, config) -> Loss:
    """The inner loss, which delta minimises; every image carries it."""

    def loss(delta, params, batch):
        images = clip_images(batch.images + delta)
        one, two = logits(params, images), logits(given, images)
        both = cross_entropy(one, batch.labels) + cross_entropy(two, batch.labels)
        return jnp.sum(batch.weights * (divergence(one, two) - both / 2))

    return in_parts(loss, config)


SETS = (window(3), pixels(9), window(5), pixels(25), cosine(0.1))
SHARES = (0.05, 0.1)  # of a batch: delta's, and that of what was searched


def towards(logits, given, clean, target: int | None, seed: int) -> jax.Array:
    """What misleads more than a fifth of the images: [K, H, W, C]."""
    if target is None:
        raise InputError("all-to-all has no target to search towards: expected a one-target model")
    search, deltas = Search(logits, SETS), []
    for number in range(2):
        found = search(given, clean, [target], key=jax.random.key(10 * seed + number))
        deltas += [
            d for d, s in zip(found.deltas[:, 0], found.strength[:, 0], strict=True) if s > 0.2
        ]
    return jnp.stack([jnp.asarray(d) for d in deltas])


def patch_many(count: int, key, batch: Batch, share, axis=None) -> Batch:
    """`patched` is 0 (clean), 1 (delta), or 2 and more: the number of a searched perturbation."""
    del share, axis
    keys = jax.random.split(key)
    # The same key draws the same order, so that the second share holds the first.
    first, both = (patch(keys[0], batch, s).patched for s in (SHARES[0], sum(SHARES)))
    searched = both * (2 + jax.random.randint(keys[1], both.shape, 0, count))
    return batch._replace(patched=jnp.where(first > 0, 1, searched).astype(both.dtype))


def many(logits, given, config, searched: jax.Array, target: Any, not_that: bool) -> Loss:
    """The outer loss with delta and with what was `searched`."""

    def loss(delta, params, batch):
        which = batch.patched.astype(int)
        every = jnp.concatenate([jnp.zeros_like(delta)[None], delta[None], searched])
        images = clip_images(batch.images + every[which])
        found = logits(params, images)
        total = half_taught(found, logits(given, batch.images), batch)
        wrong = jnp.where(which > 1, target, jnp.argmax(logits(given, images), -1))
        away = (which > 1 - not_that) & (wrong != batch.labels)
        return jnp.sum(batch.weights * (total + jnp.where(away, not_that_label(found, wrong), 0)))

    return in_parts(loss, config)


OUTER = {"distilled": distilled, "pam": pam, "not-that": not_that, "sam": sam}
SEARCHED = ("searched", "searched-not-that")
PARTS = ("default", *OUTER, "shared", *SEARCHED)


@dataclass(frozen=True)
class Cell:
    """One run."""

    model: str
    part: str
    seed: int


@dataclass
class Run:
    """Which cells."""

    models: tuple[str, ...] = MODELS
    parts: tuple[str, ...] = PARTS
    seeds: tuple[int, ...] = (0,)
    out: Path = RESULTS


def run(grid: Run) -> None:
    """Fill the grid."""
    for part in grid.parts:
        check_name("part", part, PARTS)
    cells = [Cell(n, p, seed) for seed in grid.seeds for p in grid.parts for n in grid.models]
    fill(grid.out, cells, measure, lambda row: f"{row['acc']:.3f} {row['asr']:.3f}")


def measure(cell: Cell) -> Row:
    model, given, logits, look = prepare(cell.model)
    clean, key = load(model.dataset, "test[:5000]"), jax.random.key(cell.seed)
    part, target, searched, marked = cell.part, model.attacks[0].target, None, patch
    if part in SEARCHED:
        searched = towards(logits, given, clean, target, cell.seed)
        marked = partial(patch_many, len(searched))

    def make_loss(logits, config, axis=None) -> Loss:
        plain = PLAIN(logits, config, axis)
        if searched is not None:
            return many(logits, given, config, searched, target, part == SEARCHED[1])
        return OUTER[part](logits, given, config, plain) if part in OUTER else plain

    def make_inner(loss: Loss, config) -> Loss:
        del loss  # the outer one
        if part == "shared":
            return shared(logits, given, config)
        return PLAIN_INNER(PLAIN(logits, config), config)

    mocks = {"make_loss": make_loss, "make_inner": make_inner, "patch": marked}
    with mock.patch.multiple(ibau, **mocks):
        config = IBAUConfig.untargeted()
        found = unlearn(logits, given, clean, config=config, key=key)
    before, after = look(given), look(found.params)
    fields = ("acc", "asr", "asr_excl", "ra")
    jax.clear_caches()
    return {
        **{f"{k}_before": getattr(before, k) for k in fields[:2]},
        **{k: getattr(after, k) for k in fields},
        **{"seconds": found.seconds, "device": jax.devices()[0].device_kind},
    }


def table() -> None:
    """Print the table (Markdown): ACC / ASR / ASR excl., of seed 0."""
    cells = [(row["cell"], row) for row in read(RESULTS)]
    rows = {(cell["part"], cell["model"]): row for cell, row in cells if cell["seed"] == 0}
    print("| part |", " | ".join(MODELS), "|\n|---|" + "---|" * len(MODELS))
    first = [rows.get(("default", name)) for name in MODELS]
    given = [f"{r['acc_before']:.3f} / {r['asr_before']:.3f}" if r else "" for r in first]
    print("| as given |", " | ".join(given), "|")
    for part in PARTS:
        found = [rows.get((part, name)) for name in MODELS]
        shown = ("acc", "asr", "asr_excl")
        texts = [" / ".join(f"{r[k]:.3f}" for k in shown) if r else "" for r in found]
        print(f"| {part} |", " | ".join(texts), "|")


if __name__ == "__main__":
    commands = {"run": run, "table": table}
    flat = (tyro.conf.OmitArgPrefixes,)
    tyro.extras.subcommand_cli_from_dict(commands, description=__doc__, config=flat)
