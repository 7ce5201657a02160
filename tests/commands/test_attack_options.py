"""Attacks from names and options; triggers that are optimised against a clean model."""

import jax
import numpy as np
import pytest
from conftest import random_variables

from ibau_jax import InputError, load
from ibau_jax.attacks import ATTACKS, Attack, Trigger, blend
from ibau_jax.commands import attack_options
from ibau_jax.commands.attack_options import attacks_on, make_attacks
from ibau_jax.models.architectures import build
from ibau_jax.models.files import save_model
from ibau_jax.models.model import evaluation_logits
from ibau_jax.models.stored import StoredModel


@pytest.fixture
def clean_model(tmp_path, monkeypatch):
    """A clean model file, and an empty cache."""
    monkeypatch.setenv("IBAU_CACHE", str(tmp_path / "cache"))
    return save_model(
        tmp_path / "clean.safetensors", StoredModel(random_variables(), "vgg", 10, "digits")
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
    model = StoredModel(random_variables(), "vgg", 10, "digits")
    images = np.asarray(load("digits", "test[:8]").images)
    with jax.default_matmul_precision("highest"):
        found = model.network.logits(images)
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
    changed = StoredModel(random_variables(seed=1), "vgg", 10, "digits")
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


OWN = Trigger("add", np.full((32, 32, 3), 0.1, np.float32))
STORED = Trigger("add", np.full((32, 32, 3), 0.2, np.float32))


def ask(**options):
    """Name and target of the attacks that options make for a training."""
    return [(a.name, a.target) for a in make_attacks("digits", **options)]


@pytest.mark.parametrize("file", [*ATTACKS, "none", "mine"])
def test_the_name_of_a_file_decides_nothing(file):
    own = {"trigger": OWN, "trigger_name": file}
    with pytest.raises(InputError, match=r"no file name decides: give it by --target \(0 to 9\)"):
        make_attacks("digits", **own)
    assert ask(**own, target=5) == [(file, 5)]
    assert ask(**own, scenario="all-to-all") == [(file, None)]
    (attack,) = make_attacks("digits", **own, scenario="all-to-all")
    np.testing.assert_array_equal(attack.wanted(np.array([0, 9])), [1, 0])
    # Who names an attack of the paper gets its target, whatever the file is called.
    assert ask(**own, attack="smooth") == [("smooth", 6)]
    assert ask(**own, attack="smooth", target=2) == [("smooth", 2)]
    with pytest.raises(InputError, match="give it by --target"):
        make_attacks("digits", **own, attack="other")
    with pytest.raises(InputError, match="leave out --trigger, --target"):
        make_attacks("digits", **own, attack="none")


def stored(*attacks: tuple[str, int | None]) -> StoredModel:
    made = tuple(Attack(name, STORED, target, 10) for name, target in attacks)
    return StoredModel({}, "vgg", 10, "digits", made)


ONE = stored(("l2", 3))
ALL = stored(("badnets", None))
MANY = stored(("l2", 3), ("smooth", 4))
TWINS = stored(("l2", 3), ("smooth", 3))
CLEAN = stored()
MINE = {"trigger": OWN, "trigger_name": "smooth"}


@pytest.mark.parametrize(
    ("model", "options", "expected"),
    [
        (ONE, {}, [("l2", 3, STORED)]),
        (ONE, {"attack": "l2"}, [("l2", 3, STORED)]),
        (ONE, {"attack": "l2", "target": 7}, [("l2", 7, STORED)]),
        (ONE, {"attack": "l2", "scenario": "all-to-all"}, [("l2", None, STORED)]),
        (ONE, {"attack": "l2", "trigger": OWN}, [("l2", 3, OWN)]),
        (ONE, {"attack": "badnets"}, [("badnets", 3, None)]),
        (ONE, {"attack": "none"}, []),
        (ONE, MINE, [("smooth", 3, OWN)]),
        (ONE, {**MINE, "target": 5}, [("smooth", 5, OWN)]),
        (ONE, {**MINE, "scenario": "one-target"}, [("smooth", 3, OWN)]),
        (ONE, {**MINE, "scenario": "all-to-all"}, [("smooth", None, OWN)]),
        (ALL, {}, [("badnets", None, STORED)]),
        (ALL, MINE, [("smooth", None, OWN)]),
        (ALL, {"attack": "badnets"}, [("badnets", None, STORED)]),
        (ALL, {"attack": "blend"}, [("blend", None, None)]),
        (ALL, {"attack": "badnets", "trigger": OWN}, [("badnets", None, OWN)]),
        (ALL, {**MINE, "target": 5}, [("smooth", 5, OWN)]),
        (ALL, {"attack": "blend", "scenario": "one-target"}, [("blend", 1, None)]),
        (MANY, {}, [("l2", 3, STORED), ("smooth", 4, STORED)]),
        (MANY, {"attack": "smooth"}, [("smooth", 4, STORED)]),
        (MANY, {"attack": "smooth", "trigger": OWN}, [("smooth", 4, OWN)]),
        (MANY, {**MINE, "target": 5}, [("smooth", 5, OWN)]),
        (TWINS, MINE, [("smooth", 3, OWN)]),
        (CLEAN, {}, []),
        (CLEAN, {"attack": "badnets"}, [("badnets", 8, None)]),
        (CLEAN, {"attack": "l2", "trigger": OWN}, [("l2", 0, OWN)]),
        (CLEAN, {**MINE, "target": 5}, [("smooth", 5, OWN)]),
        (CLEAN, {**MINE, "scenario": "all-to-all"}, [("smooth", None, OWN)]),
    ],
)
def test_a_model_keeps_its_own_label_rule(model, options, expected):
    found = attacks_on(model, "digits", **options)
    assert [(a.name, a.target) for a in found] == [(name, target) for name, target, _ in expected]
    for attack, (_, target, trigger) in zip(found, expected, strict=True):
        assert trigger is None or attack.trigger is trigger
        wanted = (np.arange(10) + 1) % 10 if target is None else np.full(10, target)
        np.testing.assert_array_equal(attack.wanted(np.arange(10)), wanted)


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (CLEAN, MINE, "give it by --target"),
        (ALL, {**MINE, "scenario": "one-target"}, "give it by --target"),
        (MANY, MINE, r"targets \[3, 4\]: say by --target .* by --attack: l2, smooth"),
        (MANY, {"attack": "badnets"}, r"targets \[3, 4\]: say by --target"),
        (ONE, {"attack": "smoth"}, "did you mean 'smooth'"),
        (ONE, {"attack": "smooth"}, "give its picture by --trigger"),
        (ONE, {"attack": "none", "target": 1}, "leave out --trigger, --target"),
        (ONE, {"attack": "none", "scenario": "all-to-all"}, "leave out .*--scenario"),
        (ONE, {"attack": "none", **MINE}, "leave out --trigger"),
        (ONE, {"attack": "l2", "target": 10}, "target 10 is not a class"),
        (ONE, {"attack": "l2", "rule": "add"}, "expected a picture, or --attack blend or smooth"),
        (ONE, {"attack": "l2", "scenario": "all-to-all", "target": 1}, "leave out --target"),
        (ONE, {"attack": "l2", "scenario": "seven-target"}, "expected one of one-target, all-to"),
        (ONE, {"target": 1}, "name the attack or the trigger too"),
        (ONE, {"scenario": "all-to-all"}, "name the attack or the trigger too"),
        (ONE, {"rule": "add"}, "name the attack or the trigger too"),
        (ONE, {"attack": "", **MINE}, "empty name"),
    ],
)
def test_what_does_not_fit_a_model_is_refused(model, options, message):
    with pytest.raises(InputError, match=message):
        attacks_on(model, "digits", **options)


def test_a_rule_is_used_on_the_trigger_of_the_model():
    own = Trigger("add", np.full((32, 32, 3), 0.15, np.float32))
    model = StoredModel(
        {}, "vgg", 10, "digits", (Attack("smooth", own, 2), Attack("blend", blend(), 3))
    )
    (smooth,) = attacks_on(model, "digits", "smooth", rule="renormalise")
    assert (smooth.target, smooth.trigger.rule) == (2, "renormalise")
    np.testing.assert_array_equal(smooth.trigger.pattern, own.pattern)
    (convex,) = attacks_on(model, "digits", "blend", rule="replace")
    images = np.random.default_rng(0).uniform(size=(2, 32, 32, 3)).astype(np.float32)
    np.testing.assert_array_equal(convex.trigger(images), blend(rule="convex")(images))
    (back,) = attacks_on(
        StoredModel({}, "vgg", 10, "digits", (convex,)), "digits", "blend", rule="add"
    )
    np.testing.assert_array_equal(back.trigger(images), blend()(images))


@pytest.mark.parametrize(
    "options",
    [
        {"attack": "badnets"},
        {"attack": "blend", "rule": "replace"},
        {"attack": "none"},
        {"scenario": "all-to-all"},
        {"trigger": OWN, "target": 3},
        {"trigger": OWN, "attack": "l2"},
    ],
)
def test_a_clean_model_is_refused_where_nothing_is_optimised(clean_model, options):
    with pytest.raises(InputError, match="--clean-model is for triggers that are optimised"):
        make_attacks("digits", **options, clean_model=clean_model)
