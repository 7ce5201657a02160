"""Many devices and many processes give what one gives."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import UNOPTIMISED, on_devices

from ibau_jax.devices import mesh
from ibau_jax.devices.mesh import Devices, devices
from ibau_jax.errors import InputError, LostProcess

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def eight() -> dict:
    """What `eight_devices.py` found."""
    done = subprocess.run(
        [sys.executable, HERE / "eight_devices.py"],
        env=on_devices(8),
        capture_output=True,
        text=True,
    )
    assert not done.returncode, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    ("case", "counts"),
    [("untargeted 103", (8, 5)), ("published 103", (8,)), ("untargeted 3", (8,))],
)
def test_a_round_is_the_same_on_many_devices(eight, case, counts):
    """103 images leave a remainder; 3 images leave devices without any."""
    for count in counts:
        assert eight[f"{case} float64 {count}"] < 1e-10
    assert eight[f"{case} float64 moved"] > 1e-3


def test_a_round_is_the_same_in_float32(eight):
    assert eight["untargeted 103 float32 8"] < 1e-4


@pytest.mark.parametrize("count", [8, 5])
def test_an_epoch_is_the_same_on_many_devices(eight, count):
    assert eight[f"train {count}"] < 1e-10


@pytest.mark.parametrize("name", ["nad", "neural-cleanse"])
def test_a_baseline_is_the_same_on_many_devices(eight, name):
    assert eight[f"{name} 8"] < 1e-10 and eight[f"{name} moved"] > 1e-3
    assert eight["neural-cleanse flagged"]


def test_one_message_for_each_product(eight):
    """An ascent: one, in its loop. An outer step: one for the slope of the outer loss in delta, one
    for each product with the Hessian, one for both gradients of the parameters together."""
    products = {"untargeted": 3, "published": 1}  # as written: a loop's once
    for preset, count in products.items():
        for found in eight["collectives"][preset]:
            assert found["ascent"] == {"all_reduces": 1, "others": 0}, preset
            assert found["step"] == {"all_reduces": 2 + count, "others": 0}, preset


@pytest.mark.parametrize("what", ["a round", "an epoch"])
def test_both_mappings_compute_the_same(eight, what):
    assert eight[f"{what} by shard_map"] == 0


def test_a_differing_device_is_found(eight):
    for told in eight["broken"]:  # by each mapping
        assert "['params']['w'] on device" in told


def test_too_many_devices_are_refused():
    with pytest.raises(InputError, match="9999 devices were asked for: expected 1 to"):
        devices(9999)


def address() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


def start(*command: str | Path, **env: str) -> subprocess.Popen:
    pipe, env = subprocess.PIPE, os.environ | {"IBAU_SILENCE": "10"} | env
    return subprocess.Popen(
        [sys.executable, *command], stdout=pipe, stderr=pipe, text=True, env=env
    )


def test_two_processes_are_as_one(tmp_path):
    script, at = HERE / "two_processes.py", address()
    files = [tmp_path / f"{name}.npz" for name in ("alone", "0", "1")]
    joined = [(), (at, "2", "0"), (at, "2", "1")]
    pairs = zip(files, joined, strict=True)
    running = [start(script, file, *j, XLA_FLAGS=UNOPTIMISED) for file, j in pairs]
    outputs = [p.communicate(timeout=300) for p in running]
    assert [p.returncode for p in running] == [0, 0, 0], outputs
    alone, first, second = (np.load(f) for f in files)
    for name in alone:
        np.testing.assert_array_equal(first[name], second[name])
        np.testing.assert_allclose(first[name], alone[name], rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("killed", [0, 1])
def test_a_lost_process_ends_the_other(killed, digits_model, tmp_path):
    out = tmp_path / "run"
    command = ["-m", "ibau_jax", "defend", "--model", digits_model, "--out", out, "--json"]
    command += ["--defense", "finetune"]  # the one that compiles least
    command += ["--clean", "test[:60]", "--split", "test[60:100]", "--rounds", "1000"]
    command += ["--coordinator", address(), "--num-processes", "2", "--process-id"]
    two = [start(*command, str(i)) for i in range(2)]
    deadline = time.monotonic() + 240
    rows = out / "rows.partial.jsonl"
    # Not while it compiles: where process 0 is lost then, JAX ends the other before we can.
    while not rows.exists() or len(rows.read_text().splitlines()) < 2:
        assert time.monotonic() < deadline and all(p.poll() is None for p in two)
        time.sleep(0.2)
    time.sleep(2)
    two[killed].send_signal(signal.SIGKILL)
    message = two[1 - killed].communicate(timeout=60)[1]
    two[killed].communicate()
    assert two[1 - killed].returncode not in (0, None)
    assert "lost another process" in message, message
    assert {p.name for p in out.iterdir()} == {"rows.partial.jsonl"}
    for line in (out / "rows.partial.jsonl").read_text().splitlines():
        json.loads(line)


def test_a_process_lost_in_the_comparison_is_told(monkeypatch):
    """As in a step: the collective that notices it may be this one."""

    def lost(*_):
        raise jax.errors.JaxRuntimeError("Connection reset by peer")

    both = Devices((*jax.devices()[:1], *jax.devices()[:1]))
    monkeypatch.setattr(Devices, "share", lambda *_: np.zeros(()))
    monkeypatch.setattr(mesh, "_gather", lambda _: lost)
    with pytest.raises(jax.errors.JaxRuntimeError, match="reset by peer"):  # one process: a bug
        both.check_equal(state=np.zeros(3))
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(LostProcess, match="lost another process of this run"):
        both.check_equal(state=np.zeros(3))


def test_draws_do_not_depend_on_padding_or_a_flag():
    """What N devices draw is more rows of padding than what one draws, and begins the same."""
    on = devices(1)
    row, key = on.share(lambda _: np.zeros(1)), on.replicate(jax.random.key(0))

    def drawn(rows: int) -> np.ndarray:
        program = on.compile(lambda key, _: jax.random.uniform(key, (rows,)), key, row, rows=(1,))
        return np.asarray(program(key, row))

    with jax.threefry_partitionable(False):
        np.testing.assert_array_equal(drawn(103), drawn(104)[:103])


def test_a_key_whose_draws_depend_on_the_devices_is_refused():
    key = jax.random.key(0, impl="rbg")
    devices(1).replicate(key)
    with pytest.raises(InputError, match="'rbg', whose draws depend on the number of devices"):
        Devices((*jax.devices()[:1], *jax.devices()[:1])).replicate(key)
