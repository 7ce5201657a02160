"""Small models of JAX libraries, of images [N, 16, 16, 1], as their users write them."""

import functools
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from conftest import SQUARE, small_digits
from flax import nnx

from ibau_jax.attacks import poison
from ibau_jax.defenses.finetune import Tuning, finetune
from ibau_jax.models.adapters.linen import from_linen
from ibau_jax.models.adapters.nnx import from_nnx
from ibau_jax.training.optimizers import Adam

KEY = jax.random.key(0)


class Block(nn.Module):
    """A residual block; its switch has the name of flax's examples."""

    width: int

    @nn.compact
    def __call__(self, x, training: bool):
        y = nn.Conv(self.width, (3, 3), 2, use_bias=False)(x)
        y = nn.BatchNorm(use_running_average=not training, momentum=0.9)(y)
        return nn.relu(y + nn.Conv(self.width, (1, 1), 2)(x))


class ResNet(nn.Module):
    """Convolution, a block, dropout, mean over places, dense."""

    classes: int = 10
    rate: float = 0.0

    @nn.compact
    def __call__(self, x, training: bool = False):
        x = nn.Conv(16, (3, 3), 2, use_bias=False)(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not training, momentum=0.9)(x))
        x = Block(32)(x, training)
        x = nn.Dropout(self.rate)(x, deterministic=not training)
        return nn.Dense(self.classes)(x.mean((1, 2)))


class NNXBlock(nnx.Module):
    def __init__(self, inputs: int, width: int, rngs: nnx.Rngs):
        self.conv = nnx.Conv(inputs, width, (3, 3), 2, use_bias=False, rngs=rngs)
        self.norm = nnx.BatchNorm(width, momentum=0.9, rngs=rngs)
        self.cut = nnx.Conv(inputs, width, (1, 1), 2, rngs=rngs)

    def __call__(self, x):
        return nnx.relu(self.norm(self.conv(x)) + self.cut(x))


class NNXResNet(nnx.Module):
    """The same for NNX."""

    def __init__(self, classes: int = 10, rate: float = 0.0, seed: int = 0):
        rngs = nnx.Rngs(seed)
        self.conv = nnx.Conv(1, 16, (3, 3), 2, use_bias=False, rngs=rngs)
        self.norm = nnx.BatchNorm(16, momentum=0.9, rngs=rngs)
        self.blocks = nnx.List([NNXBlock(16, 32, rngs)])
        self.drop = nnx.Dropout(rate, rngs=rngs)
        self.out = nnx.Linear(32, classes, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.norm(self.conv(x)))
        for block in self.blocks:
            x = block(x)
        return self.out(self.drop(x).mean((1, 2)))


def equinox_module(rate: float = 0.0, mode: str = "batch", seed: int = 0):
    """The same for Equinox, without the shortcuts, and its state; imported only here."""
    import equinox as eqx
    from equinox_net import Net

    return eqx.nn.make_with_state(Net)(jax.random.key(seed), rate, mode)


def opened(library: str, rate: float = 0.0) -> tuple[Any, Any]:
    """A model of random weights and its variables."""
    if library == "linen":
        module = ResNet(rate=rate)
        return from_linen(module), jax.jit(module.init)(KEY, np.zeros((1, 16, 16, 1), np.float32))
    if library == "nnx":
        return from_nnx(NNXResNet(rate=rate))
    from ibau_jax.models.adapters.eqx import from_equinox

    return from_equinox(*equinox_module(rate))


@functools.cache
def trained(library: str) -> tuple[Any, Any]:
    """A model with the backdoor `SQUARE`."""
    model, variables = opened(library)
    data, _ = poison(small_digits("train"), SQUARE, 0.2, 0)
    config = Tuning(epochs=8, batch_size=32, optimizer=Adam(1e-2, schedule="cosine"))
    return model, finetune(model, variables, data, config=config, key=KEY).params
