"""PreAct-ResNet and ViT beside the VGG: their shapes, their mathematics, one and many devices."""

import json
import subprocess
import sys
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import on_devices, same

from ibau_jax.attacks import make_attack
from ibau_jax.commands import cli
from ibau_jax.commands.options import ARCHITECTURE_NAMES
from ibau_jax.data import Dataset
from ibau_jax.devices.mesh import devices
from ibau_jax.models.architectures import ARCHITECTURES, build
from ibau_jax.models.files import load_model, save_model
from ibau_jax.models.model import Classifier, without_dropout
from ibau_jax.models.normed import fed_by, normed_layers
from ibau_jax.models.resnet import BatchNorm, PreActResNet
from ibau_jax.models.stored import StoredModel
from ibau_jax.models.vit import ViT, positions
from ibau_jax.training.train import TrainConfig, train

KEY = jax.random.key(0)
IMAGES = np.random.default_rng(0).uniform(size=(4, 16, 16, 3)).astype(np.float32)
SMALL = {
    "resnet": PreActResNet(5, widths=(4, 8), blocks=1),
    "vit": ViT(5, width=16, depth=3, heads=2, dropout=(0.3,)),
}


def shapes(name: str) -> dict:
    images = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    return jax.eval_shape(build(name, 10).init, KEY, images)


def drawn(variables) -> dict:
    """The same with random numbers: scales, statistics and all."""
    rng = np.random.default_rng(0)
    spread = jax.tree.map(lambda a: rng.uniform(0.5, 1.5, a.shape).astype(np.float32), variables)
    return jax.tree.map(
        lambda a: a if a.ndim == 1 else (a - 1) * (2 / a[..., 0].size) ** 0.5, spread
    )


def test_sizes_are_those_of_the_originals():
    """PreActResNet18 of the PyTorch benchmarks, and DeiT-Ti less its class token and positions."""
    for name, count in (("preact-resnet18", 11_171_146), ("vit-tiny", 5_350_090)):
        assert sum(x.size for x in jax.tree.leaves(shapes(name)["params"])) == count
    assert ", ".join(ARCHITECTURES) == ARCHITECTURE_NAMES


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_all_have_what_defenses_ask_for(name):
    module, variables = build(name, 10), shapes(name)
    images = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
    logits, maps = jax.eval_shape(Classifier(module).look, variables, images)
    # NAD takes three where there are as many; `vgg-mini` has one block.
    assert logits.shape == (2, 10) and len(maps) >= (1 if name == "vgg-mini" else 3)
    features = jax.eval_shape(partial(module.apply, features=True), variables, images)
    kernel = variables["params"]["classifier"]["kernel"]
    assert kernel.shape == (features.shape[1], 10)
    assert features.shape[1] % maps[-1].shape[-1] == 0  # as Fine-Pruning takes it
    assert set(without_dropout(Classifier(module)).module.dropout) <= {0.0}  # pyright: ignore
    size = maps[-1].shape[1:]
    assert {m.ndim for m in maps} == {4} and size == {"vgg": (8, 8, 128)}.get(name, size)


def test_the_resnet_is_the_published_one():
    """Against its description, by flax's own layers."""
    module = SMALL["resnet"]
    variables = drawn(module.init(KEY, IMAGES))
    p, s = variables["params"], variables["batch_stats"]

    def conv(x, kernel, stride=1):
        layer = nn.Conv(
            kernel.shape[-1], kernel.shape[:2], stride, len(kernel) // 2, use_bias=False
        )
        return layer.apply({"params": {"kernel": kernel}}, x)

    def norm(x, p, s):
        layer = nn.BatchNorm(use_running_average=True, epsilon=1e-5)
        params = {"scale": p["scale"], "bias": p["offset"]}
        return nn.relu(layer.apply({"params": params, "batch_stats": s}, x))

    x = conv(IMAGES, p["conv1"]["kernel"])
    for i, stride in ((1, 1), (2, 2)):
        block, stats = p[f"layer{i}_0"], s[f"layer{i}_0"]
        assert ("shortcut" in block) == (i == 2)
        y = norm(x, block["norm1"], stats["norm1"])
        short = conv(y, block["shortcut"]["kernel"], 2) if i == 2 else x
        y = norm(conv(y, block["conv1"]["kernel"], stride), block["norm2"], stats["norm2"])
        x = conv(y, block["conv2"]["kernel"]) + short
    last = p["classifier"]
    expected = x.mean((1, 2)) @ last["kernel"] + last["bias"]
    found = Classifier(module)(variables, IMAGES)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    # Of the two norms of a block a convolution feeds the second one.
    layers = normed_layers(variables, fed_by(Classifier(module), variables, IMAGES))
    kernels = {layer.name: layer.kernel for layer in layers}
    assert kernels["layer2_0/norm2"] == ("layer2_0", "conv1", "kernel")
    assert kernels["layer2_0/norm1"] is None
    assert kernels["layer1_0/norm1"] == ("conv1", "kernel")  # of the first block


def test_batch_norm_in_training_without_padding():
    layer, x = BatchNorm(), jnp.asarray(IMAGES)
    variables = layer.init(KEY, x, False, None)
    y, moved = layer.apply(variables, x, True, None, mutable=["batch_stats"])
    flat = np.asarray(x, np.float64).reshape(-1, 3)
    expected = (flat - flat.mean(0)) / np.sqrt(flat.var(0) + 1e-5)
    np.testing.assert_allclose(np.reshape(y, (-1, 3)), expected, atol=1e-5)
    np.testing.assert_allclose(
        moved["batch_stats"]["var"], 0.9 + 0.1 * flat.var(0, ddof=1), rtol=1e-5
    )
    padded, weights = jnp.concatenate([x, 1 - x[:2]]), jnp.asarray([0.25] * 4 + [0.0] * 2)
    z, again = layer.apply(variables, padded, True, weights, mutable=["batch_stats"])
    np.testing.assert_allclose(z[:4], y, atol=1e-5)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5), again, moved)


def test_positions_are_told_apart():
    found = positions(4, 3, 16)
    apart = np.linalg.norm(found[:, None] - found[None], axis=-1)
    assert found.shape == (12, 16) and apart[~np.eye(12, dtype=bool)].min() > 0.5


@pytest.mark.parametrize("name", ["preact-resnet18-16", "vit-mini"])
def test_files_hold_them(name, tmp_path):
    variables = drawn(shapes(name))
    attack = make_attack("badnets", 10)
    model = StoredModel(variables, name, 10, "digits", (attack,), {"seed": 0})
    found = load_model(save_model(tmp_path / "m.safetensors", model))
    assert found.architecture == name and found.hash == model.hash
    same(found.variables, variables)


def test_train_and_defend_by_the_command(capsys, tmp_path, monkeypatch):
    tiny = partial(ViT, patch=8, width=48, depth=2, heads=2)  # a ResNet learns as well, in a minute
    monkeypatch.setitem(ARCHITECTURES, "vit-small", tiny)
    path, out = tmp_path / "m.safetensors", tmp_path / "out"
    begin = [
        "train",
        "--architecture",
        "vit-small",
        "--epochs",
        "3",
        "--out",
        str(path),
        "--json",
    ]
    assert cli.main(begin) == 0
    trained = json.loads(capsys.readouterr().out)
    assert trained["architecture"] == "vit-small" and trained["acc"] > 0.6
    common = ["--model", str(path), "--json"]
    assert cli.main(["defend", "--defense", "fine-pruning", "--out", str(out), *common]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["before"]["asr"] == pytest.approx(trained["asr"], abs=0.01)
    assert found["after"]["acc"] > 0.4 and found["after"]["asr"] < found["before"]["asr"]
    assert load_model(out / "cleaned.safetensors").architecture == "vit-small"
    assert cli.main(["bound", *common]) == 2
    assert "is a vit-small: expected a vgg" in capsys.readouterr().err
    assert cli.main(["train", "--architecture", "resnet", "--out", str(out / "x")]) == 2
    assert "unknown architecture 'resnet'" in capsys.readouterr().err


@pytest.mark.parametrize("name", SMALL)
def test_eight_devices_are_as_one(name):
    done = subprocess.run(
        [sys.executable, __file__, name], env=on_devices(8), capture_output=True, text=True
    )
    assert not done.returncode, done.stderr
    found = json.loads(done.stdout)
    assert found["apart"] < 1e-9 and found["moved"] > 1e-3


def main(name: str) -> dict[str, float]:
    """An epoch on one and on eight devices; batches of 20 leave a remainder."""
    jax.config.update("jax_enable_x64", True)
    rng = np.random.default_rng(0)
    data = Dataset(rng.uniform(size=(50, 16, 16, 3)), rng.integers(0, 5, 50))
    config = TrainConfig(epochs=1, batch_size=20, rate=1e-3)
    one, eight = (
        jax.tree.leaves(train(SMALL[name], data, config=config, key=KEY, devices=devices(n))[0])
        for n in (1, 8)
    )
    first = jax.tree.leaves(SMALL[name].init(jax.random.split(KEY, 3)[0], data.images[:1]))

    def far(these, those):
        return max(float(np.abs(a - b).max()) for a, b in zip(these, those, strict=True))

    return {"apart": far(one, eight), "moved": far(one, first)}


if __name__ == "__main__":
    json.dump(main(sys.argv[1]), sys.stdout)
