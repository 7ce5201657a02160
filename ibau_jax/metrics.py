"""ACC, ASR, ASR without target-class images, and RA."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ibau_jax.attacks import Attack
from ibau_jax.data import Dataset
from ibau_jax.errors import InputError
from ibau_jax.models import Logits


class Metrics(NamedTuple):
    """Fractions in [0, 1]; those that need an attack are None without one.

    Attributes:
      acc: accuracy on the clean images.
      asr: share of all triggered images that get the target, target-class images included
        (the convention of the paper's tables: it reproduces them to the last digit).
      asr_excl: the same without images whose true label is the target.
      ra: share of the triggered non-target images that get their true label
        (recovery accuracy).
      n: number of images.
    """

    acc: float
    asr: float | None
    asr_excl: float | None
    ra: float | None
    n: int


def predict(logits: Logits, batch_size: int | None = None) -> Callable[[Any, Any], np.ndarray]:
    """A compiled `predict(params, images [N, H, W, C]) -> labels int32 [N]`.

    The batch size does not change the result; by default it suits the backend's memory.
    """
    if batch_size is None:
        batch_size = 20 if jax.default_backend() == "cpu" else 500
    compiled = jax.jit(lambda params, images: jnp.argmax(logits(params, images), -1))

    def run(params, images):
        found = []
        for start in range(0, len(images), batch_size):
            batch = np.asarray(images[start : start + batch_size])
            short = batch_size - len(batch) if start else 0  # one shape, one compilation
            batch = np.pad(batch, [(0, short)] + [(0, 0)] * (batch.ndim - 1))
            found.append(compiled(params, batch)[: batch_size - short])
        return np.concatenate([np.asarray(f) for f in found]).astype(np.int32)

    return run


def evaluator(
    logits: Logits, data: Dataset, attack: Attack | None = None, batch_size: int | None = None
) -> Callable[[Any], Metrics]:
    """`evaluate(params) -> Metrics` on fixed data; compiles once, triggers are stamped once.

    Args:
      data: held-out images [N, H, W, C] and labels [N].
      attack: the known attack, or None where there is none to measure.

    Raises:
      InputError: `data` is empty.
    """
    if not len(data.images):
        raise InputError("nothing to evaluate on: the split is empty")
    labels = np.asarray(data.labels)
    triggered = None if attack is None else np.asarray(attack.trigger(np.asarray(data.images)))
    run = predict(logits, batch_size)

    def evaluate(params) -> Metrics:
        acc = float(np.mean(run(params, data.images) == labels))
        if attack is None or triggered is None:
            return Metrics(acc, None, None, None, len(labels))
        found = run(params, triggered)
        other = labels != attack.target
        hit = found == attack.target
        return Metrics(
            acc=acc,
            asr=float(hit.mean()),
            asr_excl=float(hit[other].mean()) if other.any() else None,
            ra=float((found == labels)[other].mean()) if other.any() else None,
            n=len(labels),
        )

    return evaluate


def defense_effectiveness(before: Metrics, after: Metrics) -> float | None:
    """DER in [0, 1]: (max(0, fall of ASR) - max(0, fall of ACC) + 1) / 2.

    Defense effectiveness rate as BackdoorBench states it (its code has the wrong sign for the
    fall of ACC in one place).
    """
    if before.asr is None or after.asr is None:
        return None
    fall = max(0.0, before.asr - after.asr)
    return (fall - max(0.0, before.acc - after.acc) + 1) / 2
