"""The search in I-BAU: what it searches for, how far it goes, and what it says in the end."""

import re
import subprocess
import sys
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import MODEL, SQUARE, clean, measure, on_devices, small_model

from ibau_jax import Dataset, IBAUConfig, InputError, load, unlearn
from ibau_jax.defenses import hunt, pool
from ibau_jax.defenses.guard import bearable, roll_back
from ibau_jax.defenses.hunt import Hunt
from ibau_jax.defenses.run import Job
from ibau_jax.defenses.verdict import verdict_of
from ibau_jax.devices.mesh import devices
from ibau_jax.models.model import opened
from ibau_jax.unlearning.batches import UNTARGETED
from ibau_jax.unlearning.evidence import LEVELS, Evidence, Perturbation
from ibau_jax.unlearning.objective import cross_entropy
from ibau_jax.unlearning.search import Search

KEY = jax.random.key(0)
QUICK = replace(IBAUConfig(), rounds=6, batch_size=40, inner_steps=5, microbatch=None)


@pytest.fixture(autouse=True)
def short_searches(monkeypatch):
    shorten(monkeypatch.setattr)


def shorten(change):
    change(hunt, "Search", partial(Search, starts=60, steps=3, few=5))


@pytest.mark.parametrize(("least", "share"), [(0.2, 1.0), (0.75, 0.5), (2.0, 0.0)])
def test_roll_back_goes_as_far_as_it_may(least, share):
    given, params = {"w": np.ones(3)}, {"w": np.full(3, 0.5)}
    kept, found = roll_back(lambda p: p["w"].mean() >= least, given, params)
    assert found == share
    np.testing.assert_allclose(kept["w"], 1 - 0.5 * share)


@pytest.mark.parametrize(
    ("lost", "won", "budget", "bears"),
    [
        (10, 0, 0.1, True),
        (13, 0, 0.1, True),  # the error is .036
        (14, 0, 0.1, False),
        (40, 30, 0.02, True),  # .08 of error
        (40, 29, 0.02, False),
        (1, 1, None, True),
        (1, 0, None, False),
    ],
)
def test_of_accuracy_no_more_is_lost_than_the_budget_beyond_doubt(lost, won, budget, bears):
    before, after = np.ones(100, bool), np.ones(100, bool)
    after[:lost] = before[lost : lost + won] = False
    assert bearable({"after": after}.__getitem__, before, "after", budget) == bears


@pytest.mark.parametrize(
    ("strength", "suspects", "left", "undone", "kept", "verdict", "told"),
    [
        (0.0, [], {}, [], 1, "was-clean", "nothing stands out"),
        (0.9, [1], {1: 0.3}, [], 1, "cleaned", "; now a fresh search comes to 0.30"),
        (0.9, [1], {1: 0.9}, [], 1, "not-cleaned", "still comes to 0.90 .* towards label 1"),
        (0.9, [1, 4], {1: 0.1, 4: 1.1}, [4], 1, "not-cleaned", "label 4; to unlearn label 4 too"),
        (0.9, [1, 4, 5], {1: 0.1, 4: 0.2}, [4, 5], 1, "cleaned", "to unlearn labels 4, 5 too"),
        (0.9, [1], {1: 0.1}, [], 0.5, "cleaned", "; only 50% of the way was gone"),
        (0.53, [1], {1: 0.1}, [], 1, "was-clean", "not by much; .*; what comes near was unlearned"),
        (
            0.53,
            [1],
            {1: 0.9},
            [],
            0,
            "was-clean",
            "%\\); another search comes to 0.90 .*; the model is as",
        ),
        (0.53, [1], {1: 1.1}, [], 0, "not-cleaned", "another search comes to 1.10 "),
        (
            0.0,
            [UNTARGETED],
            {UNTARGETED: 1.2},
            [],
            1,
            "not-cleaned",
            "still leads 24% of .* rule",
        ),
        (0.0, [UNTARGETED], {UNTARGETED: 0.3}, [], 1, "cleaned", "now .* leads 6% of the images"),
    ],
)
def test_how_it_ended_is_told(strength, suspects, left, undone, kept, verdict, told):
    strengths = np.zeros((len(LEVELS), 10))
    strengths[0, 1] = strength
    many = UNTARGETED in suspects
    evidence = Evidence(strengths, 0.9 * many, 1.0 - many, np.zeros(10, np.int32), [])
    found, reason = verdict_of(evidence, suspects, left, undone, kept)
    assert found == verdict and re.search(told, reason), reason


@pytest.mark.parametrize(("count", "held"), [(100, 20), (1000, 200), (1500, 200), (5000, 500)])
def test_of_few_images_more_are_held_back(count, held):
    assert IBAUConfig().held(count) == held and IBAUConfig.untargeted().held(count) == 0


def test_it_removes_a_backdoor_and_says_so():
    found = unlearn(MODEL, small_model(0, True), clean(), config=QUICK, key=KEY)
    before, after = measure(small_model(0, True)), measure(found.params)
    told = found.diagnostics
    assert before["asr_excl"] > 0.9 and after["asr_excl"] < 0.2
    assert after["acc"] > before["acc"] - 0.05
    assert SQUARE.target in told["flagged"] and told["searched"] > 0
    assert told["verdict"] == "cleaned" and "now a fresh search" in told["reason"]
    assert any(name.startswith(f"label {SQUARE.target}: ") for name in found.found)
    assert len(found.history) == 6 and 0.8 < found.history[-1]["held_acc"] <= 1


def test_a_budget_of_nothing_goes_back():
    """With a rate that destroys the model hardly anything of the way is gone."""
    wild = replace(QUICK, outer_optimizer=optax.adam(0.1), budget=0.0)
    found = unlearn(MODEL, small_model(0, True), clean(), config=wild, key=KEY)
    kept, reason = (found.diagnostics[name] for name in ("kept", "reason"))
    assert kept <= 0.3
    assert (f"only {kept:.0%} of the way was gone" if kept else "is as given") in reason
    assert measure(found.params)["acc"] > measure(small_model(0, True))["acc"] - 0.1


@pytest.mark.parametrize(
    ("late", "left", "flagged", "verdict"),
    [
        (0.3, [(0.3, 0.2)], [1], "cleaned"),  # label 0 fell with label 1
        (0.3, [(1.2, 0.2), (0.3, 0.2)], [1], "cleaned"),  # once more
        (0.3, [(0.3, 1.1), (0.3, 0.2)], [1, 0], "cleaned"),  # and what was unlearned with it
        (0.5, [(0.3, 0.2), (0.3, 0.2)], [1, 0], "cleaned"),  # it may stand
        (0.9, [(0.3, 0.2), (0.3, 0.2)], [1, 0], "cleaned"),  # it stood for long
        (0.9, [(1.2, 0.2), (0.3, 0.2)], [1, 0], "cleaned"),
        (0.9, [(1.2, 0.2), (1.2, 0.2)], [1, 0], "not-cleaned"),
    ],
)
def test_what_is_left_of_the_suspects_is_the_matter_of_the_next_stage(
    monkeypatch, late, left, flagged, verdict
):
    strength = np.zeros((len(LEVELS), 10))
    strength[:, 1], strength[0, 0] = 0.8, 0.9  # label 0 is stronger, but by one geometry only
    window = Perturbation(np.full((16, 16, 1), 0.5, np.float32), 0, 0.9, "3x3 window")
    evidence = Evidence(strength, 0.0, 1.0, np.zeros(10, np.int32), [window])

    class Fake:
        """A search of a model that gives label 0 to so many images, late on the way."""

        def warm(self, *args):
            pass

        def label(self, params, images):
            first = jax.tree.leaves(params["params"])[0]
            if first is given[0] or not np.any(first):  # at both ends all perturbations lead to 0
                return np.zeros(len(images), int)
            np.testing.assert_allclose(first, 0.3 * given[0], rtol=1e-5)
            return np.where(np.arange(len(images)) % 10 < 10 * late, 0, 5)

        def drawn(self, params, clean, labels, geometry, *, key, starts, best):
            at_given = jax.tree.leaves(params["params"])[0] is given[0]
            assert geometry == pool.SQUARE and len(labels) > 1 and at_given == (late > 0.4)
            return np.zeros((len(labels), best, 16, 16, 1))

    scores = iter([*left, left[-1]])
    monkeypatch.setattr(hunt, "Search", lambda *args, **kwargs: Fake())
    monkeypatch.setattr(hunt, "look", lambda *args, **kwargs: evidence)
    fresh = Perturbation(window.delta, 1, 0.9, "5x5 window")
    monkeypatch.setattr(
        hunt, "rest", lambda *a, **k: (dict(zip([1, 0], next(scores), strict=True)), [fresh])
    )
    model, variables = opened(MODEL, small_model(0, True))
    job = Job(model, variables, clean(), QUICK, KEY, devices(1), 10)
    given = jax.tree.leaves(variables["params"])
    end = jax.tree.map(lambda a: 0 * a, variables["params"])
    costs = []  # parameters that are right on no image

    def right(params):
        return np.full(9, not any(params is one for one in costs))

    at = Hunt(job, job.clean, replace(QUICK, stages=2), 5, right)
    at.look(variables["params"])
    assert at.targets == (1,)
    for stage in range(len(left)):
        assert at.goes_on(end) == (stage < len(left) - 1)
        if not stage and len(left) == 2:  # what goes on is what still stands, and the others
            assert at.targets == ((1, 0) if late > 0.4 or left[0][1] >= 1 else (1,))
            assert at.anew == (late > 0.4)
    last = jax.tree.map(np.copy, end)
    assert at.settled(last) is last  # it cost no accuracy
    told = at.told(end, 1.0)
    assert told["suspects"] == [1, 0] and told["flagged"] == flagged
    assert told["stages"] == len(left) and told["verdict"] == verdict
    # Once, however many stages, and what a fresh search found for a target that still stands. Of
    # several targets squares too, and of all what leads to its label.
    again, several = len(left) == 2 and 1 in at.targets, len(at.targets) > 1
    found = [one.label for one in at.pool.found]
    assert found.count(0) == (0 in flagged) and found.count(1) == again
    kept = [one.label for one in at.pool.members]
    assert sorted(kept) == ([0] * (1 + pool.SQUARES) if several else sorted(found))
    before = len(at.pool.members)
    deltas = [np.full((16, 16, 1), i, np.float32) for i in range(len(at.aims(0)))]
    at.met(deltas)
    new = at.pool.members[before:]
    assert [one.label for one in new] == (at.pool.led if several else [])
    assert all(one.delta is delta for one, delta in zip(new, deltas, strict=False))
    # Where it cost accuracy, the second stage is taken back, unless something was left of the
    # first target.
    costs.append(last)
    settled = at.settled(last)
    back = flagged == [1, 0] and left[0][0] < 1
    assert settled is (end if back else last)
    told = at.told(settled, 1.0)
    assert ("to unlearn label 0 too cost accuracy" in told["reason"]) == back
    assert told["flagged"] == ([1] if back else flagged)


def test_of_all_to_all_what_leads_along_its_rule_is_in_the_pool(monkeypatch):
    """Squares too, and what leads there no more is not; classes without a rule do not count."""
    data = clean()
    rule = np.array([*range(1, 10), UNTARGETED])
    away = Perturbation(np.full((16, 16, 1), 0.5, np.float32), UNTARGETED, 0.9, "9 pixels")
    evidence = Evidence(np.zeros((len(LEVELS), 10)), 0.9, 0.1, rule, [away])
    along = [*range(1, 10), 9]

    class Fake:
        """A search of a model that leads the images of the first 7 classes along the rule."""

        left = 7

        def warm(self, *args):
            pass

        def label(self, params, images):
            true = data.labels[: len(images)]
            return np.where(true < self.left, (true + 1) % 10, 0)

        def drawn(self, params, clean, labels, geometry, *, starts, best, **kwargs):
            assert geometry == pool.SQUARE and starts == pool.STARTS
            np.testing.assert_array_equal(labels, [along])
            return np.zeros((1, best, 16, 16, 1))

    def rest(*args, along, starts, **kwargs):
        np.testing.assert_array_equal(along, evidence.along)
        assert starts == pool.STARTS
        return {UNTARGETED: 0.9}, [away._replace(geometry="along")]

    search = Fake()
    monkeypatch.setattr(hunt, "Search", lambda *args, **kwargs: search)
    monkeypatch.setattr(hunt, "look", lambda *args, **kwargs: evidence)
    monkeypatch.setattr(hunt, "rest", rest)
    model, variables = opened(MODEL, small_model(0, True))
    job = Job(model, variables, data, QUICK, KEY, devices(1), 10)
    at = Hunt(job, data, QUICK, 5)
    at.look(variables["params"])
    squares = [pool.SQUARE.name] * pool.SQUARES
    assert [one.geometry for one in at.pool.members] == ["9 pixels", "along", *squares]
    true = data.labels[:100]
    expected = np.mean(true[true < 9] < 7)
    assert 0.5 < expected < 1
    assert [one.strength for one in at.pool.members] == [pytest.approx(expected)] * len(
        at.pool.members
    )
    aim = at.aims(0)[0]
    np.testing.assert_array_equal(aim.rule, rule)  # the rounds lead away where no rule is known
    assert aim.times == pool.SHARES
    at.met([away.delta] * len(at.pool.led))
    assert [one.geometry for one in at.pool.members][-len(at.pool.led) :] == ["delta"] * len(
        at.pool.led
    )
    search.left = 0  # all is unlearned
    at.between(variables["params"])
    assert at.pool.members == []


@pytest.mark.parametrize(
    ("late", "lost", "goes_on"),
    [(hunt.SUSPECTED, 2, True), (hunt.SUSPECTED, 14, True), (hunt.SUSPECTED, 15, False)]
    + [(0.5, 1, True), (0.5, 2, False)],
)
def test_a_stage_that_costs_too_much_is_the_last(monkeypatch, late, lost, goes_on):
    """Of three. Two labels more may cost a point for each level that they came to late, together.

    Beside it three standard errors, of 300 images, but none in the end. Where nothing was left,
    they may cost one error and no more, then and in the end.
    """
    none = Evidence(np.zeros((len(LEVELS), 10)), 0.0, 1.0, np.zeros(10, np.int32), [])
    monkeypatch.setattr(Hunt, "_score", lambda self, params: [])
    monkeypatch.setattr(Hunt, "_refresh", lambda self, params: None)
    monkeypatch.setattr(Hunt, "_look_late", lambda self, params: None)
    model, variables = opened(MODEL, small_model(0, True))
    job = Job(model, variables, clean(), QUICK, KEY, devices(1), 10)
    first, second = {"lost": 0}, {"lost": lost}
    at = Hunt(job, job.clean, QUICK, 5, lambda params: np.arange(300) >= params["lost"])
    at.evidence, at.late, at.left = none, {0: late, 2: 0.4}, {1: 0.0, 0: 1.0, 2: 1.0}
    at.pool = pool.Pool(at.search, job, job.clean, QUICK, 5, suspects=3, evidence=none)
    at._unlearn((1,))
    assert at.goes_on(first) and at.targets == (1, 0, 2)
    assert at.goes_on(second) == goes_on
    assert at.settled(second) is (second if lost == (1 if late == 0.5 else 2) else first)
    # Nothing stood out, so nothing may be lost; where something did, more by several targets.
    assert at.budget is None
    found = np.zeros((len(LEVELS), 10))
    found[0, :3] = 1
    at.evidence = none._replace(strength=found)
    assert at.budget == QUICK.budget * (hunt.TIMES if (late, lost) == (hunt.SUSPECTED, 2) else 1)


def test_few_images():
    data = clean()
    few = Dataset(data.images[:12], data.labels[:12])
    found = unlearn(MODEL, small_model(0, True), few, config=replace(QUICK, rounds=1), key=KEY)
    assert np.isfinite(found.history[0]["outer_loss"]) and "verdict" in found.diagnostics


def test_a_plain_function_of_other_images_and_a_hundred_labels():
    """A perceptron on 28x28x1 images, with many labels that no image has."""
    draw = np.random.default_rng(0)
    shapes = [(784, 64), (64, 100)]
    params = [np.float32(draw.normal(size=s) * np.sqrt(2 / s[0])) for s in shapes]

    def logits(params, images):
        return jax.nn.relu(images.reshape(len(images), -1) @ params[0]) @ params[1]

    def patched(images):
        images = images.copy()
        images[:, -4:, -4:] = 1
        return images

    digits = load("digits", "train+test")
    images, labels = np.ascontiguousarray(digits.images[:, 2:30, 2:30, :1]), digits.labels
    train, target = slice(0, 1200), 42
    given = images[train].copy(), labels[train].copy()
    given[0][:150], given[1][:150] = patched(given[0][:150]), target
    optimizer = optax.adam(2e-3)

    @jax.jit
    def fit(params):
        def step(carry, _):
            params, state = carry
            found = jax.grad(lambda p: jnp.mean(cross_entropy(logits(p, given[0]), given[1])))(
                params
            )
            move, state = optimizer.update(found, state)
            return (optax.apply_updates(params, move), state), None

        return jax.lax.scan(step, (params, optimizer.init(params)), length=150)[0][0]

    params = fit(params)
    few = Dataset(images[1200:1500], labels[1200:1500])
    found = unlearn(logits, params, few, config=replace(QUICK, rounds=12), key=KEY)

    def rates(params):
        acc = np.mean(np.argmax(logits(params, images[1500:]), 1) == labels[1500:])
        return acc, np.mean(np.argmax(logits(params, patched(images[1500:])), 1) == target)

    (acc, asr), (acc_after, asr_after) = rates(params), rates(found.params)
    assert acc > 0.9 and asr > 0.9 and found.diagnostics["flagged"] == [target]
    assert acc_after > acc - 0.05 and asr_after < 0.2


def test_shares_are_checked():
    for name, value in (
        ("searched", 1.5),
        ("distilled", -0.1),
        ("mixed", -1.0),
        ("held_back", 0.9),
    ):
        with pytest.raises(InputError, match=f"{name} is {value}"):
            replace(QUICK, **{name: value})


def test_many_devices_are_as_one():
    done = subprocess.run(
        [sys.executable, __file__], env=on_devices(4), capture_output=True, text=True
    )
    assert not done.returncode, done.stderr


def on_many_devices():
    """Run in a process of its own: the same on 1 device and on 4 but for rounding.

    In float64: Adam makes a whole step of what is nearly nothing, whatever its sign. With noise,
    since of equal neighbours in an even area rounding decides which one maximum pooling takes.
    """
    jax.config.update("jax_enable_x64", True)
    shorten(setattr)
    params, data = jax.tree.map(np.float64, small_model(0, True)), clean()
    noise = np.random.default_rng(0).uniform(0, 0.02, data.images[:60].shape)
    data = Dataset(np.clip(data.images[:60] * 0.98 + noise, 0, 1), data.labels[:60])
    config = replace(QUICK, rounds=1, batch_size=18, stages=1)
    one, four = (
        unlearn(MODEL, params, data, config=config, key=KEY, devices=devices(n)) for n in (1, 4)
    )
    for a, b in zip(jax.tree.leaves(one.params), jax.tree.leaves(four.params), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    assert one.diagnostics["flagged"] == four.diagnostics["flagged"] != [UNTARGETED]


if __name__ == "__main__":
    on_many_devices()
