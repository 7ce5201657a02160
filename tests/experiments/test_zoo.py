"""The models in `experiments/zoo/`: their rows, and the statistics of their triggers (spec 2)."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from ibau_jax.attacks import ATTACKS, Trigger, badnets_square, drawing, scenario_of
from ibau_jax.commands.evaluate import evaluate_model
from ibau_jax.models.files import load_model

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
FILES = sorted((EXPERIMENTS / "zoo").glob("*.safetensors"))
ROWS = [
    json.loads(line) for line in (EXPERIMENTS / "results" / "zoo.jsonl").read_text().splitlines()
]


def check_badnets(trigger: Trigger):
    np.testing.assert_array_equal(trigger.pattern, badnets_square().pattern)


def check_blend(trigger: Trigger):
    assert np.linalg.norm(trigger.pattern) == pytest.approx(8.6, rel=0.1)
    assert 0.19 < trigger.pattern.max() <= 0.2 + 1e-6


def check_l0(trigger: Trigger):
    assert trigger.mask is not None and trigger.mask[31, 23:].all()
    assert trigger.mask[..., 0].sum() == 9 and set(np.unique(trigger.pattern)) <= {0, 1}


def check_l2(trigger: Trigger):
    assert 3.0 <= np.linalg.norm(trigger.pattern) <= 3.4 and trigger.pattern.max() <= 0.28
    assert (trigger.pattern > 0).mean() > 0.5
    # The published one has 28 to 38 %, white noise 20 %; ours 25 % on CIFAR-10, 63 % on GTSRB,
    # whose model looks at coarser things.
    assert 0.22 < drawing.statistics(trigger.pattern)["energy_radius_8"] < 0.7


def check_smooth(trigger: Trigger):
    """Published: norms 3.8 to 6.1, 98 % of the energy within a radius of 2."""
    assert trigger.pattern.min() == 0 and trigger.pattern.max() == pytest.approx(0.2)
    assert 3 <= np.linalg.norm(trigger.pattern) <= 7
    assert drawing.statistics(trigger.pattern)["energy_radius_2"] > 0.95


def check_trojan(trigger: Trigger, low: int, high: int):
    assert low <= (trigger.pattern > 0).any(-1).sum() <= high
    assert np.linalg.norm(trigger.pattern) == pytest.approx(8.7, rel=0.05)


CHECKS = {
    "badnets": check_badnets,
    "blend": check_blend,
    "l0": check_l0,
    "l2": check_l2,
    "smooth": check_smooth,
    "trojan-square": lambda trigger: check_trojan(trigger, 60, 64),
    "trojan-watermark": lambda trigger: check_trojan(trigger, 75, 90),
}


@pytest.fixture
def zoo(script):
    return script("zoo")


def test_each_model_has_its_row():
    assert {path.stem for path in FILES} == {row["model"] for row in ROWS}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_model_is_what_its_row_says(path):
    model = load_model(path)
    (row,) = [row for row in ROWS if row["model"] == path.stem]
    assert (model.dataset, scenario_of(model.attacks)) == (row["dataset"], row["scenario"])
    assert (model.hash, model.info["epochs"]) == (row["model_hash"], row["epochs"])
    assert (model.info["poison_ratio"], model.info["seed"]) == (row["poison_ratio"], row["seed"])
    assert model.info.get("copies", 1) == row.get("copies", 1)
    assert path.stat().st_size < 1e6
    for attack in model.attacks:
        assert isinstance(attack.trigger, Trigger)
        CHECKS[attack.name](attack.trigger)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["model"])
def test_a_row_is_of_what_the_zoo_names(row, zoo):
    """How good the models are is measured by `zoo.py`; its page says it beside the paper's."""
    (entry,) = [entry for entry in zoo.entries() if entry.name == row["model"]]
    assert row["dataset"] == entry.dataset
    if row["scenario"] is None:
        assert row["asr"] is None
        return
    assert row["poison_ratio"] == float(entry.options.get("--poison-ratio", 0.2))
    assert row.get("copies", 1) == int(entry.options.get("--copies", 1))
    if row["scenario"] == "all-to-all":
        assert row["target"] is None
        return
    if row["scenario"] == "seven-target":
        assert row["target"] == [info.seven_target for info in ATTACKS.values()]
        assert list(row["by_attack"]) == list(ATTACKS)
        assert row["asr"] == pytest.approx(np.mean(list(row["by_attack"].values())))
    else:
        assert row["attack"] == entry.options["--attack"]
        assert row["target"] == ATTACKS[row["attack"]].target


def test_figures_are_those_of_the_file():
    if not os.environ.get("TFDS_DATA_DIR"):
        pytest.skip("TFDS_DATA_DIR does not name a folder with prepared data sets")
    (row,) = [row for row in ROWS if row["model"] == "cifar10-l0"]
    found = evaluate_model(EXPERIMENTS / "zoo" / "cifar10-l0.safetensors")
    for figure in ("acc", "asr", "asr_excl", "ra"):
        assert found[figure] == pytest.approx(row[figure], abs=5e-4), figure  # other processors


def test_a_model_is_made_once_and_no_training_is_lost(zoo, tmp_path, monkeypatch):
    options = {"--attack": "badnets", "--target": "3", "--epochs": "1"}
    options["--architecture"] = "vgg-mini"
    entry = zoo.Entry("digits-badnets", "digits", options, "1", 85, 98)
    monkeypatch.setattr(zoo, "entries", lambda: [entry])
    monkeypatch.setattr(zoo, "FOLDER", tmp_path / "zoo")
    monkeypatch.setattr(zoo, "RESULTS", tmp_path / "zoo.jsonl")
    zoo.run(zoo.Run())
    (row,) = zoo.read(tmp_path / "zoo.jsonl")
    assert (row["model"], row["target"], row["epochs"]) == ("digits-badnets", 3, 1)
    kept = tmp_path / "zoo" / "digits-badnets.safetensors"
    unfinished = kept.parent / "unfinished"
    assert kept.is_file() and not list(unfinished.iterdir())

    # As if the training had ended, and the script too before it wrote the row.
    kept.rename(unfinished / kept.name)
    (unfinished / "digits-badnets.json").write_text(json.dumps(row))
    monkeypatch.setattr(zoo.subprocess, "run", lambda *_, **__: pytest.fail("trained again"))
    zoo.run(zoo.Run())
    zoo.run(zoo.Run())
    assert zoo.read(tmp_path / "zoo.jsonl") == [row] and kept.is_file()
    assert not list(unfinished.iterdir())
