"""The table of defenses: every one is called as `unlearn` is."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

from ibau_jax.defenses import anp, clp, dp_sgd, fine_pruning, finetune, ft_sam, nad, naive, sau
from ibau_jax.defenses.ibau import unlearn
from ibau_jax.defenses.inversion import deepinspect, neural_cleanse, tabor
from ibau_jax.defenses.method import Method
from ibau_jax.errors import InputError, check_name
from ibau_jax.unlearning.config import PRESETS


class Defense(NamedTuple):
    """A defense and its named settings.

    Attributes:
      method: called as `unlearn` is.
      presets: name -> function of the data set's name -> config; the first is the default.
    """

    method: Method
    presets: dict[str, Callable[[str], Any]]

    @property
    def train_set(self) -> bool:
        """Does it train on the training set (poisoned as it is)?"""
        return "train_set" in self.method.data


DEFENSES: dict[str, Defense] = {
    "ibau": Defense(unlearn, PRESETS),
    "finetune": Defense(finetune.finetune, finetune.PRESETS),
    "neural-cleanse": Defense(neural_cleanse.neural_cleanse, neural_cleanse.PRESETS),
    "deepinspect": Defense(deepinspect.deepinspect, deepinspect.PRESETS),
    "tabor": Defense(tabor.tabor, tabor.PRESETS),
    "fine-pruning": Defense(fine_pruning.fine_pruning, fine_pruning.PRESETS),
    "nad": Defense(nad.nad, nad.PRESETS),
    "dp-sgd": Defense(dp_sgd.dp_sgd, dp_sgd.PRESETS),
    "naive": Defense(naive.naive, naive.PRESETS),
    "ft-sam": Defense(ft_sam.ft_sam, ft_sam.PRESETS),
    "sau": Defense(sau.sau, sau.PRESETS),
    "anp": Defense(anp.anp, anp.PRESETS),
    "clp": Defense(clp.clp, clp.PRESETS),
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
    for name in ("student", "tuning"):
        if hasattr(config, name):
            return replace(config, **{name: with_rounds(getattr(config, name), rounds)})
    raise InputError("the defense has one round, whose number cannot be chosen", argument="rounds")
