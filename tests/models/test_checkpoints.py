"""Files of PyTorch: read as data whatever they hold, and written back as they were."""

import argparse
import io
import os
import pickle
import zipfile
from collections import OrderedDict

import numpy as np
import pytest

try:
    import torch
except ImportError:
    pytest.skip("PyTorch is not installed", allow_module_level=True)

from tiny_torch import TinyResNet, seeded, trained_statistics

from ibau_jax.errors import InputError
from ibau_jax.models.checkpoints.inert import Stub, Unpickler, Weights
from ibau_jax.models.checkpoints.names import check_fit, prefix_of
from ibau_jax.models.checkpoints.reading import read_checkpoint
from ibau_jax.models.checkpoints.writing import write_checkpoint


@pytest.fixture(scope="module")
def module():
    return trained_statistics(seeded(TinyResNet))


@pytest.fixture
def state(module):
    return module.state_dict()


def equal(found, wanted):
    assert list(found) == list(wanted)
    for key, value in wanted.items():
        assert found[key].dtype == value.dtype and torch.equal(found[key], value), key


def benched(state, **more):
    """The parts of BackdoorBench's attack_result.pt, whose keys are NumPy's numbers."""
    keys = np.arange(3)
    data = {key: {"path": f"/a/{key}.png", "other_info": [0, key]} for key in keys}
    return {
        "model_name": "preactresnet18",
        "num_classes": 10,
        "model": state,
        "data_path": "../data",
        "img_size": (32, 32, 3),
        "bd_train": {"bd_data_container": {"data_dict": data}, "poison_indicator": keys % 2},
        **more,
    }


PLAIN = {
    "bare": (lambda s: s, ()),
    "state_dict": (lambda s: {"epoch": 3, "state_dict": s}, ("state_dict",)),
    "net": (lambda s: {"net": s, "acc": 0.5}, ("net",)),
    "model_state_dict": (lambda s: {"model_state_dict": s}, ("model_state_dict",)),
    "nested": (lambda s: {"model": {"state_dict": s}}, ("model", "state_dict")),
    "averaged": (lambda s: {"state_dict_ema": s, "state_dict": {}}, ("state_dict_ema",)),
    "a list beside": (lambda s: {"model": s, "history": [1, 2.5]}, ("model",)),
}


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("name", PLAIN)
def test_plain_files_keep_all_they_held(name, old, state, tmp_path):
    make, place = PLAIN[name]
    path, out = tmp_path / "m.pth", tmp_path / "cleaned.pth"
    torch.save(make(state), path, _use_new_zipfile_serialization=not old)
    found = read_checkpoint(path)
    assert (found.kind, found.place) == ("plain", place)
    equal(found.state, state)
    moved = OrderedDict((k, v + 1) for k, v in found.state.items())
    moved._metadata = found.state._metadata
    assert write_checkpoint(out, found, moved) == ""
    again = torch.load(out, weights_only=True)
    wanted = make(moved)
    inner = again
    for key in place:
        assert {k: v for k, v in inner.items() if k not in place} == {
            k: v for k, v in wanted.items() if k not in place
        }
        inner, wanted = inner[key], wanted[key]
    equal(inner, moved)
    assert inner._metadata == state._metadata
    equal(read_checkpoint(path).state, state)  # that file is as it was


def foreign_files(module):
    """Contents that PyTorch refuses as they are, and what is kept of them."""
    state = module.state_dict()
    yield "BackdoorBench", benched(state), {"model_name": "preactresnet18", "num_classes": 10}
    yield "an argparse.Namespace", {"args": argparse.Namespace(lr=1), "state_dict": state}, {}
    yield "a module", module, {}
    yield "a module of data parallel", wrapped(module), {}
    yield "a module in a dict", {"net": module, "epoch": 3}, {}


def wrapped(module):
    found = torch.nn.DataParallel.__new__(torch.nn.DataParallel)
    torch.nn.Module.__init__(found)
    found.module = module
    return found


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("number", range(5))
def test_foreign_objects_are_left_out(number, old, module, tmp_path):
    name, content, kept = list(foreign_files(module))[number]
    path, out = tmp_path / "m.pt", tmp_path / "cleaned.pt"
    torch.save(content, path, _use_new_zipfile_serialization=not old)
    found = read_checkpoint(path)
    assert found.kind == "foreign", name
    prefix = "module." if "parallel" in name else ""
    wanted = {prefix + key: value for key, value in module.state_dict().items()}
    equal(found.state, wanted)
    told = write_checkpoint(out, found, found.state)
    assert "which are not written back" in told and "\n" not in told
    again = torch.load(out, weights_only=True)
    if kept:
        assert list(again) == [*kept, "model"] and kept.items() <= again.items()
    equal(again["model"] if kept else again, wanted)


def test_a_torchscript_is_read(module, tmp_path):
    path = tmp_path / "m.pt"
    with pytest.warns(DeprecationWarning):
        torch.jit.script(module).save(path)
    found = read_checkpoint(path)
    assert found.kind == "torchscript" and found.state.keys() == module.state_dict().keys()
    for key, value in module.state_dict().items():
        assert torch.equal(found.state[key], value)


def test_safetensors_keep_dtypes_and_metadata(state, tmp_path):
    from safetensors import safe_open
    from safetensors.torch import save_file

    path, out = tmp_path / "m.safetensors", tmp_path / "cleaned.safetensors"
    state = {k: v.bfloat16() if "conv" in k else v for k, v in state.items()}
    save_file(state, path, {"format": "pt", "who": "me"})
    found = read_checkpoint(path)
    assert found.kind == "safetensors" and write_checkpoint(out, found, found.state) == ""
    with safe_open(out, framework="pt") as file:
        assert file.metadata() == {"format": "pt", "who": "me"}
        for key, value in state.items():
            again = file.get_tensor(key)
            assert again.dtype == value.dtype and torch.equal(again, value)


def test_other_copies_of_the_weights_are_cleaned_too(state, tmp_path):
    """Averaged weights beside those of the last step have the backdoor as well."""
    path, out = tmp_path / "m.pth", tmp_path / "cleaned.pth"
    content = {"state_dict": state, "state_dict_ema": state, "optimizer": {"lr": 0.1}}
    torch.save(content, path)
    found = read_checkpoint(path)
    moved = {k: v + 1 for k, v in state.items()}
    told = write_checkpoint(out, found, moved)
    assert told == (
        "'state_dict' has the cleaned weights too; 'optimizer' is as it was, of the training before"
    )
    again = torch.load(out, weights_only=True)
    equal(again["state_dict"], moved)
    equal(again["state_dict_ema"], moved)


def test_tied_weights_and_views_come_out_as_they_were(tmp_path):
    whole = torch.arange(12.0).reshape(3, 4)
    content = {
        "model": {"a": whole, "b": whole, "rows": whole[1:], "turned": whole.t(),
                  "none": torch.zeros(0, 3), "one": torch.tensor(5)},
        "foreign": argparse.Namespace(),
    }  # fmt: skip
    for old in (False, True):
        torch.save(content, tmp_path / "m.pt", _use_new_zipfile_serialization=not old)
        found = read_checkpoint(tmp_path / "m.pt").state
        equal(found, content["model"])
        assert found["a"].data_ptr() == found["b"].data_ptr()
        assert found["turned"].stride() == (1, 4)


# Nothing is executed


class Calls:
    """A pickle that calls `function(*args)`, with a state, list and dict items for the result."""

    def __init__(self, function, *args, more=()):
        self.how = (function, args, *more)

    def __reduce__(self):
        return self.how


def payloads(folder):
    mark = folder / "executed"
    shell = f"touch {mark}"
    yield "system", Calls(os.system, shell)
    yield "popen", Calls(os.popen, shell)
    yield "eval", Calls(eval, f"open({str(mark)!r}, 'w')")
    yield "getattr", Calls(getattr, Calls(__import__, "os"), "system")
    yield "nested", Calls(dict, [Calls(os.system, shell), Calls(exec, f"open({str(mark)!r}, 'w')")])
    yield "state", Calls(argparse.Namespace, more=({"__setstate__": Calls(os.system, shell)},))
    yield "items", Calls(OrderedDict, more=(None, None, iter([("k", Calls(os.system, shell))])))
    yield "list", Calls(argparse.Namespace, more=(None, iter([Calls(os.system, shell)])))
    yield "setattr", Calls(setattr, Calls(__import__, "torch"), "load", Calls(eval, "1"))


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("number", range(9))
def test_a_file_that_wants_to_run_something_runs_nothing(number, old, state, tmp_path):
    name, payload = list(payloads(tmp_path))[number]
    path = tmp_path / "evil.pth"
    torch.save({"state_dict": state, "more": payload}, path, _use_new_zipfile_serialization=not old)
    load = torch.load
    found = read_checkpoint(path)
    assert not (tmp_path / "executed").exists() and torch.load is load
    equal(found.state, state)


def program(*opcodes: bytes) -> bytes:
    return b"\x80\x02" + b"".join(opcodes) + b"."


def named(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


TEXT = b"X\x01\x00\x00\x00x"  # the string "x"
STATE = b"N}" + TEXT + TEXT + b"s\x86"  # (None, {"x": "x"}), which `setattr`s
REBUILD = named("torch._utils", "_rebuild_tensor_v2")


@pytest.mark.parametrize(
    "name, code",
    {
        "a function's attribute": program(REBUILD, STATE, b"b"),
        "a function's dict": program(REBUILD, b"}" + TEXT + TEXT + b"s", b"b"),
        "a class's attribute": program(named("collections", "OrderedDict"), STATE, b"b"),
        "a stub class's attribute": program(named("os", "system"), STATE, b"b"),
        "a storage that is none": program(TEXT, b"Q"),
        "storage of a foreign kind": program(
            b"(" + b"X\x07\x00\x00\x00storage" + named("os", "system") + TEXT + TEXT + b"K\x01t",
            b"Q",
        ),
        "a tensor of nothing": program(REBUILD, b"(" + TEXT * 4 + b"t", b"R"),
        "a tensor of too few": program(REBUILD, b")", b"R"),
        "a parameter of nothing": program(named("torch._utils", "_rebuild_parameter"), b")", b"R"),
        "an unhashable key": program(b"}]" + TEXT + b"s"),
    }.items(),
)
def test_programs_that_are_no_file_of_torchs_are_refused(name, code, tmp_path):
    path = tmp_path / "m.pth"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("m/data.pkl", code)
        archive.writestr("m/version", "3")
    with pytest.raises(InputError, match="cannot read .* expected a whole PyTorch file") as refused:
        read_checkpoint(path)
    assert "\n" not in str(refused.value)
    assert not hasattr(OrderedDict, "x") and not hasattr(Stub, "x")


@pytest.mark.parametrize(
    "code",
    [
        program(named("os", "system"), b"(" + TEXT + b"t", b"R"),
        program(named("os", "system"), b"(" + TEXT + b"t", b"\x81"),
        b"(" + TEXT + b"ios\nsystem\n.",  # INST
        b"(" + named("os", "system") + TEXT + b"o.",  # OBJ
        b"\x80\x04\x8c\x02os\x8c\x06system\x93(" + TEXT + b"tR.",  # STACK_GLOBAL
        program(named("builtins", "getattr"), b"(" + named("os", "system") + TEXT + b"t", b"R"),
        program(named("collections", "OrderedDict.__init__"), b")", b"R"),
        program(named("os", "system"), b")", b"R", b")", b"R"),  # what a stub gives is called
        program(named("os", "system"), b")", b"R", STATE, b"b"),
        program(named("os", "system"), b")", b"R", TEXT, TEXT, b"s"),
        program(named("os", "system"), b")", b"R", TEXT, b"a"),
        program(named("os", "system"), b")", b"R", b"(" + TEXT + TEXT + b"e"),
    ],
)
def test_every_way_to_call_gives_a_stub(code):
    found = Unpickler(io.BytesIO(code)).load()
    assert isinstance(found, Stub)
    with pytest.raises(AttributeError):
        found.other = 1


def test_names_are_asked_of_no_module(monkeypatch):
    """Not even imported."""
    code = program(named("antigravity", "fly"), b")", b"R")
    monkeypatch.setitem(__import__("sys").modules, "antigravity", None)
    assert Unpickler(io.BytesIO(code)).load().origin == ("antigravity", "fly")


def test_content_that_holds_itself_ends(state, tmp_path):
    loop = {"state_dict": {}, "args": argparse.Namespace()}
    loop["state_dict"] = loop
    torch.save(loop, tmp_path / "m.pt")
    with pytest.raises(InputError, match="holds no state dict"):
        read_checkpoint(tmp_path / "m.pt")


def changed(path, name, change):
    """An archive with one of its members changed."""
    with zipfile.ZipFile(path) as archive:
        members = {n: archive.read(n) for n in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for member, data in members.items():
            data = change(data) if member.endswith(name) else data
            if data is not None:
                archive.writestr(member, data)


DAMAGED = {
    "numbers missing": ("data/0", lambda data: data[:-4], "bytes for"),
    "a member missing": ("data/0", lambda data: None, "no item named"),
    "big-endian": ("byteorder", lambda data: b"big", "big-endian"),
    "half a pickle": ("data.pkl", lambda data: data[:50], "cannot read"),
}


@pytest.mark.parametrize("what", DAMAGED)
def test_damaged_archives_are_refused_in_one_line(what, state, tmp_path):
    name, change, text = DAMAGED[what]
    torch.save(benched(state), tmp_path / "m.pt")
    changed(tmp_path / "m.pt", name, change)
    with pytest.raises(InputError, match=text) as refused:
        read_checkpoint(tmp_path / "m.pt")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "content, text",
    [
        ([1, 2], "holds no state dict: .* found list"),
        ({"a": 1}, r"found the keys \['a'\]"),
        (argparse.Namespace(), "found argparse.Namespace"),
        ({"model": argparse.Namespace()}, r"found the keys \['model'\]"),
    ],
)
def test_files_without_a_state_dict_are_refused(content, text, tmp_path):
    torch.save(content, tmp_path / "m.pt")
    with pytest.raises(InputError, match=text) as refused:
        read_checkpoint(tmp_path / "m.pt")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("data", [b"", b"text", b"PK\x03\x04", pickle.dumps(3)])
def test_other_files_are_refused(data, tmp_path):
    (tmp_path / "m.pt").write_bytes(data)
    with pytest.raises(InputError, match="cannot read .* expected a whole PyTorch file"):
        read_checkpoint(tmp_path / "m.pt")
    with pytest.raises(InputError, match="no such file"):
        read_checkpoint(tmp_path / "other.pt")


@pytest.mark.parametrize(
    "prefix", ["", "module.", "_orig_mod.module.", "module._orig_mod.", "model."]
)
def test_prefixes_of_wrappers(prefix):
    wanted = ["conv1.weight", "model.fc.bias"]
    assert prefix_of([prefix + name for name in wanted], wanted) == prefix


def test_what_is_wanted_is_no_prefix():
    names = ["model.a", "model.b"]
    assert prefix_of(names, names) == "" and prefix_of(names, ["a", "b"]) == "model."
    assert prefix_of(["module.model.a", "module.model.b"], names) == "module."


def test_the_first_names_that_do_not_fit_are_told():
    wanted = {"a.weight": (3, 3), "b.weight": (2,), "bn.num_batches_tracked": ()}
    check_fit({"a.weight": (3, 3), "b.weight": (2,)}, wanted, "m.pth")
    check_fit({"a.weight": (3, 3)}, wanted, "m.pth", may_lack=["b.weight"])
    with pytest.raises(InputError) as refused:
        check_fit({"x": (), "y": (), "a.weight": (3, 3)}, wanted, "m.pth")
    assert "missing 'b.weight', unexpected 'x' (and 1 more)" in str(refused.value)
    with pytest.raises(InputError, match=r"'b.weight' is \(5,\), expected \(2,\)"):
        check_fit({"a.weight": (3, 3), "b.weight": (5,)}, wanted, "m.pth")


def test_weights_are_no_more_than_a_description():
    code = program(
        REBUILD,
        b"((X\x07\x00\x00\x00storage" + named("torch", "FloatStorage"),
        TEXT + TEXT + b"K\x04tQK\x00(K\x02K\x02t(K\x02K\x01t\x89}t",
        b"R",
    )  # fmt: skip
    found = Unpickler(io.BytesIO(code)).load()
    assert found == Weights(("x", "float32", 4), 0, (2, 2), (2, 1))
