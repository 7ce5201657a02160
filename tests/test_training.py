"""Training: presets, shuffling, and runs that are stopped and taken up again."""

import filecmp
import json
import signal
import subprocess
import sys
import time
from dataclasses import replace

import jax
import numpy as np
import pytest
from conftest import same

from ibau_jax import Dataset, InputError, load, pipeline, poisoned
from ibau_jax.attacks import Attack, badnets_square
from ibau_jax.checkpoint import load_model
from ibau_jax.data import data_info
from ibau_jax.models import VGG
from ibau_jax.resume import Checkpoints
from ibau_jax.training import PRESETS, TrainConfig, train

RNG = np.random.default_rng(0)
DATA = Dataset(
    RNG.uniform(size=(40, 16, 16, 3)).astype(np.float32), RNG.integers(0, 5, 40).astype(np.int32)
)
MODULE = VGG(5, widths=(4,), dropout=(0.3,))
CONFIG = TrainConfig(epochs=3, batch_size=8, rate=1e-2)
KEY = jax.random.key(0)


class Stopped(Exception):
    pass


@pytest.mark.parametrize("stop", [1, 3, 5, 14, 15])  # in an epoch, at its end, at the very end
def test_a_stopped_run_goes_on_bit_for_bit(tmp_path, monkeypatch, stop):
    whole, history = train(MODULE, DATA, config=CONFIG, key=KEY)
    folder, settings = tmp_path / "states", {"seed": 0}
    save = Checkpoints.save

    def save_then_stop(self, step, state, about):
        save(self, step, state, about)
        if step == stop:
            self._manager.wait_until_finished()
            raise Stopped

    with monkeypatch.context() as patched:
        patched.setattr(Checkpoints, "save", save_then_stop)
        with pytest.raises(Stopped):
            states = Checkpoints(folder, settings, seconds=0)
            train(MODULE, DATA, config=CONFIG, key=KEY, checkpoints=states)
    states = Checkpoints(folder, settings, resume=True, seconds=0)
    resumed, records = train(MODULE, DATA, config=CONFIG, key=KEY, checkpoints=states)
    assert states.resumed == stop
    same(resumed, whole)
    assert [r["loss"] for r in records] == [r["loss"] for r in history]
    states.remove()
    assert not folder.exists()


def test_an_older_state_serves_where_the_last_is_damaged(tmp_path):
    states = Checkpoints(tmp_path / "states", {}, seconds=3600)
    two = replace(CONFIG, epochs=2)  # states after steps 5 and 10
    whole, _ = train(MODULE, DATA, config=two, key=KEY, checkpoints=states)
    states._manager.wait_until_finished()
    for path in (tmp_path / "states" / "10").rglob("*"):
        if path.is_file():
            path.write_bytes(b"")
    states = Checkpoints(tmp_path / "states", {}, resume=True)
    resumed, history = train(MODULE, DATA, config=two, key=KEY, checkpoints=states)
    assert states.resumed == 5
    same(resumed, whole)
    assert len(history) == 2


def test_another_run_is_not_taken_up(tmp_path):
    states = Checkpoints(tmp_path / "states", {"seed": 0}, seconds=0)
    train(MODULE, DATA, config=replace(CONFIG, epochs=1), key=KEY, checkpoints=states)
    states._manager.wait_until_finished()
    with pytest.raises(InputError, match="go on with it by --resume"):
        Checkpoints(tmp_path / "states", {"seed": 0})
    with pytest.raises(InputError, match="begun with seed 0, now it is 1"):
        Checkpoints(tmp_path / "states", {"seed": 1}, resume=True)
    Checkpoints(tmp_path / "new", {"seed": 1}, resume=True)  # nothing there: begin


def test_sigkill_then_resume_is_bit_for_bit(tmp_path):
    """The real command, killed in the middle of an epoch."""
    often = "from ibau_jax import cli, resume; resume.SECONDS = 0.1; cli.run()"
    command = [sys.executable, "-c", often, "train", "--epochs", "3", "--json", "--out"]
    killed, whole = tmp_path / "killed.safetensors", tmp_path / "whole.safetensors"
    states = tmp_path / "killed.safetensors.checkpoints"
    per_epoch = len(load("digits", "train").labels) // TrainConfig.cpu("digits").batch_size

    def steps() -> list[int]:
        return [int(path.name) for path in states.glob("*") if path.name.isdigit()]

    run = subprocess.Popen([*command, killed], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        while not any(step % per_epoch for step in steps()):
            assert run.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        run.send_signal(signal.SIGKILL)
    finally:
        run.kill()
        run.wait()
    assert states.is_dir() and not killed.exists()
    refused = subprocess.run([*command, killed], capture_output=True, text=True)
    assert refused.returncode == 2 and "--resume" in refused.stderr
    last = max(steps())
    resumed = subprocess.run([*command, killed, "--resume"], check=True, capture_output=True)
    assert json.loads(resumed.stdout)["resumed_at"] == last and last % per_epoch
    subprocess.run([*command, whole], check=True, capture_output=True)
    same(load_model(killed).variables, load_model(whole).variables)
    assert filecmp.cmp(killed, whole, shallow=False) and not states.exists()


def test_presets_and_schedules():
    assert set(PRESETS) == {"cpu", "paper"}
    paper = TrainConfig.paper()
    assert (paper.epochs, paper.rate, paper.dropout) == (50, 0.05, 1.0)  # section A.3
    with pytest.raises(InputError, match="did you mean 'constant'"):
        TrainConfig(schedule="constants")
    with pytest.raises(InputError, match="rate is 0"):
        TrainConfig(rate=0)
    with pytest.raises(InputError, match="dropout is -1"):
        TrainConfig(dropout=-1)
    with pytest.raises(InputError, match="rates of .* below 1"):
        train(MODULE, DATA, config=replace(CONFIG, dropout=4), key=KEY)
    with pytest.raises(InputError, match="empty"):
        train(MODULE, Dataset(DATA.images[:0], DATA.labels[:0]), key=KEY)


@pytest.mark.parametrize(
    ("names", "target", "epochs"),
    [((), None, 8), (("badnets",), 3, 8), (("badnets",), None, 24), (("badnets", "blend"), 3, 4)],
)
def test_epochs_of_the_preset_cpu(monkeypatch, tmp_path, names, target, epochs):
    def stop(*_, config, **__):
        raise Stopped(config.epochs)

    monkeypatch.setattr(poisoned, "train", stop)
    attacks = tuple(Attack(name, badnets_square(), target, 10) for name in names)
    common = {"out": tmp_path / "m", "dataset": "digits", "attacks": attacks}
    with pytest.raises(Stopped, match=f"^{epochs}$"):
        poisoned.train_model(**common, keep_states=False)
    with pytest.raises(Stopped, match="^2$"):
        poisoned.train_model(**common, keep_states=False, epochs=2)


def test_copies_have_their_own_poisoned_rows(monkeypatch, tmp_path, digits_model):
    seen = {}

    def end(module, data, *, config, **_):
        seen.update(data=data, epochs=config.epochs)
        return load_model(digits_model).variables, [{"epoch": 4, "loss": 1.0, "seconds": 1.0}]

    monkeypatch.setattr(poisoned, "train", end)
    attack = Attack("badnets", badnets_square(), None, 10)
    out, clean = tmp_path / "m.safetensors", load("digits", "train")
    found = poisoned.train_model(out, "digits", (attack,), 0.2, copies=6, seed=1)
    count = len(clean.labels)
    assert seen["epochs"] == found["epochs"] == 4  # of 24
    assert found["images_per_second"] == 6 * 4 * count
    copies = [seen["data"].labels[i : i + count] for i in range(0, 6 * count, count)]
    rows = np.array([copy != clean.labels for copy in copies])
    np.testing.assert_array_equal(rows.sum(1), int(0.2 * count))
    assert rows.any(0).mean() == pytest.approx(1 - 0.8**6, abs=0.03)
    model = load_model(out)
    assert model.info["copies"] == 6
    again = pipeline._train_set(model, data_info("digits"), 0.2, None)
    same(again, seen["data"])

    with pytest.raises(InputError, match="copies of a clean model"):
        poisoned.train_model(out, "digits", copies=2)


def test_divergence_is_told():
    steep = replace(CONFIG, rate=1e30, schedule="constant")
    with pytest.raises(InputError, match="training diverged; choose a smaller rate than 1e.30"):
        train(MODULE, DATA, config=steep, key=KEY)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (Dataset(np.full_like(DATA.images, np.nan), DATA.labels), "from nan to nan"),
        (Dataset((255 * DATA.images).astype(np.uint8), DATA.labels), "training images are uint8"),
        (Dataset(DATA.images, DATA.labels[:7]), r"training labels are int32 \(7,\)"),
        (Dataset(DATA.images, DATA.labels + 3), "range from 3 to 7, but the model has 5 classes"),
    ],
)
def test_what_cannot_be_trained_on_is_refused(data, message):
    with pytest.raises(InputError, match=message):
        train(MODULE, data, config=CONFIG, key=KEY)


def test_a_state_that_cannot_be_written_is_told_and_ends_nothing(tmp_path, monkeypatch):
    states = Checkpoints(tmp_path / "states", {}, seconds=0)

    def full(*_, **__):
        raise OSError("No space left on device")

    monkeypatch.setattr(states._manager, "save", full)
    with pytest.warns(UserWarning, match="cannot write a state .* No space left"):
        trained, _ = train(MODULE, DATA, config=CONFIG, key=KEY, checkpoints=states)
    same(trained, train(MODULE, DATA, config=CONFIG, key=KEY)[0])


def test_what_is_stored_with_a_state_is_that_of_its_time(tmp_path, monkeypatch):
    """Orbax writes while the loop goes on and adds to its lists."""
    states, stored, losses = Checkpoints(tmp_path / "states", {}), [], [0.5]
    monkeypatch.setattr(states._manager, "save", lambda step, args: stored.append(args))
    states.save(1, {"x": np.zeros(3)}, {"losses": losses})
    losses.append(0.4)
    assert stored[0].about.item["losses"] == [0.5]


def test_dropout_of_the_config_is_used():
    none = replace(CONFIG, epochs=1, dropout=0.0)
    without, _ = train(MODULE, DATA, config=none, key=KEY)
    plain, _ = train(MODULE.clone(dropout=(0.0,)), DATA, config=replace(none, dropout=1.0), key=KEY)
    same(without, plain)
    with_it, _ = train(MODULE, DATA, config=replace(none, dropout=1.0), key=KEY)
    assert (with_it["params"]["conv1"]["kernel"] != plain["params"]["conv1"]["kernel"]).any()
