"""Training: presets, shuffling, and runs that are stopped and taken up again."""

import filecmp
import json
import pickle
import signal
import subprocess
import sys
import time
from dataclasses import replace

import jax
import numpy as np
import pytest
from conftest import on_devices, same

from ibau_jax import Dataset, InputError, load
from ibau_jax.attacks import Attack, badnets_square
from ibau_jax.commands import attack_options, cli
from ibau_jax.commands import train as command
from ibau_jax.data import data_info
from ibau_jax.models.files import load_model
from ibau_jax.models.vgg import VGG
from ibau_jax.training.states import Checkpoints
from ibau_jax.training.train import PRESETS, TrainConfig, train

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
    with pytest.raises(InputError, match="unfinished training: resume it"):
        Checkpoints(tmp_path / "states", {"seed": 0})
    with pytest.raises(InputError, match="begun with seed 0, now it is 1:"):
        Checkpoints(tmp_path / "states", {"seed": 1}, resume=True)
    Checkpoints(tmp_path / "new", {"seed": 1}, resume=True)  # nothing there: begin


def test_another_environment_goes_on_with_a_note(tmp_path):
    """The state is the same on every device, so that another number of them can go on."""
    folder, one = tmp_path / "states", replace(CONFIG, epochs=1)
    where = {"devices": 1, "backend": "cpu", "jax": "0.10.2"}
    states = Checkpoints(folder, {"seed": 0}, seconds=0, environment=where)
    train(MODULE, DATA, config=one, key=KEY, checkpoints=states)
    states.close()
    other = {**where, "devices": 2, "jax": "0.11.0"}
    told = "begun with devices 1, now it is 2, jax '0.10.2', now it is '0.11.0': the training goes"
    with pytest.warns(UserWarning, match=told):
        resumed = Checkpoints(folder, {"seed": 0}, resume=True, environment=other)
    train(MODULE, DATA, config=one, key=KEY, checkpoints=resumed)
    assert resumed.resumed == 5
    with pytest.raises(InputError, match="seed 0, now it is 1: give the options that .* or remove"):
        Checkpoints(folder, {"seed": 1}, resume=True, environment=other)


ON_TWO_DEVICES = """
import pickle, sys, warnings
from dataclasses import replace
import jax
from training.test_training import CONFIG, DATA, KEY, MODULE
from ibau_jax.devices.mesh import devices
from ibau_jax.training.states import Checkpoints
from ibau_jax.training.train import train
warnings.simplefilter("ignore")
config, settings, found = replace(CONFIG, epochs=2), {"seed": 0}, []
for begin, end in ((1, 2), (2, 1)):
    folder = f"{sys.argv[1]}/{begin}"
    states = Checkpoints(folder, settings, seconds=0, environment={"devices": begin})
    save = states.save
    states.save = lambda step, *content: step > 3 or save(step, *content)  # as if stopped there
    on = [train(MODULE, DATA, config=config, key=KEY, devices=devices(begin), checkpoints=states)]
    states.close()
    states = Checkpoints(folder, settings, True, environment={"devices": end})
    on += [train(MODULE, DATA, config=config, key=KEY, devices=devices(end), checkpoints=states)]
    assert states.resumed == 3
    found.append([variables for variables, _ in on])
pickle.dump(found, open(f"{sys.argv[1]}/found.pickle", "wb"))
"""


def test_a_run_goes_on_on_another_number_of_devices(tmp_path):
    """From one device to two, and from two to one: the same model but for rounding."""
    subprocess.run(
        [sys.executable, "-c", ON_TWO_DEVICES, str(tmp_path)],
        check=True,
        env=on_devices(2),
    )
    found = pickle.loads((tmp_path / "found.pickle").read_bytes())
    start = jax.jit(MODULE.init)(KEY, DATA.images[:1])
    for whole, resumed in found:
        pairs = zip(jax.tree.leaves(whole), jax.tree.leaves(start), strict=True)
        assert max(np.abs(a - b).max() for a, b in pairs) > 0.1
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), resumed, whole)


def states_of(out, **options):
    """As a training to `out` that was stopped would leave them."""
    options = {"dataset": "digits", "clean": True, "copies": 1, "seed": 0} | options
    options.setdefault("architecture", "vgg")
    config = replace(TrainConfig.cpu("digits"), epochs=options.pop("epochs", 8))
    ratio = options.pop("poison_ratio", None)
    settings = command.settings_of(config=config, poison_ratio=ratio, **options)
    states = Checkpoints(command.states_folder(out), settings, seconds=0)
    states.save(1, [np.zeros(3)], {"history": [], "losses": [], "seconds": 0.0})
    states.close()


def test_states_are_looked_at_before_a_trigger_is_made(tmp_path, monkeypatch, capsys):
    out = tmp_path / "m.safetensors"
    common = ["train", "--attack", "l2", "--clean-model", "none", "--out", str(out)]
    states_of(out, clean=False, poison_ratio=0.3)
    tried = []

    def make(*_, **__):
        tried.append(True)
        raise InputError("the trigger is made")

    monkeypatch.setattr(attack_options, "make_attacks", make)
    for options, told in (
        ([], "holds an unfinished training: resume it, or remove the folder"),
        (["--resume"], "begun with poison ratio 0.3, now it is 0.2: give the options"),
        (["--resume", "--poison-ratio", "0.3", "--seed", "1"], "seed 0, now it is 1"),
        (["--resume", "--poison-ratio", "0.3", "--copies", "2"], "copies 1, now it is 2"),
        (["--resume", "--poison-ratio", "0.3", "--epochs", "3"], "epochs 8, now it is 3"),
        (
            ["--resume", "--poison-ratio", "0.3", "--preset", "paper"],
            "batch_size 32, now it is 128",
        ),
        (["--resume", "--poison-ratio", "0.3", "--dataset", "cifar10"], "dataset 'digits', now"),
    ):
        assert cli.main([*common, *options]) == 2
        line = capsys.readouterr().err
        assert told in line and line.count("\n") == 1 and not tried, line
    assert cli.main([*common, "--resume", "--poison-ratio", "0.3"]) == 2 and tried
    assert "the trigger is made" in capsys.readouterr().err


def test_a_model_file_that_cannot_be_written_is_told_first(tmp_path, capsys):
    (tmp_path / "file").touch()
    common = ["train", "--attack", "l2", "--clean-model", "none", "--out"]
    for out, told in (
        (tmp_path / "file" / "m", "cannot write in the folder"),
        (tmp_path, "is a folder: expected a model file"),
        ("/dev/null", "is no regular file: expected a model file"),
    ):
        assert cli.main([*common, str(out)]) == 2
        assert told in capsys.readouterr().err


def test_sigkill_then_resume_is_bit_for_bit(tmp_path):
    """The real command, killed in the middle of an epoch."""
    often = "from ibau_jax.commands import cli; from ibau_jax.training import states; "
    often += "states.SECONDS = 0.1; cli.run()"
    options = ["train", "--architecture", "vgg-mini", "--epochs", "2", "--json", "--out"]
    command = [sys.executable, "-m", "ibau_jax", *options]
    killed, whole = tmp_path / "killed.safetensors", tmp_path / "whole.safetensors"
    states = tmp_path / "killed.safetensors.checkpoints"
    per_epoch = len(load("digits", "train").labels) // TrainConfig.cpu("digits").batch_size

    def steps() -> list[int]:
        return [int(path.name) for path in states.glob("*") if path.name.isdigit()]

    run = subprocess.Popen(
        [sys.executable, "-c", often, *options, killed],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
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

    monkeypatch.setattr(command, "train", stop)
    attacks = tuple(Attack(name, badnets_square(), target, 10) for name in names)
    common = {"out": tmp_path / "m", "dataset": "digits", "attacks": attacks}
    with pytest.raises(Stopped, match=f"^{epochs}$"):
        command.train_model(**common, keep_states=False)
    with pytest.raises(Stopped, match="^2$"):
        command.train_model(**common, keep_states=False, epochs=2)


def test_copies_have_their_own_poisoned_rows(monkeypatch, tmp_path, digits_model):
    seen = {}

    def end(module, data, *, config, **_):
        seen.update(data=data, epochs=config.epochs)
        return load_model(digits_model).variables, [{"epoch": 4, "loss": 1.0, "seconds": 1.0}]

    monkeypatch.setattr(command, "train", end)
    attack = Attack("badnets", badnets_square(), None, 10)
    out, clean = tmp_path / "m.safetensors", load("digits", "train")
    options = {"architecture": load_model(digits_model).architecture, "copies": 6, "seed": 1}
    found = command.train_model(out, "digits", (attack,), poison_ratio=0.2, **options)
    count = len(clean.labels)
    assert seen["epochs"] == found["epochs"] == 4  # of 24
    assert found["images_per_second"] == 6 * 4 * count
    copies = [seen["data"].labels[i : i + count] for i in range(0, 6 * count, count)]
    rows = np.array([copy != clean.labels for copy in copies])
    np.testing.assert_array_equal(rows.sum(1), int(0.2 * count))
    assert rows.any(0).mean() == pytest.approx(1 - 0.8**6, abs=0.03)
    model = load_model(out)
    assert model.info["copies"] == 6
    again = model.train_set(data_info("digits"))
    same(again, seen["data"])

    with pytest.raises(InputError, match="copies of a clean model"):
        command.train_model(out, "digits", copies=2)


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
