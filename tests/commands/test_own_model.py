"""A model of the user's own through the real commands: its code by name, its weights in a file."""

import flax
import jax
import numpy as np
import pytest
from command_line import printed as run
from command_line import refused
from PIL import Image

from ibau_jax.data import Dataset, load
from ibau_jax.models.predict import predict
from ibau_jax.results.rows import read_rows

CODE = """
import flax.linen as nn

class Net(nn.Module):
    classes: int = 10
    double: bool = False

    @nn.compact
    def __call__(self, x, train: bool = False):
        x = nn.Conv(4, (5, 5), 4)(x)
        x = nn.BatchNorm(use_running_average=not train)(x)
        return nn.Dense(self.classes)(nn.relu(x).mean((1, 2)))

def broken():
    raise RuntimeError("no such luck")
"""
MEAN = ("--mean", ".5", "--std", ".25")
DEFEND = ["defend", "--defense", "finetune", "--rounds", "1", "--out", "out", "--json"]
NET = ["--model", "weights.msgpack", "--linen", "net.py:Net"]


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A folder with code and weights, and images that are labelled as the normalised model does."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.py").write_text(CODE)
    space: dict = {}
    exec(CODE, space)
    net = space["Net"]()
    variables = net.init(jax.random.key(10), np.zeros((1, 32, 32, 3)))
    (tmp_path / "weights.msgpack").write_bytes(flax.serialization.to_bytes(variables))
    label = predict(lambda v, x: net.apply(v, (x - 0.5) / 0.25))
    for name, split in (("clean", "test[:20]"), ("test", "test[700:730]")):
        images = load("digits", split).images
        np.savez(tmp_path / f"{name}.npz", images=images, labels=label(variables, images))
    Image.fromarray(np.full((3, 3, 3), 255, np.uint8)).save(tmp_path / "trigger.png")
    return tmp_path


def test_from_weights_to_weights(capsys, own):
    images = ["--clean", "clean.npz", "--split", "test.npz"]
    attack = ["--trigger", "trigger.png", "--trigger-at", "28,27", "--target", "4"]
    found, _ = run(capsys, *DEFEND, *NET, *MEAN, *images, *attack)
    assert found["before"]["acc"] == 1 and found["before"]["asr"] is not None
    assert found["weights"] == "out/cleaned.msgpack" and found["dataset"] == "own"
    row = read_rows(own / "out")[-1]
    assert row["own"]["code"] == "net.py:Net" and row["own"]["mean"] == ".5"
    # The file is one of flax's, and what was measured is what is in it.
    old, new = (
        flax.serialization.msgpack_restore((own / name).read_bytes())
        for name in ("weights.msgpack", "out/cleaned.msgpack")
    )
    assert jax.tree.structure(old) == jax.tree.structure(new)
    changed = [np.any(a != b) for a, b in zip(*map(jax.tree.leaves, (old, new)), strict=True)]
    assert any(changed)
    cleaned = ["--model", "out/cleaned.msgpack", *NET[2:], *MEAN, "--json", "--split", "test.npz"]
    after, _ = run(capsys, "evaluate", *cleaned, *attack)
    assert [after[k] for k in ("acc", "asr", "ra", "n")] == [
        found["after"][k] for k in ("acc", "asr", "ra", "n")
    ]
    # The file beside it remembers the normalisation, and runs no code by itself.
    beside = ["evaluate", "--json", "--split", "test.npz", "--model", found["model"]]
    again, _ = run(capsys, *beside, *NET[2:], *attack)
    assert {**again, "model": None} == {**after, "model": None}
    assert "whose code is not in it: give --linen net.py:Net" in refused(capsys, *beside)
    # The trigger is where it was asked for: 27 rows down, 28 columns to the right.
    with np.load("test.npz") as data:
        test = Dataset(data["images"].copy(), data["labels"])
    test.images[:, 27:30, 28:31] = 1
    np.savez("stamped.npz", images=test.images, labels=np.full(30, 4))
    stamped, _ = run(capsys, "evaluate", *cleaned[:-1], "stamped.npz")
    assert stamped["acc"] == pytest.approx(after["asr"])


def test_without_its_normalisation_it_stops(capsys, own):
    """Labels in another order than the model's look just the same."""
    with np.load("clean.npz") as data:
        np.savez("wrong.npz", images=data["images"], labels=(data["labels"] + 1) % 10)
    line = refused(capsys, *DEFEND, *NET, *MEAN, "--clean", "wrong.npz", "--split", "test.npz")
    assert "hardly more than guessing" in line and not (own / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (NET[:2], "cannot read the model 'weights.msgpack'"),
        ([*NET, "--nnx", "net.py:Net"], "code by --linen and --nnx: expected one of them"),
        ([*NET, "--model-args", "[1]"], "the arguments of the model are '[1]': expected an object"),
        ([*NET, "--model-args", '{"width": 3}'], "width"),
        ([*NET, "--model-args", '{"classes": 7}'], "refuses images of"),
        ([*NET, "--mean", ".5"], "the std is None: expected numbers"),
        ([*NET, "--mean", ".5,.5", "--std", ".2,.2"], "a number for each of 3 channels"),
        ([*NET, "--mean", "127", "--std", "64"], "divide those of 0 to 255 by 255"),
        ([*NET[:2], "--linen", "net.py:Nets"], "'Nets'"),
        ([*NET[:2], "--linen", "nets.py:Net"], "nets.py"),
        ([*NET[:2], "--linen", "net.py:broken"], "no such luck"),
        (["--model", "none.msgpack", *NET[2:]], "none.msgpack"),
        ([*NET, "--trigger", "trigger.png", "--target", "3"], "or a place for it"),
        ([*NET, "--trigger", "trigger.png", "--trigger-at", "30,1", "--target", "3"], "not inside"),
        ([*NET, "--trigger", "trigger.png", "--trigger-at", "3", "--target", "3"], "expected X,Y"),
        ([*NET, "--attack", "badnets"], "no target: expected the label"),
        ([*NET, "--attack", "l2", "--target", "3"], "expected badnets or blend, or the picture"),
    ],
)
def test_refused_in_one_line_with_nothing_written(capsys, own, arguments, message):
    images = ["--clean", "clean.npz", "--split", "test.npz"]
    assert message in refused(capsys, *DEFEND, *images, *arguments)
    assert not (own / "out").exists()


def test_options_of_own_models_are_for_them_alone(capsys, digits_model):
    line = refused(capsys, "evaluate", "--model", digits_model, "--mean", ".5")
    assert "mean for a model file of ours" in line and "(--mean)" in line
    line = refused(capsys, "evaluate", "--model", digits_model, "--trigger-at", "1,1")
    assert "(--trigger-at)" in line


def test_a_module_of_pytorch_comes_back_as_it_was(capsys, tmp_path, monkeypatch):
    """Under `net` beside an epoch, ending in a softmax; measured by PyTorch itself."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("torchax")
    torch.set_num_threads(1)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(
        "from torch import nn\n"
        "def net(width=4):\n"
        "    return nn.Sequential(nn.Conv2d(3, width, 5, 4), nn.BatchNorm2d(width), nn.ReLU(),\n"
        "        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * width, 10), nn.Softmax(1))\n"
    )
    space: dict = {}
    exec((tmp_path / "mine.py").read_text(), space)
    torch.manual_seed(0)
    net = space["net"](5).eval()
    torch.save({"net": net.state_dict(), "epoch": 7}, "weights.pth")

    def labels(images):
        with torch.no_grad():
            return net(torch.from_numpy(images.transpose(0, 3, 1, 2).copy())).argmax(1).numpy()

    for name, split in (("clean", "test[:20]"), ("test", "test[700:730]")):
        images = load("digits", split).images
        np.savez(tmp_path / f"{name}.npz", images=images, labels=labels(images))
    code = ["--torch", "mine.py:net", "--model-args", '{"width": 5}']
    images = ["--clean", "clean.npz", "--split", "test.npz"]
    found, _ = run(capsys, *DEFEND, "--model", "weights.pth", *code, *images)
    assert found["before"]["acc"] == 1 and found["weights"] == "out/cleaned.pth"
    beside = ["evaluate", "--json", "--split", "test.npz", "--model", found["model"]]
    again, _ = run(capsys, *beside, "--torch", "mine.py:net")
    assert again["acc"] == found["after"]["acc"]
    cleaned = torch.load("out/cleaned.pth", weights_only=True)
    assert cleaned["epoch"] == 7 and list(cleaned["net"]) == list(net.state_dict())
    before = torch.cat([p.ravel() for p in net.parameters()]).detach().clone()
    net.load_state_dict(cleaned["net"], strict=True)
    assert torch.any(torch.cat([p.ravel() for p in net.parameters()]) != before)
    with np.load("test.npz") as data:
        acc = np.mean(labels(data["images"]) == data["labels"])
    assert found["after"]["acc"] == pytest.approx(acc)
    assert "missing 'weight' (and 1 more), unexpected '0.weight'" in refused(
        capsys,
        *DEFEND,
        "--model",
        "weights.pth",
        "--torch",
        "torch.nn:Linear",
        "--model-args",
        '{"in_features": 3, "out_features": 2}',
        *images,
    )
