"""The table of defenses: every one is called as `unlearn` is."""

from collections.abc import Callable
from typing import Any, NamedTuple

from ibau_jax.config import PRESETS
from ibau_jax.errors import check_name
from ibau_jax.ibau import Result, unlearn


class Defense(NamedTuple):
    """A defense and its named settings.

    Attributes:
      run: `run(logits, params, clean, config=, key=, evaluate=, on_round=, progress=,
        devices=)`.
      presets: name -> function of the data set's name -> config; the first is the default.
    """

    run: Callable[..., Result]
    presets: dict[str, Callable[[str], Any]]


DEFENSES: dict[str, Defense] = {"ibau": Defense(unlearn, PRESETS)}


def defense(name: str, preset: str | None, dataset: str) -> tuple[Callable[..., Result], str, Any]:
    """The function, the preset's name and the config; unknown names raise, telling the nearest."""
    check_name("defense", name, DEFENSES)
    run, presets = DEFENSES[name]
    preset = preset or next(iter(presets))
    check_name(f"preset of {name}", preset, presets)
    return run, preset, presets[preset](dataset)
