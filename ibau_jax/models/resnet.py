"""PreAct-ResNet-18 (He et al., "Identity mappings in deep residual networks", ECCV 2016) for small
images: the form that the field's benchmarks use, without a batch norm before the pooling.

    x -> norm, relu -> conv 3x3 (stride) -> norm, relu -> conv 3x3 -> + shortcut

The shortcut is x itself, or a 1x1 convolution of relu(norm(x)) where the size changes.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from ibau_jax.models.adapters.inside import normalised
from ibau_jax.models.vgg import unbiased


class PreActResNet(nn.Module):
    """A convolution, four layers of blocks, the mean over places, and a dense layer.

    Attributes:
      num_classes: size of the output.
      axis: name of the mapped axis (`jax.pmap`) that a training batch is spread over.
      widths: channels of the layers; each but the first halves the size.
      blocks: in each layer.
      dropout: it has none.
    """

    num_classes: int
    axis: str | None = None
    widths: tuple[int, ...] = (64, 128, 256, 512)
    blocks: int = 2
    dropout: tuple[float, ...] = ()

    @nn.compact
    def __call__(
        self,
        images: jax.Array,
        train: bool = False,
        weights: jax.Array | None = None,
        features: bool = False,
    ) -> jax.Array:
        """images [N, H, W, C] in [0, 1] -> logits [N, num_classes]; arguments as of `VGG`.

        With `features`, what the dense layer reads: [N, widths[-1]].
        """
        x = Convolution(self.widths[0], name="conv1")(images)
        for i, width in enumerate(self.widths):
            for j in range(self.blocks):
                stride = 2 if i and not j else 1
                block = PreActBlock(width, stride, self.axis, name=f"layer{i + 1}_{j}")
                x = block(x, train, weights)
            self.sow("intermediates", f"layer{i + 1}", x)
        x = x.mean((1, 2))
        if features:
            return x
        dtype = jnp.result_type(float)  # float64 where JAX is set to it, as the other parameters
        return nn.Dense(self.num_classes, param_dtype=dtype, name="classifier")(x)


class PreActBlock(nn.Module):
    """See the top of the file."""

    width: int
    stride: int = 1
    axis: str | None = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool, weights: jax.Array | None) -> jax.Array:
        y = nn.relu(BatchNorm(self.axis, name="norm1")(x, train, weights))
        if self.stride != 1 or x.shape[-1] != self.width:
            x = Convolution(self.width, 1, self.stride, name="shortcut")(y)
        y = Convolution(self.width, 3, self.stride, name="conv1")(y)
        y = nn.relu(BatchNorm(self.axis, name="norm2")(y, train, weights))
        return x + Convolution(self.width, name="conv2")(y)


class Convolution(nn.Module):
    """A square convolution without bias, padded by half its size.

    On a CPU it becomes matrix products (`models.rewrite`), as any other.
    """

    features: int
    size: int = 3
    stride: int = 1

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = (self.size, self.size, x.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.he_normal(), shape)
        edge = (self.size // 2, self.size // 2)
        return lax.conv_general_dilated(
            x,
            kernel,
            (self.stride, self.stride),
            (edge, edge),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )


class BatchNorm(nn.Module):
    """Batch norm (eps 1e-5, momentum 0.9) over a batch on all devices; unbiased running variances,
    as PyTorch keeps them."""

    axis: str | None = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool, weights: jax.Array | None) -> jax.Array:
        channels = x.shape[-1]
        scale = self.param("scale", nn.initializers.ones, channels)
        offset = self.param("offset", nn.initializers.zeros, channels)
        mean = self.variable("batch_stats", "mean", jnp.zeros, channels)
        var = self.variable("batch_stats", "var", jnp.ones, channels)
        if not train:
            gain = scale * lax.rsqrt(var.value + 1e-5)
            return x * gain + (offset - mean.value * gain)
        y, batch_mean, batch_var = normalised(x, -1, weights, self.axis, 1e-5, scale, offset)
        if not self.is_initializing():
            mean.value = 0.9 * mean.value + 0.1 * batch_mean
            var.value = 0.9 * var.value + 0.1 * unbiased(batch_var, x, weights, self.axis)
        return y
