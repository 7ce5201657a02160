"""ACC, ASR, ASR without target-class images, and RA; means where there are several attacks."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from ibau_jax.attacks import Attack
from ibau_jax.data import Dataset, check_data, check_labels
from ibau_jax.errors import InputError
from ibau_jax.models.model import Logits
from ibau_jax.models.predict import predict


class Metrics(NamedTuple):
    """Fractions in [0, 1]; those that need an attack are None without one.

    Attributes:
      acc: accuracy on the clean images.
      asr: share of all triggered images that get the label the attack wants, images of that
        label included (the convention of the paper's tables: it reproduces them to the last
        digit).
      asr_excl: the same without images whose true label is the wanted one (in the all-to-all
        scenario there are none).
      ra: share of these other images that get their true label (recovery accuracy).
      n: number of images.
      by_attack: the ASR of each attack by name, where there are several (the others are then
        means over them); else None.
    """

    acc: float
    asr: float | None
    asr_excl: float | None
    ra: float | None
    n: int
    by_attack: dict[str, float] | None = None

    def row(self) -> dict[str, Any]:
        """For JSON: `by_attack` only where there are several attacks."""
        return {k: v for k, v in self._asdict().items() if k != "by_attack" or v is not None}


def evaluator(
    logits: Logits, data: Dataset, attacks: Sequence[Attack] = (), batch_size: int | None = None
) -> Callable[[Any], Metrics]:
    """`evaluate(params) -> Metrics` on fixed data; compiles once, triggers are stamped once.

    Args:
      data: held-out images [N, H, W, C] and labels [N].
      attacks: those that are known; empty where there is none to measure.

    Raises:
      InputError: `data` are not as described, or a trigger makes of them what is no image; and by
        `evaluate`, where a label or a target is no class of the model.
    """
    images, labels = check_data(data, "evaluation")
    triggered = [attack.stamp(images) for attack in attacks]
    run = predict(logits, batch_size)

    def measure(params, attack: Attack, images) -> tuple[float, float | None, float | None]:
        found, wanted = run(params, images), attack.wanted(labels)
        hit, other = found == wanted, labels != wanted
        asr = float(hit.mean())
        if not other.any():
            return asr, None, None
        return asr, float(hit[other].mean()), float((found == labels)[other].mean())

    def evaluate(params) -> Metrics:
        num_classes = jax.eval_shape(logits, params, images[:1]).shape[-1]
        check_labels(labels, num_classes, "evaluation")
        for attack in attacks:
            if attack.target is None and attack.num_classes != num_classes:
                raise InputError(
                    f"the all-to-all attack {attack.name!r} has {attack.num_classes} classes, the "
                    f"model {num_classes}: expected the same number"
                )
            check_labels(attack.wanted(labels), num_classes, f"{attack.name}'s wanted")
        acc = float(np.mean(run(params, images) == labels))
        if not attacks:
            return Metrics(acc, None, None, None, len(labels))
        each = [measure(params, *pair) for pair in zip(attacks, triggered, strict=True)]
        asr, asr_excl, ra = (
            None if None in values else float(np.mean(values)) for values in zip(*each, strict=True)
        )
        by_attack = {attack.name: asr for attack, (asr, _, _) in zip(attacks, each, strict=True)}
        several = by_attack if len(attacks) > 1 else None
        return Metrics(acc, asr, asr_excl, ra, len(labels), several)

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
