"""What stands out on a model, and what is said of it."""

import jax
import numpy as np
import pytest
from conftest import MODEL, SQUARE, clean, small_model

from ibau_jax import Dataset, InputError, inspect
from ibau_jax.unlearning.batches import UNTARGETED
from ibau_jax.unlearning.evidence import (
    ALIKE,
    GEOMETRIES,
    LEVELS,
    MISLED,
    NEAR,
    Evidence,
    Perturbation,
    alike,
    collect,
    looks,
    read_rule,
    rule,
)
from ibau_jax.unlearning.search import Found

KEY = jax.random.key(0)
DELTA = np.zeros((2, 2, 1), np.float32)


def evidence(strength=0.0, misled=0.0, same=1.0):
    table = np.zeros((len(LEVELS), 4))
    table[0, 2] = strength
    found = [Perturbation(DELTA, 2, s, g.name) for s, g in zip((0.5, 0.9), LEVELS, strict=False)]
    return Evidence(table, misled, same, np.zeros(4, np.int32), found)


@pytest.mark.parametrize(
    ("found", "verdict", "nearly", "said"),
    [
        (evidence(0.3), "clean", (), "nothing stands out; a 3x3 window leads 30%"),
        (evidence(0.55), "uncertain", (2,), "nothing stands out, but not by much; a 3x3 window"),
        (evidence(0.7), "backdoored", (), "a 3x3 window leads 70%"),
        (evidence(misled=0.9, same=0.1), "backdoored", (), "9 pixels lead 90%"),
        (evidence(misled=0.65, same=0.1), "uncertain", (UNTARGETED,), "nothing stands out, but"),
        (evidence(misled=0.65, same=0.9), "clean", (), "nothing stands out;"),
    ],
)
def test_verdict(found, verdict, nearly, said):
    assert (found.verdict, found.nearly) == (verdict, nearly)
    assert found.reason.startswith(said)
    assert ("label 2 (a target from 60% on)" in found.reason) == (found.strength.max() > 0)


def test_pictures_are_of_suspects_the_strongest_first():
    assert not evidence(0.3).pictures()
    found = evidence(0.7).pictures()
    assert [*found] == ["label 2: 5x5 window, 90%", "label 2: 3x3 window, 50%"]
    assert np.all(found["label 2: 3x3 window, 50%"] == 0.5)  # grey: it changes nothing


def test_alike():
    true = np.array([0, 0, 0, 1, 2])
    assert alike(true, true) == 0
    assert alike(np.array([1, 1, 2, 1, 0]), true) == 0.5


def test_the_rule_of_all_to_all_is_read():
    true = np.array([0, 0, 0, 1, 1, 2])
    given = np.array([1, 1, 2, 2, 1, 2])
    np.testing.assert_array_equal(read_rule(given, true, 4), [1, 2, UNTARGETED, UNTARGETED])


def test_an_untargeted_perturbation_that_leads_to_one_label_is_left_out():
    true = np.arange(10) % 5
    one, many = np.full(10, 3), (true + 1) % 5
    found = Found(
        np.zeros((2, 2, 2, 2, 1)),
        np.array([[0.8, 0.1], [0.8, 0.8]]),
        np.array([[one] * 2, [many] * 2]),
        true,
    )
    kept = collect(GEOMETRIES[:2], [3, UNTARGETED], found)
    assert [(p.label, p.geometry) for p in kept] == [
        (3, GEOMETRIES[0].name),
        (3, GEOMETRIES[1].name),
        (UNTARGETED, GEOMETRIES[1].name),
    ]


def test_the_rule_names_its_levels():
    for number in (*LEVELS.values(), MISLED, ALIKE, NEAR):
        assert f"{number:.0%}" in rule()


def test_inspect_names_the_target():
    data = clean()
    found = inspect(MODEL, small_model(0, True), data, key=KEY)
    assert SQUARE.target in found.suspects and found.verdict == "backdoored"
    assert found.strength.shape == (len(LEVELS), 10)
    assert f"label {SQUARE.target}" in " ".join(found.pictures())
    with pytest.raises(InputError, match="expected"):
        inspect(MODEL, small_model(0, True), Dataset(data.images[:1], data.labels[:1]), key=KEY)


def test_advance_is_called_for_each_ascent():
    assert looks(10) == 31
