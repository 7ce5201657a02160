"""Convolutions of any kind, anywhere in a program, as matrix products."""

from dataclasses import replace
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

from ibau_jax import Dataset, IBAUConfig, unlearn
from ibau_jax.models import Classifier
from ibau_jax.models import model as models
from ibau_jax.models.rewrite import has_convolution, with_products

KEY = jax.random.key(0)
SIDES = {1: "W", 2: "HW", 3: "DHW"}
# Of x, kernel and result; X stands for the axes of the image.
LAYOUTS = [
    ("NXC", "XIO", "NXC"),
    ("NCX", "OIX", "NCX"),
    ("NXC", "IOX", "NCX"),
    ("CNX", "XOI", "XNC"),
]
PADDINGS = ("SAME", "VALID", (1, 2), (2, -1), (-1, 0))


@st.composite
def convolutions(draw):
    """A convolution `f(x, kernel)` and arguments: anything that flax, Equinox or PyTorch asks."""
    dims = draw(st.sampled_from([1, 2, 2, 2, 3]))

    def each(*values):
        return tuple(draw(st.sampled_from(values)) for _ in range(dims))

    groups = draw(st.sampled_from([1, 1, 2, 3]))
    channels = draw(st.sampled_from([1, 2]))  # of a group: 1 in groups is depthwise
    if draw(st.booleans()) and groups == 1:
        channels = 16  # takes Winograd's products, where the rest allows it
    width = groups * draw(st.sampled_from([1, 2]))
    size, kernel, layout = each(6, 7, 8), each(1, 2, 3, 3), draw(st.sampled_from(LAYOUTS))
    strides, dilation = each(1, 1, 2, 3), each(1, 1, 2)
    padding = draw(st.sampled_from(PADDINGS))
    if not isinstance(padding, str):
        padding = [padding] * dims
    numbers = lax.conv_dimension_numbers(
        *[(1,) * (dims + 2)] * 2, tuple(part.replace("X", SIDES[dims]) for part in layout)
    )
    shapes = [[0] * (dims + 2), [0] * (dims + 2)]
    for places, shape, lengths in (
        (numbers.lhs_spec, shapes[0], (2, groups * channels, *size)),
        (numbers.rhs_spec, shapes[1], (width, channels, *kernel)),
    ):
        for place, length in zip(places, lengths, strict=True):
            shape[place] = length
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    convolve = partial(
        lax.conv_general_dilated,
        window_strides=strides,
        padding=padding,
        # lax does not allow a name of a padding beside it
        lhs_dilation=(1,) * dims if isinstance(padding, str) else each(1, 1, 2),
        rhs_dilation=dilation,
        dimension_numbers=numbers,
        feature_group_count=groups,
    )
    return convolve, [rng.normal(size=shape) for shape in shapes]


def derivatives(f, *args):
    """Value, gradients, and products with the Hessian of a function that bends the result."""

    def height(*args):
        return jnp.sum(jnp.sin(f(*args)))

    slopes = jax.grad(height, tuple(range(len(args))))
    return f(*args), slopes(*args), jax.jvp(slopes, args, tuple(jnp.cos(a) for a in args))[1]


def assert_same(found, expected, bound=1e-10):
    """Leaf by leaf, relative to the largest number of each."""

    def compare(one, other):
        assert one.dtype == other.dtype and one.shape == other.shape
        np.testing.assert_allclose(one, other, atol=bound * max(1, np.abs(other).max(initial=0)))

    jax.tree.map(compare, found, expected)


def count_convolutions(f, *args):
    return str(jax.make_jaxpr(f)(*args)).count("conv_general_dilated[")


@given(convolutions())
@settings(max_examples=12)
def test_every_convolution_and_its_derivatives(drawn):
    f, arrays = drawn
    with jax.enable_x64(True):
        args = tuple(jnp.asarray(a) for a in arrays)
        products = partial(derivatives, with_products(f))
        assert_same(jax.jit(products)(*args), jax.jit(partial(derivatives, f))(*args))
        left = count_convolutions(products, *args)
        assert left == (
            0
            if jax.eval_shape(f, *args).size
            else count_convolutions(partial(derivatives, f), *args)
        )


def convolve(x, kernel):
    return lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=NHWC)


NHWC = ("NHWC", "HWIO", "NHWC")


def layer(x, kernel):
    return jnp.tanh(convolve(x, kernel))


@jax.custom_jvp
def ruled(x, kernel):
    return layer(x, kernel)


@ruled.defjvp
def _(primals, tangents):
    y, slope = jax.jvp(layer, primals, tangents)
    return y, 2 * slope


@jax.custom_vjp
def pulled(x, kernel):
    return layer(x, kernel)


@partial(pulled.defvjp, lambda x, kernel: (layer(x, kernel), (x, kernel)))
def _(kept, slope):
    to_x, to_kernel = jax.vjp(layer, *kept)[1](slope)
    return 3 * to_x, to_kernel


def looked_up(x, kernel, count=2):
    """A `cond` in a loop that cannot be unrolled, with a whole number in what it carries."""

    def step(carry):
        i, x = carry
        return i + 1, lax.cond(i % 2 == 0, layer, lambda x, kernel: x / 2, x, kernel)

    return lax.while_loop(lambda carry: carry[0] < count, step, (0, x))[1]


def choice(x, kernel):
    index = (x[0, 0, 0, 0] > 0).astype(int)
    return lax.switch(index, [layer, lambda x, k: layer(x, 2 * k), lambda x, k: x], x, kernel)


PROGRAMS = {
    "jit": jax.jit(layer),
    "scan": lambda x, k: lax.scan(lambda c, row: (layer(c, k) * row, c.sum()), x, jnp.ones(2))[0],
    "scan over x": lambda x, k: lax.scan(lambda c, a: (c + 1, layer(a[None], k)[0] * c), 0.0, x)[1],
    "backwards": lambda x, k: lax.scan(
        lambda c, a: (layer(c, k) + a, a), x, x[:, None], None, True
    )[0],
    "fori_loop": lambda x, k: lax.fori_loop(0, 2, lambda i, x: layer(x, k) * (i + 1), x),
    "switch": choice,
    "map": lambda x, k: lax.map(lambda a: layer(a[None], k)[0], x),
    "checkpoint": jax.checkpoint(layer, policy=jax.checkpoint_policies.dots_saveable),
    "custom_jvp": ruled,
    "custom_vjp": pulled,
    "vmap": lambda x, k: jax.vmap(lambda a, s: layer(a[None], s * k)[0])(x, jnp.arange(1.0, 3)),
    "all in all": jax.jit(
        lambda x, k: lax.fori_loop(0, 2, lambda i, x: jax.checkpoint(jax.jit(ruled))(x, k), x)
    ),
}


def arguments(dtype=np.float32, channels=2):
    rng = np.random.default_rng(0)
    shapes = (2, 4, 4, channels), (3, 3, channels, channels)
    return tuple(jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes)


@pytest.mark.parametrize("name", PROGRAMS)
def test_every_place_in_a_program(name, x64):
    args = arguments(np.float64)
    f = PROGRAMS[name]
    products = partial(derivatives, with_products(f))
    assert_same(jax.jit(products)(*args), jax.jit(partial(derivatives, f))(*args))
    assert not has_convolution(jax.make_jaxpr(products)(*args))


def test_a_loop_of_unknown_length_forwards(x64):
    args = arguments(np.float64)
    forward = [
        partial(lambda f, *args: jax.jvp(f, args, args), f)
        for f in (with_products(looked_up), looked_up)
    ]
    assert_same(*(jax.jit(f)(*args) for f in forward))
    assert not count_convolutions(forward[0], *args)


def test_the_rewritten_function_can_be_mapped(x64):
    x, kernel = arguments(np.float64)
    kernels = jnp.stack([kernel, 2 * kernel])
    found, expected = (
        jax.vmap(partial(derivatives, f), (None, 0))(x, kernels)
        for f in (with_products(layer), layer)
    )
    assert_same(found, expected)

    def mean(x, kernel):
        return lax.pmean(layer(x, kernel), "devices")

    found, expected = (
        jax.pmap(jax.grad(lambda k, f=f: f(x, k).sum()), axis_name="devices")(kernel[None])
        for f in (with_products(mean), mean)
    )
    assert_same(found, expected)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_other_floats(dtype):
    args = arguments(dtype, 16)
    found, expected = (
        jax.jit(partial(derivatives, f))(*args) for f in (with_products(layer), layer)
    )
    assert_same(
        *jax.tree.map(lambda a: a.astype(np.float32), (found, expected)),
        3e-5 if dtype == jnp.float32 else 0.1,  # Winograd's sums cost some rounding
    )
    assert jax.tree.map(jnp.result_type, found) == jax.tree.map(jnp.result_type, expected)


def test_what_is_no_matter_of_a_model_stays():
    x, kernel = arguments()
    whole = partial(convolve, x.astype(np.int32))
    assert count_convolutions(with_products(whole), kernel.astype(np.int32)) == 1
    halves = partial(
        lax.conv_general_dilated,
        window_strides=(1, 1),
        padding="SAME",
        dimension_numbers=NHWC,
        batch_group_count=2,
    )
    assert count_convolutions(with_products(halves), x, kernel) == 1
    assert_same(with_products(halves)(x, kernel), halves(x, kernel))


def test_a_rule_for_whole_numbers_stays_as_it_is():
    """Its tangents are of no type that a program could have."""

    @jax.custom_jvp
    def power(x, kernel, times):
        return layer(x, kernel) * times

    @power.defjvp
    def _(primals, tangents):
        x, kernel, times = primals
        return power(*primals), 5 * convolve(tangents[0], kernel)

    x, kernel = arguments()
    found, expected = (
        jax.grad(lambda x, f=f: f(x, kernel, 3).sum())(x) for f in (with_products(power), power)
    )
    assert_same(found, expected)


class Block(nn.Module):
    width: int
    stride: int = 1

    @nn.compact
    def __call__(self, x, train):
        y = nn.Conv(self.width, (3, 3), self.stride, use_bias=False)(x)
        y = nn.relu(nn.BatchNorm(not train)(y))
        y = nn.BatchNorm(not train)(nn.Conv(self.width, (3, 3), use_bias=False)(y))
        if x.shape != y.shape:
            x = nn.BatchNorm(not train)(nn.Conv(self.width, (1, 1), self.stride, use_bias=False)(x))
        return nn.relu(x + y)


class ResNet(nn.Module):
    axis: str | None = None

    @nn.compact
    def __call__(self, x, train=False, weights=None):
        x = nn.Conv(4, (3, 3))(x)
        self.sow("intermediates", "stem", x)
        x = Block(8, 2)(Block(4)(x, train), train)
        return nn.Dense(3)(x.mean((1, 2)))


@pytest.fixture(scope="module")
def resnet():
    images = np.random.default_rng(0).uniform(size=(12, 8, 8, 3)).astype(np.float32)
    variables = jax.jit(ResNet().init)(KEY, images[:1])
    labels = np.arange(12, dtype=np.int32) % 3
    return Classifier(ResNet()), variables, Dataset(images, labels)


def in_a_loop(model, variables, data):
    """Three steps along the gradient in the parameters."""
    others = {name: value for name, value in variables.items() if name != "params"}

    def loss(params):
        slopes = jax.nn.log_softmax(model({"params": params, **others}, data.images))
        return -jnp.take_along_axis(slopes, data.labels[:, None], 1).mean()

    def step(_, params):
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, jax.grad(loss)(params))

    return lax.fori_loop(0, 3, step, variables["params"])


def test_no_convolution_is_left_in_a_resnet(resnet):
    program = partial(in_a_loop, resnet[0], data=resnet[2])
    assert not count_convolutions(program, resnet[1])
    assert not count_convolutions(resnet[0].look, *resnet[1:2], resnet[2].images)
    train = partial(resnet[0].train, key=KEY)
    assert not count_convolutions(train, resnet[1], resnet[2].images)


def test_other_backends_keep_their_convolutions(resnet, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert count_convolutions(resnet[0], resnet[1], resnet[2].images) == 6


def test_a_resnet_says_learns_and_shows_the_same(resnet, monkeypatch):
    model, variables, (images, _) = resnet
    found = [
        jax.jit(model.look)(variables, images),
        jax.jit(partial(model.train, key=KEY))(variables, images),
    ]
    monkeypatch.setattr(models, "on_cpu", lambda f: f)
    assert_same(found[0], model.look(variables, images), 1e-5)
    assert_same(found[1], model.train(variables, images, KEY), 1e-5)


class Small(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.elu(nn.Conv(4, (3, 3), 2)(x))
        return nn.Dense(3)(nn.elu(nn.Conv(6, (2, 2), padding="VALID")(x)).mean((1, 2)))


def test_unlearning_does_the_same_with_and_without(resnet, monkeypatch):
    data = resnet[2]
    params = jax.jit(Small().init)(KEY, data.images)["params"]
    config = IBAUConfig.untargeted()
    config = replace(config, rounds=1, batch_size=6, inner_steps=2, radius=1.0, microbatch=3)

    def logits(params, images):
        return Small().apply({"params": params}, images)

    run = partial(unlearn, logits, params, data, config=config, key=KEY)
    found = run()
    monkeypatch.setattr(models, "on_cpu", lambda f: f)
    expected = run()
    # Adam divides by the size of a gradient, and with it what is rounded.
    assert_same(found.params, expected.params, 1e-4)
    assert_same(found.deltas, expected.deltas, 1e-4)
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), found.params, params)
    assert min(jax.tree.leaves(moved)) > 1e-3
