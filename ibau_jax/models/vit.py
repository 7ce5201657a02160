"""A small vision transformer: Beyer, Zhai and Kolesnikov, "Better plain ViT baselines for
ImageNet-1k" (2022): fixed positions of sines and cosines, the mean over patches, no class token."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ibau_jax.models.vgg import Dropout


class ViT(nn.Module):
    """Patches, blocks of attention and of a dense network, layer norm, the mean, a dense layer.

    Attributes:
      num_classes: size of the output.
      axis: name of the mapped axis (`jax.pmap`) that a training batch is spread over.
      patch: side of a patch; the images' sides are multiples of it.
      width, depth, heads: of the tokens, blocks, and of each block's attention.
      dropout: rate after each block's dense network, one number.
    """

    num_classes: int
    axis: str | None = None
    patch: int = 4
    width: int = 192
    depth: int = 12
    heads: int = 3
    dropout: tuple[float, ...] = (0.1,)

    @nn.compact
    def __call__(
        self,
        images: jax.Array,
        train: bool = False,
        weights: jax.Array | None = None,
        features: bool = False,
    ) -> jax.Array:
        """images [N, H, W, C] in [0, 1] -> logits [N, num_classes].

        `train` turns on dropout; there are no batch statistics that `weights` could belong to.
        With `features`, what the dense layer reads: [N, width].
        """
        del weights
        n, height, width, channels = images.shape
        size = self.patch
        rows, columns = height // size, width // size
        x = images.reshape(n, rows, size, columns, size, channels).transpose(0, 1, 3, 2, 4, 5)
        x = x.reshape(n, rows * columns, size * size * channels)
        dtype = jnp.result_type(float)
        x = nn.Dense(self.width, param_dtype=dtype, name="patches")(2 * x - 1)
        x += positions(rows, columns, self.width).astype(x.dtype)
        thirds = [-(-self.depth * part // 3) for part in (1, 2)]  # and the last, after its norm
        for i in range(1, self.depth + 1):
            block = Encoder(self.heads, self.dropout[0], self.axis, name=f"block{i}")
            x = block(x, train)
            if i in thirds:
                self._show(f"map{thirds.index(i) + 1}", x, rows)
        x = nn.LayerNorm(param_dtype=dtype, name="norm")(x)
        self._show("map3", x, rows)
        x = x.mean(1)
        if features:
            return x
        return nn.Dense(self.num_classes, param_dtype=dtype, name="classifier")(x)

    def _show(self, name: str, tokens: jax.Array, rows: int) -> None:
        n, count, width = tokens.shape
        self.sow("intermediates", name, tokens.reshape(n, rows, count // rows, width))


class Encoder(nn.Module):
    """x + attention(norm(x)), then x + dense(gelu(dense(norm(x)))), four times as wide inside."""

    heads: int
    rate: float = 0.0
    axis: str | None = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        dtype, width = jnp.result_type(float), x.shape[-1]
        y = nn.LayerNorm(param_dtype=dtype, name="norm1")(x)
        x += nn.MultiHeadAttention(self.heads, param_dtype=dtype, name="attention")(y)
        y = nn.LayerNorm(param_dtype=dtype, name="norm2")(x)
        y = nn.gelu(nn.Dense(4 * width, param_dtype=dtype, name="dense1")(y))
        y = nn.Dense(width, param_dtype=dtype, name="dense2")(y)
        return x + Dropout(self.rate, self.axis)(y, train)


def positions(rows: int, columns: int, width: int) -> np.ndarray:
    """Sines and cosines of a patch's row and column: [rows * columns, width], width a multiple of
    four; wavelengths from 2 pi to 20000 pi."""
    y, x = np.mgrid[:rows, :columns].reshape(2, -1, 1)
    rates = 1e4 ** -np.linspace(0, 1, width // 4)
    waves = [np.sin(x * rates), np.cos(x * rates), np.sin(y * rates), np.cos(y * rates)]
    return np.concatenate(waves, 1)
