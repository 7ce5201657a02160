"""The table of defenses: every one is called as `unlearn` is."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

from ibau_jax.defenses import dp_sgd, fine_pruning, finetune, nad, naive
from ibau_jax.defenses.ibau import unlearn
from ibau_jax.defenses.inversion import deepinspect, neural_cleanse, tabor
from ibau_jax.defenses.run import Method
from ibau_jax.errors import check_name
from ibau_jax.unlearning.config import PRESETS


class Defense(NamedTuple):
    """A defense and its named settings.

    Attributes:
      method: called as `unlearn` is.
      presets: name -> function of the data set's name -> config; the first is the default.
      train_set: it is also given the training set (poisoned as it is), as `train_set=`.
    """

    method: Method
    presets: dict[str, Callable[[str], Any]]
    train_set: bool = False


DEFENSES: dict[str, Defense] = {
    "ibau": Defense(unlearn, PRESETS),
    "finetune": Defense(finetune.finetune, finetune.PRESETS),
    "neural-cleanse": Defense(neural_cleanse.neural_cleanse, neural_cleanse.PRESETS),
    "deepinspect": Defense(deepinspect.deepinspect, deepinspect.PRESETS),
    "tabor": Defense(tabor.tabor, tabor.PRESETS),
    "fine-pruning": Defense(fine_pruning.fine_pruning, fine_pruning.PRESETS),
    "nad": Defense(nad.nad, nad.PRESETS),
    "dp-sgd": Defense(dp_sgd.dp_sgd, dp_sgd.PRESETS, train_set=True),
    "naive": Defense(naive.naive, naive.PRESETS),
}


def find(name: str, preset: str | None, dataset: str) -> tuple[Defense, str, Any]:
    """The defense, the preset's name and the config; unknown names raise, telling the nearest."""
    check_name("defense", name, DEFENSES)
    found = DEFENSES[name]
    preset = preset or next(iter(found.presets))
    check_name(f"preset of {name}", preset, found.presets)
    return found, preset, found.presets[preset](dataset)


def with_rounds(config: Any, rounds: int) -> Any:
    """A config whose history has so many rounds (of Fine-Pruning: after the pruned model)."""
    if isinstance(config, finetune.Tuning):
        return replace(config, epochs=rounds, steps=0)  # no more than asked for
    for name in ("rounds", "epochs"):
        if hasattr(config, name):
            return replace(config, **{name: rounds})
    name = "student" if hasattr(config, "student") else "tuning"
    return replace(config, **{name: with_rounds(getattr(config, name), rounds)})
