"""DeepInspect: the generator, its loss, the rule, and what it finds on small models."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import MODEL, SQUARE, clean, job, measure, same, small_model

from ibau_jax import Dataset, InputError
from ibau_jax.defenses.finetune import Tuning
from ibau_jax.defenses.inversion import deepinspect as module
from ibau_jax.defenses.inversion import generator as generators
from ibau_jax.defenses.inversion.deepinspect import (
    PRESETS,
    DeepInspectConfig,
    Score,
    deepinspect,
    drawer,
    pictures,
    score,
    stamp,
)
from ibau_jax.defenses.inversion.generator import (
    Generator,
    Search,
    draw_labels,
    draw_noise,
    squared_distance,
)
from ibau_jax.defenses.inversion.outliers import stand_out
from ibau_jax.models.model import Frozen
from ibau_jax.training.optimizers import SGD

KEY = jax.random.key(0)
# The allowance and the penalty suit images of 16x16x1, a twelfth of the values of CIFAR-10's.
CONFIG = DeepInspectConfig(
    steps=200, rate=7e-3, allowance=5.0, penalty=0.05, score_images=200,
    tuning=Tuning(epochs=2, batch_size=32),
)  # fmt: skip
QUICK = replace(CONFIG, steps=12, score_images=40)
# So lenient that something is always flagged.
LENIENT = replace(QUICK, threshold=0.1, ratio=1.0)


def attack(search, *args):
    """`search.attack`, compiled: one by one its operations take longer to compile."""
    return jax.jit(search.attack)(*args)


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


@pytest.fixture
def small(linear):
    """A search against the linear model with its variables and data, and a lively generator."""
    logits, params, data = linear
    made = Generator((6, 5, 2), 4, channels=(8, 4))
    search = Search(Frozen(logits), made, 3, noise=7, squared=0.5, penalty=0.1, allowance=2.0)
    learned = jax.jit(made.init)(KEY, np.zeros((1, 7)), np.zeros(1, int))["params"]
    learned = {**learned, "kernel2": jax.random.normal(KEY, learned["kernel2"].shape) / 4}
    return search, learned, {"params": params}, data


# --- what it is for


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_backdoor_is_found_and_unlearned(seed):
    variables = small_model(seed, True)
    found = deepinspect(
        MODEL, variables, clean(), config=CONFIG, key=jax.random.key(seed), evaluate=measure
    )
    told = found.diagnostics
    assert told["flagged"] == [SQUARE.target]
    assert told["scores"] == told["losses"]
    assert np.argmin(told["norms"]) == SQUARE.target and told["success"][SQUARE.target] > 0.9
    before = measure(variables)
    assert before["asr"] > 0.9
    assert found.history[-1]["asr"] < 0.35 and found.history[-1]["acc"] > before["acc"] - 0.04
    assert [name for name in found.found if "flagged" in name][0].startswith("label 7: loss 0.")


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_nothing_is_found_in_a_clean_model(seed):
    variables = small_model(seed, False)
    found = deepinspect(MODEL, variables, clean(), config=CONFIG, key=jax.random.key(seed))
    assert found.diagnostics["flagged"] == []
    assert len(found.history) == 1 and found.history[0]["round"] == 1
    same(found.params, variables)


# --- the contract


def test_what_is_told_of_each_label():
    found = deepinspect(MODEL, small_model(0, True), clean(), config=LENIENT, key=KEY)
    assert found.diagnostics["flagged"], "the case of unlearning"
    assert all(len(found.diagnostics[k]) == 10 for k in ("scores", "anomaly_index", "success"))
    assert len(found.found) == 10


def test_a_plain_function(linear):
    logits, params, data = linear
    config = replace(LENIENT, score="norm", num_labels=5)  # more labels than classes
    config = replace(config, tuning=Tuning(epochs=1, batch_size=8, optimizer=SGD(1e-3)))
    found = deepinspect(logits, params, data, config=config, key=KEY)
    assert set(found.params) == {"w", "b"}
    assert found.diagnostics["scores"] == found.diagnostics["norms"]


# --- the generator


@pytest.mark.parametrize("shape", [(6, 5, 2), (8, 4, 3)])
def test_generator(shape):
    made = Generator(shape, 4, channels=(8, 4))
    noise, labels = np.random.default_rng(0).normal(size=(5, 7)), np.arange(5) % 4
    variables = jax.jit(made.init)(KEY, noise, labels)
    first = jax.jit(made.apply)(variables, noise, labels)
    assert first.shape == (5, *shape) and not np.any(first), "it starts from no trigger"
    params = variables["params"]
    assert params["label"].shape == (4, -(-shape[0] // 4) * -(-shape[1] // 4) * 8)
    params = {**params, "kernel2": 9.0 * jax.random.normal(KEY, params["kernel2"].shape)}
    made_of = jax.jit(lambda noise, labels: made.apply({"params": params}, noise, labels))
    triggers = np.asarray(made_of(noise, labels))
    assert -1 <= triggers.min() < 0 < triggers.max() <= 1
    other = np.abs(triggers - made_of(noise, (labels + 1) % 4)).mean()
    shaken = np.abs(triggers - made_of(noise[::-1], labels)).mean()
    assert other > shaken > 0, "the label says more than the noise"
    dark = {**params, "label": -jnp.ones_like(params["label"]), "noise": 0 * params["noise"]}
    assert not np.any(made.apply({"params": dark}, noise, labels)), "only what is positive counts"
    # No image depends on the others of its batch: there is no batch norm.
    np.testing.assert_allclose(made_of(noise[:1], labels[:1])[0], triggers[0], atol=1e-5)


def test_upsampling_repeats_every_value():
    x = np.arange(4.0).reshape(1, 2, 2, 1)
    expected = [[0, 0, 1, 1], [0, 0, 1, 1], [2, 2, 3, 3], [2, 2, 3, 3]]
    np.testing.assert_array_equal(generators.doubled(jnp.array(x))[0, :, :, 0], expected)


def test_what_is_drawn_does_not_depend_on_the_devices():
    """Row r lies on device r mod 4, in place r div 4."""

    def draw(count, axis):
        return draw_noise(KEY, count, 20, axis), draw_labels(KEY, count, 5, axis)

    spread = jax.jit(jax.vmap(lambda _: draw(251, "d"), axis_name="d", axis_size=4))(np.zeros(4))
    for parts, whole in zip(spread, jax.jit(lambda: draw(1001, None))(), strict=True):
        parts = np.swapaxes(parts, 0, 1).reshape(1004, *whole.shape[1:])
        np.testing.assert_array_equal(parts[:1001], whole)  # three rows are padding
    noise, labels = (np.asarray(a) for a in jax.jit(lambda: draw(1000, None))())
    assert abs(noise.mean()) < 0.05 and abs(noise.std() - 1) < 0.05
    np.testing.assert_allclose(np.bincount(labels) / 1000, np.full(5, 0.2), atol=0.05)


# --- the loss


def test_the_loss_by_hand(small):
    search, learned, variables, data = small
    targets = np.array([2, 0, 1, 1])
    images = data.images[:4]
    found = attack(search, learned, variables, images, KEY, targets)
    added = np.asarray(jax.jit(search.triggers)(learned, KEY, targets))
    stamped = images + added
    assert stamped.min() < 0 and stamped.max() > 1, "the fixture needs clipping"
    p = softmax(np.asarray(search.model(variables, np.clip(stamped, 0, 1))))
    chosen = p[np.arange(4), targets]
    norms = np.abs(added).reshape(4, -1).sum(1)
    assert norms.min() > 2
    expected = -np.log(chosen) + 0.5 * (1 - chosen) ** 2 + 0.1 * (norms - 2)
    np.testing.assert_allclose(found.losses, expected, rtol=1e-4)
    np.testing.assert_allclose(found.norms, norms, rtol=1e-5)
    np.testing.assert_array_equal(found.hits, p.argmax(1) == targets)
    free = search._replace(allowance=1e3, squared=0.0)
    losses = attack(free, learned, variables, images, KEY, targets).losses
    np.testing.assert_allclose(losses, -np.log(chosen), rtol=1e-4)


def test_a_trigger_can_grow_on_black_images(small):
    """The gradient passes the border at full strength (`jnp.clip` halves it there)."""
    search, learned, variables, _ = small
    start = {**learned, "kernel2": jnp.zeros_like(learned["kernel2"])}
    black, targets = np.zeros((4, 6, 5, 2), np.float32), np.arange(4) % 3

    def free(learned):
        logits = search.model(variables, black + search.triggers(learned, KEY, targets))
        return -jax.nn.log_softmax(logits)[np.arange(4), targets].sum()

    bare = search._replace(squared=0.0)

    def clipped(learned):
        return bare.attack(learned, variables, black, KEY, targets).losses.sum()

    slope, expected = jax.jit(lambda p: (jax.grad(clipped)(p), jax.grad(free)(p)))(start)
    assert np.abs(expected["kernel2"]).max() > 0.1
    np.testing.assert_allclose(slope["kernel2"], expected["kernel2"], rtol=1e-4, atol=1e-5)


def test_squared_distance_by_hand():
    logits = np.array([[0.0, np.log(3.0)], [5.0, 5.0]])
    np.testing.assert_allclose(
        squared_distance(logits, np.array([1, 0])), [0.0625, 0.25], rtol=1e-5
    )


def test_training_lowers_the_loss_by_whole_passes(small, monkeypatch):
    search, _, variables, data = small
    passes, fit = [], generators.Fit
    monkeypatch.setattr(
        generators,
        "Fit",
        lambda *args, **kwargs: passes.append(kwargs["epochs"]) or fit(*args, **kwargs),
    )
    losses = []
    for steps in (1, 60):
        config = DeepInspectConfig(steps=steps, batch_size=8, rate=1e-2)
        learned = generators.learn(job(search.model, variables, data, config), search, KEY)
        targets = np.arange(24) % 3
        losses.append(attack(search, learned, variables, data.images, KEY, targets).losses.mean())
    assert passes == [1, 20]  # of 3 batches
    assert losses[1] < 0.5 * losses[0]


# --- the scores and the rule


def test_scores_by_hand(small):
    search, learned, variables, data = small
    config = DeepInspectConfig(batch_size=8, score_images=24)
    still = {**learned, "kernel2": jnp.zeros_like(learned["kernel2"])}
    bare = search._replace(squared=0.0)
    given = job(search.model, variables, data, config)
    found = score(given, bare, still, KEY)
    p = softmax(np.asarray(search.model(variables, data.images)))
    for label, one in enumerate(found):
        assert one.norm == 0 and one.loss == pytest.approx(-np.log(p[:, label]).mean(), rel=1e-4)
        others = data.labels != label  # the model is right on all images
        assert one.success == (p[others].argmax(1) == label).mean() == 0
    moved = score(given, bare, learned, KEY)
    norms = [
        attack(search, learned, variables, data.images, KEY, np.full(24, i)).norms.mean()
        for i in range(3)
    ]
    np.testing.assert_allclose([s.norm for s in moved], norms, rtol=0.1)  # another noise
    assert max(s.success for s in moved) > 0
    one = Dataset(data.images[:1], data.labels[:1])
    alone = score(replace(given, clean=one), bare, learned, KEY)
    assert alone[data.labels[0]].success is None, "there is no image of another label"


def test_the_rule_by_hand():
    scores = np.array([10.0, 11, 12, 13, 14, 1])
    alone = replace(CONFIG, scale="linear", ratio=1.0)
    index, flagged = stand_out(scores, alone)  # median 11.5, distances 1.5 .5 .5 1.5 2.5 10.5
    np.testing.assert_allclose(index, np.abs(scores - 11.5) / (1.4826 * 1.5))
    assert flagged == [5]
    assert stand_out(scores, replace(alone, ratio=0.5)).flagged == [5]
    assert stand_out(scores, replace(alone, ratio=0.08)).flagged == []
    scores[5] = 6  # an outlier of the MAD rule, but more than half of the median
    assert stand_out(scores, alone).flagged == [5]
    assert stand_out(scores, replace(alone, ratio=0.5)).flagged == []
    # Scores that differ by factors: on the linear scale no score at all would be low enough.
    wide = np.array([0.0, 1, 1.5, 2, 3, 4, 6])
    assert stand_out(wide, alone).flagged == [] and stand_out(wide, CONFIG).flagged == [0]
    logs = np.abs(np.log(wide[1:]) - np.log(2))
    expected = logs / (1.4826 * np.median(np.append(logs, 9)))
    np.testing.assert_allclose(stand_out(wide, CONFIG).index[1:], expected)


@pytest.mark.parametrize(
    ("kind", "failed", "labels", "flagged", "note"),
    [
        ("norm", (), np.arange(40) % 10, [9], None),
        ("norm", (9,), np.arange(40) % 10, [], "no trigger found for label 9: not judged"),
        ("norm", range(9), np.arange(40) % 10, [9], "7, 8: they count as out of reach"),
        ("loss", (), np.append(np.full(20, 9), np.arange(20) % 9), [], "label 9 not judged: half"),
        ("loss", (), np.arange(40) % 10, [9], None),
        ("loss", (), 5 + np.arange(40) % 5, [9], "no image of 5 of the 10 classes (0, 1, 2, 3, 4)"),
    ],
)
def test_labels_that_cannot_be_judged(monkeypatch, kind, failed, labels, flagged, note):
    """A generator that makes nothing for a label has a small norm for it."""
    values = [20.0, 21, 22, 23, 24, 25, 26, 27, 28, 2]
    found = [Score(v, v, 0.2 if i in failed else 0.9) for i, v in enumerate(values)]
    monkeypatch.setattr(module, "score", lambda *_: found)
    monkeypatch.setattr(module, "learn", lambda *_, **__: {})
    monkeypatch.setattr(module, "drawer", lambda *_: lambda *_: np.zeros((8, 32, 32, 1)))
    data = Dataset(np.full((40, 32, 32, 1), 0.5, np.float32), labels.astype(np.int32))
    params = {"w": np.zeros((1024, 10), np.float32)}
    told = deepinspect(
        lambda p, x: x.reshape(len(x), -1) @ p["w"], params, data, key=KEY,
        config=replace(CONFIG, score=kind, tuning=Tuning(epochs=1, optimizer=SGD(1e-6))),
    ).diagnostics  # fmt: skip
    assert told["flagged"] == flagged and told["scores"] == values
    assert "note" not in told if note is None else note in told["note"]
    json.dumps(dict(told), allow_nan=False)


def test_presets_are_those_of_the_specification():
    paper = PRESETS["paper"]("cifar10")
    assert paper.steps == 20 * (5000 // 32) and paper.batch_size == 32 and paper.rate == 1e-3
    assert (paper.squared, paper.penalty, paper.allowance) == (0, 0.02, 20)
    assert (paper.score, paper.scale, paper.threshold, paper.ratio) == ("loss", "linear", 2, 1)
    assert paper.share == 0.2 and paper.noise == 100 and paper.tuning == Tuning(epochs=1)
    assert next(iter(PRESETS)) == "cpu" and PRESETS["cpu"]("cifar10") == DeepInspectConfig()
    assert PRESETS["cpu"]("gtsrb").steps == 3 * DeepInspectConfig().steps  # 43 labels


# --- what is unlearned and shown


def test_stamps_have_noise_of_their_own(small):
    search, learned, variables, data = small
    config = DeepInspectConfig(batch_size=8)
    draw = drawer(job(search.model, variables, data, config), search, learned, KEY)
    images = np.full((20, 6, 5, 2), 0.5, np.float32)
    stamped = stamp(draw, 2, images)
    assert stamped.shape == images.shape and 0 <= stamped.min() and stamped.max() <= 1
    assert len(np.unique(stamped.reshape(20, -1), axis=0)) == 20
    np.testing.assert_allclose(stamped[8:16], np.clip(0.5 + draw(2, 1), 0, 1))
    assert np.abs(draw(2, 0) - draw(1, 0)).max() > 0.01


def test_pictures_are_of_the_flagged_and_of_the_lowest(small):
    search, learned, variables, data = small
    given = job(search.model, variables, data, DeepInspectConfig(batch_size=8))
    draw = drawer(given, search, learned, KEY)
    found = score(given, search, learned, KEY)
    shown = pictures(draw, found, np.array([3.0, 1.0, 2.0]), [0], most=2)
    names = list(shown)
    assert (
        len(names) == 2 and names[0].endswith(", flagged") and names[1].startswith("label 1: loss")
    )
    assert names[0] == f"label 0: loss {found[0].loss:.2f}, norm {found[0].norm:.1f}, flagged"
    np.testing.assert_array_equal(shown[names[1]], 0.5 + 0.5 * draw(1, 0)[0])


# --- what is refused


def test_wrong_input_is_refused(linear):
    logits, params, data = linear
    with pytest.raises(InputError, match="3 classes, more classes than the generator was built f"):
        deepinspect(logits, params, data, config=replace(QUICK, num_labels=2), key=KEY)
    with pytest.raises(InputError, match="loss in pass 2 is no longer.*a smaller one"):
        deepinspect(logits, params, data, config=replace(QUICK, rate=1e38), key=KEY)
    two = {"w": params["w"][:, :2], "b": params["b"][:2]}
    with pytest.raises(InputError, match="expected at least 3"):  # and before all the work
        data = Dataset(data.images, data.labels % 2)
        next(iter(deepinspect.run(logits, two, data, config=QUICK, key=KEY)))
    with pytest.raises(InputError, match="did you mean 'norm'"):
        DeepInspectConfig(score="norms")
    with pytest.raises(InputError, match="unknown scale 'square'"):
        DeepInspectConfig(scale="square")
    with pytest.raises(InputError, match="steps is 0: expected a positive number"):
        DeepInspectConfig(steps=0)
