"""Model files: round trip, damage, misfits, and the import of PyTorch files."""

import hashlib
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import random_variables
from safetensors.numpy import save_file

from ibau_jax import InputError
from ibau_jax.attacks import Attack, Trigger, badnets_square, make_attack
from ibau_jax.checkpoint import Model, convert_pth, load_model, model_hash, save_model

LABELS = np.arange(10)
ATTACKS = {
    "none": (),
    "replace": (make_attack("badnets", 10),),
    "all-to-all": (Attack("badnets", badnets_square(), None, 10),),
    "several": (make_attack("badnets", 10), make_attack("blend", 10)),
}


def model(**changes):
    pattern = np.random.default_rng(1).uniform(size=(32, 32, 3)).astype(np.float32)
    attack = Attack("mine", Trigger("add", pattern), 3)
    return replace(
        Model(random_variables(), "vgg", 10, "cifar10", (attack,), {"seed": 4, "list": [1]}),
        **changes,
    )


@pytest.mark.parametrize("attack", ["add", *ATTACKS])
def test_round_trip(tmp_path, attack):
    saved = model()
    if attack != "add":
        saved = replace(saved, attacks=ATTACKS[attack])
    loaded = load_model(save_model(tmp_path / "new folder" / "m.safetensors", saved))
    jax.tree.map(np.testing.assert_array_equal, loaded.variables, saved.variables)
    for name in ("architecture", "num_classes", "dataset", "info"):
        assert getattr(loaded, name) == getattr(saved, name)
    assert (
        model_hash(loaded)
        == model_hash(saved)
        != model_hash(model(variables=random_variables(10, 1)))
    )
    images = np.random.default_rng(2).uniform(size=(2, 32, 32, 3)).astype(np.float32)
    for found, expected in zip(loaded.attacks, saved.attacks, strict=True):
        assert (found.name, found.target) == (expected.name, expected.target)
        np.testing.assert_array_equal(found.wanted(LABELS), expected.wanted(LABELS))
        np.testing.assert_array_equal(found.trigger(images), expected.trigger(images))


def test_half_precision_rounds_the_weights_only(tmp_path):
    whole = save_model(tmp_path / "whole.safetensors", model())
    half = save_model(tmp_path / "half.safetensors", model(), np.float16)
    assert half.stat().st_size < 0.55 * whole.stat().st_size
    found, expected = load_model(half), load_model(whole)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-7),
        found.variables,
        expected.variables,
    )
    np.testing.assert_array_equal(
        found.attacks[0].trigger.pattern, expected.attacks[0].trigger.pattern
    )


def test_the_same_model_gives_the_same_bytes(tmp_path):
    written = {
        save_model(tmp_path / "m.safetensors", model(attacks=ATTACKS["several"])).read_bytes()
        for _ in range(8)
    }
    assert len({hashlib.sha256(file).digest() for file in written}) == 1


def test_missing_damaged_and_foreign_files(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        load_model(tmp_path / "missing.safetensors")
    with pytest.raises(InputError, match="a folder"):
        load_model(tmp_path)
    path = save_model(tmp_path / "m.safetensors", model())
    whole = path.read_bytes()
    for size in (0, 5, 1000, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(InputError, match="expected a whole safetensors file"):
            load_model(path)
    save_file({"w": np.zeros(3, np.float32)}, path)
    with pytest.raises(InputError, match="has no metadata .ibau_jax model"):
        load_model(path)


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = save_model(tmp_path / "m.safetensors", model())
    before = path.read_bytes()

    def fail(self, content):
        self.write_text("half")
        raise OSError("disk full")

    monkeypatch.setattr(Path, "write_bytes", fail)
    with pytest.raises(OSError, match="disk full"):
        save_model(path, model())
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == [path.name]


def test_weights_that_do_not_fit_name_the_first_that_differs(tmp_path):
    wrong = random_variables()
    wrong["params"]["conv2"]["kernel"] = np.zeros((5, 5, 32, 32), np.float32)
    path = save_model(tmp_path / "m.safetensors", model(variables=wrong))
    with pytest.raises(
        InputError, match=r"conv2/kernel is \(5, 5, 32, 32\), expected \(3, 3, 32, 32"
    ):
        load_model(path)
    path = save_model(path, model(num_classes=43))
    with pytest.raises(InputError, match=r"classifier/bias is \(10,\), expected \(43,\)"):
        load_model(path)
    del wrong["params"]["conv2"]
    path = save_model(path, model(variables=wrong))
    with pytest.raises(InputError, match="conv2/bias is missing"):
        load_model(path)


def test_nan_weights_are_refused(tmp_path):
    wrong = random_variables()
    wrong["params"]["conv3"]["bias"][5] = np.nan
    path = save_model(tmp_path / "m.safetensors", model(variables=wrong))
    with pytest.raises(InputError, match="NaN.*params/conv3/bias"):
        load_model(path)


def test_pth_with_code_is_never_executed(tmp_path):
    torch = pytest.importorskip("torch")
    mark = tmp_path / "executed"

    class Evil:
        def __reduce__(self):
            return (mark.touch, ())

    torch.save({"net": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(InputError, match="only tensors and plain values"):
        convert_pth(tmp_path / "evil.pth")
    assert not mark.exists()


def test_bad_pth_files(tmp_path):
    torch = pytest.importorskip("torch")
    path = tmp_path / "m.pth"
    path.write_bytes(b"nothing")
    with pytest.raises(InputError, match="cannot read"):
        convert_pth(path)
    torch.save([1, 2], path)
    with pytest.raises(InputError, match="holds list"):
        convert_pth(path)
    torch.save({"net": {"features.0.weight": torch.zeros(8, 3, 3, 3)}}, path)
    with pytest.raises(InputError, match="does not fit the architecture"):
        convert_pth(path)


def test_pth_import_needs_torch_and_says_so(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    (tmp_path / "m.pth").write_bytes(b"")
    with pytest.raises(InputError, match=r"pip install 'ibau_jax\[torch\]'"):
        convert_pth(tmp_path / "m.pth")
