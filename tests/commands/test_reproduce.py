"""Figures of the paper, at smoke scale."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import small_stored
from PIL import Image

from ibau_jax import InputError
from ibau_jax.attacks import ATTACKS, Trigger, make_attack
from ibau_jax.commands.cli import main
from ibau_jax.commands.reproduce import module
from ibau_jax.models.files import load_model, save_model


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder, attacks = tmp_path_factory.mktemp("models"), []
    for i, name in enumerate(ATTACKS):
        trigger = Trigger("add", np.full((32, 32, 3), i / 10, np.float32))
        attacks.append(make_attack(name, 10, trigger=trigger))
        save_model(folder / f"digits-{name}.safetensors", small_stored((attacks[-1],)))
    for name, listed in {"all-to-all": attacks[:1], "seven-target": attacks}.items():
        save_model(folder / f"digits-{name}.safetensors", small_stored(tuple(listed)))
    return folder


def test_figure2(models, tmp_path, capsys):
    command = ["reproduce", "figure2", "--models", str(models), "--scale", "smoke"]
    assert main([*command, "--out", str(tmp_path / "new")]) == 0
    assert "figure2.png" in capsys.readouterr().out
    with Image.open(tmp_path / "new" / "figure2.png") as picture:
        assert picture.width > 1000 and np.asarray(picture).std() > 10


def figure2(models, tmp_path, name="figure2"):
    return module().reproduce(name, models=models, scale="smoke", out=tmp_path)


def test_missing_models_are_told(models, tmp_path):
    with pytest.raises(InputError, match="zoo.py run"):
        figure2(tmp_path, tmp_path)
    for name in ATTACKS:
        shutil.copy(models / "digits-l2.safetensors", tmp_path / f"digits-{name}.safetensors")
    with pytest.raises(InputError, match=r"attacks \['l2'\]: expected digits and \['badnets'\]"):
        figure2(tmp_path, tmp_path)
    with pytest.raises(InputError, match="did you mean 'figure2'"):
        figure2(models, tmp_path, "figure22")


# The quick ones; what the others do is tested with the defenses.
QUICK = {
    **dict.fromkeys(("figure1", "figure4", "figure5"), "ibau-published"),
    **dict.fromkeys(("table1", "table2", "table3", "table4", "table5"), "finetune"),
    **{"table6": "fine-pruning", "figure3": "none"},
}


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """The folder of the rows: tables share their cells."""
    return tmp_path_factory.mktemp("smoke")


@pytest.mark.parametrize("name", QUICK)
def test_each_name_at_smoke(models, rows, name, capsys):
    command = ["reproduce", name, "--scale", "smoke", "--models", str(models), "--json"]
    assert main([*command, "--methods", QUICK[name], "--run", "--out", str(rows)]) == 0
    ran = json.loads(capsys.readouterr().out)
    there = {path: path.read_bytes() for path in (rows / "smoke").glob("*.jsonl")}
    assert main([*command, "--out", str(rows)]) == 0  # measures nothing
    assert json.loads(capsys.readouterr().out) == ran
    assert there == {path: path.read_bytes() for path in (rows / "smoke").glob("*.jsonl")}
    if name.startswith("figure"):
        with Image.open(ran["file"]) as picture:
            assert picture.width > 400 and np.asarray(picture).std() > 10
    else:
        states = [cell["status"] for cell in ran["cells"]]
        assert "run" in states and "not run" in states
        assert Path(ran["file"]).read_text().count("\n") > 4


def test_a_figure_without_rows_says_what_to_do(tmp_path, capsys):
    command = ["reproduce", "figure4", "--scale", "smoke", "--out", str(tmp_path)]
    assert main(command) == 2
    assert "--run" in capsys.readouterr().err


def test_stand_ins_are_trained_where_they_are_missing(script, models, tmp_path):
    measure, cells = script("measure"), script("cells")
    assert measure.stand_in("gtsrb-l0", "digits", models) == "digits-l0"
    assert measure.stand_in("cifar10-trojan-watermark-0.05", "digits", models) == "digits-badnets"
    names = [cell.model for name in ("table1", "table3") for cell in cells.GRIDS[name]]
    measure.train_stand_ins(names, "digits", models)  # all are there
    measure.train_stand_ins(["cifar10-seven-target"], "digits", tmp_path, epochs=1)
    (path,) = tmp_path.glob("*.safetensors")
    stored = load_model(path)
    assert path.stem == "digits-seven-target" and len(stored.attacks) == 2
    assert len({attack.target for attack in stored.attacks}) == 2
