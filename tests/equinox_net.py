"""A small module of Equinox, of one image [1, 16, 16]; imported where Equinox is there."""

import equinox as eqx
import jax


class Net(eqx.Module):
    """Two convolutions with batch norm, mean over places, dropout, linear."""

    conv1: eqx.nn.Conv2d
    norm1: eqx.nn.BatchNorm
    conv2: eqx.nn.Conv2d
    norm2: eqx.nn.BatchNorm
    drop: eqx.nn.Dropout
    out: eqx.nn.Linear

    def __init__(self, key, rate: float = 0.0, mode: str = "batch", classes: int = 10):
        one, two, three = jax.random.split(key, 3)
        self.conv1 = eqx.nn.Conv2d(1, 16, 3, 2, padding=1, key=one)
        self.norm1 = eqx.nn.BatchNorm(16, "batch", momentum=0.9, mode=mode)  # pyright: ignore
        self.conv2 = eqx.nn.Conv2d(16, 32, 3, 2, padding=1, key=two)
        self.norm2 = eqx.nn.BatchNorm(32, "batch", momentum=0.9, mode=mode)  # pyright: ignore
        self.drop = eqx.nn.Dropout(rate)
        self.out = eqx.nn.Linear(32, classes, key=three)

    def __call__(self, x, state, *, key=None):
        x, state = self.norm1(self.conv1(x), state)
        x, state = self.norm2(self.conv2(jax.nn.relu(x)), state)
        x = self.drop(jax.nn.relu(x).mean((1, 2)), key=key)
        return self.out(x), state
