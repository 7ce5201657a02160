"""What tries the default: unseen models, and the changes of the ablation."""

from dataclasses import replace
from functools import partial

import jax
import numpy as np
import pytest
from conftest import MODEL, SQUARE, clean, small_model

from ibau_jax import IBAUConfig, unlearn
from ibau_jax.defenses import hunt, pool
from ibau_jax.hypergradient import Direct
from ibau_jax.unlearning import evidence
from ibau_jax.unlearning.batches import UNTARGETED
from ibau_jax.unlearning.search import Search


@pytest.fixture
def unseen(script):
    return script("unseen")


@pytest.fixture
def race(script):
    return script("race")


@pytest.fixture
def targeted(script):
    return script("targeted")


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
    config = targeted.changed("rounds=3 share=0.2 pool=1")
    assert config.share == 0.2 and isinstance(config.rounds, int)

    def mocks():
        return evidence.LEVELS, evidence.GEOMETRIES, hunt.Hunt.look, pool.Pool.aims

    for change in targeted.ABLATION[1:]:
        changes = " ".join(change)
        before = mocks()
        with targeted.mocked(changes):
            now = mocks()
        assert targeted.changed(changes) != IBAUConfig() or now != before
        assert mocks() == before
    with pytest.raises(ValueError, match="no geometry"), targeted.mocked("without=7x7-window"):
        pass


def test_delta_that_is_not_aimed_leads_away(targeted, monkeypatch):
    """And what was found still carries the label that it leads to."""

    class Enough(Exception):
        pass

    seen = []
    aims = pool.Pool.aims

    def spy(self, number, targets):
        seen.append((tuple(targets), aims(self, number, targets)))
        raise Enough

    monkeypatch.setattr(pool.Pool, "aims", spy)
    monkeypatch.setattr(hunt, "Search", partial(Search, starts=60, steps=3, few=5))
    config = replace(IBAUConfig(), rounds=1, batch_size=50, microbatch=None)
    with targeted.mocked("aimed=no"), pytest.raises(Enough):
        unlearn(MODEL, small_model(0, True), clean(), config=config, key=jax.random.key(0))
    ((targets, (first, *_)),) = seen
    assert targets == () and (np.asarray(first.rule) == UNTARGETED).all()
    rules = np.asarray(first.rules)[: int(first.size)]
    assert len(rules) and (rules == SQUARE.target).all()


def test_a_race_looks_at_every_fifth_step(race):
    """And after each round, at what the model was then."""
    config = replace(
        IBAUConfig.untargeted(), rounds=2, batch_size=50, inner_steps=2, microbatch=None
    )
    run = unlearn.run(MODEL, small_model(0, True), clean(), config=config, key=jax.random.key(0))
    given = run.job.variables
    with race.copying(run.job) as copies:
        rounds = [record.params for record in run]
    steps = 2 * -(-len(clean().labels) // 50)
    assert len(copies.taken) == steps // race.EVERY > 1
    seconds = [second for second, _ in copies.taken]
    assert seconds == sorted(seconds) and seconds[0] > 0
    for _, variables in copies.taken:
        assert jax.tree.structure(variables) == jax.tree.structure(given)
    copied, ended = (jax.tree.leaves(tree) for tree in (copies.taken[-1][1], rounds[-1]))
    assert steps % race.EVERY or all(map(np.array_equal, copied, ended))


def test_a_race_is_won_with_the_accuracy_kept(race):
    row = {"acc_before": 0.8, "looks": [[1.0, 0.6, 0.1], [2.0, 0.75, 0.3], [3.0, 0.71, 0.19]]}
    assert race.effective(row) == 3.0
    assert race.effective({**row, "looks": row["looks"][:2]}) is None
