"""Against the models and figures that the paper's authors published (skipped without them)."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ibau_jax import Dataset, IBAUConfig, load
from ibau_jax.attacks import Attack, badnets_square, trigger_from_files
from ibau_jax.hypergradient import Neumann, hypergradient
from ibau_jax.models import winograd
from ibau_jax.models.architectures import build
from ibau_jax.models.model import Classifier, evaluation_logits
from ibau_jax.models.torch_import import convert_pth
from ibau_jax.results.metrics import evaluator
from ibau_jax.unlearning.batches import make_batches, resolve
from ibau_jax.unlearning.ibau import ibau
from ibau_jax.unlearning.objective import make_inner, make_loss, pick

PUBLISHED = {
    "badnets": ("badnets_8_02", None, 8),
    "l2": ("l2_inv_0_02", "l2_inv", 0),
    "trojan_wm": ("trojan_wm_2_02", "trojan_wm", 2),
    "gtsrb badnets": ("gtsrbbadnets_8_02", None, 8),
    "gtsrb trojan_wm": ("gtsrbtrojan_wm_2_02", "trojan_wm", 2),
}


def published(reference, name):
    """The network, the variables and the attack of a published model."""
    pytest.importorskip("torch")
    file, trigger, target = PUBLISHED[name]
    variables, classes, _ = convert_pth(reference / "checkpoints" / f"{file}_ckpt.pth")
    path = reference / "triggers" / f"{trigger}.png"
    stamp = trigger_from_files(path) if trigger else badnets_square()
    return Classifier(build("vgg", classes)), variables, Attack(name, stamp, target)


def torch_model(state):
    """The published architecture, in PyTorch, from the table of its README."""
    import torch
    from torch import nn

    layers, inputs = [], 3
    for width in (32, 64, 128):
        for _ in range(2):
            layers += [nn.Conv2d(inputs, width, 3, padding=1), nn.BatchNorm2d(width), nn.ELU()]
            inputs = width
        layers += [nn.MaxPool2d(2), nn.Dropout(0.3)]
    classes = state["classifier.bias"].shape[0]
    model = nn.ModuleDict(
        {"features": nn.Sequential(*layers), "classifier": nn.Linear(2048, classes)}
    )
    model.load_state_dict(state)
    model.eval()

    def run(images):
        with torch.no_grad():
            x = torch.from_numpy(np.asarray(images).transpose(0, 3, 1, 2).copy())
            return model["classifier"](model["features"](x).flatten(1)).numpy()

    return run


@pytest.mark.parametrize("name", PUBLISHED)
def test_logits_agree_with_pytorch(reference, name):
    torch = pytest.importorskip("torch")
    network, variables, attack = published(reference, name)
    file = reference / "checkpoints" / f"{PUBLISHED[name][0]}_ckpt.pth"
    model = torch_model(torch.load(file, map_location="cpu", weights_only=True)["net"])
    rng = np.random.default_rng(0)
    images = rng.uniform(size=(20, 32, 32, 3)).astype(np.float32)
    images = np.concatenate([images, np.asarray(attack.trigger(images))])
    found = jax.jit(network)(variables, images)
    np.testing.assert_allclose(found, model(images), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["badnets", "trojan_wm"])
def test_logits_of_real_images(reference, cifar10, name):
    network, variables, _ = published(reference, name)
    expected = np.load(reference / "expected" / f"{name}.npz")
    found = jax.jit(network)(variables, cifar10.images[:10])
    np.testing.assert_allclose(found, expected["logits_first_10"], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "acc", "asr", "asr_excl"),
    [
        ("badnets", 0.8494, 0.9828, 0.9811),
        ("l2", 0.8526, 1.0, 1.0),
        ("trojan_wm", 0.8492, 0.9996, None),
    ],
)
def test_published_figures_of_cifar10(reference, cifar10, name, acc, asr, asr_excl):
    """The paper's Table 1, to the last digit."""
    network, variables, attack = published(reference, name)
    held_out = Dataset(cifar10.images[5000:], cifar10.labels[5000:])
    found = evaluator(network, held_out, [attack])(variables)
    assert (round(found.acc, 4), round(found.asr, 4)) == (acc, asr)
    assert asr_excl is None or round(found.asr_excl, 4) == asr_excl


@pytest.mark.parametrize(("name", "acc"), [("gtsrb badnets", 0.9786), ("gtsrb trojan_wm", 0.9775)])
def test_published_figures_of_gtsrb(reference, cifar10, name, acc):
    network, variables, _ = published(reference, name)
    found = evaluator(network, load("gtsrb", "test"))(variables)
    assert found.acc == pytest.approx(acc, abs=1e-3)


@pytest.fixture(scope="module", params=["badnets", "trojan_wm"])
def procedure(request, reference, cifar10):
    """The published procedure on one model: its pieces, and the expected figures.

    The figures are of the first batches, so no more is made.
    """
    network, variables, _ = published(reference, request.param)
    logits = evaluation_logits(network.module, variables)
    config = IBAUConfig.published("cifar10")
    config = resolve(config, logits, variables["params"], cifar10.images[:5000])
    first = Dataset(cifar10.images[:200], cifar10.labels[:200])
    batches, sizes = make_batches(first, config)
    assert list(sizes) == [100, 100]
    expected = np.load(reference / "expected" / f"{request.param}.npz")
    return request.param, network, variables, config, batches, expected


@pytest.mark.parametrize(
    ("fast", "steps", "tolerance"), [(False, 1, 1e-3), (False, 2, 1e-3), (True, 1, 0.1)]
)
def test_published_ascent(procedure, fast, steps, tolerance, monkeypatch):
    """With Winograd's products neighbours that are equal in even areas differ by rounding.

    So pooling takes another of them, and the slope goes to another pixel, as good as the first.
    """
    if not fast:
        monkeypatch.setattr(winograd, "suits", lambda *shapes: False)
    _, network, variables, config, batches, expected = procedure
    config = replace(config, inner_steps=steps, radius=1e9)  # the projection comes at the end
    logits = evaluation_logits(network.module, variables)
    delta, _ = ibau(logits, config, len(batches.weights)).ascend(variables["params"], batches, 0)
    wanted = expected[f"delta_{steps}"]
    assert np.linalg.norm(delta - wanted) <= tolerance * np.linalg.norm(wanted)


def test_published_hypergradient(procedure):
    name, network, variables, config, batches, expected = procedure
    one_patched = pick(batches, 1)
    one_patched = one_patched._replace(patched=jnp.zeros(100).at[0].set(1))
    rows = one_patched, pick(batches, 0)

    # The model is an argument: both have the same programs.
    @partial(jax.jit, static_argnums=0)
    def solve(terms, delta, variables, rows):
        loss = make_loss(evaluation_logits(network.module, variables), config)
        inner_loss = make_inner(loss, config)

        def outer(d, p):
            return loss(d, p, rows[0])

        def inner(d, p):
            return inner_loss(d, p, rows[1])

        found = hypergradient(
            outer,
            inner,
            delta,
            variables["params"],
            solver=Neumann(terms, 0.1),
            keep_diverged=config.keep_diverged,
        )
        return found, inner(delta, variables["params"])

    for terms in (1, 5):
        (value, gradient, report), below = solve(
            terms, expected["delta_projected"], variables, rows
        )
        np.testing.assert_allclose(value, expected["outer_loss"], rtol=1e-4)
        np.testing.assert_allclose(below, expected["inner_loss"], rtol=1e-3)
        assert not report.dropped
        assert report.failed or terms == 1  # five terms diverge, and are used all the same
        for theirs, ours in names_in_torch(gradient).items():
            norm = expected[f"hypergradient_K{terms}_norm/{theirs}"]
            np.testing.assert_allclose(np.linalg.norm(ours), norm, rtol=1e-3, err_msg=theirs)
            if terms == 5 and name == "badnets":
                wanted = expected[f"hypergradient_K5/{theirs}"]
                error = np.linalg.norm(ours - wanted) / np.linalg.norm(wanted)
                assert error <= 1e-3, theirs


def names_in_torch(tree):
    """A gradient in PyTorch's names and layouts."""
    found = {}
    for i, place in enumerate((0, 3, 8, 11, 16, 19)):
        layer = {k: np.asarray(v) for k, v in tree[f"conv{i + 1}"].items()}
        found[f"features.{place}.weight"] = layer["kernel"].transpose(3, 2, 0, 1)
        found[f"features.{place}.bias"] = layer["bias"]
        found[f"features.{place + 1}.weight"] = layer["scale"]
        found[f"features.{place + 1}.bias"] = layer["offset"]
    kernel = np.asarray(tree["classifier"]["kernel"])
    found["classifier.weight"] = (
        kernel.reshape(4, 4, 128, -1).transpose(3, 2, 0, 1).reshape(-1, 2048)
    )
    found["classifier.bias"] = np.asarray(tree["classifier"]["bias"])
    return found
