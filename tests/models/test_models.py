"""The VGG: both forms of convolution, pooling, ELU, folding of batch norm."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import random_variables
from jax.test_util import check_grads

from ibau_jax.errors import InputError
from ibau_jax.models.architectures import build
from ibau_jax.models.convolution import convolve, convolve_in_parts
from ibau_jax.models.model import evaluation_logits
from ibau_jax.models.vgg import VGG, ConvNormELU, elu, max_pool, normalised

KEY = jax.random.key(0)


def test_size_is_that_of_table_7():
    for classes, count in ((10, 308_394), (43, 376_011)):
        params = random_variables(classes)["params"]
        assert sum(x.size for x in jax.tree.leaves(params)) == count


@pytest.mark.parametrize(
    ("height", "channels"),
    [(6, (3, 5)), (3, (16, 5)), (8, (3, 16)), (5, (16, 5))],  # the last two: `winograd`
)
def test_convolutions_agree_with_their_derivatives(height, channels, x64):
    x = jax.random.normal(KEY, (2, height, 8, channels[0]), jnp.float64)
    kernel = jax.random.normal(KEY, (3, 3, *channels), jnp.float64)

    def loss(implementation):
        return lambda x, k: jnp.sum(jnp.tanh(convolve(x, k, implementation)))

    one, two = loss("patches"), loss("lax")
    np.testing.assert_allclose(
        convolve(x, kernel, "patches"), convolve(x, kernel, "lax"), atol=1e-12
    )
    tangent = jax.random.normal(jax.random.key(1), x.shape, jnp.float64)

    def derivatives(f):
        return jax.jvp(lambda x: jax.grad(f, (0, 1))(x, kernel), (x,), (tangent,))

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-10),
        derivatives(one),
        derivatives(two),
    )


@pytest.mark.parametrize("images", [1, 3, 9])
def test_a_convolution_in_parts_is_the_same(images, x64):
    rng = np.random.default_rng(0)
    x, kernel = rng.normal(size=(images, 64, 64, 16)), rng.normal(size=(3, 3, 16, 5))
    slope = rng.normal(size=(images, 64, 64, 5))  # two images in a part
    whole, back = jax.vjp(lambda x, k: convolve(x, k, "lax"), x, kernel)
    parts, back_parts = jax.vjp(lambda x, k: convolve_in_parts(x, k, "patches"), x, kernel)
    np.testing.assert_allclose(parts, whole, atol=1e-11)
    for found, expected in zip(back_parts(slope), back(slope), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-9)


def test_both_forms_share_parameters_and_logits():
    images = jax.random.uniform(KEY, (2, 32, 32, 3))
    found = random_variables()
    one, two = (VGG(10, conv).apply(found, images) for conv in ("patches", "lax"))
    np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-4)
    shapes = [
        jax.tree.map(jnp.shape, jax.eval_shape(VGG(10, conv).init, KEY, images))
        for conv in ("patches", "lax")
    ]
    assert shapes[0] == shapes[1]


def test_folded_batch_norm_is_the_unfolded_one():
    """Against flax's own layers, in evaluation mode."""
    images = jax.random.uniform(KEY, (2, 32, 32, 3))
    found = random_variables()
    x = images
    for i in range(1, 7):
        p, s = found["params"][f"conv{i}"], found["batch_stats"][f"conv{i}"]
        x = jax.lax.conv_general_dilated(
            x, p["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        norm = {"params": {"scale": p["scale"], "bias": p["offset"]}, "batch_stats": s}
        x = nn.BatchNorm(use_running_average=True, epsilon=1e-5).apply(norm, x + p["bias"])
        x = jax.nn.elu(x)
        if i % 2 == 0:
            x = nn.max_pool(x, (2, 2), (2, 2))
    last = found["params"]["classifier"]
    expected = x.reshape(2, -1) @ last["kernel"] + last["bias"]
    logits = evaluation_logits(VGG(10), found)(found["params"], images)
    np.testing.assert_allclose(logits, expected, rtol=1e-3, atol=1e-3)


def test_training_moves_the_running_statistics_as_pytorch_does():
    images = jax.random.uniform(KEY, (4, 6, 6, 3))
    layer = ConvNormELU(5, "lax")
    found = layer.init(KEY, images)
    for _ in range(2):
        old = found["batch_stats"]
        _, updated = layer.apply(found, images, train=True, mutable=["batch_stats"])
        found = {**found, **updated}
    y = np.asarray(convolve(images, found["params"]["kernel"], "lax"), np.float64).reshape(-1, 5)
    new = found["batch_stats"]
    np.testing.assert_allclose(new["mean"], 0.9 * old["mean"] + 0.1 * y.mean(0), rtol=1e-4)
    np.testing.assert_allclose(new["var"], 0.9 * old["var"] + 0.1 * y.var(0, ddof=1), rtol=1e-4)


@pytest.mark.parametrize("weighted", [False, True])
def test_the_derivative_of_batch_norm_is_that_of_its_formula(weighted, x64):
    draw = np.random.default_rng(0)
    y, slopes = draw.normal(size=(2, 5, 4, 3, 6))
    scale, offset = draw.uniform(0.5, 2, (2, 6))
    weights = np.array([0.3, 0.5, 0, 0.2, 0]) if weighted else None

    def formula(y, scale, offset):
        each = np.full(5, 0.2) if weights is None else weights
        mean = jnp.einsum("n,nhwc->c", each, y) / 12
        var = jnp.einsum("n,nhwc->c", each, (y - mean) ** 2) / 12
        return jax.nn.elu((y - mean) / jnp.sqrt(var + 1e-5) * scale + offset)

    found, pull = jax.vjp(lambda *args: normalised(*args, weights, None)[0], y, scale, offset)
    expected, pulled = jax.vjp(formula, y, scale, offset)
    np.testing.assert_allclose(found, expected, atol=1e-12)
    for a, b in zip(pull(slopes), pulled(slopes), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-11)


def test_max_pool_gives_equal_values_to_the_first():
    np.testing.assert_array_equal(
        max_pool(jnp.arange(16.0).reshape(1, 4, 4, 1))[0, :, :, 0], [[5, 7], [13, 15]]
    )
    gradient = jax.grad(lambda x: max_pool(x).sum())(jnp.ones((1, 2, 2, 1)))
    np.testing.assert_array_equal(gradient[0, :, :, 0], [[1, 0], [0, 0]])
    x = jnp.array([[0.0, 2], [2, 1]]).reshape(1, 2, 2, 1)  # flax's pooling has the same rule
    flax = jax.grad(lambda x: nn.max_pool(x, (2, 2), (2, 2)).sum())(x)
    np.testing.assert_array_equal(jax.grad(lambda x: max_pool(x).sum())(x), flax)


def test_elu_and_its_derivatives(x64):
    x = jnp.array([-30.0, -2, -1e-9, 0.3, 5])
    np.testing.assert_allclose(elu(x), jax.nn.elu(x), atol=1e-15)
    slope = jax.grad(lambda x: elu(x).sum())(x)
    np.testing.assert_allclose(slope, np.exp(np.minimum(x, 0)), atol=1e-15)
    check_grads(elu, (jnp.array([-2.0, -0.5, 0.7]),), order=3)


def test_unknown_names_tell_the_nearest():
    with pytest.raises(InputError, match="did you mean 'vgg'"):
        build("vgg16", 10)
    with pytest.raises(InputError, match="did you mean 'patches'"):
        convolve(jnp.zeros((1, 2, 2, 1)), jnp.zeros((3, 3, 1, 1)), "patch")
