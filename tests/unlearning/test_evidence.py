"""What stands out on a model, and what is said of it."""

from functools import partial

import jax
import numpy as np
import pytest
from conftest import MODEL, SQUARE, clean, small_model

from ibau_jax import Dataset, InputError, inspect
from ibau_jax.unlearning.batches import UNTARGETED
from ibau_jax.unlearning.evidence import (
    ALIKE,
    ALONG,
    AWAY,
    GEOMETRIES,
    LEVELS,
    MISLED,
    NEAR,
    ONE,
    Evidence,
    Perturbation,
    rule,
)
from ibau_jax.unlearning.look import alike, look, looks, read_rule, rest
from ibau_jax.unlearning.search import Found
from ibau_jax.unlearning.strength import rule_of, share

KEY = jax.random.key(0)
DELTA = np.zeros((2, 2, 1), np.float32)


def evidence(strength=0.0, misled=0.0, same=1.0, where=UNTARGETED):
    table = np.zeros((len(LEVELS), 4))
    table[0, 2] = strength
    found = [Perturbation(DELTA, 2, s, g.name) for s, g in zip((0.5, 0.9), LEVELS, strict=False)]
    return Evidence(table, misled, same, np.zeros(4, np.int32), found, where)


def test_what_misleads_most_images_to_one_label_names_it_where_no_search_does():
    found = evidence(0.55, 0.9, 0.9, where=3)
    assert found.suspects == (3,) and found.target == 3 and found.by_away
    assert found.nearest == pytest.approx(0.81 / ONE)
    reached = evidence(0.7, 0.9, 0.9, where=3)
    assert reached.suspects == (2,) and not reached.by_away
    assert not evidence(misled=0.9, same=0.1).by_away and not evidence(0.3).by_away


@pytest.mark.parametrize(
    ("found", "verdict", "nearly", "said"),
    [
        (evidence(0.3), "clean", (), "nothing stands out; a 3x3 window leads 30%"),
        (evidence(0.55), "uncertain", (2,), "nothing stands out, but not by much; a 3x3 window"),
        (evidence(0.55, 0.9, 0.5, where=2), "uncertain", (2,), "nothing stands out, but not by"),
        (evidence(0.55, 0.9, 0.9, where=3), "backdoored", (), "9 pixels lead 81% of all images to"),
        (evidence(0.0, 0.9, 0.9, where=2), "backdoored", (), "9 pixels lead 81% of all images to"),
        (evidence(0.5, 0.9, 0.5, where=2), "clean", (), "nothing stands out; a 3x3 window leads"),
        (evidence(0.7), "backdoored", (), "a 3x3 window leads 70%"),
        (evidence(misled=0.9, same=0.1), "backdoored", (), "9 pixels lead 90%"),
        (evidence(misled=0.65, same=0.1), "uncertain", (UNTARGETED,), "nothing stands out, but"),
        (evidence(0.5, 0.65, 0.9, where=3), "uncertain", (3,), "nothing stands out, but not by"),
        (evidence(misled=0.5, same=0.9, where=3), "clean", (), "nothing stands out;"),
    ],
)
def test_verdict(found, verdict, nearly, said):
    assert (found.verdict, found.nearly) == (verdict, nearly)
    assert found.reason.startswith(said)
    named = found.where if found.by_away else 2
    expected = found.strength.max() > 0 or found.by_away
    assert (f"label {named} (a target from 60% on)" in found.reason) == expected
    assert ("81% of all images" in found.reason) == found.by_away


def test_pictures_are_of_suspects_the_strongest_first():
    assert not evidence(0.3).pictures()
    found = evidence(0.7).pictures()
    assert [*found] == ["label 2: 5x5 window, 90%", "label 2: 3x3 window, 50%"]
    assert np.all(found["label 2: 3x3 window, 50%"] == 0.5)  # grey: it changes nothing


def test_alike():
    true = np.array([0, 0, 0, 1, 2])
    assert alike(true, true) == (UNTARGETED, 0)
    assert alike(np.array([1, 1, 2, 1, 0]), true) == (1, 0.5)


def test_the_rule_of_all_to_all_is_read():
    true = np.array([0, 0, 0, 1, 1, 2])
    given = np.array([1, 1, 2, 2, 1, 2])
    np.testing.assert_array_equal(read_rule(given, true, 4), [1, 2, UNTARGETED, UNTARGETED])


class Fake:
    """A search that finds what leads half of all images along what it is asked for."""

    geometries = GEOMETRIES
    every = 2
    true = np.arange(40) % 5

    def __init__(self, rule):
        self.rule = rule

    def __call__(self, params, clean, labels, *, among=None, **kwargs):
        shape = len(among or self.geometries), len(labels)
        hit = np.where(np.arange(40) % self.every == 0, self.rule[self.true], self.true)
        strength = [share(hit, self.true, rule_of(label, 5)[self.true]) for label in labels]
        given = np.broadcast_to(hit, (*shape, 40))
        deltas = np.zeros((*shape, 2, 2, 1), np.float32)
        return Found(deltas, np.broadcast_to(strength, shape), given, self.true)


def test_an_untargeted_perturbation_that_leads_to_one_label_is_left_out():
    for leads, kept in ((np.full(5, 3), [3] * len(LEVELS)), ((np.arange(5) + 1) % 5, [-1])):
        found = look(Fake(leads), {}, clean(), 5, key=KEY)
        assert found.misled >= 0.4 and [one.label for one in found.found] == kept


def test_what_is_left_of_all_to_all_is_sought_along_its_rule():
    """Classes that the rule says nothing of do not count."""
    rule = np.array([1, 2, 3, 4, UNTARGETED])
    along = Evidence(np.zeros((len(LEVELS), 5)), 1.0, 0.0, rule, []).along
    for leads, most in (([1, 2, 3, 4, 0], 0.5), ([1, 2, 3, 4, 4], 0.5), ([1, 2, 0, 0, 0], 0.25)):
        left, found = rest(Fake(np.array(leads)), {}, clean(), [UNTARGETED], along=along, key=KEY)
        assert left == {UNTARGETED: pytest.approx(most / ALONG)}
        assert {one.label for one in found} == {UNTARGETED} and len(found) == len(GEOMETRIES)
    left, found = rest(Fake(np.full(5, 2)), {}, clean(), [2, 3], along=along, key=KEY)
    assert left == {2: pytest.approx(0.5 / min(LEVELS.values())), 3: 0}
    assert {one.label for one in found} == {2} and len(found) == len(LEVELS)


def test_a_target_that_no_search_towards_it_named_is_sought_as_it_was_found():
    class Away(Fake):
        """Finds nothing but away from the true labels."""

        every = 1

        def __call__(self, params, clean, labels, *, among=None, **kwargs):
            found = super().__call__(params, clean, labels, among=among, **kwargs)
            return found if among == [AWAY] else found._replace(strength=0 * found.strength)

    search = Away(np.full(5, 3))
    found = look(search, {}, clean(), 5, key=KEY)
    assert (found.target, found.by_away, found.lead) == (3, True, 0.8)
    assert [(one.label, one.geometry) for one in found.found] == [(3, AWAY.name)]
    call = partial(rest, search, {}, clean(), [3], along=found.along, key=KEY)
    left, fresh = call(by_away=True)
    assert left == {3: pytest.approx(0.8 / ONE)} and fresh[0].geometry == AWAY.name
    assert call() == ({3: 0.0}, [])
    search.every = 2  # half of the images: .4 of all
    assert not look(search, {}, clean(), 5, key=KEY).by_away
    search.every = 40  # what is left is worth nothing
    assert call(by_away=True) == ({3: 0.0}, [])


def test_the_rule_names_its_levels():
    for number in (*LEVELS.values(), MISLED, ALIKE, NEAR, ONE):
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
    assert looks(10) == 41
