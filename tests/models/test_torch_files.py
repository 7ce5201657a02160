"""A module by name, the weights of a file in it, and the cleaned ones back in such a file."""

import sys

import jax
import numpy as np
import pytest

from ibau_jax.errors import InputError
from ibau_jax.models.adapters.torch_pass import need_torchax

try:
    need_torchax()
except InputError as missing:
    pytest.skip(str(missing), allow_module_level=True)

import torch
from tiny_torch import TinyResNet, seeded, trained_statistics
from torch import nn

from ibau_jax.models.adapters.torch_files import load_torch, save_torch
from ibau_jax.models.adapters.torch_modules import module_by_name

SPEC = "tiny_torch:TinyResNet"
IMAGES = np.random.default_rng(0).uniform(size=(3, 8, 8, 3)).astype(np.float32)
NCHW = torch.from_numpy(IMAGES.transpose(0, 3, 1, 2).copy())


@pytest.fixture
def module():
    return trained_statistics(seeded(TinyResNet, classes=5)).eval()


def with_(prefix, state):
    return {prefix + name: value for name, value in state.items()}


@pytest.mark.parametrize("prefix", ["", "module.", "model._orig_mod."])
def test_a_file_in_and_out(prefix, module, tmp_path):
    path, out = tmp_path / "m.pth", tmp_path / "cleaned.pth"
    state = with_(prefix, module.state_dict())
    torch.save({"epoch": 3, "net": state}, path)
    model, variables, container = load_torch(path, SPEC, {"classes": 5})
    found = jax.jit(model)(variables, IMAGES)
    np.testing.assert_allclose(found, module(NCHW).detach(), atol=1e-5)
    moved = jax.tree.map(lambda a: a * 1.5, variables)
    assert save_torch(out, container, moved) == ""
    again = torch.load(out, weights_only=True)
    assert again["epoch"] == 3 and list(again["net"]) == list(state)
    module.load_state_dict({k.removeprefix(prefix): v for k, v in again["net"].items()})
    np.testing.assert_allclose(jax.jit(model)(moved, IMAGES), module(NCHW).detach(), atol=1e-4)
    assert int(again["net"][prefix + "bn1.num_batches_tracked"]) == 7
    model, variables, _ = load_torch(out, SPEC, {"classes": 5})
    jax.tree.map(np.testing.assert_array_equal, variables, moved)


def test_a_whole_module_whose_class_is_gone(module, tmp_path, monkeypatch):
    """BackdoorBench's, TrojAI's: the weights are read, the class comes by name."""
    path, out = tmp_path / "m.pt", tmp_path / "cleaned.pt"
    monkeypatch.setattr(TinyResNet, "__module__", "gone")
    monkeypatch.setitem(sys.modules, "gone", sys.modules["tiny_torch"])
    torch.save({"model": module, "model_name": "tiny", "num_classes": 5}, path)
    monkeypatch.delitem(sys.modules, "gone")
    model, variables, container = load_torch(path, SPEC, {"classes": 5})
    found = jax.jit(model)(variables, IMAGES)
    np.testing.assert_allclose(found, module(NCHW).detach(), atol=1e-5)
    assert "model_name, num_classes, model" in save_torch(out, container, variables)
    assert list(torch.load(out, weights_only=True)) == ["model_name", "num_classes", "model"]


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.second(self.first(x.mean((2, 3))))


def test_tied_weights_need_be_in_a_file_once(tmp_path):
    """safetensors refuses them twice."""
    from safetensors.torch import load_file, save_file

    module = Tied()
    for gone in ("first.weight", "second.weight"):
        path, out = tmp_path / "m.safetensors", tmp_path / "cleaned.safetensors"
        save_file({k: v for k, v in module.state_dict().items() if k != gone}, path)
        model, variables, container = load_torch(path, f"{__name__}:Tied")
        np.testing.assert_allclose(model(variables, IMAGES), module(NCHW).detach(), atol=1e-6)
        moved = jax.tree.map(lambda a: a + 1, variables)
        save_torch(out, container, moved)
        for key, value in load_file(out).items():
            np.testing.assert_allclose(value, module.state_dict()[key] + 1)
    torch.save({k: v.clone() for k, v in module.state_dict().items()}, tmp_path / "m.pth")
    _, variables, container = load_torch(tmp_path / "m.pth", f"{__name__}:Tied")
    save_torch(tmp_path / "out.pth", container, jax.tree.map(lambda a: a + 1, variables))
    found = torch.load(tmp_path / "out.pth", weights_only=True)
    assert torch.equal(found["second.weight"], found["first.weight"])


MISFITS = {
    "another architecture": (
        lambda s: {"features.0.weight": torch.zeros(3), "classifier.bias": torch.zeros(3)},
        {},
        "missing 'conv1.weight' .*, unexpected 'features.0.weight' .and 1 more.",
    ),
    "another number of classes": (
        lambda s: s, {"classes": 4}, r"'fc.weight' is \(5, 8\), expected \(4, 8\)"
    ),
    "double precision": (
        lambda s: {k: v.double() for k, v in s.items()}, {"classes": 5}, "in double precision"
    ),
    "not a number": (
        lambda s: {**s, "fc.bias": s["fc.bias"] * np.nan}, {"classes": 5}, "fc.bias holds NaN"
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", MISFITS)
def test_files_that_do_not_fit_are_refused_in_one_line(what, module, tmp_path):
    change, args, text = MISFITS[what]
    torch.save(change(module.state_dict()), tmp_path / "m.pth")
    with pytest.raises(InputError, match=text) as refused:
        load_torch(tmp_path / "m.pth", SPEC, args)
    assert "\n" not in str(refused.value)


CODE = """
import torch
from neighbour import width

class Net(torch.nn.Module):
    def __init__(self, classes=2):
        super().__init__()
        self.layer = torch.nn.Linear(width, classes)

def make(**args):
    return Net(**args)

made, number = Net(), 3

def wrong():
    return [Net()]
"""


@pytest.fixture
def code(tmp_path, monkeypatch):
    (tmp_path / "own_code.py").write_text(CODE)
    (tmp_path / "neighbour.py").write_text("width = 7")
    (tmp_path / "broken.py").write_text("import torch\n1 / 0")
    (tmp_path / "quits.py").write_text("raise SystemExit(3)")
    monkeypatch.chdir(tmp_path)
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if name.startswith(("own_code", "neighbour", "broken", "quits", "ibau_jax_user")):
            del sys.modules[name]


@pytest.mark.parametrize("place", ["own_code", "own_code.py", "./own_code.py"])
def test_own_code(place, code):
    for name in ("Net", "make"):
        assert module_by_name(f"{place}:{name}", {"classes": 4}).layer.weight.shape == (4, 7)
    path = list(sys.path)
    assert module_by_name(f"{place}:made").layer.weight.shape == (2, 7) and sys.path == path


@pytest.mark.parametrize(
    "spec, args, text",
    [
        ("resnet18", {}, "the model is 'resnet18': expected one of 'package.module:name'"),
        ("own_code:", {}, "expected one of"),
        ("nowhere.at_all:Net", {}, "cannot import 'nowhere.at_all': No module named 'nowhere'"),
        ("nowhere.py:Net", {}, "cannot import 'nowhere.py': no such file"),
        ("broken.py:Net", {}, "cannot import 'broken.py': division by zero"),
        ("quits:Net", {}, "cannot import 'quits': 3"),
        ("own_code:Nett", {}, "'own_code' has no 'Nett': .* did you mean 'Net'"),
        ("own_code:number", {}, "'own_code:number' is int: expected a module"),
        ("own_code:wrong", {}, "'own_code:wrong' gives list: expected a torch.nn.Module"),
        ("own_code:Net", {"depth": 3}, r"refuses the arguments \(depth=3\): .*unexpected keyword"),
        ("own_code:made", {"classes": 3}, "is a module already: expected no arguments"),
    ],
)
def test_refusals_of_names_in_one_line(spec, args, text, code):
    with pytest.raises(InputError, match=text) as refused:
        module_by_name(spec, args)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("library", ["torchvision", "timm"])
def test_models_of_libraries(library):
    pytest.importorskip(library)
    module = module_by_name(f"{library}:resnet18", {"num_classes": 3})
    assert module.fc.weight.shape == (3, 512)
    with pytest.raises(InputError, match=f"'{library}' has no 'resnet81': .*did you mean"):
        module_by_name(f"{library}:resnet81")
    with pytest.raises(InputError, match="refuses the arguments"):
        module_by_name(f"{library}:resnet18", {"nothing": 3})


def test_a_library_that_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(InputError, match="run pip install transformers"):
        module_by_name("transformers:ViTForImageClassification")
