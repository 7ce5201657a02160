"""A PyTorch module as a model: what it gives, how it is trained, and its weights back."""

import copy
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import on_devices

from ibau_jax import clean_torch
from ibau_jax.errors import InputError
from ibau_jax.models.adapters.torch_pass import need_torchax

try:
    need_torchax()
except InputError as missing:
    pytest.skip(str(missing), allow_module_level=True)

import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_torch import PreActNet, TinyResNet, seeded, trained_statistics
from torch import nn

from ibau_jax.models.adapters.torch_model import from_torch, to_state_dict
from ibau_jax.models.model import Model, without_dropout
from ibau_jax.models.normalised import normalised as behind
from ibau_jax.models.normed import fed_by, normed_layers

IMAGES = np.random.default_rng(0).uniform(size=(4, 8, 8, 3)).astype(np.float32)
NCHW = torch.from_numpy(IMAGES.transpose(0, 3, 1, 2).copy())
KEY = jax.random.key(0)


def logits_of(module: nn.Module) -> np.ndarray:
    with torch.no_grad():
        return module.eval()(NCHW.clone()).numpy()


def ours(module: nn.Module) -> np.ndarray:
    model, variables = from_torch(module)
    return np.asarray(jax.jit(model)(variables, IMAGES))


def resnet() -> nn.Module:
    return trained_statistics(seeded(TinyResNet, classes=5))


class Head(nn.Module):
    """A linear layer on the mean colour, of which the tests change one thing each."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 4)

    def forward(self, x):
        return self.layer(x.mean((2, 3)))


class Constants(Head):
    def __init__(self):
        super().__init__()
        self.plain, self.several = torch.full((4,), 2.0), [torch.ones(4), {"x": torch.ones(4)}]
        self.register_buffer("order", torch.tensor([3, 2, 1, 0]))
        self.register_buffer("hidden", torch.full((4,), 0.5), persistent=False)

    def forward(self, x):
        found = super().forward(x)[:, self.order] * self.plain + self.several[1]["x"]
        return found + torch.tensor([1.0, 2.0, 3.0, 4.0]) + self.hidden + torch.zeros(4)


class InPlace(Head):
    def forward(self, x):
        x -= 0.5
        x[:, 0].mul_(2)
        return super().forward(x)


class AsksConstants(Head):
    """As torchvision's `Normalize` does, with constants."""

    def forward(self, x):
        std = torch.as_tensor([0.2, 0.3, 0.4])
        if (std == 0).any():
            raise ValueError("a deviation is zero")
        return super().forward(x / std.view(1, 3, 1, 1))


class Object(Head):
    def forward(self, x):
        return {"logits": super().forward(x), "loss": None}


class Tied(Head):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.layer(self.second(self.first(x.mean((2, 3)))))


def parametrized():
    layer = nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 8))
    return nn.Sequential(layer, nn.Flatten())


def attention():
    layer = nn.TransformerEncoderLayer(64, 2, 32, batch_first=True)
    return nn.Sequential(nn.Flatten(2), layer, nn.Flatten(), nn.Linear(192, 3))


def resized():
    def forward(x):
        return nn.functional.interpolate(x, size=(5, 11), mode="bilinear", antialias=True)

    class Resize(nn.Module):
        def forward(self, x):
            return forward(x)

    return nn.Sequential(Resize(), nn.Conv2d(3, 4, 5), nn.Flatten())


def parallel():
    """As it was made where there were no devices (those of torchax are refused)."""
    found = nn.DataParallel.__new__(nn.DataParallel)
    nn.Module.__init__(found)
    found.module, found.device_ids = resnet(), []
    return found


MODULES = {
    "resnet": resnet, "pre-activation": lambda: trained_statistics(seeded(PreActNet)),
    "constants": Constants, "in place": InPlace, "a test of constants": AsksConstants, "tied": Tied,
    "weight norm": parametrized, "attention": attention, "antialiased resizing": resized,
    "data parallel": parallel,
    "synchronised": lambda: nn.SyncBatchNorm.convert_sync_batchnorm(resnet()),
    "no batch norm": lambda: nn.Sequential(nn.Conv2d(3, 4, 8), nn.Dropout(), nn.Flatten()),
}  # fmt: skip


@pytest.mark.parametrize("name", MODULES)
def test_logits_and_the_way_back(name):
    module = MODULES[name]()
    before = copy.deepcopy(module.state_dict())
    model, variables = from_torch(module)
    assert isinstance(model, Model)
    np.testing.assert_allclose(jax.jit(model)(variables, IMAGES), logits_of(module), atol=1e-5)
    back = to_state_dict(variables, module.state_dict())
    assert list(back) == list(before)
    for key, value in back.items():
        assert value.dtype == before[key].dtype and torch.equal(value, before[key])
    # other weights, the same way
    moved = jax.tree.map(lambda a: a * 1.25, variables)
    module.load_state_dict(to_state_dict(moved, module.state_dict()), strict=True)
    np.testing.assert_allclose(jax.jit(model)(moved, IMAGES), logits_of(module), atol=2e-5)


def test_the_module_stays_as_it_is():
    module = Constants().train()
    before = copy.deepcopy(module.state_dict())
    model, variables = from_torch(module)
    jax.jit(model.train)(variables, IMAGES, KEY)
    assert module.training and type(module.plain) is torch.Tensor
    variables["params"]["layer"]["weight"][:] = 0  # no view of the module's memory
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())


def test_derivatives_are_torchs():
    """Of the parameters, and of the images twice (a product with the Hessian)."""
    module = resnet().eval()
    model, variables = from_torch(module)
    direction = np.random.default_rng(1).normal(size=IMAGES.shape).astype(np.float32)

    def loss(params, images):
        return jnp.mean(jax.nn.log_softmax(model({**variables, "params": params}, images))[:, 0])

    x = NCHW.clone().requires_grad_()
    value = module(x).log_softmax(-1)[:, 0].mean()
    (slope,) = torch.autograd.grad(value, x, create_graph=True)
    along = (slope * torch.from_numpy(direction.transpose(0, 3, 1, 2).copy())).sum()
    (curve,) = torch.autograd.grad(along, x, retain_graph=True)
    value.backward()
    grads = jax.jit(jax.grad(loss))(variables["params"], IMAGES)
    found = to_state_dict({"params": grads}, dict(module.named_parameters()))
    for name, p in module.named_parameters():
        np.testing.assert_allclose(found[name].detach(), p.grad, atol=1e-6)
    slope_of = jax.grad(lambda images: loss(variables["params"], images))
    _, product = jax.jit(lambda x, v: jax.jvp(slope_of, (x,), (v,)))(IMAGES, direction)
    np.testing.assert_allclose(product, curve.numpy().transpose(0, 2, 3, 1), atol=1e-6)


@pytest.mark.parametrize("momentum", [0.1, 0.3, None])
def test_training_moves_the_statistics_as_torch_does(momentum):
    module = resnet()
    for one in module.modules():
        if isinstance(one, nn.BatchNorm2d):
            one.momentum = momentum
    model, variables = from_torch(module)
    logits, maps, others = jax.jit(model.train)(variables, IMAGES, KEY)
    np.testing.assert_allclose(logits, module.train()(NCHW).detach(), atol=2e-5)
    back = to_state_dict({**variables, **others}, module.state_dict())
    for key, value in module.state_dict().items():
        np.testing.assert_allclose(back[key], value, atol=1e-6, err_msg=key)
    assert jax.tree.structure(others) == jax.tree.structure(
        {"batch_stats": variables["batch_stats"]}
    )
    assert [m.shape[1:] for m in maps] == [(8, 8, 4), (4, 4, 8)]


@given(st.integers(1, 4), st.integers(0, 3))
def test_padding_counts_nowhere(count, padding):
    model, variables = from_torch(_MODULE)
    images = np.concatenate([IMAGES[:count], np.full((padding, *IMAGES.shape[1:]), 9, np.float32)])
    weights = np.float32([1 / count] * count + [0] * padding)
    some, _, moved = jax.jit(model.train)(variables, images, KEY, weights)
    alone, _, wanted = jax.jit(model.train)(variables, images[:count], KEY)
    np.testing.assert_allclose(some[:count], alone, rtol=1e-4, atol=1e-4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), moved, wanted)


_MODULE = resnet()


def test_dropout_is_drawn_from_the_key():
    module = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Dropout1d(0.25), nn.Linear(192, 3))
    model, variables = from_torch(module)
    train = jax.jit(lambda key: model.train(variables, IMAGES, key)[0])
    first, again, other = train(KEY), train(KEY), train(jax.random.key(1))
    assert (first == again).all() and np.abs(first - other).max() > 1e-3
    calm = without_dropout(model)
    np.testing.assert_allclose(calm.train(variables, IMAGES, KEY)[0], logits_of(module), atol=1e-5)
    # kept values are larger by as much as others are missing
    keep = nn.Sequential(nn.Dropout(0.25), nn.Flatten())
    keep.append(nn.Linear(192, 192, bias=False))
    with torch.no_grad():
        keep[2].weight.copy_(torch.eye(192))
    model, variables = from_torch(keep)
    dropped = np.asarray(jax.jit(model.train)(variables, IMAGES + 1, KEY)[0])
    given_values = np.moveaxis(IMAGES + 1, -1, 1).reshape(4, -1)
    share = np.mean(dropped == 0)
    assert 0.15 < share < 0.35
    np.testing.assert_allclose(dropped[dropped > 0], (given_values / 0.75)[dropped > 0], rtol=1e-5)


ON_TWO_DEVICES = """
import jax, numpy as np
from test_torch_model import IMAGES, KEY, nn, resnet
from ibau_jax.devices.mesh import devices
from ibau_jax.models.adapters.torch_model import from_torch

model, variables = from_torch(nn.Sequential(nn.Dropout(0.3), resnet()))
found = []
for number, mapping in ((1, "pmap"), (2, "pmap"), (2, "shard_map")):
    on = devices(number, mapping)

    def trained(variables, images, weights):
        logits, _, others = model.train(variables, images, KEY, weights, on.axis)
        return others

    rows = lambda i: on.numbers(i, 4 // number)
    images = on.share(lambda i: IMAGES[rows(i)])
    weights = on.share(lambda i: np.float32([1 / 3, 1 / 3, 1 / 3, 0])[rows(i)])
    program = on.program(trained, rows=(1, 2))
    found.append(on.one(program(on.replicate(variables), images, weights)))
for other in found[1:]:
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), other, found[0])
"""


def test_statistics_and_dropout_are_those_of_the_whole_batch():
    """On one device and on two, by either mapping."""
    done = subprocess.run(
        [sys.executable, "-c", ON_TWO_DEVICES], env=on_devices(2), capture_output=True, text=True
    )
    assert not done.returncode, done.stderr


def test_half_precision_is_computed_in_single_and_cast_back():
    module = resnet().bfloat16()
    module.conv1.half()
    wanted = logits_of(copy.deepcopy(module).float())
    model, variables = from_torch(module)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {np.dtype(np.float32)}
    np.testing.assert_allclose(jax.jit(model)(variables, IMAGES), wanted, atol=1e-5)
    back = to_state_dict(variables, module.state_dict())
    assert back["conv1.weight"].dtype == torch.float16
    assert {k: v.dtype for k, v in back.items()} == {
        k: v.dtype for k, v in module.state_dict().items()
    }
    module.load_state_dict(back, strict=True)
    huge = jax.tree.map(lambda a: a + 1e6, variables)
    with pytest.raises(InputError, match="'conv1.weight' holds values too large for torch.float16"):
        to_state_dict(huge, module.state_dict())


def test_what_is_frozen_is_state_and_comes_back():
    module = resnet()
    module.conv1.requires_grad_(False)
    _, variables = from_torch(module)
    assert "conv1" in variables["state"] and "conv1" not in variables["params"]
    assert torch.equal(
        to_state_dict(variables, module.state_dict())["conv1.weight"], module.conv1.weight
    )
    _, variables = from_torch(module.requires_grad_(False))  # as people load models
    assert "conv1" in variables["params"] and "state" not in variables


def test_images_are_normalised_on_demand():
    module, mean, std = resnet(), (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
    normalised = (NCHW - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    wanted = module.eval()(normalised).detach()
    model, variables = from_torch(module)
    found = jax.jit(behind(model, mean, std, 3))(variables, IMAGES)
    np.testing.assert_allclose(found, wanted, atol=2e-5)
    with pytest.raises(InputError, match="mean and std belong together"):
        clean_torch(module, IMAGES, np.zeros(len(IMAGES), int), mean=mean)


def test_logits_are_found_in_an_object():
    module = Object()
    np.testing.assert_allclose(ours(module), module(NCHW)["logits"].detach(), atol=1e-6)


def test_float64_where_jax_is_set_to_it(x64):
    module = resnet()
    model, variables = from_torch(module)
    wide = jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), variables)
    found = jax.jit(model)(wide, jnp.asarray(IMAGES, jnp.float64))
    assert found.dtype == jnp.float64
    np.testing.assert_allclose(found, module.double().eval()(NCHW.double()).detach(), atol=1e-12)


class If(Head):
    def forward(self, x):
        return super().forward(x if x.mean() > 0 else -x)


def holding(value: float) -> nn.Module:
    module = resnet()
    with torch.no_grad():
        module.layer2[0].conv2.weight[1, 0, 0, 0] = value
    return module


class Uncopied(Head):
    def __init__(self):
        super().__init__()
        self.generator = (i for i in range(3))


REFUSED = {
    "no module": (lambda: 3, "expected a torch.nn.Module, found int"),
    "double": (lambda: resnet().double(), "conv1.weight is in double precision: .* .float()"),
    "NaN": (lambda: holding(np.nan), "layer2.0.conv2.weight holds NaN"),
    "infinite": (lambda: holding(np.inf), "layer2.0.conv2.weight holds infinite values"),
    "no values": (lambda: nn.LazyLinear(3), "weight has no values yet"),
    "meta": (lambda: nn.Linear(3, 3, device="meta"), "weight has no values yet"),
    "no parameters": (nn.Flatten, "has no parameters"),
    "not copied": (Uncopied, "cannot be copied: cannot pickle 'generator'"),
}


@pytest.mark.parametrize("what", REFUSED)
@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_refusals_in_one_line(what):
    make, text = REFUSED[what]
    with pytest.raises(InputError, match=text) as refused:
        from_torch(make())
    assert "\n" not in str(refused.value)


def test_a_forward_that_asks_for_values_is_refused():
    model, variables = from_torch(If())
    with pytest.raises(InputError, match="asks for the value of a tensor") as refused:
        jax.jit(model)(variables, IMAGES)
    assert "\n" not in str(refused.value)


def test_a_state_dict_of_another_module_is_refused():
    _, variables = from_torch(resnet())
    with pytest.raises(InputError, match="the state dict has no 'conv1.weight'"):
        to_state_dict(variables, Head().state_dict())


def test_torch_is_left_as_it_was():
    """torchax turns off the fast path of attention for the whole process."""
    torch.backends.mha.set_fastpath_enabled(True)
    ours(attention())
    assert torch.backends.mha.get_fastpath_enabled()


@pytest.mark.parametrize("make", [TinyResNet, PreActNet])
def test_batch_norms_and_their_convolutions_are_found(make):
    """What hooks say of the order in which they run."""
    module, made, pairs = seeded(make), {}, {}
    for name, one in module.named_modules():
        if isinstance(one, nn.Conv2d):
            one.register_forward_hook(lambda m, i, o, name=name: made.update({id(o): (name, o)}))
        elif isinstance(one, nn.BatchNorm2d):
            one.register_forward_pre_hook(
                lambda m, i, name=name: pairs.update({name: made.get(id(i[0]), (None,))[0]})
            )
    logits_of(module)
    model, variables = from_torch(module)
    layers = normed_layers(variables, fed_by(model, variables, IMAGES[:1]))
    kernels = {".".join(layer.scale[:-1]): layer.kernel for layer in layers}
    assert {name: path and ".".join(path[:-1]) for name, path in kernels.items()} == pairs
    for layer in layers:
        if layer.kernel:
            kernel = module.get_parameter(".".join(layer.kernel)).detach().numpy()
            outputs, inputs, *size = kernel.shape
            assert layer.hwio(kernel).shape == (
                *size,
                inputs,
                layer.channels == outputs and outputs,
            )
