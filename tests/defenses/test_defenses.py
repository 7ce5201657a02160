"""The baselines: one contract for all of them, and each does its work on a small model."""

import importlib
import json
from dataclasses import replace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import MODEL, SMALL, SQUARE, clean, measure, same, small_digits, small_model

from ibau_jax import Dataset, InputError
from ibau_jax.attacks import poison
from ibau_jax.defenses import DEFENSES, find, with_rounds
from ibau_jax.defenses.fine_pruning import FinePruningConfig, cutter, fine_pruning, prune
from ibau_jax.defenses.finetune import SHORT, Tuning, finetune
from ibau_jax.defenses.inversion.neural_cleanse import (
    CostSchedule,
    NeuralCleanseConfig,
    neural_cleanse,
)
from ibau_jax.defenses.inversion.outliers import low_outliers, with_stamps
from ibau_jax.defenses.inversion.search import Found, Step, decode, draw, stamp
from ibau_jax.defenses.inversion.tabor import (
    LowestLoss,
    TaborConfig,
    blocking,
    elastic_net,
    overlaying,
    overly_large,
    roughness,
    scattered,
    tabor,
    tabor_score,
    terms,
)
from ibau_jax.defenses.nad import NADConfig, attention, distillation, nad
from ibau_jax.models.model import Classifier, Frozen
from ibau_jax.training.augment import augment
from ibau_jax.training.optimizers import SGD, Adam, transform

KEY = jax.random.key(0)
ONE = Tuning(epochs=1, batch_size=32)
SEARCH = {"steps": 40, "batches": 3, "labels_at_once": 10, "tuning": replace(ONE, epochs=2)}
FINDERS = {  # settings that do the job on a small model; DeepInspect's are in its own file
    "neural-cleanse": NeuralCleanseConfig(**SEARCH),
    "tabor": TaborConfig(**SEARCH),
}


def test_presets_and_rounds():
    for name, entry in DEFENSES.items():
        assert name == "ibau" or set(entry.presets) == {"cpu", "paper"}
        for preset in entry.presets:
            for dataset in ("cifar10", "gtsrb", "digits"):
                _, used, config = find(name, preset, dataset)
                assert used == preset
                if name in ("anp", "clp"):
                    with pytest.raises(InputError, match="one round"):
                        with_rounds(config, 7)
                else:
                    assert with_rounds(config, 7) != config
    with pytest.raises(InputError, match="did you mean 'neural-cleanse'"):
        find("neural_cleanse", None, "cifar10")
    with pytest.raises(InputError, match="unknown preset of nad 'papers'"):
        find("nad", "papers", "cifar10")


class Dense(nn.Module):
    """A classifier without convolutions."""

    @nn.compact
    def __call__(self, x, train=False):
        return nn.Dense(10)(x.reshape(len(x), -1))


def test_a_model_without_convolutions_is_refused():
    variables = Dense().init(KEY, clean().images[:1])
    with pytest.raises(InputError, match="fine-pruning needs a model with convolutions"):
        fine_pruning(Classifier(Dense()), variables, clean(), key=KEY)
    with pytest.raises(InputError, match="shows 0 maps: expected 3"):
        nad(Classifier(Dense()), variables, clean(), key=KEY)


@pytest.mark.parametrize("run", [fine_pruning, nad])
def test_a_plain_function_is_refused_where_the_inside_is_needed(run, linear):
    logits, params, data = linear
    with pytest.raises(InputError, match="expected a flax module as ibau_jax.models.Classifier"):
        run(logits, params, data, key=KEY)


def test_a_plain_function_is_fine_elsewhere(linear):
    logits, params, data = linear
    tuned = finetune(logits, params, data, config=replace(ONE, batch_size=8), key=KEY)
    assert set(tuned.params) == {"w", "b"} and np.abs(tuned.params["w"] - params["w"]).max() > 0
    config = NeuralCleanseConfig(
        steps=3, batches=2, batch_size=8, tuning=replace(ONE, optimizer=SGD(1e-3, momentum=0.9))
    )
    found = neural_cleanse(logits, params, data, config=config, key=KEY)
    assert set(found.params) == {"w", "b"} and len(found.diagnostics["norms"]) == 3


# --- the rule of outliers, and stamping


def test_low_outliers_by_hand():
    scores = np.array([10.0, 11, 12, 13, 14, 1])  # an even number: the median is 11.5
    found = low_outliers(scores)
    spread = 1.4826 * 1.5  # the distances are 1.5 .5 .5 1.5 2.5 10.5
    np.testing.assert_allclose(found.index, np.abs(scores - 11.5) / spread)
    assert found.flagged == [5]
    assert low_outliers(-scores).flagged == []  # far above the others is no sign of a backdoor
    assert low_outliers(np.array([2.0, 2, 2, 1])).flagged == [3]  # no spread at all
    assert low_outliers(np.full(10, 3.0)).flagged == []
    assert low_outliers(scores, gap=10.4).flagged == [5]  # it lies 10.5 below
    assert low_outliers(scores, gap=10.6).flagged == []
    missing = low_outliers(np.array([10.0, np.nan, 11, 12, 13, 14, 1]))
    assert missing.flagged == [6] and np.isnan(missing.index[1])
    assert low_outliers(np.array([1.0, 2.0, np.nan])).flagged == [], "two scores: none stands out"
    with pytest.raises(InputError, match="the model has 2 labels: expected at least 3"):
        low_outliers(np.array([1.0, 2.0]))


CLASSES = np.arange(40) % 10  # of a clean set, four images each
# A search on a VGG for digits with a backdoor to label 8: the norms of ten masks.
DIGITS = [87.5, 148.7, 56.5, 62.1, 27.1, 60.2, 85.7, 38.2, 3.0, 73.1]


def searched(monkeypatch, name, norms, success, labels, config):
    """What a defense makes of a search that gave masks of these norms, each of so much success."""
    data = Dataset(np.full((len(labels), 32, 32, 1), 0.5, np.float32), np.int32(labels))
    found = [
        Found(np.full((32, 32, 1), n / 1024, np.float32), data.images[0], n, s, 1)
        for n, s in zip(norms, success, strict=True)
    ]
    module = importlib.import_module(DEFENSES[name].method.rounds.__module__)
    monkeypatch.setattr(module, "reverse_engineer", lambda *args, **options: found)
    params = {"w": np.zeros((1024, len(norms)), np.float32)}
    config = replace(config, tuning=replace(ONE, optimizer=SGD(1e-6, momentum=0.9)))
    run = DEFENSES[name].method
    return run(lambda p, x: x.reshape(len(x), -1) @ p["w"], params, data, config=config, key=KEY)


@pytest.mark.parametrize("name", FINDERS)
@pytest.mark.parametrize(
    ("norms", "works", "flagged", "note"),
    [
        # The small masks of labels whose triggers never worked are no sign of a backdoor ...
        ([60, 61, 62, 63, 64, 65, 66, 67, 5, 6], 8, [], "no trigger found for labels 8, 9: not j"),
        # ... and hide none: with them the median would be 6.
        ([5, 64, 66, 68, 60, 6, 6, 6, 6, 6], 5, [0], "no trigger found for labels 5, 6, 7, 8, 9:"),
        # The labels that alone can be reached are the plainest case.
        ([3, 4, 8, 2, 9, 5, 1, 6, 7, 3], 1, [0], "labels 1, 2, 3, 4, 5, 6, 7, 8, 9: they count as"),
        ([3, 4, 8, 2, 9, 5, 1, 6, 7, 3], 2, [0, 1], "labels 2, 3, 4, 5, 6, 7, 8, 9: they count"),
        # But not where a trigger is half of the image, or there is none at all.
        ([500, 4, 8, 2, 9, 5, 1, 6, 7, 3], 1, [], "no label stands out: the model is returned as"),
        ([3, 60, 70, 80, 90, 50, 55, 65, 75, 85], 0, [], "the search says nothing of this model"),
        # All have worked: the rule as it was.
        ([3, 60, 70, 80, 90, 50, 55, 65, 75, 85], 10, [0], None),
    ],
)
def test_labels_without_a_trigger_that_works(monkeypatch, name, norms, works, flagged, note):
    """The first `works` labels have one, the others do not."""
    success = [0.99] * works + [0.98] * (10 - works)
    config = NeuralCleanseConfig() if name == "neural-cleanse" else TaborConfig(score="norm")
    found = searched(monkeypatch, name, norms, success, CLASSES, config)
    told = found.diagnostics
    assert told["flagged"] == flagged and told["norms"] == norms and told["success"] == success
    assert "note" not in told if note is None else note in told["note"]
    assert all(x is None for x in told["anomaly_index"][works:])
    json.dumps(dict(told), allow_nan=False)
    captions = [caption for caption in found.found if "no trigger found, 98% with" in caption]
    assert len(captions) == 10 - works


def test_where_a_search_was_short_logarithms_are_compared(monkeypatch):
    """Norms of honest labels differ by factors then, and the index of a small one is small."""
    for dataset, norms, flagged in (
        ("digits", DIGITS, [8]),
        ("digits", DIGITS[:8] + [20.0] + DIGITS[9:], []),  # more than a fourth of the median
        ("cifar10", DIGITS, []),  # index 1.65
    ):
        config = find("neural-cleanse", "cpu", dataset)[2]
        found = searched(monkeypatch, "neural-cleanse", norms, [1.0] * 10, CLASSES, config)
        assert found.diagnostics["flagged"] == flagged, dataset


@pytest.mark.parametrize("name", FINDERS)
def test_a_label_that_most_images_show_is_not_judged(monkeypatch, name):
    """A mask of no pixel does for it."""
    norms = [60, 61, 62, 1, 64, 65, 66, 67, 63, 62]
    config = NeuralCleanseConfig() if name == "neural-cleanse" else TaborConfig(score="norm")
    half = np.append(np.full(20, 3), np.arange(20) % 3)
    for labels, flagged in ((CLASSES, [3]), (half, [])):
        found = searched(monkeypatch, name, norms, [1.0] * 10, labels, config)
        assert found.diagnostics["flagged"] == flagged
    assert "label 3 not judged: half or more of the clean images" in found.diagnostics["note"]


def test_classes_that_the_clean_set_lacks_are_told(monkeypatch):
    norms = [60, 61, 62, 1, 64, 65, 66, 67, 63, 62]
    args = monkeypatch, "neural-cleanse", norms, [1.0] * 10
    found = searched(*args, np.arange(40) % 8, NeuralCleanseConfig())
    lacks = (
        "the clean set has no image of 2 of the 10 classes (8, 9): the result may not hold for "
        "them, and fine-tuning may forget them"
    )
    assert found.diagnostics["note"] == lacks
    norms[3] = 63
    found = searched(*args, np.arange(40) % 8, NeuralCleanseConfig())
    nothing = "no label stands out: the model is returned as it was given"
    assert found.diagnostics["note"] == f"{lacks}; {nothing}"


def test_one_class_is_not_enough_to_search_with(linear):
    logits, params, data = linear
    data = Dataset(data.images, np.full(24, 1, np.int32))
    for name in (*FINDERS, "deepinspect"):
        with pytest.raises(InputError, match=r"images of class 1 only \(24 of them\): expected"):
            DEFENSES[name].method(logits, params, data, key=KEY)


def test_the_metric_of_failed_triggers_is_no_score(monkeypatch):
    """Of TABOR: a region of one pixel that leads nowhere had a low one."""
    metric = [-4.0, -4.5, -4.2, -4.4, -4.1, -4.3, -4.6, -3.9, -4.0, -8.0]
    monkeypatch.setattr(
        importlib.import_module("ibau_jax.defenses.inversion.tabor"), "scores_of", lambda *_: metric
    )
    for success, flagged in ((0.99, [9]), (0.3, [])):
        found = searched(
            monkeypatch, "tabor", [50.0] * 10, [0.99] * 9 + [success], CLASSES, TaborConfig()
        )
        assert found.diagnostics["flagged"] == flagged and found.diagnostics["metric"] == metric
    alone = searched(monkeypatch, "tabor", [50.0] * 10, [0.3] * 9 + [0.99], CLASSES, TaborConfig())
    assert alone.diagnostics["flagged"] == [9], "the only one that works"
    fixed = TaborConfig(adaptive=False)  # no step was asked for a success
    found = searched(monkeypatch, "tabor", [50.0] * 10, [0.6] * 10, CLASSES, fixed)
    assert found.diagnostics["flagged"] == [9]


# --- small clean sets


@pytest.mark.parametrize(
    ("count", "settings", "plan"),
    [
        (5000, SHORT, (128, 39, 2)),  # as published
        (400, SHORT, (40, 10, 8)),
        (400, Tuning(epochs=2), (128, 3, 2)),  # exactly as told
        (60, Tuning(epochs=2, steps=20), (10, 6, 4)),
        (7, Tuning(epochs=2, steps=5), (7, 1, 5)),
        (400, Tuning(epochs=9, batch_size=32, steps=100), (32, 12, 9)),  # they are enough
        (400, Tuning(epochs=9, batch_size=32, steps=109), (32, 12, 10)),
        (5000, NADConfig.cpu("cifar10").teacher, (64, 78, 2)),
        (5000, NADConfig.cpu("gtsrb").student, (64, 78, 4)),
        (400, NADConfig.cpu("digits").student, (40, 10, 10)),
    ],
)
def test_few_images_are_passed_over_more_often(count, settings, plan):
    assert settings.plan(count) == plan


def test_the_rate_falls_at_the_same_part_of_the_way():
    config = Tuning(epochs=4, optimizer=SGD(1.0, drops=((0.5, 0.1),)))
    for steps in (8, 30):
        step = transform(config.optimizer, steps)
        state, rates = step.init(np.float32(0)), []
        for _ in range(steps):
            update, state = step.update(np.float32(1), state, np.float32(0))
            rates.append(-float(update))
        np.testing.assert_allclose(rates, [1.0] * (steps // 2) + [0.1] * (steps // 2), rtol=1e-6)


def test_steps_are_made_and_rounds_are_as_told(linear):
    logits, params, data = linear  # 24 images
    config = Tuning(epochs=1, steps=4, optimizer=SGD(1e-3))
    assert len(finetune(logits, params, data, config=config, key=KEY).history) == 2  # of two tens
    config = with_rounds(config, 1)
    assert len(finetune(logits, params, data, config=config, key=KEY).history) == 1
    nad_config = with_rounds(find("nad", None, "digits")[2], 3).student
    assert nad_config.plan(400)[2] == 3


def test_stamps_share_the_images_and_keep_the_labels():
    data = Dataset(np.full((100, 4, 4, 1), 0.5, np.float32), np.arange(100).astype(np.int32))
    rng = np.random.default_rng(0)
    stamped = with_stamps(data, [lambda x: x + 0.1, lambda x: x + 9], 0.2, rng)
    values = stamped.images[:, 0, 0, 0]
    assert [np.sum(np.isclose(values, v)) for v in (0.5, 0.6, 1.0)] == [80, 10, 10]
    same(stamped.labels, data.labels)
    assert np.all(data.images == 0.5), "the clean set itself is not touched"


# --- Neural Cleanse


@pytest.mark.parametrize(
    ("name", "seed"),
    [*(("neural-cleanse", i) for i in (0, 3, 4)), *(("tabor", i) for i in range(3))],
)
def test_the_backdoor_is_found_and_unlearned(name, seed):
    """The right label and no other. (On models 1, 5, 6 Neural Cleanse's index is 1.8 to 1.9.)"""
    variables, key = small_model(seed, True), jax.random.key(seed)
    run = DEFENSES[name].method
    found = run(MODEL, variables, clean(), config=FINDERS[name], key=key, evaluate=measure)
    assert found.diagnostics["flagged"] == [SQUARE.target]
    assert found.history[-1]["asr"] < 0.35 and found.history[-1]["acc"] > 0.94
    assert [name for name in found.found if "flagged" in name][0].startswith("label 7:")


@pytest.mark.parametrize(
    ("name", "seed"),
    [*(("neural-cleanse", i) for i in (0, 1, 3)), *(("tabor", i) for i in range(3))],
)
def test_nothing_is_found_in_a_clean_model(name, seed):
    """(On model 2 Neural Cleanse has a false alarm: two deviations are few, of ten labels.)"""
    variables, key = small_model(seed, False), jax.random.key(seed)
    found = DEFENSES[name].method(MODEL, variables, clean(), config=FINDERS[name], key=key)
    assert found.diagnostics["flagged"] == []
    same(found.params, variables)


def test_nothing_to_score_is_a_result():
    """Triggers of no pixel, as here, or of all have no score; nothing is flagged."""
    weights, rate = (1e9, 0.0, 0.0, 0.0, 0.0, 0.0), 10.0
    config = TaborConfig(
        weights=weights, adaptive=False, rate=rate, steps=2, batches=1, labels_at_once=10
    )
    found = tabor(MODEL, small_model(0, True), clean(), config=config, key=KEY)
    assert found.diagnostics["metric"] == found.diagnostics["anomaly_index"] == [None] * 10
    assert found.diagnostics["flagged"] == []
    json.dumps(dict(found.diagnostics), allow_nan=False)
    assert all("none" in caption or "no trigger" in caption for caption in found.found)
    same(found.params, small_model(0, True))


def test_a_model_of_two_labels_is_refused_before_the_search(linear):
    logits, params, data = linear
    two = {"w": params["w"][:, :2], "b": params["b"][:2]}
    data = Dataset(data.images, np.minimum(data.labels, 1))
    for run in (neural_cleanse, tabor):
        with pytest.raises(InputError, match="2 labels: expected at least 3"):
            run(logits, two, data, key=KEY)


def test_without_a_trigger_that_works_the_last_is_kept():
    config = NeuralCleanseConfig(steps=3, batches=1, labels_at_once=10, success=1.1, tuning=ONE)
    found = neural_cleanse(MODEL, small_model(0, True), clean(), config=config, key=KEY)
    assert found.diagnostics["steps"] == [3] * 10


def test_labels_at_once_do_not_change_what_is_found():
    variables, norms = small_model(0, True), []
    for at_once in (1, 4, 10):  # 4 does not divide 10
        config = NeuralCleanseConfig(steps=2, batches=1, labels_at_once=at_once, tuning=ONE)
        found = neural_cleanse(MODEL, variables, clean(), config=config, key=KEY)
        norms.append(found.diagnostics["norms"])
    np.testing.assert_allclose(norms[1], norms[0], rtol=1e-4)
    np.testing.assert_allclose(norms[2], norms[0], rtol=1e-4)


def test_the_cost_goes_up_and_down_and_the_search_ends():
    schedule = CostSchedule(initial=1.0, patience=2, multiplier=4.0, success=0.9)

    def steps(*pairs):
        return [
            (schedule.after(Step(0.0, success, norm)), schedule.cost) for success, norm in pairs
        ]

    assert steps((0.5, 9), (1.0, 8)) == [(False, 0.0), (True, 0.0)]
    assert steps((1.0, 8.5)) == [(False, 1.0)]  # worked twice in a row: the cost counts now
    assert steps((1.0, 7), (1.0, 6)) == [(True, 4.0), (True, 4.0)]
    assert steps((0.2, 1), (0.2, 1)) == [(False, 4.0), (False, 0.5)]  # down by 4^1.5
    assert not schedule.ended
    steps(*[(1.0, 6.0)] * 7)
    assert not schedule.ended, "stale for 9 steps"
    steps((1.0, 6.0))
    assert schedule.ended and schedule.best == 6


def test_numbers_stay_in_the_unit_interval():
    mask, pattern = decode(draw(KEY, (5, 4, 3)))
    assert mask.shape == (5, 4, 1) and pattern.shape == (5, 4, 3)
    for values in (mask, pattern):
        assert 0 <= values.min() < 0.2 and 0.8 < values.max() <= 1
    extreme = decode(jnp.array([-1e9, 0.0, 1e9]))
    np.testing.assert_allclose(extreme, [0, 0.5, 1], atol=1e-6)
    image = np.full((1, 5, 4, 3), 0.25)
    np.testing.assert_array_equal(stamp(image, np.zeros((5, 4, 1)), pattern), image)
    np.testing.assert_array_equal(stamp(image, np.ones((5, 4, 1)), pattern)[0], pattern)


# --- TABOR


def test_regularisers_by_hand():
    mask = np.array([[[0.5], [1.0]], [[0.0], [0.25]]])
    pattern = np.array([[[1.0], [0.2]], [[0.4], [0.8]]])
    outside = (1 - mask) * pattern  # .5 0 / .4 .6
    assert float(elastic_net(mask)) == pytest.approx(1.75 + 1.3125)
    assert float(elastic_net(-mask)) == pytest.approx(1.75 + 1.3125)
    # down: (0 - .5)^2 + (.25 - 1)^2; right: (1 - .5)^2 + (.25 - 0)^2
    assert float(roughness(mask)) == pytest.approx(0.25 + 0.5625 + 0.25 + 0.0625)
    weights = (2.0, 3.0, 5.0, 7.0, 0.0, 0.0)
    expected = 2 * 3.0625 + 3 * (1.5 + 0.25 + 0.16 + 0.36)
    assert float(overly_large(mask, pattern, weights)) == pytest.approx(expected)
    rough = 0.01 + 0.36 + 0.25 + 0.04
    assert float(roughness(outside)) == pytest.approx(rough)
    assert float(scattered(mask, pattern, weights)) == pytest.approx(5 * 1.125 + 7 * rough)


def test_blocking_and_overlaying_by_hand(linear):
    logits, params, data = linear
    mask = np.zeros((6, 5, 1), np.float32)
    mask[2:4, 1:3] = 1
    model, variables = Frozen(logits), {"params": params}
    entropy = optax.losses.softmax_cross_entropy_with_integer_labels
    cut = np.array(data.images)
    cut[:, 2:4, 1:3] = 0
    np.testing.assert_allclose(
        blocking(model, variables, mask, data.images, data.labels),
        entropy(logits(params, cut), data.labels), rtol=1e-5,
    )  # fmt: skip
    alone = np.zeros((1, 6, 5, 2), np.float32)
    alone[:, 2:4, 1:3] = 0.7
    np.testing.assert_allclose(
        overlaying(model, variables, mask, np.full((6, 5, 2), 0.7, np.float32), jnp.int32(1)),
        entropy(logits(params, alone), np.array([1]))[0], rtol=1e-5,
    )  # fmt: skip


def test_all_terms_are_weighted_by_the_cost(linear):
    logits, params, data = linear
    model, variables = Frozen(logits), {"params": params}
    rng = np.random.default_rng(0)
    mask = rng.uniform(size=(6, 5, 1)).astype(np.float32)
    pattern = rng.uniform(size=(6, 5, 2)).astype(np.float32)
    weights, target, cost = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6), jnp.int32(1), 7.0
    rows, penalty = terms(weights)
    losses, found = rows(model, variables, mask, pattern, data.images, data.labels, target, cost)
    np.testing.assert_allclose(found, logits(params, stamp(data.images, mask, pattern)), rtol=1e-5)
    entropy = optax.losses.softmax_cross_entropy_with_integer_labels
    expected = entropy(found, jnp.ones(len(found), jnp.int32))
    expected += 7 * 0.5 * blocking(model, variables, mask, data.images, data.labels)
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    expected = 0.6 * overlaying(model, variables, mask, pattern, target)
    expected += overly_large(mask, pattern, weights) + scattered(mask, pattern, weights)
    assert float(penalty(model, variables, mask, pattern, target)) == pytest.approx(float(expected))


def test_the_score_of_tabor_by_hand():
    region = np.zeros((4, 4), bool)
    region[1:3, 1:3] = True  # a border of 8 pairs
    expected = np.log(4 / 16) + np.log(8 / 12) - np.log(0.9) - np.log(1.0) - np.log(0.5)
    assert tabor_score(region, 0.9, 1.0, 0.5) == pytest.approx(expected)
    assert tabor_score(region, 0.9, 1.0, 0.0) == pytest.approx(
        expected + np.log(0.5) - np.log(1e-3)
    )
    assert np.isnan(tabor_score(np.zeros((4, 4), bool), 1, 1, 1)), "nothing is not the smallest"
    assert np.isnan(tabor_score(np.ones((4, 4), bool), 1, 1, 1))


def test_fixed_weights_keep_the_lowest_loss():
    schedule = LowestLoss(2.0)
    losses = (3.0, 4.0, 2.0)
    assert [schedule.after(Step(x, 0.0, 0.0)) for x in losses] == [True, False, True]
    assert schedule.cost == 2.0 and not schedule.ended


# --- Fine-Pruning


def test_pruning_is_a_mask_after_the_nonlinearity():
    """The model with cut channels equals the one whose activations are masked."""
    variables, data = small_model(2, True), clean()
    kept, activity, order, accuracy = prune(MODEL, variables, data, 0.2)
    assert 0 < len(order) == (~kept).sum() and set(order) == set(np.flatnonzero(~kept))
    _, maps = MODEL.look(variables, data.images)
    last = np.asarray(maps[-1])
    np.testing.assert_allclose(activity, np.maximum(last, 0).mean((0, 1, 2)), rtol=1e-4)
    assert list(order) == list(np.argsort(activity)[: len(order)])
    head = variables["params"]["classifier"]

    def logits(kept):
        masked = last * kept
        n, h, w, c = masked.shape
        pooled = masked.reshape(n, h // 2, 2, w // 2, 2, c).max((2, 4)).reshape(n, -1)
        return pooled @ head["kernel"] + head["bias"]

    cut = {**variables, "params": cutter(kept)(variables["params"])}
    np.testing.assert_allclose(MODEL(cut, data.images), logits(kept), rtol=1e-3, atol=1e-3)
    assert accuracy == np.mean(logits(kept).argmax(-1) == data.labels)
    whole = np.mean(logits(np.ones(16)).argmax(-1) == data.labels)
    assert accuracy >= whole - 0.2
    further = kept.copy()
    further[np.argsort(activity)[len(order)]] = False
    assert np.mean(logits(further).argmax(-1) == data.labels) < whole - 0.2, "one more is too many"


def test_fine_pruning_lowers_the_asr_and_the_mask_stays():
    variables = small_model(2, True)
    config = FinePruningConfig(tuning=Tuning(epochs=2, batch_size=32, optimizer=Adam(1e-3)))
    found = fine_pruning(MODEL, variables, clean(), config=config, key=KEY, evaluate=measure)
    tuned = finetune(MODEL, variables, clean(), config=config.tuning, key=KEY)
    assert measure(tuned.params)["asr"] > 0.95, "fine-tuning alone leaves it"
    assert found.history[-1]["asr"] < 0.6 and found.history[-1]["acc"] > 0.9
    kernel = np.asarray(found.params["params"]["classifier"]["kernel"]).reshape(-1, 16, 10)
    zero = np.flatnonzero(~kernel.any((0, 2)))
    assert sorted(found.diagnostics["pruned"]) == list(zero) and len(zero)


def test_a_clean_set_that_cannot_be_divided_is_refused():
    with pytest.raises(InputError, match="1 clean images, 0 of them to prune by"):
        fine_pruning(MODEL, small_model(2, True), small_digits("test[:1]"), key=KEY)


# --- NAD


def test_distillation_lowers_the_asr():
    # Mirrored digits are other pictures, as mirrored traffic signs are.
    config = NADConfig(
        betas=(500.0, 1000.0), crop=2, flip=False,
        teacher=replace(ONE, epochs=2), student=replace(ONE, epochs=3),
    )  # fmt: skip
    found = nad(MODEL, small_model(4, True), clean(), config=config, key=KEY, evaluate=measure)
    assert measure(small_model(4, True))["asr"] > 0.95
    assert found.history[-1]["asr"] < 0.5 and found.history[-1]["acc"] > 0.93
    assert 0 <= found.diagnostics["teacher"]["acc"] <= 1


def test_the_preset_keeps_the_accuracy_with_few_images():
    """(The images of the small model are half as large, and it has two maps of attention.)"""
    variables = small_model(4, True)
    config = replace(find("nad", "cpu", "digits")[2], betas=(500.0, 1000.0), crop=2)
    found = nad(MODEL, variables, clean(), config=config, key=KEY)
    before, after = measure(variables), measure(found.params)
    assert before["asr"] > 0.95 and after["asr"] < 0.35 and after["acc"] > before["acc"] - 0.04


def test_attention_by_hand():
    maps = np.random.default_rng(0).normal(size=(3, 4, 5, 6))
    expected = (maps**2).sum(-1)
    expected /= np.sqrt((expected**2).sum((1, 2), keepdims=True))
    np.testing.assert_allclose(attention(maps), expected, rtol=1e-4)
    assert np.isfinite(attention(np.zeros((1, 2, 2, 3)))).all()


def test_a_student_equal_to_its_teacher_pays_cross_entropy_alone():
    variables, data = small_model(0, True), small_digits("test[:16]")
    config = NADConfig(betas=(500.0, 1000.0), crop=0, flip=False, cutout=0)
    params, others = variables["params"], {"batch_stats": variables["batch_stats"]}

    class Evaluated(Classifier):  # as the teacher, in evaluation mode
        def train(self, variables, images, key, weights=None, axis=None):
            return *self.look(variables, images), {"batch_stats": variables["batch_stats"]}

    values = [
        distillation(Evaluated(SMALL), config, None, teacher)(
            params, others, data.images, data.labels, None, KEY
        )[0]
        for teacher in (None, variables, small_model(2, True))
    ]
    assert values[0] == pytest.approx(values[1])
    shown = [MODEL.look(v, data.images)[1] for v in (variables, small_model(2, True))]
    apart = [
        float(np.mean((attention(a) - attention(b)) ** 2)) for a, b in zip(*shown, strict=True)
    ]
    assert float(values[2] - values[0]) == pytest.approx(500 * apart[0] + 1000 * apart[1], rel=1e-3)
    assert min(apart) > 0


def test_augmentation():
    images = np.random.default_rng(0).uniform(0.1, 1, (64, 8, 8, 2)).astype(np.float32)
    same(augment(KEY, images, 0, False, 0), images)
    flipped = np.asarray(augment(KEY, images, 0, True, 0))
    mirrored = [np.array_equal(f, i[:, ::-1]) for f, i in zip(flipped, images, strict=True)]
    kept = [np.array_equal(f, i) for f, i in zip(flipped, images, strict=True)]
    assert sum(mirrored) + sum(kept) == 64 and 16 < sum(mirrored) < 48
    holes = (np.asarray(augment(KEY, images, 0, False, 2)) == 0).all(-1).sum((1, 2))
    # Of the pixel that is drawn and the one before it: cut only at the upper and left borders.
    assert set(holes) <= {1, 2, 4} and (holes == 4).sum() > 32
    ends = np.asarray(augment(KEY, np.ones((2000, 8, 8, 1), np.float32), 0, False, 2))[..., 0] == 0
    assert ends[:, 0, 0].any() and ends[:, 7, 7].any() and not (ends[:, 7] & ~ends[:, 6]).any()
    shifted = np.asarray(augment(KEY, images, 2, False, 0))
    first = images[0]
    padded = np.pad(first, ((2, 2), (2, 2), (0, 0)))
    windows = [padded[i : i + 8, j : j + 8] for i in range(5) for j in range(5)]
    assert sum(np.array_equal(shifted[0], w) for w in windows) == 1


def test_of_fewer_maps_the_last_betas_count():
    settings = NADConfig(teacher=ONE, student=ONE, crop=0, flip=False, cutout=0)
    every, two = (
        nad(MODEL, small_model(0, True), clean(), config=replace(settings, betas=betas), key=KEY)
        for betas in ((9.0, 500.0, 1000.0), (500.0, 1000.0))
    )
    same(every.params, two.params)
    assert "shows 2 maps: the betas are (500.0, 1000.0)" in every.diagnostics["note"]
    assert "note" not in two.diagnostics


def test_wrong_settings_are_refused():
    with pytest.raises(InputError, match="six numbers"):
        TaborConfig(weights=(1.0,))
    with pytest.raises(InputError, match="did you mean 'metric'"):
        TaborConfig(score="metrics")
    with pytest.raises(InputError, match="part is 1.0: expected a share below 1"):
        FinePruningConfig(part=1.0)
    with pytest.raises(InputError, match="rate is 0: expected a positive number"):
        SGD(rate=0)
    with pytest.raises(InputError, match="fine-tuning: the loss of epoch 1.*1e.30.*smaller rate"):
        wild = replace(ONE, optimizer=SGD(1e30, momentum=0.9))
        finetune(MODEL, small_model(0, True), clean(), config=wild, key=KEY)


def test_poisoned_small_model_has_its_backdoor():
    assert measure(small_model(0, True))["asr_excl"] > 0.95
    assert measure(small_model(0, False))["asr_excl"] < 0.05
    assert poison(small_digits("train"), SQUARE, 0.2, 0)[1].sum() == 199
