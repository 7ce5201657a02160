"""What Figure 3 is drawn from: t-SNE of the flatten layer, before and after a defense."""

import tempfile
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from cells import METHODS
from measure import Models
from sklearn.manifold import TSNE

from ibau_jax.commands.defend import defend
from ibau_jax.data import load
from ibau_jax.models.files import load_model

Row = dict[str, Any]
IMAGES = 300  # without the trigger, and the same with it


@dataclass(frozen=True)
class Embedding:
    """A model, as it was given (`none`) or cleaned by a method; its features in the plane."""

    model: str
    method: str
    seed: int = 0


CELLS = tuple(Embedding("cifar10-badnets", method) for method in ("none", "ibau-published", "ibau"))


def measure(
    cell: Embedding, models: Models, rounds: int | None = None, images: int | None = None
) -> Row | None:
    """Points of images without the trigger and of the same with it, those of the target left out.

    One t-SNE of a model's images together (perplexity 30, of scikit-learn), as in the paper's
    Figure 3; of the last map, pooled and flattened.
    """
    with models.file(cell.model) as path, tempfile.TemporaryDirectory() as out:
        if path is None:
            return None
        if cell.method != "none":
            defense, preset = METHODS[cell.method]
            clean = f"test[:{images}]" if images else None
            settings = {"rounds": rounds, "clean": clean, "seed": cell.seed, "out": out}
            path = defend(path, defense=defense, preset=preset, **settings)["model"]
        model = load_model(path)
    held_out = load(model.dataset, model.data_info(None).split)
    (attack,) = model.attacks
    shown = np.flatnonzero(attack.wanted(held_out.labels) != held_out.labels)[: images or IMAGES]
    pictures, labels = np.asarray(held_out.images[shown]), np.asarray(held_out.labels[shown])
    both = np.concatenate([pictures, np.asarray(attack.trigger(pictures))])

    @jax.jit
    def flatten(images: jax.Array) -> jax.Array:
        _, maps = model.classifier.look(model.variables, images)
        last = maps[-1]
        rows, height, width, channels = last.shape
        pooled = last.reshape(rows, height // 2, 2, width // 2, 2, channels).max((2, 4))
        return pooled.reshape(rows, -1)

    features = np.concatenate(
        [np.asarray(flatten(both[i : i + 20])) for i in range(0, len(both), 20)]
    )
    points = TSNE(random_state=cell.seed, init="pca").fit_transform(features)
    jax.clear_caches()
    return {
        "points": np.round(points, 2).tolist(),
        "labels": [*labels.tolist(), *labels.tolist()],
        "triggered": [0] * len(labels) + [1] * len(labels),
        "dataset": model.dataset,
    }


def shown(row: Row) -> str:
    """How many points."""
    return f"{len(row['points'])} points"
