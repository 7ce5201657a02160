"""Figures of the paper, at smoke scale."""

import shutil

import numpy as np
import pytest
from conftest import random_variables
from PIL import Image

from ibau_jax import InputError
from ibau_jax.attacks import ATTACKS, Trigger, make_attack
from ibau_jax.commands.cli import main
from ibau_jax.commands.reproduce import reproduce
from ibau_jax.models.files import save_model
from ibau_jax.models.stored import StoredModel


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder, variables = tmp_path_factory.mktemp("models"), random_variables()
    for i, name in enumerate(ATTACKS):
        trigger = Trigger("add", np.full((32, 32, 3), i / 10, np.float32))
        attack = make_attack(name, 10, trigger=trigger)
        model = StoredModel(variables, "vgg", 10, "digits", (attack,))
        save_model(folder / f"digits-{name}.safetensors", model)
    return folder


def test_figure2(models, tmp_path, capsys):
    command = ["reproduce", "figure2", "--models", str(models), "--scale", "smoke"]
    assert main([*command, "--out", str(tmp_path / "new")]) == 0
    assert "figure2.png" in capsys.readouterr().out
    with Image.open(tmp_path / "new" / "figure2.png") as picture:
        assert picture.width > 1000 and np.asarray(picture).std() > 10


def test_missing_models_are_told(models, tmp_path):
    with pytest.raises(InputError, match="zoo.py run"):
        reproduce("figure2", tmp_path, "smoke", tmp_path, 0, None)
    for name in ATTACKS:
        shutil.copy(models / "digits-l2.safetensors", tmp_path / f"digits-{name}.safetensors")
    with pytest.raises(InputError, match=r"attacks \['l2'\]: expected digits and \['badnets'\]"):
        reproduce("figure2", tmp_path, "smoke", tmp_path, 0, None)
    with pytest.raises(InputError, match="did you mean 'figure2'"):
        reproduce("figure22", models, "smoke", tmp_path, 0, None)
