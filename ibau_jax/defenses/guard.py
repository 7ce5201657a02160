"""How far from the given parameters a model may go: as far as its accuracy bears it."""

from collections.abc import Callable

import jax
import numpy as np

from ibau_jax.models.model import Params


def bearable(
    right: Callable[[Params], np.ndarray],
    before: np.ndarray,
    params: Params,
    budget: float | None,
    doubt: float = 1.0,
) -> bool:
    """Is no more accuracy lost than `budget` and `doubt` standard errors; with None, none at all?

    Few images say little. The error is that of the difference, in which only those count that
    changed (McNemar's test).

    Args:
      right: `right(params)`, bool [N], which of the held-back images get their label.
      before: that of the given parameters.
    """
    after = right(params)
    lost = before.mean() - after.mean()
    if budget is None:
        return bool(lost <= 0)
    error = np.sqrt(np.sum(before != after)) / len(before)
    return bool(lost <= budget + doubt * error)


def roll_back(
    bears: Callable[[Params], bool], given: Params, params: Params
) -> tuple[Params, float]:
    """As far from `given` to `params` as it `bears` (of parameters).

    Returns:
      The parameters, and the share of the way.
    """
    for tenths in range(10, 0, -1):
        there = params if tenths == 10 else on_the_way(given, params, tenths / 10)
        if bears(there):
            return there, tenths / 10
    return given, 0.0


def on_the_way(given: Params, params: Params, share: float) -> Params:
    """The parameters when so much of the way from `given` to `params` is gone."""
    return jax.tree.map(lambda a, b: a + share * (b - a), given, params)
