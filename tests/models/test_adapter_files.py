"""Weights of JAX libraries in files: what comes in goes out in the same form."""

import json
from pathlib import Path

import flax.linen as nn
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import safetensors
import safetensors.numpy
from conftest import same
from flax import nnx
from flax.traverse_util import flatten_dict
from libraries import KEY, NNXResNet, opened

from ibau_jax.errors import InputError
from ibau_jax.models.adapters.files import load_linen, load_nnx, save_linen, save_nnx
from ibau_jax.models.adapters.named import named

IMAGES = np.random.default_rng(0).uniform(size=(3, 16, 16, 1)).astype(np.float32)
LINEN, NNX = "libraries:ResNet", "libraries:NNXResNet"


def arrays(tree):
    return jax.tree.map(np.asarray, tree)


def orbax_save(path: Path, tree) -> None:
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, tree)


def manager_save(path: Path, tree) -> None:
    with ocp.CheckpointManager(path) as manager:
        for step in (9, 10):
            manager.save(step, args=ocp.args.StandardSave(tree))
            manager.wait_until_finished()


def flat_save(path: Path, tree, sep: str = "/") -> None:
    path.write_bytes(safetensors.numpy.save(flatten_dict(tree, sep=sep), {"epoch": "3"}))


def bytes_save(path: Path, tree) -> None:
    path.write_bytes(flax.serialization.to_bytes(tree))


WRITERS = {
    "w.safetensors": flat_save,
    "dots.safetensors": lambda path, tree: flat_save(path, tree, "."),
    "w.msgpack": bytes_save,
    "folder": orbax_save,
    "manager": manager_save,
}


def moved(variables):
    return jax.tree.map(lambda a: (a + 1).astype(a.dtype), variables)


@pytest.mark.parametrize("name", WRITERS)
def test_linen_weights_come_and_go(name, tmp_path):
    _, variables = opened("linen")
    variables = arrays(variables)
    WRITERS[name](tmp_path / name, variables)
    model, found, container = load_linen(tmp_path / name, LINEN, {"classes": 10})
    same(arrays(found), variables)
    assert model(found, IMAGES).shape == (3, 10)
    out = tmp_path / f"out{Path(name).suffix}"
    save_linen(out, container, moved(found))
    same(arrays(load_linen(out, LINEN, {})[1]), moved(variables))
    save_linen(out, container, found)  # what was there is replaced
    same(arrays(load_linen(out, LINEN, {})[1]), variables)
    if name == "dots.safetensors":
        with safetensors.safe_open(out, "np") as file:
            assert file.metadata() == {"epoch": "3"} and "params.Conv_0.kernel" in file.keys()


def test_a_train_state_keeps_what_is_not_ours(tmp_path):
    _, variables = opened("linen")
    state = {
        "step": 7,
        **arrays(variables),
        "opt_state": {"0": {"mu": arrays(variables)["params"]}},
    }
    bytes_save(tmp_path / "state.msgpack", state)
    _, found, container = load_linen(tmp_path / "state.msgpack", LINEN, {})
    same(found, arrays(variables))
    save_linen(tmp_path / "out.msgpack", container, moved(found))
    back = flax.serialization.msgpack_restore((tmp_path / "out.msgpack").read_bytes())
    assert back["step"] == 7
    same(back["opt_state"], state["opt_state"])
    same(back["params"], moved(variables)["params"])


def test_parameters_alone_and_in_16_bits(tmp_path):
    params = {"Dense_0": {"kernel": jnp.ones((4, 3), jnp.bfloat16), "bias": jnp.ones(3)}}
    params["scale"] = jnp.ones(())
    flat_save(tmp_path / "w.safetensors", arrays(params))
    _, found, container = load_linen(
        tmp_path / "w.safetensors", "flax.linen:Dense", {"features": 3}
    )
    same(found, {"params": arrays(params)})
    wide = jax.tree.map(lambda a: np.float32(a) + 1, found)
    save_linen(tmp_path / "out.safetensors", container, wide)
    _, back, _ = load_linen(tmp_path / "out.safetensors", "flax.linen:Dense", {"features": 3})
    assert back["params"]["Dense_0"]["kernel"].dtype == jnp.bfloat16
    same(back["params"]["Dense_0"]["bias"], np.full(3, 2, np.float32))
    assert back["params"]["scale"].shape == ()


def test_a_checkpoint_of_variables_under_params(tmp_path):
    _, variables = opened("linen")
    bytes_save(tmp_path / "w.msgpack", {"params": arrays(variables), "step": 3})
    _, found, container = load_linen(tmp_path / "w.msgpack", LINEN, {})
    same(found, arrays(variables))
    save_linen(tmp_path / "w.msgpack", container, moved(found))
    back = flax.serialization.msgpack_restore((tmp_path / "w.msgpack").read_bytes())
    same(back["params"], moved(variables))


def strings(tree):
    """With the keys of lists as strings, as files have them."""
    if isinstance(tree, dict):
        return {str(name): strings(value) for name, value in tree.items()}
    return np.asarray(tree)


@pytest.mark.parametrize("name", ["w.safetensors", "w.msgpack", "folder", "state", "all"])
def test_nnx_weights_come_and_go(name, tmp_path):
    module = NNXResNet(rate=0.1, seed=1)
    if name in ("state", "all"):
        kinds = (nnx.Variable,) if name == "all" else (nnx.Any(nnx.Param, nnx.BatchStat),)
        orbax_save(tmp_path / name, nnx.state(module, *kinds))
    else:
        state = nnx.state(module, nnx.Any(nnx.Param, nnx.BatchStat))
        WRITERS[name](tmp_path / name, strings(nnx.to_pure_dict(state)))
    model, found, container = load_nnx(tmp_path / name, NNX, {"rate": 0.1})
    own = nnx.clone(module)
    own.eval()
    np.testing.assert_allclose(model(found, IMAGES), own(IMAGES), rtol=1e-5, atol=1e-6)
    out = tmp_path / f"out{Path(name).suffix}"
    save_nnx(out, container, moved(found))
    same(load_nnx(out, NNX, {"rate": 0.1})[1], moved(found))
    plain = tmp_path / "plain.safetensors"  # of the variables alone, by the names that they have
    flat_save(plain, arrays(found))
    same(load_nnx(plain, NNX, {"rate": 0.1})[1], arrays(found))


def test_an_nnx_module_gets_its_random_numbers(tmp_path):
    """Its metaclass hides the arguments of the class."""
    module = nnx.Linear(2, 3, rngs=nnx.Rngs(1))
    bytes_save(tmp_path / "w.msgpack", nnx.to_pure_dict(nnx.state(module)))
    args = {"in_features": 2, "out_features": 3}
    model, found, _ = load_nnx(tmp_path / "w.msgpack", "flax.nnx:Linear", args)
    x = np.ones((4, 2), np.float32)
    np.testing.assert_array_equal(model(found, x), module(x))


def test_equinox_weights_come_and_go(tmp_path):
    eqx = pytest.importorskip("equinox", reason="the extra `equinox` is not installed")
    from libraries import equinox_module

    from ibau_jax.models.adapters.eqx import from_equinox
    from ibau_jax.models.adapters.eqx_files import load_equinox, save_equinox, tensors_of

    module, state = equinox_module(seed=1)
    expected, own = from_equinox(module, state)
    spec, args = "equinox_net:Net", {"rate": 0.0}
    for header in (b"", json.dumps({"rate": 0.0}).encode() + b"\n"):
        path, out = tmp_path / "w.eqx", tmp_path / "out.eqx"
        with path.open("wb") as file:
            file.write(header)
            eqx.tree_serialise_leaves(file, (module, state))
        model, found, container = load_equinox(path, spec, args)
        np.testing.assert_array_equal(model(found, IMAGES), expected(own, IMAGES))
        save_equinox(out, container, found)
        assert out.read_bytes() == path.read_bytes()
        save_equinox(out, container, {**found, "params": moved(found["params"])})
        assert load_equinox(out, spec, args)[1]["params"].out.bias[0] == module.out.bias[0] + 1
    # and by the places of its arrays, in safetensors
    tensors = {k: np.asarray(v) for k, v in tensors_of(container, found).items()}
    plain = tmp_path / "w.safetensors"
    plain.write_bytes(safetensors.numpy.save(tensors))
    again, values, _ = load_equinox(plain, spec, args)
    np.testing.assert_array_equal(again(values, IMAGES), expected(own, IMAGES))
    first = min(tensors)
    for changed, told in (
        ({**tensors, "more": tensors[first]}, "also has 'more'"),
        ({k: v for k, v in tensors.items() if k != first}, "is not there"),
        ({**tensors, first: tensors[first][None]}, "is of shape"),
    ):
        plain.write_bytes(safetensors.numpy.save(changed))
        with pytest.raises(InputError, match=told):
            load_equinox(plain, spec, args)
    eqx.tree_serialise_leaves(path, module)
    with pytest.raises(InputError, match="holds the module without its state"):
        load_equinox(path, spec, args)
    path.write_bytes(b"nothing")
    with pytest.raises(InputError, match="cannot read the weights .* expected what eqx"):
        load_equinox(path, spec, args)
    with pytest.raises(InputError, match="cannot be made with the arguments .width=3"):
        load_equinox(path, spec, {"width": 3})
    # a module without state, from a function
    mlp, spec = eqx.nn.MLP(2, 3, 4, 1, key=KEY), "equinox.nn:MLP"
    args = {"in_size": 2, "out_size": 3, "width_size": 4, "depth": 1}
    eqx.tree_serialise_leaves(path, mlp)
    _, found, container = load_equinox(path, spec, args)
    save_equinox(out, container, found)
    assert out.read_bytes() == path.read_bytes() and "state" not in found


USER = """
import beside
import flax.linen as nn

class Net(nn.Module):
    classes: int
    def __call__(self, x):
        return x

def make(classes=3):
    return Net(classes)

made = Net(beside.CLASSES)
text = "no module"
"""


def test_a_name_in_a_file(tmp_path):
    (tmp_path / "beside.py").write_text("CLASSES = 4")
    (tmp_path / "net.py").write_text(USER)
    spec = f"{tmp_path / 'net.py'}:"
    assert named(spec + "Net", {"classes": 2}, nn.Module).classes == 2
    assert named(spec + "make", {}, nn.Module).classes == 3
    assert named(spec + "made", {}, nn.Module).classes == 4
    (tmp_path / "broken.py").write_text("1 / 0")
    (tmp_path / "ends.py").write_text("raise SystemExit(3)")
    for what, args, message in (
        ("net.py:Nett", {}, "has no 'Nett'; did you mean 'Net'?"),
        ("net.py:Net", {}, "cannot be made with the arguments .*classes"),
        ("net.py:Net", {"width": 1}, "cannot be made with the arguments .width=1.*width"),
        ("net.py:made", {"classes": 1}, "is a Net already, and takes no arguments .found classes"),
        ("net.py:text", {}, "is a str: expected a class or a function that gives a flax.linen"),
        ("net.py:nn.Module.__repr__", {}, "cannot be made"),
        ("net.py:beside.len", {}, "has no 'len'"),
        ("none.py:Net", {}, "cannot import .*none.py': no such file; expected a .py file"),
        ("broken.py:Net", {}, "ZeroDivisionError: division by zero"),
        ("ends.py:Net", {}, "SystemExit: 3"),
        ("net.py", {}, "names no class: expected package.module:Name or path"),
    ):
        with pytest.raises(InputError, match=message) as refused:
            named(str(tmp_path / what), args, nn.Module)
        assert "\n" not in str(refused.value)
    with pytest.raises(InputError, match="cannot import 'no.such.module': ModuleNotFoundError"):
        named("no.such.module:Net", {}, nn.Module)
    with pytest.raises(InputError, match="gives a OrderedDict: expected a flax.linen.*Module"):
        named("collections:OrderedDict", {}, nn.Module)


def test_refusals_of_files(tmp_path):
    _, variables = opened("linen")
    for name, content, message in (
        ("none.msgpack", None, "no such file; expected a .safetensors or .msgpack file"),
        ("bad.msgpack", b"\xc1", "cannot read the weights"),
        ("bad.safetensors", b"bad", "cannot read the weights"),
        (
            "list.msgpack",
            flax.serialization.msgpack_serialize([1]),
            "holds a list: expected nested",
        ),
        ("empty.msgpack", flax.serialization.to_bytes({"params": {}}), "has no parameters"),
    ):
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=message) as refused:
            load_linen(tmp_path / name, LINEN, {})
        assert "\n" not in str(refused.value)
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match="is no checkpoint of Orbax"):
        load_linen(tmp_path / "folder", LINEN, {})
    path = tmp_path / "w.msgpack"
    bytes_save(path, arrays(variables))
    _, found, container = load_linen(path, LINEN, {})
    with pytest.raises(InputError, match="are not those that were loaded .first difference: 'par"):
        save_linen(path, container, {"batch_stats": found["batch_stats"]})
    with pytest.raises(InputError, match="has no 'blocks/0/"):
        load_nnx(path, NNX, {})
    state = strings(nnx.to_pure_dict(nnx.state(NNXResNet(), nnx.Any(nnx.Param, nnx.BatchStat))))
    bytes_save(path, state)
    with pytest.raises(InputError, match=r"has 'out/bias' of shape \(10,\): expected \(3,\)"):
        load_nnx(path, NNX, {"classes": 3})
    bytes_save(path, {**state, "more": {"kernel": np.ones(1)}})
    with pytest.raises(InputError, match="also has 'more/kernel', which"):
        load_nnx(path, NNX, {})
