"""The work of `ibau bound`."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ibau_jax.data import load
from ibau_jax.errors import InputError
from ibau_jax.models.files import load_model
from ibau_jax.models.model import of_params
from ibau_jax.models.vgg import VGG
from ibau_jax.unlearning.batches import make_batches, resolve, shuffled
from ibau_jax.unlearning.bounds import vgg_bound
from ibau_jax.unlearning.config import IBAUConfig
from ibau_jax.unlearning.ibau import ibau


def bound(
    model: str | Path,
    *,
    dataset: str | None = None,
    clean: str | None = None,
    radius: float = 10.0,
    margin: float = 1.0,
    xi: float = 0.05,
    data_dir: str | Path | None = None,
) -> dict[str, Any]:
    """Theorem 3 on a model: every term, at the perturbation that the untargeted ascent finds."""
    loaded = load_model(model)
    if not isinstance(loaded.module, VGG):
        raise InputError(
            f"the model {str(model)!r} is a {loaded.architecture}: expected a vgg, since the bound "
            "is of networks whose layers follow each other",
            argument="model",
        )
    info = loaded.data_info(dataset)
    data = load(info.name, clean or info.clean, data_dir)
    logits, params = of_params(loaded.classifier, loaded.variables), loaded.variables["params"]
    config = resolve(replace(IBAUConfig.untargeted(), radius=radius), logits, params, data.images)
    batches, sizes = make_batches(shuffled(data, jax.random.key(0)), config)
    delta, _ = ibau(logits, config, len(sizes)).ascend(params, batches, 0)
    found = vgg_bound(
        loaded.variables, logits, data, np.asarray(delta), radius=radius, margin=margin, xi=xi
    )
    return {
        "total": found.total,
        "vacuous": found.vacuous,
        "empirical_risk": found.empirical_risk,
        "complexity": found.complexity,
        "confidence": found.confidence,
        **found.details,
        **{"radius": radius, "margin": margin, "xi": xi, "n": len(data.labels)},
        **{"delta_norm": float(config.ball.size(delta)), "model": str(model)},
    }
