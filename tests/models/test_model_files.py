"""Model files: round trip, damage, misfits, and the import of PyTorch files."""

import hashlib
import json
import struct
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import random_variables
from flax.traverse_util import flatten_dict
from safetensors.numpy import save_file

from ibau_jax import InputError
from ibau_jax.attacks import Attack, Trigger, badnets_square, make_attack
from ibau_jax.models.files import FORMAT, load_model, save_model
from ibau_jax.models.stored import StoredModel
from ibau_jax.models.torch_import import convert_pth

LABELS = np.arange(10)
KINDS = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64", "bool": "BOOL"}


def raw_safetensors(tensors: dict[str, np.ndarray], metadata: dict | None = None) -> bytes:
    """A safetensors file, of dtypes too that its library for NumPy does not write."""
    header, data = {}, b""
    for name, value in tensors.items():
        begin, data = len(data), data + value.tobytes()
        kind = KINDS[value.dtype.name]
        header[name] = {"dtype": kind, "shape": value.shape, "data_offsets": [begin, len(data)]}
    text = json.dumps({**header, "__metadata__": metadata or {}}).encode()
    return struct.pack("<Q", len(text)) + text + data


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
        StoredModel(random_variables(), "vgg", 10, "cifar10", (attack,), {"seed": 4, "list": [1]}),
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
    assert loaded.hash == saved.hash != model(variables=random_variables(10, 1)).hash
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


def write_header(path, header, **changes) -> Path:
    """A model file with this header (text, or JSON values) and the tensors of `model()`."""
    tensors = {"/".join(k): v for k, v in flatten_dict(random_variables()).items()}
    tensors["trigger/0/pattern"] = np.full((32, 32, 3), 0.1, np.float32)
    tensors = {k: v for k, v in (tensors | changes).items() if v is not None}
    text = header if isinstance(header, str) else json.dumps(header)
    path.write_bytes(raw_safetensors(tensors, {FORMAT: text}))
    return path


ATTACK = {"name": "mine", "target": 3, "rule": "add"}
HEADER = {
    "architecture": "vgg",
    "num_classes": 10,
    "dataset": "digits",
    "info": {"seed": 0, "poison_ratio": 0.2, "copies": 1},
    "attacks": [ATTACK],
}


def test_the_header_of_these_tests_is_good(tmp_path):
    found = load_model(write_header(tmp_path / "m", HEADER))
    assert (found.num_classes, found.dataset, found.info) == (10, "digits", HEADER["info"])
    assert [(a.name, a.target) for a in found.attacks] == [("mine", 3)]


WRONG = [
    *(("architecture", value, "architecture is .*, expected one of vgg") for value in (1, ["vgg"])),
    ("architecture", "resnet", "architecture is 'resnet', expected one of vgg"),
    *(
        ("num_classes", value, "num_classes is .*, expected a whole number from 1 to 100000")
        for value in ("10", 10.0, True, None, 0, -1, 10**12, [10])
    ),
    *(("dataset", value, "dataset is .*, expected a name") for value in (None, 3, "", ["digits"])),
    *(("info", value, "info is .*, expected an object") for value in ([1], None, "x", 3)),
    ("info", {"poison_ratio": "0.2"}, "info.poison_ratio is '0.2', expected a share"),
    ("info", {"poison_ratio": True}, "info.poison_ratio is True"),
    ("info", {"poison_ratio": 1.5}, "info.poison_ratio is 1.5"),
    ("info", {"seed": -1}, "info.seed is -1, expected 0 or a larger whole number"),
    ("info", {"seed": 1.0}, "info.seed is 1.0"),
    (
        "info",
        {"copies": 10**9},
        "info.copies is 1000000000, expected a whole number from 1 to 1000",
    ),
    ("info", {"copies": 0}, "info.copies is 0"),
    ("info", {"epochs": "8"}, "info.epochs is '8'"),
    *(("attacks", value, "attacks is .*, expected a list") for value in (None, {}, "x", 1)),
    ("attacks", [[]], r"attacks\[0\] is \[\], expected an object"),
    *(
        ("attacks", [ATTACK | {"target": value}], r"attacks\[0\].target is .*, expected")
        for value in ("x", 1.5, True, -1, 10, [3], 10**30)
    ),
    *(
        ("attacks", [ATTACK | {"name": value}], r"attacks\[0\].name is .*, expected a name")
        for value in (None, 3, "", " ", ["x"])
    ),
    *(
        ("attacks", [ATTACK | {"rule": value}], r"attacks\[0\].rule is .*, expected one of add")
        for value in (None, "Add", "multiply", ["add"], 0)
    ),
    (
        "attacks",
        [{"name": "mine", "rule": "add"}],
        r"attacks\[0\] lacks .'target'., expected",
    ),
    ("attacks", [ATTACK | {"mask": 1}], r"attacks\[0\] also has .'mask'."),
    ("attacks", [ATTACK, ATTACK], "names .'mine', 'mine'., expected each one once"),
    ("attacks", [ATTACK, ATTACK | {"name": "b"}], "trigger/1/pattern is missing"),
    ("attacks", [], "trigger/0/pattern is .*, expected no such layer"),
    ("attacks", [ATTACK | {"rule": "replace"}], "trigger 0 of .*: expected a mask with 'replace'"),
    ("more", 1, "it also has .'more'., expected only architecture"),
]


@pytest.mark.parametrize(("name", "value", "message"), WRONG)
def test_a_header_with_a_wrong_value_is_refused(tmp_path, name, value, message):
    path = write_header(tmp_path / "m", HEADER | {name: value})
    with pytest.raises(InputError, match=message) as told:
        load_model(path)
    assert "\n" not in str(told.value) and len(str(told.value)) < 600


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no JSON object"),
        ("{", "no JSON object"),
        ("[]", r"it is \[\], expected an object"),
        ("null", "it is None, expected an object"),
        ("[" * 100_000 + "]" * 100_000, "no JSON object of this kind"),
        ('{"a":' * 100_000 + "1" + "}" * 100_000, "no JSON object of this kind"),
        ("9" * 10_000, "no JSON object of this kind"),
        (json.dumps(HEADER | {"info": {"x": float("nan")}}), "NaN is not JSON"),
        (json.dumps(HEADER).replace("0.2", "Infinity"), "Infinity is not JSON"),
        (json.dumps(HEADER).replace('"vgg"', '"vgg", "num_classes": 2'), "a name occurs twice"),
        (json.dumps({k: v for k, v in HEADER.items() if k != "info"}), "it lacks .'info'."),
        (json.dumps("\ud800"), "expected an object"),
    ],
)
def test_a_header_that_is_no_object_is_refused(tmp_path, text, message):
    with pytest.raises(InputError, match=message) as told:
        load_model(write_header(tmp_path / "m", text))
    assert "\n" not in str(told.value) and len(str(told.value)) < 600


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trigger/0/pattern": None}, "trigger/0/pattern is missing"),
        ({"trigger/0/pattern": np.zeros((16, 16, 3), np.float32)}, r"has shape \(16, 16, 3\)"),
        ({"trigger/0/pattern": np.zeros((32, 32, 1), np.float32)}, r"has shape \(32, 32, 1\)"),
        ({"trigger/0/pattern": np.full((32, 32, 3), 2, np.float32)}, "ranges from 0 to 2"),
        ({"trigger/0/pattern": np.full((32, 32, 3), np.nan, np.float32)}, "without NaN"),
        ({"trigger/0/mask": np.ones((32, 32, 3), np.float32)}, "trigger 0 of .*none with another"),
        ({"trigger/1/pattern": np.ones((32, 32, 3), np.float32)}, "trigger/1/pattern is .*no such"),
        ({"more": np.ones(3, np.float32)}, "more is .*no such layer"),
        ({"params/conv1/bias": np.ones(32, np.int64)}, "'params/conv1/bias' as I64: expected F16"),
        ({"params/conv1/bias": np.ones(32, bool)}, "'params/conv1/bias' as BOOL: expected F16"),
        ({"batch_stats/conv2/var": np.full(32, -1, np.float32)}, "negative variance .*conv2/var"),
    ],
)
def test_tensors_that_do_not_fit_the_header_are_refused(tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        load_model(write_header(tmp_path / "m", HEADER, **changes))


def test_what_could_not_be_read_is_not_written(tmp_path):
    small = Attack("small", Trigger("add", np.zeros((16, 16, 3), np.float32)), 3)
    twins = (make_attack("badnets", 10), make_attack("badnets", 10))
    for changes, message in (
        ({"attacks": (small,)}, r"has shape \(16, 16, 3\): expected \(32, 32, 3\)"),
        ({"attacks": twins}, "expected each one once"),
        ({"num_classes": 0}, "num_classes is 0"),
        ({"info": {"seed": "x"}}, "info.seed is 'x'"),
    ):
        with pytest.raises(InputError, match=message):
            save_model(tmp_path / "m.safetensors", model(**changes))
    large = random_variables()
    large["params"]["conv1"]["bias"][0] = 1e6
    with pytest.raises(InputError, match=r"params/conv1/bias reach 1e\+06, too large for float16"):
        save_model(tmp_path / "m.safetensors", model(variables=large), np.float16)
    assert not list(tmp_path.iterdir())
    numpy = model(num_classes=np.int64(10), info={"loss": np.float32("nan"), "seed": np.int64(2)})
    found = load_model(save_model(tmp_path / "m.safetensors", numpy))
    assert found.num_classes == 10 and found.info == {"loss": None, "seed": 2}


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


def torch_state(variables: dict) -> dict[str, np.ndarray]:
    """Our variables under the names and in the layout of the published models."""
    state = {}
    for i, place in enumerate((0, 3, 8, 11, 16, 19)):
        p, s = variables["params"][f"conv{i + 1}"], variables["batch_stats"][f"conv{i + 1}"]
        state |= {
            f"features.{place}.weight": p["kernel"].transpose(3, 2, 0, 1),
            f"features.{place}.bias": p["bias"],
            f"features.{place + 1}.weight": p["scale"],
            f"features.{place + 1}.bias": p["offset"],
            f"features.{place + 1}.running_mean": s["mean"],
            f"features.{place + 1}.running_var": s["var"],
            f"features.{place + 1}.num_batches_tracked": np.array(1),
        }
    kernel = variables["params"]["classifier"]["kernel"]
    kernel = kernel.reshape(4, 4, 128, -1).transpose(3, 2, 0, 1).reshape(-1, 2048)
    state |= {
        "classifier.weight": kernel,
        "classifier.bias": variables["params"]["classifier"]["bias"],
    }
    return {name: np.ascontiguousarray(value) for name, value in state.items()}


STATE = torch_state(random_variables())
WRAPPERS = {
    "at the top": lambda state: state,
    "net": lambda state: {"net": state, "acc": 84.5, "epoch": 3, "best": True},
    "model": lambda state: {"model": state, "optimizer": {"lr": 0.1}},
    "state_dict": lambda state: {"state_dict": state, "epoch": 3},
    "model_state_dict": lambda state: {"args": {"net": "vgg"}, "model_state_dict": state},
    "one in another": lambda state: {"model": {"state_dict": state}},
    "with other values": lambda state: {**state, "version": 2, "note": "text"},
}


def check_converted(path, exact=True):
    variables, classes, extra = convert_pth(path)
    assert classes == 10
    tolerance = {"rtol": 0} if exact else {"rtol": 1e-2, "atol": 1e-3}
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, **tolerance), variables, random_variables()
    )
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(variables))
    return extra


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_pth_files_as_people_have_them(tmp_path, wrapper):
    torch = pytest.importorskip("torch")
    state = {name: torch.tensor(value) for name, value in STATE.items()}
    torch.save(WRAPPERS[wrapper](state), tmp_path / "m.pth")
    extra = check_converted(tmp_path / "m.pth")
    expected = {"net": {"acc": 84.5, "epoch": 3}, "state_dict": {"epoch": 3}}
    assert extra == expected.get(wrapper, {})


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."]
)
def test_pth_names_with_prefixes_of_wrappers(tmp_path, prefix):
    torch = pytest.importorskip("torch")
    state = {prefix + name: torch.tensor(value) for name, value in STATE.items()}
    torch.save({"state_dict": state}, tmp_path / "m.pth")
    check_converted(tmp_path / "m.pth")
    state["classifier.bias"] = torch.zeros(10)
    torch.save(state, tmp_path / "m.pth")
    with pytest.raises(InputError, match="'classifier.bias' twice, with and without a prefix"):
        convert_pth(tmp_path / "m.pth")


@pytest.mark.parametrize("kind", ["float16", "bfloat16", "float64", "parameters", "safetensors"])
def test_pth_values_of_other_kinds(tmp_path, kind):
    torch = pytest.importorskip("torch")
    exact, path = kind not in ("float16", "bfloat16"), tmp_path / "m.pth"
    state = {name: torch.tensor(value) for name, value in STATE.items()}
    for name, value in state.items():
        if value.is_floating_point():
            if kind == "parameters":
                state[name] = torch.nn.Parameter(value)
            elif kind != "safetensors":
                state[name] = value.to(getattr(torch, kind))
    if kind == "safetensors":
        path = tmp_path / "m.safetensors"
        save_file(STATE, path)
    else:
        torch.save({"state_dict": state}, path)
    check_converted(path, exact)


def test_a_safetensors_file_of_torch_names_needs_no_torch(tmp_path, monkeypatch):
    import ml_dtypes

    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    path = tmp_path / "m.safetensors"
    halves = {
        f"module.{k}": v.astype(ml_dtypes.bfloat16) if v.dtype == np.float32 else v
        for k, v in STATE.items()
    }
    path.write_bytes(raw_safetensors(halves, {"format": "pt"}))
    check_converted(path, exact=False)
    with pytest.raises(InputError, match="is a model file already"):
        convert_pth(save_model(path, model()))
    path.write_bytes(b"nothing")
    with pytest.raises(InputError, match="expected a whole safetensors file"):
        convert_pth(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"weights": {"a": 1}, "lr": 0.1}, r"no tensors: .* found the keys .'weights', 'lr'."),
        ({i: i for i in range(9)}, r"found the keys .0, 1, 2, 3, 4, \.\.\..;?"),
        ({}, r"no tensors: .* state_dict, model_state_dict, model, net, found the keys ..$"),
        ({"net": [1, 2]}, r"no tensors: .* found the keys .'net'."),
        ([1, 2], "holds list: expected a dict of tensors"),
        (7, "holds int"),
    ],
)
def test_pth_files_without_known_keys_tell_those_that_are(tmp_path, content, message):
    torch = pytest.importorskip("torch")
    torch.save(content, tmp_path / "m.pth")
    with pytest.raises(InputError, match=message):
        convert_pth(tmp_path / "m.pth")


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")  # of torch 2.12, not of 2.13
def test_pth_tensors_that_are_no_plain_numbers(tmp_path):
    torch = pytest.importorskip("torch")
    good = {name: torch.tensor(value) for name, value in STATE.items()}
    for value, message in (
        (torch.zeros(10, dtype=torch.complex64), "'classifier.bias' .*complex64"),
        (torch.zeros(10).to_sparse(), "cannot read the tensor 'classifier.bias'"),
        (torch.full((10,), torch.nan), "NaN or infinite weights"),
        (torch.zeros(10, 10), r"classifier/bias is \(10, 10\)"),
        (torch.zeros(()), r"classifier/bias is \(\)"),
    ):
        torch.save({"net": {**good, "classifier.bias": value}}, tmp_path / "m.pth")
        with pytest.raises(InputError, match=message):
            convert_pth(tmp_path / "m.pth")
    torch.save({"backbone.weight": torch.zeros(3)}, tmp_path / "m.pth")
    with pytest.raises(InputError, match="such as features.0.weight .* found .'backbone.weight'"):
        convert_pth(tmp_path / "m.pth")
