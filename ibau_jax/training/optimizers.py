"""Optimisers by their settings, which can be compared, shown and written down.

`Optimizer` is what a config takes: one of these, any function `optimizer(steps)` that gives an
optax transformation for so many steps in all, or an optax transformation itself.
"""

from collections.abc import Callable
from dataclasses import dataclass, is_dataclass
from typing import Any

import jax.numpy as jnp
import optax

from ibau_jax.errors import InputError, check_name, check_positive

Optimizer = optax.GradientTransformation | Callable[[int], optax.GradientTransformation]
SCHEDULES = ("constant", "cosine")


@dataclass(frozen=True)
class Adam:
    """Adam (Kingma and Ba, ICLR 2015) with optax's betas.

    Attributes:
      rate: learning rate.
      schedule: `constant`, or `cosine`: down to zero over all steps.
      clip: largest norm of the gradient that it is given; None: no limit.
      small: an array of two and more dimensions whose root mean square is below this takes
        smaller steps, by the square of the ratio; None: none does. Adam's steps are as large
        whatever the values; those of a layer fall with the root of the number of its inputs, and
        the steps that it bears with the number itself (Yang et al., NeurIPS 2021: mu-transfer).
    """

    rate: float = 1e-3
    schedule: str = "constant"
    clip: float | None = None
    small: float | None = None

    def __post_init__(self):
        _check(self)
        check_positive(self, "small")

    def __call__(self, steps: int) -> optax.GradientTransformation:
        """For `steps` steps in all."""
        adam = optax.adam(_rate(self, steps))
        if (small := self.small) is not None:

            def shortened(move: Any, values: Any) -> Any:
                if values.ndim < 2:  # an offset may be zero
                    return move
                return move * jnp.minimum(1, jnp.mean(jnp.square(values)) / small**2)

            adam = optax.chain(adam, optax.stateless_with_tree_map(shortened))
        return _clipped(self.clip, adam)


@dataclass(frozen=True)
class SGD:
    """Gradient descent, with momentum and weight decay.

    Attributes:
      rate: learning rate.
      momentum: 0: none.
      nesterov: in Nesterov's form.
      decay: factor of the parameters that is added to the gradient.
      schedule: `constant`, or `cosine`: down to zero over all steps.
      drops: (share, factor): after that share of all steps the rate is so many times what it was;
        with the schedule `constant`.
      clip: largest norm of the gradient that it is given; None: no limit.
    """

    rate: float = 0.01
    momentum: float = 0.0
    nesterov: bool = False
    decay: float = 0.0
    schedule: str = "constant"
    drops: tuple[tuple[float, float], ...] = ()
    clip: float | None = None

    def __post_init__(self):
        _check(self)
        for name in ("momentum", "decay"):
            if not getattr(self, name) >= 0:
                raise InputError(f"{name} is {getattr(self, name)}: expected at least 0")
        if self.drops and self.schedule != "constant":
            raise InputError("drops with a schedule: expected the schedule 'constant'")

    def __call__(self, steps: int) -> optax.GradientTransformation:
        """For `steps` steps in all."""
        descent = optax.sgd(_rate(self, steps), self.momentum or None, self.nesterov)
        if self.decay:
            descent = optax.chain(optax.add_decayed_weights(self.decay), descent)
        return _clipped(self.clip, descent)


def transform(optimizer: Optimizer, steps: int) -> optax.GradientTransformation:
    """The optax transformation of an `Optimizer`, for so many steps in all."""
    if isinstance(optimizer, optax.GradientTransformation):
        return optimizer
    return optimizer(steps)


def _check(optimizer: Adam | SGD) -> None:
    check_name("schedule", optimizer.schedule, SCHEDULES)
    check_positive(optimizer, "rate", "clip")


def _rate(optimizer: Adam | SGD, steps: int) -> Any:
    rate = optimizer.rate
    if optimizer.schedule == "cosine":
        return optax.cosine_decay_schedule(rate, steps)
    if drops := getattr(optimizer, "drops", ()):
        boundaries = {round(steps * share): factor for share, factor in drops}
        return optax.piecewise_constant_schedule(rate, boundaries)
    return rate


def _clipped(
    limit: float | None, optimizer: optax.GradientTransformation
) -> optax.GradientTransformation:
    if limit is None:
        return optimizer
    return optax.chain(optax.clip_by_global_norm(limit), optimizer)


def shown(optimizer: Any) -> str:
    """An `Optimizer` in words, for rows and messages; of an optax one the names of its parts."""
    if isinstance(optimizer, optax.GradientTransformation):
        name = getattr(optimizer.update, "__qualname__", "transformation")
        return f"optax.{name.partition('.')[0]}"
    if is_dataclass(optimizer):
        return repr(optimizer)
    return getattr(optimizer, "__name__", repr(optimizer))
