"""`cleaned.safetensors` of a model of the user's own."""

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from ibau_jax.commands.options import OURS, OwnModel
from ibau_jax.commands.own_file import KEY, add_to, remembered, save_own
from ibau_jax.errors import InputError

ABOUT = {"library": "torch", "code": "net.py:Net", "arguments": {"n": 3}, "mean": ".5", "std": ".2"}
TENSORS = {"w": jnp.ones((2, 3), jnp.bfloat16), "n": np.array(3), "half": np.ones(2, np.float16)}


def test_what_is_not_given_is_remembered(tmp_path):
    path = save_own(tmp_path / "cleaned.safetensors", TENSORS, ABOUT)
    found = safetensors.numpy.load_file(path)
    assert {k: v.shape for k, v in found.items()} == {"w": (2, 3), "n": (), "half": (2,)}
    assert {k: v.dtype for k, v in found.items()} == {
        "w": np.float32, "n": np.int64, "half": np.float32,
    }  # fmt: skip
    own = remembered(path, OwnModel(torch="elsewhere.py:Net"))
    assert own == OwnModel("elsewhere.py:Net", model_args='{"n": 3}', mean=".5", std=".2")
    given = OwnModel("net.py:Net", model_args="{}", mean="0", std="1")
    assert remembered(path, given) == given
    for other in (OURS, OwnModel(nnx="net.py:Net")):
        with pytest.raises(InputError, match="give --torch net.py:Net, or where it is now"):
            remembered(path, other)


def test_other_files_say_nothing(tmp_path):
    plain = tmp_path / "weights.safetensors"
    plain.write_bytes(safetensors.numpy.save({"w": np.ones(2)}))
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(b"nothing")
    for path in (plain, damaged, tmp_path / "none.safetensors", tmp_path / "weights.pth"):
        assert remembered(path, OURS) is OURS


def test_a_file_that_is_there_gets_it_and_keeps_its_arrays(tmp_path):
    path = tmp_path / "w.safetensors"
    path.write_bytes(safetensors.numpy.save({"b": np.arange(5), "a": np.ones(1)}, {"epoch": "3"}))
    add_to(path, {**ABOUT, "mean": "ü"})
    with safetensors.safe_open(path, framework="np") as file:
        assert file.metadata().keys() == {"epoch", KEY}
        np.testing.assert_array_equal(file.get_tensor("b"), np.arange(5))
    assert remembered(path, OwnModel(torch="x:y")).mean == "ü"


@pytest.mark.parametrize(
    "text",
    ["", "[]", "3", '{"library": "torch"}', '{"library": "os", "code": "a:b", "arguments": {}}',
     '{"library": "torch", "code": 3, "arguments": {}}',
     '{"library": "torch", "code": "a:b", "arguments": []}', "[" * 99999],
)  # fmt: skip
def test_what_is_damaged_is_told(tmp_path, text):
    path = tmp_path / "w.safetensors"
    path.write_bytes(safetensors.numpy.save({"a": np.ones(1)}, {KEY: text}))
    with pytest.raises(InputError, match="is damaged: make it again"):
        remembered(path, OwnModel(torch="a:b"))
