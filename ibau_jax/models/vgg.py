"""The paper's simplified VGG (Table 7).

Two facts decide the form of the code on a CPU (design notes in README, "Speed"):

1. XLA's convolutions are slow there, and worse in loops: see `convolution.py`.
2. In evaluation mode batch norm is an affine map, which is folded into the convolution: the
   gradients of its scale and offset then cost a few sums over the kernel instead of sums over
   every activation.
"""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from ibau_jax.devices import mesh
from ibau_jax.models.convolution import convolve, convolve_in_parts


class VGG(nn.Module):
    """Three blocks of two (convolution, batch norm, ELU), max pooling and dropout; one dense layer.

    Attributes:
      num_classes: size of the output.
      conv: `lax` (`lax.conv_general_dilated`, right for GPU and TPU), `patches` (matrix
        products, right for a CPU), or `auto`, which asks the backend. The parameters are
        the same.
      axis: name of the mapped axis (`jax.pmap`) that a training batch is spread over.
    """

    num_classes: int
    conv: str = "auto"
    axis: str | None = None
    widths: tuple[int, ...] = (32, 64, 128)
    dropout: tuple[float, ...] = (0.3, 0.4, 0.4)

    @nn.compact
    def __call__(
        self,
        images: jax.Array,
        train: bool = False,
        weights: jax.Array | None = None,
        features: bool = False,
    ) -> jax.Array:
        """images [N, 32, 32, 3] in [0, 1] -> logits [N, num_classes].

        With `features`, what the dense layer reads: [N, 2048].

        With `train`, batch statistics are used and collected, and dropout needs an rng; both
        are those of the whole batch on one device. There `weights` [N] tells the rows that
        count (1 / images in the batch) from padding (0); None: all count.
        """
        x = images
        for i, (width, rate) in enumerate(zip(self.widths, self.dropout, strict=True)):
            for j in (1, 2):
                layer = ConvNormELU(width, self.conv, self.axis, name=f"conv{2 * i + j}")
                x = layer(x, train, weights)
            self.sow("intermediates", f"block{i + 1}", x)  # costs nothing unless they are asked for
            x = max_pool(x)
            x = Dropout(rate, self.axis)(x, train)
        x = x.reshape(len(x), -1)
        if features:
            return x
        dtype = jnp.result_type(float)  # float64 where JAX is set to it, as the other parameters
        return nn.Dense(self.num_classes, param_dtype=dtype, name="classifier")(x)


class ConvNormELU(nn.Module):
    """Convolution 3x3 with bias, batch norm (eps 1e-5, momentum 0.9), ELU.

    Running variances are unbiased, as PyTorch keeps them (flax's are not), so that imported
    and trained models mean the same.
    """

    features: int
    conv: str = "auto"
    axis: str | None = None

    @nn.compact
    def __call__(
        self, x: jax.Array, train: bool = False, weights: jax.Array | None = None
    ) -> jax.Array:
        shape = (3, 3, x.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.he_uniform(), shape)
        bias = self.param("bias", nn.initializers.zeros, self.features)
        scale = self.param("scale", nn.initializers.ones, self.features)
        offset = self.param("offset", nn.initializers.zeros, self.features)
        mean = self.variable("batch_stats", "mean", jnp.zeros, self.features)
        var = self.variable("batch_stats", "var", jnp.ones, self.features)

        if not train:
            gain = scale * lax.rsqrt(var.value + 1e-5)
            y = convolve(x, kernel * gain, self.conv)
            return elu(y + ((bias - mean.value) * gain + offset))

        # Without the bias: batch norm takes it out again. Its gradient is then 0 and not the
        # rounding error of 0, of which Adam would make steps of full size.
        y = convolve_in_parts(x, kernel, self.conv)
        found: Any = normalised(y, scale, offset, weights, self.axis)
        out, *statistics = found
        if not self.is_initializing():
            batch_mean, batch_var = lax.stop_gradient(statistics)
            mean.value = 0.9 * mean.value + 0.1 * (batch_mean + bias)
            var.value = 0.9 * var.value + 0.1 * unbiased(batch_var, y, weights, self.axis)
        return out


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def normalised(
    y: jax.Array, scale: jax.Array, offset: jax.Array, weights: jax.Array | None, axis: str | None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """ELU of batch norm by the statistics of the batch: [N, H, W, C], [C], [C] -> [N, H, W, C].

    Its derivative is written out: what JAX makes of it goes more often over all activations. It is
    none of the mean and the variance [C], which are returned too.

    Args:
      weights, axis: as of `VGG`.
    """
    mean = _mean(y, weights, axis)
    var = _mean(jnp.square(y - mean), weights, axis)
    return elu((y - mean) * (scale * lax.rsqrt(var + 1e-5)) + offset), mean, var


def _normalised(y, scale, offset, weights, axis):
    found: Any = normalised(y, scale, offset, weights, axis)
    out, mean, var = found
    return found, (y, out, scale, weights, mean, lax.rsqrt(var + 1e-5))


def _normalised_slopes(axis, kept, slopes):
    y, out, scale, weights, mean, inverse = kept
    slopes = slopes[0] * (jnp.minimum(out, 0) + 1)  # ELU's own slope, by its value
    to_offset = slopes.sum((0, 1, 2))
    to_scale = jnp.sum(slopes * (y - mean), (0, 1, 2)) * inverse
    # The statistics are of all images of all devices.
    by_mean, by_spread = mesh.total((to_offset, to_scale * inverse), axis)
    if weights is None:
        share = 1 / (y.size // y.shape[-1] * mesh.width(axis))
    else:
        share = (weights / (y.shape[1] * y.shape[2]))[:, None, None, None]
    to_y = (scale * inverse) * (slopes - share * (by_mean + (y - mean) * by_spread))
    return to_y, to_scale, to_offset, None


normalised.defvjp(_normalised, _normalised_slopes)


def _mean(y, weights, axis):
    """Over all images of the batch, on all devices, and all places: [N, H, W, C] -> [C]."""
    if weights is None:
        return mesh.total(y.mean((0, 1, 2)), axis) / mesh.width(axis)
    return mesh.total(jnp.tensordot(weights, y.mean((1, 2)), 1), axis)


def unbiased(
    var: jax.Array, x: jax.Array, weights: jax.Array | None, axis: str | None
) -> jax.Array:
    """The variance [C] of a batch on all devices, as PyTorch keeps it: by one value less.

    Args:
      x: [N, H, W, C], this device's rows; `weights` as of `VGG`.
    """
    rows = len(x) if weights is None else jnp.sum(weights > 0)
    count = mesh.total(rows, axis) * (x.size // (len(x) * x.shape[-1]))
    return var * (count / jnp.maximum(count - 1, 1)).astype(var.dtype)


class Dropout(nn.Module):
    """Dropout whose mask is the same however many devices the batch is spread over."""

    rate: float
    axis: str | None = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        if not train or not self.rate:
            return x
        whole = (len(x) * mesh.width(self.axis), *x.shape[1:])
        keep = jax.random.bernoulli(self.make_rng("dropout"), 1 - self.rate, whole)
        return jnp.where(mesh.own(keep, self.axis), x / (1 - self.rate), 0)


def max_pool(x: jax.Array) -> jax.Array:
    """2x2 max pooling [N, H, W, C] -> [N, H/2, W/2, C]; equal values give the first the gradient.

    That is PyTorch's rule and flax's. Sharing the gradient among equal values moves the first
    step of the inner ascent by 3.5 % on real images.
    """
    n, h, w, c = x.shape
    pairs = x.reshape(n, h // 2, 2, w // 2, 2, c)
    left, right = pairs[:, :, :, :, 0], pairs[:, :, :, :, 1]
    columns = jnp.where(left >= right, left, right)
    upper, lower = columns[:, :, 0], columns[:, :, 1]
    return jnp.where(upper >= lower, upper, lower)


@jax.custom_jvp
def elu(x: jax.Array) -> jax.Array:
    """ELU with alpha 1. Its derivatives are written with its value, so `exp` is computed once."""
    return _elu_and_slope(x)[0]


@elu.defjvp
def _elu_jvp(primals, tangents):
    y, slope = _elu_and_slope(*primals)
    return y, tangents[0] * slope


# Both from one function, so that a linearised gradient (a product with a Hessian) keeps one
# array for the first and the second derivative, not three.
@jax.custom_jvp
def _elu_and_slope(x):
    # `expm1` takes twice as long as all the rest, and is more exact where nothing depends on it.
    y = jnp.where(x > 0, x, jnp.exp(jnp.minimum(x, 0)) - 1)
    return y, jnp.minimum(y, 0) + 1


@_elu_and_slope.defjvp
def _elu_and_slope_jvp(primals, tangents):
    y, slope = _elu_and_slope(*primals)
    moved = tangents[0] * slope
    return (y, slope), (moved, jnp.where(y < 0, moved, 0))
