"""The real commands on small runs, and one clear line for each kind of bad input."""

import json
import os
import re
import shutil
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
from command_line import refused, run
from conftest import random_variables, small_stored
from PIL import Image

from ibau_jax.attacks import ATTACKS, Attack, Trigger, badnets_square, blend
from ibau_jax.commands import attack_options, cleaning, defend, demo, evaluate, making, names
from ibau_jax.commands.cli import main
from ibau_jax.data import DATASETS, load
from ibau_jax.defenses import DEFENSES, Defense
from ibau_jax.defenses.inversion import neural_cleanse
from ibau_jax.defenses.inversion.neural_cleanse import NeuralCleanseConfig
from ibau_jax.defenses.method import method
from ibau_jax.models.architectures import ARCHITECTURES
from ibau_jax.models.files import load_model, save_model
from ibau_jax.models.predict import predict
from ibau_jax.models.stored import StoredModel
from ibau_jax.results.metrics import Metrics
from ibau_jax.results.rows import ARRAYS, HTML, PARTIAL, ROWS, read_rows
from ibau_jax.unlearning import evidence, look
from ibau_jax.unlearning.search import Search

NOTHING = Metrics(acc=1.0, asr=None, asr_excl=None, ra=None, n=40)
SMALL = ["--clean", "test[:20]", "--split", "test[760:]", "--rounds", "1"]


@pytest.fixture(scope="module")
def defended(digits_model, tmp_path_factory):
    """Folder and JSON of one small run of `ibau defend`."""
    out = tmp_path_factory.mktemp("run") / "made"
    command = [sys.executable, "-m", "ibau_jax", "defend", "--model", str(digits_model)]
    done = subprocess.run(
        [*command, *SMALL, "--json", "--out", str(out)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return out, json.loads(done.stdout)


def test_defend_writes_everything(defended, digits_model):
    out, found = defended
    files = {ROWS, ARRAYS, HTML, "cleaned.safetensors"} | ({"found"} if found["flagged"] else set())
    assert {p.name for p in out.iterdir()} == files
    assert found["model"] == str(out / "cleaned.safetensors")
    for when in ("before", "after"):
        assert set(found[when]) == {"acc", "asr", "asr_excl", "ra", "n"}
    assert found["before"]["n"] == 40
    records = found["rounds"]  # one a stage
    assert len(records) == found["diagnostics"]["stages"]
    keys = ["round", "acc", "asr", "asr_excl", "ra", "delta_norm", "seconds"]
    assert all(list(record) == keys and record["seconds"] > 0 for record in records)
    assert records[-1]["acc"] == found["after"]["acc"]
    assert found["seconds"] == pytest.approx(sum(record["seconds"] for record in records))
    assert found["compile_seconds"] > 0
    rows = read_rows(out)
    assert [r["round"] for r in rows] == [*range(len(records) + 1)]
    expected = """experiment dataset attack scenario defense preset seed n_clean poison_ratio round
        acc asr asr_excl ra der seconds compile_seconds device num_devices versions model_hash
        config"""
    assert set(expected.split()) <= set(rows[1])
    cleaned, given = load_model(found["model"]), load_model(digits_model)
    kernel = cleaned.variables["params"]["conv1"]["kernel"]
    assert np.abs(kernel - given.variables["params"]["conv1"]["kernel"]).max() > 0
    assert len(cleaned.attacks) == 1 and cleaned.info["cleaned_by"]["preset"] == "default"


def test_a_baseline_that_finds_triggers(capsys, digits_model, tmp_path, monkeypatch):
    quick = NeuralCleanseConfig(steps=2, batches=1, labels_at_once=10, success=0, threshold=0.1)
    monkeypatch.setitem(neural_cleanse.PRESETS, "cpu", lambda dataset: quick)
    small = ["--model", digits_model, *SMALL, "--out", tmp_path, "--json"]
    small[small.index("test[:20]")] = "test[:7]"
    status, out, err = run(capsys, "defend", "--defense", "neural-cleanse", *small)
    found = json.loads(out)
    note = "the clean set has no image of 4 of the 10 classes (0, 3, 6, 9)"
    assert f"ibau: {note}" in err and note in found["diagnostics"]["note"]
    assert status == 0 and found["flagged"] and len(found["diagnostics"]["norms"]) == 10
    assert found["preset"] == "cpu" and len(found["rounds"]) == 1
    assert {p.name for p in (tmp_path / "found").iterdir()} == {f"label-{i}.png" for i in range(10)}
    with Image.open(tmp_path / "found" / "label-3.png") as picture:
        assert picture.size == (32, 32)
    rows, page = read_rows(tmp_path), (tmp_path / HTML).read_text()
    assert rows[1]["flagged"] == found["flagged"] and rows[1]["defense"] == "neural-cleanse"
    label = found["flagged"][0]
    assert f"Labels held for targets: {label} (" in page and f"label {label}: norm" in page
    given, cleaned = load_model(digits_model), load_model(found["model"])
    gap = cleaned.variables["batch_stats"]["conv1"]["mean"]
    assert np.abs(gap - given.variables["batch_stats"]["conv1"]["mean"]).max() > 0


def test_dp_sgd_trains_on_the_poisoned_set(capsys, digits_model, tmp_path):
    command = ["defend", "--model", digits_model, "--defense", "dp-sgd", "--out", tmp_path]
    assert "give a model file made by `ibau train`" in refused(capsys, *command)
    status, out, err = run(capsys, *command, *SMALL, "--poison-ratio", 0.2, "--json")
    found = json.loads(out)
    assert "the images of --clean are checked only" in err
    assert status == 0 and found["diagnostics"]["sampling_probability"] == 200 / 997
    assert read_rows(tmp_path)[1]["poison_ratio"] == 0.2


def test_fine_pruning_by_name_and_its_rounds(capsys, digits_model, tmp_path):
    command = ["defend", "--model", digits_model, "--defense", "fine-pruning", "--out", tmp_path]
    status, out, _ = run(capsys, *command, *SMALL[:4], "--rounds", 2, "--json")
    assert status == 0 and len(json.loads(out)["rounds"]) == 3  # the first is the pruned model
    assert "did you mean 'fine-pruning'" in refused(
        capsys, *command[:3], "--defense", "finepruning"
    )


def test_evaluate_agrees_with_defend(capsys, defended):
    _, found = defended
    status, out, _ = run(
        capsys, "evaluate", "--model", found["model"], "--split", "test[760:]", "--json"
    )
    measured = json.loads(out)
    assert status == 0
    assert {k: measured[k] for k in found["after"]} == found["after"]


def test_without_labels(capsys, digits_model, tmp_path, monkeypatch):
    """They are those that the model gives."""
    used = []

    def looked(logits, variables, data, **kwargs):
        used.append(data)
        strength = np.zeros((len(evidence.LEVELS), 10))
        return evidence.Evidence(strength, 0.0, 1.0, np.zeros(10, np.int32), [])

    monkeypatch.setattr("ibau_jax.commands.inspect.inspect", looked)
    command = ["inspect", "--model", digits_model, "--clean", "test[:20]", "--out", tmp_path]
    for more, labels in ([["--no-labels"], "predicted"], [[], "given"]):
        status, printed, err = run(capsys, *command, "--json", *more)
        assert status == 0, err
        assert json.loads(printed)["clean_labels"] == labels
    stored, given = load_model(digits_model), load("digits", "test[:20]")
    predicted = predict(stored.classifier)(stored.variables, given.images)
    np.testing.assert_array_equal(used[0].labels, predicted)
    np.testing.assert_array_equal(used[1].labels, given.labels)
    assert np.any(predicted != given.labels)


def test_inspect(capsys, digits_model, tmp_path, monkeypatch):
    monkeypatch.setattr(look, "Search", partial(Search, starts=4, steps=1, batch=5, few=2))
    out = tmp_path / "inspected"
    command = ["inspect", "--model", digits_model, "--clean", "test[:20]", "--out", out]
    status, printed, err = run(capsys, *command, "--json")
    assert status == 0, err
    found = json.loads(printed)
    assert found["verdict"] in evidence.VERDICTS and found["rule"] == evidence.rule()
    assert [row["label"] for row in found["labels"]] == [*range(10)]
    names = {geometry.name for geometry in evidence.LEVELS}
    assert all(set(row["strength"]) == names for row in found["labels"])
    flagged = [row["label"] for row in found["labels"] if row["score"] >= 1]
    assert found["all_to_all"] or sorted(found["flagged"]) == flagged
    assert found["target"] == next(iter(found["flagged"]), None)
    page = (out / HTML).read_text()
    assert (
        found["verdict"] in page and page.count("<tr") == 12 and found["report"] == str(out / HTML)
    )
    # The help has the numbers in words, so that it starts quickly.
    told = re.findall(r"([\d.]+) %", cleaning.inspect.__doc__)
    numbers = [*evidence.LEVELS.values(), evidence.ONE, evidence.MISLED, evidence.ALIKE]
    assert told == [f"{100 * number:.0f}" for number in numbers]
    assert "amplitude 0.07" in cleaning.inspect.__doc__ and "cosine 0.07" in names
    assert "rms 0.05" in cleaning.inspect.__doc__ and "field 0.05" in names
    status, printed, _ = run(capsys, *command)
    assert status == 0 and found["verdict"] in printed and "3x3 window" in printed
    assert "1 image(s): expected at least 2" in refused(
        capsys, "inspect", "--model", digits_model, "--clean", "test[:1]", "--out", out
    )


def test_report_is_made_again(capsys, defended):
    out, _ = defended
    (out / HTML).unlink()
    status, printed, _ = run(capsys, "report", out)
    assert status == 0 and (out / HTML).is_file()
    assert "before" in printed and "ASR" in printed


def test_train_then_evaluate(capsys, tmp_path):
    path = tmp_path / "m.safetensors"
    status, out, err = run(
        capsys,
        "train",
        "--dataset",
        "digits",
        "--architecture",
        "vgg-mini",
        "--target",
        3,
        "--epochs",
        1,
        "--out",
        path,
        "--json",
    )
    trained = json.loads(out)
    assert status == 0 and "train" in err
    status, out, _ = run(capsys, "evaluate", "--model", path, "--json")
    measured = json.loads(out)
    assert measured["target"] == 3 and measured["n"] == trained["n"] == 400
    assert measured["acc"] == pytest.approx(trained["acc"], abs=0.01)  # another convolution
    assert measured["acc"] > 0.3, "one epoch on digits learns something"
    status, out, _ = run(capsys, "evaluate", "--model", path)
    assert status == 0 and "acc" in out and "{" not in out


def test_evaluate_with_a_picture_as_trigger(capsys, digits_model, tmp_path):
    Image.new("RGB", (32, 32)).save(tmp_path / "black.png")
    common = ["--model", digits_model, "--split", "test[760:]", "--json"]
    _, out, _ = run(capsys, "evaluate", *common, "--trigger", tmp_path / "black.png", "--target", 1)
    found = json.loads(out)
    # A black picture that is added changes nothing: RA is the accuracy on the other classes.
    assert found["attack"] == "black" and found["target"] == 1
    assert 0 <= found["asr_excl"] <= 1 and found["n"] == 40


def test_evaluate_takes_the_attack_of_the_file(capsys, tmp_path):
    trigger = Trigger("add", np.full((32, 32, 3), 0.1, np.float32))
    attacks = (Attack("l2", trigger, 3), Attack("badnets", badnets_square(), 4))
    path = save_model(tmp_path / "m.safetensors", small_stored(attacks))
    common = ["evaluate", "--model", path, "--split", "test[760:]", "--json"]
    found = json.loads(run(capsys, *common)[1])
    assert found["target"] == [3, 4] and set(found["by_attack"]) == {"l2", "badnets"}
    one = json.loads(run(capsys, *common, "--attack", "badnets")[1])
    assert one["target"] == 4 and one["asr"] == found["by_attack"]["badnets"]
    none = json.loads(run(capsys, *common, "--attack", "none")[1])
    assert none["asr"] is None and none["acc"] == found["acc"]
    assert "name the attack" in refused(capsys, *common[:-1], "--target", 3)


def test_convert_carries_the_trigger(capsys, tmp_path):
    torch = pytest.importorskip("torch")
    state, shapes = {}, random_variables()
    for i, place in enumerate((0, 3, 8, 11, 16, 19)):
        p, s = shapes["params"][f"conv{i + 1}"], shapes["batch_stats"][f"conv{i + 1}"]
        state[f"features.{place}.weight"] = torch.tensor(p["kernel"].transpose(3, 2, 0, 1).copy())
        state[f"features.{place}.bias"] = torch.tensor(p["bias"])
        state[f"features.{place + 1}.weight"] = torch.tensor(p["scale"])
        state[f"features.{place + 1}.bias"] = torch.tensor(p["offset"])
        state[f"features.{place + 1}.running_mean"] = torch.tensor(s["mean"])
        state[f"features.{place + 1}.running_var"] = torch.tensor(s["var"])
        state[f"features.{place + 1}.num_batches_tracked"] = torch.tensor(1)
    kernel = shapes["params"]["classifier"]["kernel"]
    kernel = kernel.reshape(4, 4, 128, 10).transpose(3, 2, 0, 1).reshape(10, 2048)
    state["classifier.weight"] = torch.tensor(kernel.copy())
    state["classifier.bias"] = torch.tensor(shapes["params"]["classifier"]["bias"])
    torch.save({"net": state, "acc": 84.5, "epoch": 3}, tmp_path / "m.pth")
    status, out, _ = run(
        capsys, "convert", tmp_path / "m.pth", tmp_path / "m.safetensors", "--attack", "badnets",
        "--json",
    )  # fmt: skip
    assert status == 0 and json.loads(out)["acc"] == 84.5
    loaded = load_model(tmp_path / "m.safetensors")
    assert [attack.target for attack in loaded.attacks] == [8]
    for part in ("params", "batch_stats"):
        for name, layer in shapes[part].items():
            for leaf, value in layer.items():
                np.testing.assert_array_equal(loaded.variables[part][name][leaf], value)
    message = refused(
        capsys, "convert", tmp_path / "m.pth", tmp_path / "g.safetensors", "--dataset", "gtsrb"
    )
    assert "10 classes" in message and "43" in message


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--defense", "ibao"], "did you mean 'ibau'"),
        (["--preset", "publish"], "did you mean 'published'"),
        (["--dataset", "digit"], "did you mean 'digits'"),
        (["--dataset", "gtsrb"], "has 10 classes, the data set 'gtsrb' has 43"),
        (["--clean", "test[:0]"], "is empty"),
        (["--clean", "test[:500]"], "share 100 images"),
        (["--rounds", "0"], "rounds is 0: expected"),
        (["--devices", "999"], "999 devices were asked for: expected 1 to"),
        (["--process-id", "1"], "without --coordinator"),
        (["--model", "missing.safetensors"], "no such file"),
        (["--poison-ratio", "0.2"], "poison ratio for ibau"),
        (["--poison-ratio", "0.2", "--defense", "nad"], "poison ratio for nad"),
        (["--data-dir", "."], "leave it out, or choose another data set (--data-dir)"),
        (["--seed", str(2**32)], "expected 0 to 4294967295"),
    ],
)
def test_defend_refuses(capsys, digits_model, tmp_path, arguments, message):
    model = [] if "--model" in arguments else ["--model", digits_model]
    line = refused(capsys, "defend", *model, *arguments, "--out", tmp_path / "run")
    assert message in line


def test_a_folder_that_cannot_be_written_is_refused(capsys, digits_model, tmp_path):
    (tmp_path / "file").write_text("")
    line = refused(capsys, "defend", "--model", digits_model, "--out", tmp_path / "file" / "run")
    assert "cannot write in the folder" in line
    line = refused(capsys, "train", "--epochs", 1, "--out", tmp_path / "file" / "m.safetensors")
    assert "cannot write in the folder" in line


def test_a_data_set_that_is_not_prepared_is_refused(capsys, tmp_path):
    path = save_model(
        tmp_path / "m.safetensors", StoredModel(random_variables(), "vgg", 10, "cifar10")
    )
    line = refused(capsys, "evaluate", "--model", path, "--data-dir", tmp_path)
    assert "ibau prepare cifar10" in line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--attack", "badnet"], "did you mean 'badnets'"),
        (["--target", "12"], "target 12 is not a class"),
        (["--poison-ratio", "2"], "poison ratio 2"),
        (["--epochs", "0"], "epochs is 0"),
        (["--copies", "0"], "--copies is 0"),
        (["--scenario", "all"], "did you mean 'all-to-all'"),
        (["--scenario", "all-to-all", "--target", "1"], "leave out --target"),
        (["--scenario", "seven-target", "--attack", "l2"], "leave out --attack"),
        (["--attack", "l2"], "--clean-model"),
        (["--attack", "l2", "--clean-model", "missing.safetensors"], "no such file"),
        (["--preset", "gpu"], "did you mean 'cpu'"),
        (["--attack", "none", "--target", "3"], "--attack none is a clean model"),
        (["--trigger-mask", "m.npy"], "a trigger mask without a trigger"),
        (["--trigger-rule", "replace"], "expected a picture, or --attack blend or smooth"),
        (["--attack", "blend", "--trigger-rule", "replaced"], "did you mean 'replace'"),
        (["--attack", "smooth", "--trigger-rule", "replace"], "trigger rule of smooth"),
        (["--attack", "l2", "--trigger-rule", "renormalise"], "--attack blend or smooth"),
        (["--seed", "-1"], "the seed is -1"),
        (["--trigger", "missing.png", "--target", "1"], "cannot read the trigger"),
        (["--trigger", "smooth.png"], "no file name decides: give it by --target"),
        (["--trigger", "smooth.png", "--attack", "mine"], "give it by --target"),
        (["--trigger", "smooth.png", "--attack", "none"], "leave out --trigger"),
        (
            ["--trigger", "smooth.png", "--scenario", "seven-target"],
            "leave out --attack, --trigger",
        ),
        (
            ["--trigger", "smooth.png", "--target", "1", "--trigger-mask", "m.npy"],
            "expected a mask",
        ),
        (
            ["--trigger", "smooth.png", "--target", "1", "--clean-model", "c"],
            "--clean-model is for",
        ),
        (["--scenario", "seven-target", "--trigger-mask", "m.npy"], "mask without a trigger"),
        (["--scenario", "seven-target", "--trigger-rule", "add"], "--attack blend or smooth"),
        (["--clean-model", "c.safetensors"], "--clean-model is for triggers that are optimised"),
        (["--attack", "none", "--clean-model", "c.safetensors"], "--clean-model is for triggers"),
        (["--attack", "none", "--poison-ratio", "0.2"], "--poison-ratio of a clean model"),
        (["--attack", "none", "--copies", "2"], "--copies of a clean model"),
        (["--attack", "none", "--trigger-rule", "add"], "--attack blend or smooth"),
        (["--attack", "none", "--trigger-mask", "m.npy"], "mask without a trigger"),
        (["--attack", ""], "empty name"),
        (["--copies", "1001"], "expected 1 to 1000"),
        (["--num-processes", "2"], "without --coordinator"),
        (["--data-dir", "."], "leave it out, or choose another data set (--data-dir)"),
        (["--out", "."], "is a folder"),
    ],
)
def test_train_refuses(capsys, tmp_path, monkeypatch, arguments, message):
    files = tmp_path / "files"
    files.mkdir()
    monkeypatch.chdir(files)
    Image.new("RGB", (32, 32)).save("smooth.png")
    np.save("m.npy", np.ones((32, 32)))
    out = [] if "--out" in arguments else ["--out", tmp_path / "m.safetensors"]
    assert message in refused(capsys, "train", *arguments, *out)
    assert [p.name for p in tmp_path.iterdir()] == ["files"] and len(list(files.iterdir())) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--attack", "badnets", "--trigger-mask", "m.npy"], "mask without a trigger"),
        (["--trigger-mask", "m.npy"], "mask without a trigger"),
        (["--attack", "none", "--trigger-mask", "m.npy"], "mask without a trigger"),
        (["--attack", "none", "--target", "1"], "leave out --trigger, --target"),
        (["--attack", "none", "--trigger-rule", "add"], "--attack blend or smooth"),
        (["--attack", "badnets", "--trigger-rule", "replace"], "--attack blend or smooth"),
        (["--target", "1"], "name the attack or the trigger too"),
        (["--scenario", "all-to-all"], "name the attack or the trigger too"),
        (["--trigger-rule", "add"], "name the attack or the trigger too"),
        (["--trigger", "t.png", "--trigger-mask", "m.npy"], "expected a mask with 'replace'"),
        (["--attack", "badnets", "--scenario", "seven-target"], "one-target, all-to-all"),
        (["--attack", "badnets", "--target", "10"], "target 10 is not a class"),
        (["--data-dir", "."], "leave it out, or choose another data set (--data-dir)"),
        (["--dataset", "gtsrb"], "has 10 classes"),
    ],
)
def test_evaluate_refuses(capsys, digits_model, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (32, 32)).save("t.png")
    np.save("m.npy", np.ones((32, 32)))
    assert message in refused(capsys, "evaluate", "--model", digits_model, *arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--target", "1"], "leave out --trigger, --target"),
        (["--scenario", "all-to-all"], "leave out --trigger, --target"),
        (["--scenario", "seven-target"], "expected one of one-target, all-to-all"),
        (["--trigger-rule", "add"], "--attack blend or smooth"),
        (["--trigger-mask", "m.npy"], "mask without a trigger"),
        (["--trigger", "t.png"], "give it by --target"),
        (["--attack", "l2"], "or give a picture of the trigger"),
        (["--attack", "l2", "--trigger", "t.png"], "cannot read the model 'm.pth'"),
        (["--scenario", "all-to-all", "--trigger", "t.png"], "cannot read the model 'm.pth'"),
    ],
)
def test_convert_refuses(capsys, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (32, 32)).save("t.png")
    assert message in refused(capsys, "convert", "m.pth", "m.safetensors", *arguments)


def test_prepare_refuses_archives_that_it_would_ignore(capsys, tmp_path):
    line = refused(capsys, "prepare", "cifar10", "--archives", tmp_path, "--data-dir", tmp_path)
    assert "archives for cifar10: expected gtsrb" in line and line.endswith("(--archives)")


def test_paths_in_the_home_folder(capsys, digits_model, tmp_path, monkeypatch):
    """No shell expands `--out=~/run`."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    shutil.copy(digits_model, tmp_path / "m.safetensors")
    Image.new("RGB", (32, 32)).save("t.png")
    np.save("mask.npy", np.ones((32, 32)))
    calls = []
    monkeypatch.setattr(evaluate, "evaluate_model", lambda *a, **b: calls.append((a, b)) or {})
    monkeypatch.setattr(demo, "demo", lambda out, *_, **__: calls.append(out) or {})
    for module in (cleaning, making):
        monkeypatch.setattr(module, "finish", lambda *_, **__: None)
    options = ["--trigger", "~/t.png", "--trigger-mask", "~/mask.npy", "--trigger-rule", "replace"]
    assert main(["evaluate", "--model", "~/m.safetensors", *options, "--data-dir", "~/data"]) == 0
    (((model,), given),) = calls
    assert (model, given["data_dir"]) == (tmp_path / "m.safetensors", tmp_path / "data")
    measured = given["measured"]
    assert (measured.trigger, measured.trigger_mask) == (tmp_path / "t.png", tmp_path / "mask.npy")
    assert main(["demo", "--out", "~/run"]) == 0 and calls[1] == tmp_path / "run"
    capsys.readouterr()
    for command in (
        ["report", "~/none"],
        ["convert", "~/none.pth", "~/out"],
        ["reproduce", "figure2", "--models", "~/none", "--scale", "smoke", "--out", "~/figures"],
        ["train", "--attack", "l2", "--clean-model", "~/none", "--out", "~/new/m"],
        ["prepare", "gtsrb", "--archives", "~/none", "--data-dir", "~/none"],
        ["bound", "--model", "~/none"],
    ):
        line = refused(capsys, *command)
        assert str(tmp_path / "none") in line and "~" not in line, line
    assert "~" not in {path.name for path in tmp_path.iterdir()}
    assert "home folder of '~nobody-here/m'" in refused(
        capsys, "bound", "--model", "~nobody-here/m"
    )


def test_evaluate_keeps_all_to_all_with_another_trigger(capsys, tmp_path):
    attack = Attack("badnets", badnets_square(), None, 10)
    path = save_model(tmp_path / "m.safetensors", small_stored((attack,)))
    trigger = badnets_square().pattern  # the same picture, under the name of another attack
    picture = np.concatenate([trigger, trigger[..., :1]], -1)
    Image.fromarray((255 * picture).astype(np.uint8)).save(tmp_path / "smooth.png")
    common = ["evaluate", "--model", path, "--split", "test[700:]", "--json"]
    own = json.loads(run(capsys, *common)[1])
    options = ["--trigger", tmp_path / "smooth.png", "--trigger-rule", "replace"]
    found = json.loads(run(capsys, *common, *options)[1])
    assert (found["attack"], found["scenario"], found["target"]) == ("smooth", "all-to-all", None)
    assert [found[k] for k in ("asr", "asr_excl", "ra")] == [
        own[k] for k in ("asr", "asr_excl", "ra")
    ]


def test_a_wrong_option_is_told_before_a_trigger_is_optimised(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(attack_options, "make_attacks", lambda *_, **__: pytest.fail("too early"))
    common = ["--attack", "l2", "--out", tmp_path / "m.safetensors"]
    for name, value in (
        ("--preset", "x"),
        ("--epochs", 0),
        ("--poison-ratio", 2),
        ("--devices", 9),
    ):
        assert str(value) in refused(capsys, "train", name, value, *common)


@pytest.mark.parametrize(("rule", "expected"), [("add", "additive"), ("replace", "convex")])
def test_blend_is_convex_by_its_rule(capsys, digits_model, monkeypatch, rule, expected):
    measured = []
    monkeypatch.setattr(
        evaluate, "evaluator", lambda *given: measured.append(given[2]) or (lambda _: NOTHING)
    )
    run(capsys, "evaluate", "--model", digits_model, "--attack", "blend", "--trigger-rule", rule)
    ((attack,),) = measured
    black = np.zeros((1, 32, 32, 3), np.float32)
    for images in (black, black + 1):
        np.testing.assert_array_equal(attack.trigger(images), blend(rule=expected)(images))


def test_a_full_disk_is_told_in_one_line(capsys, defended, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    assert "No space left on device" in refused(capsys, "report", defended[0])


def test_evaluate_refuses_a_trigger_without_a_target(capsys, tmp_path):
    path = save_model(tmp_path / "m.safetensors", small_stored())
    Image.new("RGB", (32, 32)).save(tmp_path / "t.png")
    line = refused(capsys, "evaluate", "--model", path, "--trigger", tmp_path / "t.png")
    assert "--target" in line
    Image.new("RGB", (16, 16)).save(tmp_path / "t.png")
    line = refused(
        capsys, "evaluate", "--model", path, "--trigger", tmp_path / "t.png", "--target", 1
    )
    assert "(16, 16, 3): expected (32, 32, 3)" in line


def test_unknown_options_and_values_are_refused_in_one_line(capsys):
    for arguments in (
        ["train", "--epochs", "many", "--out", "m"],
        ["train", "--epoch", "3", "--out", "m"],
        ["train"],
        ["trian"],
    ):
        assert "--help" in refused(capsys, *arguments)


def test_help_names_every_command(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for name in ("demo", "train", "evaluate", "defend", "convert", "report", "prepare", "bound"):
        assert name in text


def test_help_knows_the_tables_and_takes_no_second():
    assert names.ATTACKS == tuple(ATTACKS) and names.DATASETS == tuple(DATASETS)
    assert names.DEFENSES == tuple(DEFENSES) and names.ARCHITECTURES == tuple(ARCHITECTURES)
    for arguments in (["--help"], ["defend", "--help"], ["defend", "--no-such-option"]):
        code = (
            f"from ibau_jax.commands.cli import main\ntry: main({arguments})\nexcept SystemExit: 0"
        )
        code += (
            "\nimport sys; sys.exit(len({'jax', 'optax', 'tensorflow', 'PIL'} & set(sys.modules)))"
        )
        assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


def test_bound_prints_every_term(capsys, digits_model):
    arguments = ["bound", "--model", digits_model, "--clean", "test[:20]", "--radius", "2"]
    status, out, err = run(capsys, *arguments, "--json")
    found = json.loads(out)
    assert status == 0 and "vacuous" in err
    terms = [found[k] for k in ("empirical_risk", "complexity", "confidence")]
    assert found["total"] == pytest.approx(sum(terms)) and found["vacuous"] is True
    assert found["n"] == 20 and 0 < found["delta_norm"] <= 2 + 1e-4
    assert [row["layer"] for row in found["layers"]][-1] == "classifier"
    assert "margin is 0.0" in refused(capsys, *arguments, "--margin", "0")


def test_report_of_nothing_is_refused(capsys, tmp_path):
    assert "no results" in refused(capsys, "report", tmp_path)
    (tmp_path / ROWS).write_text('{"round": 0')
    assert "damaged" in refused(capsys, "report", tmp_path)


def test_an_interrupted_run_leaves_earlier_results(digits_model, defended, tmp_path, monkeypatch):
    """Stopped after the first measurement: the rows, model and report of the run before stay.

    (And any defense is told before it starts which classes the clean set lacks.)
    """
    from ibau_jax import IBAUConfig

    out, _ = defended
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}

    @method(IBAUConfig())
    def stop(job):
        yield job.variables, {}
        raise KeyboardInterrupt

    found = Defense(stop, {}), "default", IBAUConfig()
    monkeypatch.setattr(defend, "find", lambda *_: found)
    notes = []
    with pytest.raises(KeyboardInterrupt):
        defend.defend(
            digits_model, clean="test[:7]", split="test[780:]", out=out, on_note=notes.append
        )
    assert "no image of 4 of the 10 classes (0, 3, 6, 9)" in notes[0]
    after = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    assert after.pop(out / PARTIAL)
    assert after == before
    os.remove(out / PARTIAL)
