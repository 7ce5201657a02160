"""The paper's Figure 2: the triggers, an image before and after each was stamped."""

from pathlib import Path
from typing import Any

import numpy as np

from ibau_jax.attacks import ATTACKS, Attack
from ibau_jax.data import data_info, load
from ibau_jax.errors import InputError
from ibau_jax.files import atomic_path
from ibau_jax.models.files import load_model


def figure2(
    models: Path, datasets: tuple[str, ...], out: Path, seed: int, data_dir: str | Path | None
) -> dict[str, Any]:
    """Draw each trigger, an image before and the same after it was stamped.

    Args:
      models: folder of model files `DATASET-ATTACK.safetensors`.
      out: folder to write to.
      seed: which images are shown.

    Raises:
      InputError: a model is missing, or is another one.
    """
    from matplotlib.figure import Figure  # slow to import; no global state, no display

    height = 3 * len(datasets)
    figure = Figure(figsize=(1.5 * len(ATTACKS) + 1.2, 1.55 * height), layout="constrained")
    axes = figure.subplots(height, len(ATTACKS), squeeze=False)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    for i, dataset in enumerate(datasets):
        info = data_info(dataset)
        held_out = load(dataset, info.split, data_dir)
        for j, name in enumerate(ATTACKS):
            attack = _attack(models / f"{dataset}-{name}.safetensors", dataset, name)
            others = np.flatnonzero(attack.wanted(held_out.labels) != held_out.labels)
            row = np.random.default_rng([seed, i, j]).choice(others)
            image = np.asarray(held_out.images[row])
            shown = {
                "trigger, scaled": attack.trigger.scaled(),
                "before": image,
                "after": attack.trigger(image),
            }
            for k, (what, picture) in enumerate(shown.items()):
                axes[3 * i + k, j].imshow(np.asarray(picture), interpolation="nearest")
                if j == 0:
                    axes[3 * i + k, j].set_ylabel(f"{dataset}\n{what}", fontsize=9)
            label = "all" if attack.target is None else info.class_names[attack.target]
            title = f"{name}\n{attack.target}: {_short(label)}"
            axes[3 * i, j].set_title(title, fontsize=9)
    path = out / "figure2.png"
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150)
    return {"figure": "figure2", "file": str(path), "datasets": ", ".join(datasets)}


def _attack(path: Path, dataset: str, name: str) -> Attack:
    if not path.is_file():
        raise InputError(
            f"no model {str(path)!r}: expected a file for each data set and attack; make them with "
            "'python experiments/zoo.py run' (digits: 'ibau train'), or name a folder by --models"
        )
    model = load_model(path)
    names = [attack.name for attack in model.attacks]
    if names != [name] or model.dataset != dataset:
        raise InputError(
            f"{str(path)!r} is a model of {model.dataset} with the attacks {names}: expected "
            f"{dataset} and [{name!r}], by its name"
        )
    return model.attacks[0]


def _short(text: str, length: int = 16) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"
