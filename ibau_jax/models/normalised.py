"""A model that wants normalised images, as one that takes them in [0, 1]."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

from ibau_jax.errors import InputError
from ibau_jax.models.model import Model, Variables, without_dropout


@dataclass(frozen=True)
class Normalised:
    """`model` with (images - mean) / std for images; perturbations lie in front of that.

    Attributes:
      mean, std: of each channel.
    """

    model: Model
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, variables: Variables, images: jax.Array) -> jax.Array:
        return self.model(variables, self._brought(images))

    def look(self, variables: Variables, images: jax.Array) -> tuple[jax.Array, list[jax.Array]]:
        return self.model.look(variables, self._brought(images))

    def train(self, variables: Variables, images: jax.Array, *args: Any, **kwargs: Any):
        return self.model.train(variables, self._brought(images), *args, **kwargs)

    def without_dropout(self) -> "Normalised":
        """See `models.model.without_dropout`."""
        return replace(self, model=without_dropout(self.model))

    def __getattr__(self, name: str) -> Any:
        if name in ("fed_by", "init"):  # which do not depend on the values of images
            return getattr(self.model, name)
        raise AttributeError(name)

    def _brought(self, images: jax.Array) -> jax.Array:
        return (images - jnp.asarray(self.mean, images.dtype)) / jnp.asarray(self.std, images.dtype)


def normalised(model: Model, mean: Sequence[float], std: Sequence[float], channels: int) -> Model:
    """The model behind a normalisation of each of its channels.

    Raises:
      InputError: values that no normalisation has.
    """
    for name, values in (("mean", mean), ("std", std)):
        if len(values) not in (1, channels) or not all(map(_finite, values)):
            raise InputError(
                f"{name} is {','.join(f'{v:g}' for v in values)}: expected a number for each of "
                f"{channels} channels, such as {'0.5,0.5,0.5' if channels == 3 else '0.5'}",
                argument=name,
            )
    if min(std) <= 0 or max(map(abs, (*mean, *std))) > 4:
        raise InputError(
            f"mean {list(mean)} and std {list(std)}: expected those of images in [0, 1], std above "
            "0; divide those of 0 to 255 by 255",
            argument="mean",
        )
    return Normalised(model, *(tuple(v) * (channels // len(v)) for v in (mean, std)))


def _finite(value: float) -> bool:
    return abs(value) < float("inf")
