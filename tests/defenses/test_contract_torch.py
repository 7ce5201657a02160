"""Every defense of the table on a ResNet of PyTorch's, and a module cleaned in one call."""

import copy
import subprocess
import sys
from dataclasses import fields, replace

import jax
import numpy as np
import pytest
from conftest import SQUARE, small_digits

from ibau_jax import Dataset, IBAUConfig, InputError, clean_torch
from ibau_jax.attacks import poison
from ibau_jax.defenses import DEFENSES
from ibau_jax.defenses.clp import CLPConfig
from ibau_jax.defenses.torch_module import channels_last, with_logits
from ibau_jax.models.adapters.torch_pass import need_torchax

try:
    need_torchax()
except InputError as missing:
    pytest.skip(str(missing), allow_module_level=True)

import torch
from test_contract import QUICK
from tiny_torch import TinyResNet, seeded
from torch import nn

from ibau_jax.models.adapters.torch_model import from_torch, to_state_dict
from ibau_jax.models.predict import predict

KEY = jax.random.key(0)
CONFIGS = {**QUICK, "clp": CLPConfig(threshold=1.0)}  # of four channels none is far out
REFUSED = {
    "fine-pruning": "expected a module with the arguments of .* found a TorchModel",
    "dp-sgd": "expected a model that can be initialised, .* found a TorchModel",
}
UNTARGETED = replace(IBAUConfig.untargeted(), rounds=1, batch_size=40, inner_steps=3, radius=2.0)
QUICKLY = {field.name: getattr(UNTARGETED, field.name) for field in fields(UNTARGETED)}


@pytest.fixture(scope="module")
def trained() -> nn.Module:
    """A small ResNet trained on digits with a trigger.

    At a falling rate: at a fixed one its accuracy hung on the order of the sums, which the kind
    of processor decides (.76 to .93).
    """
    data, _ = poison(small_digits("train"), SQUARE, 0.1, 0)
    module = seeded(TinyResNet, channels=1)
    optimizer = torch.optim.Adam(module.parameters(), 0.02)
    images = torch.from_numpy(data.images.transpose(0, 3, 1, 2).copy())
    labels, rng = torch.from_numpy(data.labels).long(), np.random.default_rng(0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=250)
    for _ in range(250):
        rows = torch.from_numpy(rng.integers(0, len(labels), 64))
        optimizer.zero_grad()
        nn.functional.cross_entropy(module(images[rows]), labels[rows]).backward()
        optimizer.step()
        schedule.step()
    return module.eval()


@pytest.fixture(scope="module")
def clean() -> Dataset:
    return small_digits("test[:120]")


def accuracy(module: nn.Module, data: Dataset) -> float:
    with torch.no_grad():
        rows = module.eval()(torch.from_numpy(data.images.transpose(0, 3, 1, 2).copy()))
    return float((rows.argmax(-1).numpy() == data.labels).mean())


@pytest.mark.parametrize("name", DEFENSES)
def test_contract(name, trained, clean):
    before = copy.deepcopy(trained.state_dict())
    model, variables = from_torch(trained)
    more = {"train_set": clean} if DEFENSES[name].train_set else {}
    run = DEFENSES[name].method.run(
        model, variables, clean, config=CONFIGS.get(name), key=KEY, **more
    )
    if name in REFUSED:
        with pytest.raises(InputError, match=REFUSED[name]) as refused:
            next(iter(run))
        assert "\n" not in str(refused.value)
        return
    found = run.result()
    kinds = [jax.tree.map(lambda a: (a.shape, a.dtype), p) for p in (found.params, variables)]
    assert kinds[0] == kinds[1] and len(found.history) >= 1
    cleaned = seeded(TinyResNet, channels=1)
    cleaned.load_state_dict(to_state_dict(found.params, trained.state_dict()), strict=True)
    moved = [not torch.equal(before[key], value) for key, value in cleaned.state_dict().items()]
    assert any(moved) == bool(found.history[-1].get("channels", 1))  # some only cut
    assert accuracy(trained, clean) > 0.85
    if name != "clp":  # a cut channel of four is a large part of the network
        assert accuracy(cleaned, clean) > 0.15  # few large steps
    labels = predict(model)(found.params, clean.images)
    assert np.mean(labels == clean.labels) == pytest.approx(accuracy(cleaned, clean), abs=0.01)
    for key, value in trained.state_dict().items():  # the module given is not touched
        assert torch.equal(value, before[key])
    statistics = [key for key in before if "running" in key]
    if name in ("ibau", "naive", "anp", "clp", "sau"):  # state
        assert all(torch.equal(before[key], cleaned.state_dict()[key]) for key in statistics)
    else:
        assert not any(torch.equal(before[key], cleaned.state_dict()[key]) for key in statistics)


class Wrapped(nn.Module):
    """A module that may end in a softmax."""

    def __init__(self, module: nn.Module, softmax: bool = False):
        super().__init__()
        self.module, self.softmax = module, softmax

    def forward(self, x):
        rows = self.module(x)
        return rows.softmax(-1) if self.softmax else rows


def test_clean_torch(trained, clean):
    before = copy.deepcopy(trained.state_dict())
    images = torch.from_numpy(clean.images.transpose(0, 3, 1, 2).copy())
    found = clean_torch(trained, images, torch.from_numpy(clean.labels), **QUICKLY)
    assert list(found) == list(before) and not trained.training
    assert all(found[key].dtype == value.dtype for key, value in before.items())
    assert all(torch.equal(trained.state_dict()[key], value) for key, value in before.items())
    assert not torch.equal(found["conv1.weight"], before["conv1.weight"])
    cleaned = seeded(TinyResNet, channels=1)
    cleaned.load_state_dict(found, strict=True)
    assert accuracy(cleaned, clean) > 0.6


def test_images_of_all_forms():
    images = np.random.default_rng(0).integers(0, 256, (5, 7, 6, 3), np.uint8)
    wanted = np.float32(images) / 255
    first = images.transpose(0, 3, 1, 2).copy()
    for form in (
        images, first, wanted, torch.from_numpy(first), torch.from_numpy(wanted).requires_grad_()
    ):  # fmt: skip
        np.testing.assert_array_equal(channels_last(form), wanted)
    half = channels_last(torch.from_numpy(wanted).bfloat16())
    np.testing.assert_allclose(half, wanted, atol=2e-3)


def test_a_softmax_at_the_end_is_seen(trained, clean):
    """The logarithm of probabilities is as good as logits."""
    plain, variables = from_torch(Wrapped(trained))
    assert with_logits(plain, variables, clean.images) is plain
    soft, variables = from_torch(Wrapped(trained, softmax=True))
    seen = with_logits(soft, variables, clean.images[:20])
    assert seen.probabilities

    def loss(model, images):
        rows = jax.nn.log_softmax(model(variables, images))
        return rows[np.arange(len(rows)), clean.labels].sum()

    found, wanted = (
        jax.jit(jax.value_and_grad(lambda images, model=model: loss(model, images)))(clean.images)
        for model in (seen, plain)
    )
    np.testing.assert_allclose(found[0], wanted[0], rtol=1e-4)
    np.testing.assert_allclose(found[1], wanted[1], rtol=1e-3, atol=1e-4)


def test_a_module_that_is_no_better_than_chance_is_refused(trained, clean):
    with pytest.raises(InputError, match="of the clean images their labels.*normalised"):
        clean_torch(trained, clean.images, (clean.labels + 1) % 10)


@pytest.mark.parametrize(
    "images, text",
    [
        (np.zeros((4, 9, 9), np.float32), "expected .N, C, H, W. or .N, H, W, C."),
        (np.zeros((4, 7, 9, 9), np.float32), "expected .N, C, H, W. or .N, H, W, C."),
        (np.full((4, 1, 9, 9), 255.0, np.float32), "expected values in .0, 1."),
    ],
)
def test_images_are_checked(images, text, trained):
    with pytest.raises(InputError, match=text):
        clean_torch(trained, images, np.zeros(4, int))


def test_an_unknown_setting_is_refused(trained, clean):
    with pytest.raises(InputError, match="unknown setting 'round': .*did you mean 'rounds'"):
        clean_torch(trained, clean.images, clean.labels, round=3)


def test_import_does_without_torch():
    program = "import sys, ibau_jax, ibau_jax.defenses; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True)
