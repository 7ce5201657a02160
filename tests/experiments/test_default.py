"""What tries the default: unseen models, and the changes of the ablation."""

import importlib
from pathlib import Path

import numpy as np
import pytest

from ibau_jax import IBAUConfig
from ibau_jax.defenses import hunt
from ibau_jax.hypergradient import Direct
from ibau_jax.unlearning import evidence

EXPERIMENTS = Path(__file__).parents[2] / "experiments"


@pytest.fixture
def unseen(monkeypatch):
    """The script as a module."""
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    return importlib.import_module("unseen")


@pytest.fixture
def targeted(monkeypatch):
    """The script as a module."""
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    return importlib.import_module("targeted")


def test_unseen_triggers_change_images_and_stay_what_they_are(unseen):
    image = np.full((1, *unseen.SHAPE), 0.4, np.float32)
    for name, one in unseen.MODELS.items():
        assert (one.trigger is None) == ("clean" in name)
        if one.trigger is None:
            continue
        draws = [np.random.default_rng(one.seed) for _ in range(2)]
        first, second = (np.asarray(one.trigger(draw)(image)) for draw in draws)
        np.testing.assert_array_equal(first, second)
        assert np.abs(first - image).max() > 0.1 and 0 <= one.target < 10
        if one.trigger in (unseen.patch, unseen.coloured):
            assert 4 <= (first != image).any(-1).sum() <= 25


def test_unseen_models_differ(unseen):
    seeds = [one.seed for one in unseen.MODELS.values()]
    assert len(set(seeds)) == len(seeds)
    assert len({one.target for one in unseen.MODELS.values()}) > 5


def test_changes_of_the_ablation(targeted):
    assert targeted.changed("") == IBAUConfig()
    assert targeted.changed("preset=untargeted") == IBAUConfig.untargeted()
    assert targeted.changed("solver=direct").solver == Direct()
    assert targeted.changed("rounds=3 share=0.2 pool=1").share == 0.2
    for change in targeted.ABLATION[1:]:
        changes = " ".join(change)
        before = evidence.LEVELS, evidence.GEOMETRIES, hunt.Hunt.look
        with targeted.mocked(changes):
            now = evidence.LEVELS, evidence.GEOMETRIES, hunt.Hunt.look
        assert targeted.changed(changes) != IBAUConfig() or now != before
        after = evidence.LEVELS, evidence.GEOMETRIES, hunt.Hunt.look
        assert after == before
    with pytest.raises(ValueError, match="no geometry"), targeted.mocked("without=7x7-window"):
        pass
