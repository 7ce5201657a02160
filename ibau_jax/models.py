"""The paper's simplified VGG (Table 7) and the adapter to `logits(params, images)`.

Two facts decide the form of the code on a CPU (design notes in README, "Speed"):

1. XLA runs the derivatives of `lax.conv` inside a loop (`fori_loop`, `scan`) as naive loops,
   many times slower than outside. A convolution written as a few matrix products (Winograd's,
   a third fewer) has only matrix products in its derivatives, of any order, and costs the same
   in a loop.
2. In evaluation mode batch norm is an affine map, which is folded into the convolution: the
   gradients of its scale and offset then cost a few sums over the kernel instead of sums over
   every activation.
"""

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from ibau_jax import parallel
from ibau_jax.errors import check_name

Params = Any
Logits = Callable[[Params, jax.Array], jax.Array]
CONVOLUTIONS = ("auto", "patches", "lax")


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
        self, images: jax.Array, train: bool = False, weights: jax.Array | None = None
    ) -> jax.Array:
        """images [N, 32, 32, 3] in [0, 1] -> logits [N, num_classes].

        With `train`, batch statistics are used and collected, and dropout needs an rng; both
        are those of the whole batch on one device. There `weights` [N] tells the rows that
        count (1 / images in the batch) from padding (0); None: all count.
        """
        x = images
        for i, (width, rate) in enumerate(zip(self.widths, self.dropout, strict=True)):
            for j in (1, 2):
                layer = ConvNormELU(width, self.conv, self.axis, name=f"conv{2 * i + j}")
                x = layer(x, train, weights)
            x = max_pool(x)
            x = Dropout(rate, self.axis)(x, train)
        x = x.reshape(len(x), -1)
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
        y = convolve(x, kernel, self.conv)
        batch_mean = self._mean(y, weights)
        batch_var = self._mean(jnp.square(y - batch_mean), weights)
        if not self.is_initializing():
            rows = len(y) if weights is None else jnp.sum(weights > 0)
            count = parallel.total(rows, self.axis) * (y.size // (len(y) * self.features))
            unbiased = batch_var * (count / jnp.maximum(count - 1, 1)).astype(y.dtype)
            mean.value = 0.9 * mean.value + 0.1 * (batch_mean + bias)
            var.value = 0.9 * var.value + 0.1 * unbiased
        return elu((y - batch_mean) * (scale * lax.rsqrt(batch_var + 1e-5)) + offset)

    def _mean(self, y, weights):
        """Over all images of the batch, on all devices, and all places: [N, H, W, C] -> [C]."""
        if weights is None:
            return parallel.total(y.mean((0, 1, 2)), self.axis) / parallel.width(self.axis)
        return parallel.total(jnp.tensordot(weights, y.mean((1, 2)), 1), self.axis)


class Dropout(nn.Module):
    """Dropout whose mask is the same however many devices the batch is spread over."""

    rate: float
    axis: str | None = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        if not train or not self.rate:
            return x
        whole = (len(x) * parallel.width(self.axis), *x.shape[1:])
        keep = jax.random.bernoulli(self.make_rng("dropout"), 1 - self.rate, whole)
        return jnp.where(keep[parallel.numbers(len(x), self.axis)], x / (1 - self.rate), 0)


def convolve(x: jax.Array, kernel: jax.Array, implementation: str = "auto") -> jax.Array:
    """3x3 convolution, stride 1, zero padding 1: [N, H, W, C] and [3, 3, C, D] -> [N, H, W, D]."""
    check_name("convolution", implementation, CONVOLUTIONS)
    if implementation == "auto":
        implementation = "patches" if jax.default_backend() == "cpu" else "lax"
    if implementation == "lax":
        return lax.conv_general_dilated(
            x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
    height, width, channels = x.shape[1:]
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    # Three horizontal neighbours side by side: a third of the memory of all nine.
    rows = jnp.concatenate([padded[:, :, j : j + width] for j in range(3)], axis=-1)
    flat = kernel.reshape(3, 3 * channels, -1)
    if height % 2 or channels < 16:  # the rows of the kernel: products with shifted views
        return sum(rows[:, i : i + height] @ flat[i] for i in range(3))  # pyright: ignore
    return _winograd(rows, flat)


def _winograd(rows: jax.Array, flat: jax.Array) -> jax.Array:
    """[N, H, W, K] correlated along H with [3, K, D] -> [N, H - 2, W, D], H even.

    Winograd's F(2, 3): two neighbouring sums of three products from four products instead of
    six, in every derivative as well (Lavin and Gray, "Fast algorithms for convolutional neural
    networks", 2016, section 4.1). Sums and differences of neighbours cost some rounding.
    """
    n, height, width, k = rows.shape
    pairs = rows.reshape(n, height // 2, 2, width, k)
    even, odd = pairs[:, :, 0], pairs[:, :, 1]
    r0, r1, r2, r3 = even[:, :-1], odd[:, :-1], even[:, 1:], odd[:, 1:]
    views = jnp.stack([r0 - r2, r1 + r2, r2 - r1, r1 - r3]).reshape(4, -1, k)
    middle = (flat[0] + flat[2]) / 2
    taps = jnp.stack([flat[0], middle + flat[1] / 2, middle - flat[1] / 2, flat[2]])
    m = (views @ taps).reshape(4, n, height // 2 - 1, width, -1)
    return jnp.stack([m[0] + m[1] + m[2], m[1] - m[2] - m[3]], 2).reshape(n, height - 2, width, -1)


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
    y = jnp.where(x > 0, x, jnp.expm1(jnp.minimum(x, 0)))
    return y, jnp.minimum(y, 0) + 1


@_elu_and_slope.defjvp
def _elu_and_slope_jvp(primals, tangents):
    y, slope = _elu_and_slope(*primals)
    moved = tangents[0] * slope
    return (y, slope), (moved, jnp.where(y < 0, moved, 0))


ARCHITECTURES: dict[str, type[VGG]] = {"vgg": VGG}


def build(architecture: str, num_classes: int, conv: str = "auto") -> VGG:
    """A module by name; an unknown name raises and tells the nearest."""
    check_name("architecture", architecture, ARCHITECTURES)
    return ARCHITECTURES[architecture](num_classes, conv)


def evaluation_logits(module: nn.Module, variables: Mapping[str, Any]) -> Logits:
    """The pure function `logits(params, images)` in evaluation mode.

    Dropout is off and the running statistics of batch norm are fixed at those of
    `variables`; scale and offset of batch norm are among `params` (`variables["params"]`).
    """
    fixed = {name: value for name, value in variables.items() if name != "params"}

    def logits(params: Params, images: jax.Array) -> jax.Array:
        return module.apply({"params": params, **fixed}, images)  # pyright: ignore

    return logits
