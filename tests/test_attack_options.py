"""Attacks from names and options; triggers that are optimised against a clean model."""

import jax
import numpy as np
import pytest
from conftest import random_variables

from ibau_jax import InputError, attack_options, load
from ibau_jax.attack_options import make_attacks, network_of
from ibau_jax.attacks import ATTACKS, Trigger
from ibau_jax.checkpoint import Model, save_model
from ibau_jax.models import build, evaluation_logits


@pytest.fixture
def clean_model(tmp_path, monkeypatch):
    """A clean model file, and an empty cache."""
    monkeypatch.setenv("IBAU_CACHE", str(tmp_path / "cache"))
    return save_model(
        tmp_path / "clean.safetensors", Model(random_variables(), "vgg", 10, "digits")
    )


@pytest.fixture
def made(monkeypatch):
    """In place of the optimisation; what it was called with."""
    calls = []

    def make(name, network, images, seed, target):
        calls.append((name, target, seed))
        pattern = np.full((32, 32, 3), len(calls) / 20, np.float32)
        mask = np.ones_like(pattern)
        return Trigger("replace", pattern, mask) if name == "l0" else Trigger("add", pattern)

    original = attack_options.make_trigger
    monkeypatch.setattr(
        attack_options,
        "make_trigger",
        lambda name, *more: make(name, *more) if more else original(name),
    )
    return calls


def test_the_network_is_the_model():
    model = Model(random_variables(), "vgg", 10, "digits")
    images = np.asarray(load("digits", "test[:8]").images)
    with jax.default_matmul_precision("highest"):
        found = network_of(model).logits(images)
        expected = evaluation_logits(build("vgg", 10), model.variables)(
            model.variables["params"], images
        )
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_an_optimised_trigger_is_kept(clean_model, made):
    (one,) = make_attacks("digits", "l0", clean_model=clean_model)
    (again,) = make_attacks("digits", "l0", clean_model=clean_model, target=ATTACKS["l0"].target)
    assert made == [("l0", 0, 0)], "the second is from the cache"
    for name in ("rule", "pattern", "mask"):
        np.testing.assert_array_equal(getattr(again.trigger, name), getattr(one.trigger, name))
    (other,) = make_attacks("digits", "l0", clean_model=clean_model, target=3)
    make_attacks("digits", "l0", clean_model=clean_model, seed=1)
    assert made[1:] == [("l0", 3, 0), ("l0", 0, 1)] and other.target == 3
    changed = Model(random_variables(seed=1), "vgg", 10, "digits")
    make_attacks("digits", "l0", clean_model=save_model(clean_model, changed))
    assert len(made) == 4, "another model, another trigger"


def test_the_smooth_trigger_can_renormalise(clean_model, made):
    (added,) = make_attacks("digits", "smooth", clean_model=clean_model)
    (other,) = make_attacks("digits", "smooth", clean_model=clean_model, rule="renormalise")
    assert (added.trigger.rule, other.trigger.rule) == ("add", "renormalise")
    np.testing.assert_array_equal(added.trigger.pattern, other.trigger.pattern)
    assert len(made) == 1, "optimised once"
    with pytest.raises(InputError, match="a trigger has its own rule"):
        make_attacks("digits", "mine", target=3, trigger=added.trigger, rule="add")


def test_seven_targets_have_the_papers_triggers_and_their_own_targets(clean_model, made):
    attacks = make_attacks("digits", scenario="seven-target", clean_model=clean_model)
    assert [attack.name for attack in attacks] == list(ATTACKS)
    assert [attack.target for attack in attacks] == [0, 3, 4, 5, 1, 2, 9]  # Table 3
    # The same triggers as in the scenario one-target: made for its targets.
    assert [(name, target) for name, target, _ in made] == [
        (name, info.target) for name, info in ATTACKS.items() if info.optimise
    ]


def test_a_model_that_is_not_clean_or_of_other_data_is_refused(clean_model, digits_model):
    with pytest.raises(InputError, match="a model of digits .badnets.: expected a clean model"):
        make_attacks("digits", "l2", clean_model=digits_model)
    with pytest.raises(InputError, match="a model of digits .clean.: expected a clean .* cifar10"):
        make_attacks("cifar10", "l2", clean_model=clean_model)
