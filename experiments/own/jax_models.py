"""A convolutional network in Flax NNX and a perceptron in Equinox; know nothing of ibau_jax."""

import equinox as eqx
import jax
import jax.numpy as jnp
from flax import nnx


class Cnn(nnx.Module):
    """[N, 32, 32, 3] in [0, 1] -> [N, num_classes]."""

    def __init__(self, num_classes: int = 10, width: int = 24, *, rngs: nnx.Rngs):
        widths = (3, width, 2 * width, 4 * width)
        pairs = zip(widths[:-1], widths[1:], strict=True)
        self.convs = nnx.List([nnx.Conv(a, b, (3, 3), rngs=rngs) for a, b in pairs])
        self.norms = nnx.List([nnx.BatchNorm(b, rngs=rngs) for b in widths[1:]])
        self.head = nnx.Linear(4 * width, num_classes, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = nnx.max_pool(nnx.relu(norm(conv(x))), (2, 2), (2, 2))
        return self.head(x.mean((1, 2)))


class Perceptron(eqx.Module):
    """One image [3, 32, 32] in [0, 1] -> [num_classes]."""

    layers: eqx.nn.MLP

    def __init__(self, num_classes: int = 10, width: int = 256, *, key: jax.Array):
        self.layers = eqx.nn.MLP(3072, num_classes, width, 2, jax.nn.gelu, key=key)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.layers(2 * jnp.ravel(x) - 1)
