"""The work of `ibau evaluate`."""

from pathlib import Path
from typing import Any

from ibau_jax.attacks import described
from ibau_jax.commands.attack_options import attacks_on
from ibau_jax.data import load
from ibau_jax.models.files import load_model
from ibau_jax.results.metrics import evaluator


def evaluate_model(
    model: str | Path,
    *,
    dataset: str | None = None,
    split: str | None = None,
    data_dir: str | Path | None = None,
    **attack: Any,
) -> dict[str, Any]:
    """ACC, and ASR for the attacks in the model's file, or another one; a dict for JSON.

    Args:
      attack: see `attack_options.attacks_on`.
    """
    loaded = load_model(model)
    info = loaded.data_info(dataset)
    split = split or info.split
    attacks = attacks_on(loaded, info.name, **attack)
    measure = evaluator(loaded.classifier, load(info.name, split, data_dir), attacks)
    return {
        **measure(loaded.variables).row(),
        "dataset": info.name,
        "split": split,
        **described(attacks),
        "model": str(model),
        "model_hash": loaded.hash,
    }
