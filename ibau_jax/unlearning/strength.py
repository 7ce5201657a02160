"""How surely a perturbation leads to a label: what a search ascends, and what it measures."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ibau_jax.data import Dataset
from ibau_jax.errors import InputError
from ibau_jax.unlearning.batches import UNTARGETED
from ibau_jax.unlearning.objective import not_that_label

Label = int | np.ndarray
"""Where images are led: 0 .. classes - 1, `UNTARGETED`, or a rule: int [classes] of such."""


def height(logits: jax.Array, true: jax.Array, label: Any) -> jax.Array:
    """What a search ascends, for each image [N]: log p(label), or log(1 - p(true)) untargeted.

    `label`: one, or one for each image.

    Both have a gradient where the model is certain, as the cross-entropy of the true label has not.
    Images of the label itself count nothing.
    """
    label = jnp.broadcast_to(label, true.shape)
    log_p = jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.maximum(label, 0)[:, None], axis=1)
    towards = jnp.where(true == label, 0.0, log_p[:, 0])
    return jnp.where(label == UNTARGETED, -not_that_label(logits, true), towards)


def rule_of(label: Label, num_classes: int) -> np.ndarray:
    """For the images of each class the label that they are led to: int32 [num_classes]."""
    return np.broadcast_to(np.asarray(label, np.int32), (num_classes,))


def share(given: np.ndarray, true: np.ndarray, label: Label) -> float:
    """The strength of a perturbation; see `Found`. 0 where no image counts.

    `label`: one, or one for each image.
    """
    hit = np.where(np.equal(label, UNTARGETED), given != true, given == label)[true != label]
    return float(hit.mean()) if len(hit) else 0.0


def kept_of(count: int) -> int:
    """How many of `count` images are held back to measure the strength."""
    return min(200, count // 2)


def check_count(clean: Dataset) -> None:
    """Raise `InputError` where there are too few images to search on some and measure on others."""
    if (count := len(clean.labels)) < 2:
        raise InputError(f"the clean set has {count} image(s): expected at least 2 to search")
