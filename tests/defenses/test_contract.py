"""One contract for all defenses of the table, and any added later."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import MODEL, SQUARE, clean, measure, same, small_digits, small_model

from ibau_jax import Dataset, IBAUConfig, InputError, unlearn
from ibau_jax.attacks import poison
from ibau_jax.defenses import DEFENSES
from ibau_jax.defenses.anp import ANPConfig
from ibau_jax.defenses.dp_sgd import DPSGD
from ibau_jax.defenses.fine_pruning import FinePruningConfig
from ibau_jax.defenses.finetune import Tuning, finetune
from ibau_jax.defenses.ft_sam import FTSAMConfig
from ibau_jax.defenses.inversion.deepinspect import DeepInspectConfig
from ibau_jax.defenses.inversion.neural_cleanse import NeuralCleanseConfig
from ibau_jax.defenses.inversion.tabor import TaborConfig
from ibau_jax.defenses.nad import NADConfig
from ibau_jax.defenses.naive import Naive
from ibau_jax.defenses.sau import SAUConfig
from ibau_jax.training.optimizers import SGD, Adam

KEY = jax.random.key(0)
ONE = Tuning(epochs=1, batch_size=32)
# So low a threshold flags labels, which are unlearned then; any trigger counts as found.
SEARCH = {
    "steps": 3, "batches": 1, "labels_at_once": 4, "success": 0.0, "threshold": 0.1, "tuning": ONE
}  # fmt: skip
QUICK = {  # of defenses that take long, settings for the contract
    "ibau": replace(
        IBAUConfig.untargeted(), rounds=2, batch_size=40, inner_steps=5, radius=2.0, microbatch=None
    ),
    "finetune": ONE,
    "neural-cleanse": NeuralCleanseConfig(**SEARCH),
    "tabor": TaborConfig(**SEARCH, gap=0.0),
    "deepinspect": DeepInspectConfig(
        steps=12, rate=7e-3, score_images=40, threshold=0.1, ratio=1.0, tuning=ONE
    ),
    "fine-pruning": FinePruningConfig(tuning=ONE),
    "nad": NADConfig(  # mirrored digits are other pictures
        betas=(500.0, 1000.0), teacher=ONE, student=ONE, crop=0, flip=False, cutout=0
    ),
    "dp-sgd": DPSGD(epochs=2, batch_size=50, noise_multiplier=0.1),
    "ft-sam": FTSAMConfig(tuning=ONE, crop=0, flip=False),
    "sau": SAUConfig(tuning=replace(ONE, optimizer=Adam(1e-4))),
    "anp": ANPConfig(steps=20),
    "naive": Naive(rounds=2, images=20, batch_size=40, share=0.1),
}


def mixed() -> dict:
    """A model with a backdoor, its arrays in all sorts of dtypes."""
    kinds = iter((np.float16, np.float64, jnp.bfloat16, np.float32) * 10)
    return jax.tree.map(lambda a: np.asarray(a).astype(next(kinds)), small_model(0, True))


def awkward() -> Dataset:
    """A clean set as people have it: sorted by class, as a folder of images is, other dtypes."""
    data = clean()
    order = np.argsort(data.labels, kind="stable")
    return Dataset(data.images[order].astype(np.float64), data.labels[order].astype(np.uint8))


def run(name: str, variables=None, data=None, key=KEY, **more):
    if DEFENSES[name].train_set:
        more["train_set"] = poison(small_digits("train"), SQUARE, 0.2, 0)[0]
    variables = mixed() if variables is None else variables
    data = awkward() if data is None else data
    config = QUICK.get(name)  # of those that are quick anyway: none
    return DEFENSES[name].method.run(MODEL, variables, data, config=config, key=key, **more)


@pytest.mark.parametrize("name", DEFENSES)
def test_contract(name):
    given, variables, seen, kept = mixed(), mixed(), [], []
    running = run(name, variables)
    for record in running:
        record.row["acc"] = measure(record.params)["acc"]
        kept.append(record.params)
        seen.append(record.row)
    found = running.result(evaluate=lambda params: {"loss": 0.0})
    # records
    assert [r["round"] for r in seen] == list(range(len(seen))) and found.history == seen[1:]
    assert len(seen) > 1 and all({"acc", "seconds"} <= set(r) for r in seen)
    assert found.seconds == pytest.approx(sum(r["seconds"] for r in seen)) and found.seconds > 0
    assert found.compile_seconds > 0 or name == "clp"  # which trains nothing
    assert found.deltas.ndim == 4
    json.dumps([dict(found.diagnostics), found.history], allow_nan=False)
    for picture in found.found.values():
        assert picture.shape == (16, 16, 1) and 0 <= picture.min() <= picture.max() <= 1
    # the model as it was given is not touched; what comes back has its structure and dtypes
    same(variables, given)
    kinds = [jax.tree.map(lambda a: (a.shape, a.dtype), p) for p in (found.params, given)]
    assert kinds[0] == kinds[1]
    # what is not trained is state (the others train batch norm, as in training)
    if name in ("ibau", "naive"):
        same(found.params["batch_stats"], given["batch_stats"])
    # what was given of a round is valid after the run, so the best one can be kept
    same(kept[0], given)
    assert [measure(params)["acc"] for params in kept] == [r["acc"] for r in seen]
    same(kept[-1], found.params)
    # a set that is sorted by class does no harm
    assert seen[0]["acc"] > 0.95
    assert seen[-1]["acc"] > 0.85 or DEFENSES[name].train_set  # those train anew
    # the seed decides, and nothing else
    same(run(name).result().params, found.params)
    other = run(name, key=jax.random.key(1)).result()
    kernels = [np.asarray(r.params["params"]["conv2"]["kernel"], float) for r in (other, found)]
    moved = np.abs(kernels[0] - kernels[1]).max() > 0
    if name in ("anp", "clp"):  # they only cut channels; in clp nothing is random
        moved = name == "clp" or other.diagnostics["masks"] != found.diagnostics["masks"]
    assert moved


def broken(what: str) -> tuple[dict, Dataset]:
    variables, data = jax.tree.map(np.array, small_model(0, True)), clean()
    images, labels = np.array(data.images), np.array(data.labels)
    match what:
        case "pixels":
            images = np.rint(images * 255).astype(np.uint8)
        case "0 to 255":
            images = images * 255
        case "normalised":
            images = (images - 0.5) / 0.25
        case "divided twice":
            images = images / 255
        case "not a number":
            images[3, 2, 2] = np.nan
        case "one image":
            images = images[0]
        case "no image":
            images, labels = images[:0], labels[:0]
        case "another size":
            images = images[:, :12, :12]
        case "labels from 1":
            labels = labels + 1
        case "labels beyond 32 bits":
            labels = labels.astype(np.int64) + 2**32
        case "labels as floats":
            labels = labels.astype(float)
        case "too few labels":
            labels = labels[:-1]
        case "broken weights":
            variables["params"]["conv1"]["kernel"][0] = np.inf
        case "integer weights":
            variables["params"]["conv1"]["bias"] = np.zeros(8, int)
        case "parameters without state":
            variables = variables["params"]
    return variables, Dataset(images, labels)


REFUSED = {
    "pixels": "images are uint8: expected float32 in .0, 1.; divide pixels by 255",
    "0 to 255": "images range from 0 to 255: expected values in .0, 1. .* divide pixels by 255",
    "normalised": "images range from -2 to 2: .* leave out any normalisation",
    "divided twice": "divide pixels by 255 only once",
    "not a number": "images range from nan",
    "one image": "images have shape .16, 16, 1.: expected .N, H, W, C.",
    "no image": "set is empty: expected at least one image",
    "another size": "the model refuses images of shape .1, 12, 12, 1.",
    "labels from 1": "labels range from 1 to 10, but the model has 10 classes",
    "labels beyond 32 bits": "labels range from 4294967296 to 4294967305: expected classes",
    "labels as floats": "labels are float64 .400,.: expected integers",
    "too few labels": "labels are int32 .399,.: expected integers of shape .400,.",
    "broken weights": "conv1.*kernel.* holds NaN or infinite values",
    "integer weights": "conv1.*bias.* is int64: expected an array of floating point",
    "parameters without state": "no collection 'params' .found .'classifier', 'conv1'",
}


@pytest.mark.parametrize("what", REFUSED)
@pytest.mark.parametrize("name", DEFENSES)
def test_refusals_in_one_line(name, what):
    variables, data = broken(what)
    with pytest.raises(InputError, match=REFUSED[what]) as refused:
        next(iter(run(name, variables, data)))  # before the first measurement
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", DEFENSES)
def test_an_unknown_argument_is_refused(name):
    with pytest.raises(TypeError, match="unknown argument 'on_round'"):
        run(name, on_round=print)


@pytest.mark.parametrize("name", DEFENSES)
def test_statistics_are_not_trained_unnoticed(name):
    """A plain function of flax variables would have its running statistics trained as weights."""
    with pytest.raises(InputError, match="batch_stats|Classifier"):
        DEFENSES[name].method(MODEL.module.apply, small_model(0, True), clean(), key=KEY)


def test_a_sorted_clean_set_is_shuffled():
    """Cut in its order it makes batches of one class, and the last one decides."""
    labels = np.repeat(np.arange(4, dtype=np.int32), 10)
    noise = np.random.default_rng(0).uniform(0, 0.5, (40, 2, 2, 1)).astype(np.float32)
    images = noise + 0.5 * np.eye(4, dtype=np.float32)[labels].reshape(40, 2, 2, 1)

    def logits(params, images):
        return images.reshape(len(images), -1) @ params

    def accuracy(shuffle: bool) -> float:
        config = replace(
            IBAUConfig.untargeted(), rounds=1, batch_size=10, shuffle=shuffle, inner_steps=2,
            radius=0.01, microbatch=None, outer_optimizer=SGD(10.0),
        )  # fmt: skip
        params = np.zeros((4, 4), np.float32)
        found = unlearn(logits, params, Dataset(images, labels), config=config, key=KEY).params
        return float(np.mean(np.argmax(logits(found, images), -1) == labels))

    assert accuracy(shuffle=True) > 0.9 > 0.5 > accuracy(shuffle=False)


@pytest.mark.parametrize("kind", [np.float16, jnp.bfloat16, np.float32, np.float64])
@pytest.mark.parametrize("name", ["ibau", "finetune", "naive"])
def test_a_plain_function_sees_and_keeps_its_precision(name, kind, linear):
    logits, params, data = linear
    given = jax.tree.map(lambda a: np.asarray(a, kind), params)
    seen = set()

    def strict(params, images):
        seen.add((params["w"].dtype, images.dtype))
        return logits(params, images)

    data = Dataset(data.images.tolist(), data.labels.tolist())
    config = {
        "ibau": replace(IBAUConfig.untargeted(), rounds=1, batch_size=8, inner_steps=2),
        "finetune": replace(ONE, batch_size=8),
        "naive": Naive(rounds=1, images=8, batch_size=8),
    }[name]
    found = DEFENSES[name].method(strict, given, data, config=config, key=KEY)
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(found.params)} == {np.dtype(kind).name}
    assert np.abs(np.float32(found.params["w"]) - np.float32(given["w"])).max() > 0
    # float64 is computed in float32 where JAX is not set to it
    narrow = {np.dtype(jnp.float32 if kind == np.float64 else kind)}
    assert {p for p, _ in seen} <= narrow | {np.dtype(kind)} and {i for _, i in seen} == {
        np.dtype(np.float32)
    }


def test_small_steps_are_not_lost_in_16_bits(linear):
    """A hundred steps of 1e-4 from weights near 1, where bfloat16 has a spacing of 8e-3."""
    logits, params, data = linear
    given = {"w": jnp.ones((60, 3), jnp.bfloat16), "b": jnp.zeros(3, jnp.bfloat16)}
    config = Tuning(epochs=34, batch_size=8, optimizer=Adam(1e-4))
    moved = finetune(logits, given, data, config=config, key=KEY).params["w"] - given["w"]
    assert np.abs(np.float32(moved)).max() >= 2**-8


@pytest.mark.parametrize("kind", [np.int8, np.int64, np.uint8, np.uint64])
def test_labels_of_any_integers(kind, linear):
    logits, params, data = linear
    one, two = (
        finetune(logits, params, Dataset(data.images, labels), config=ONE, key=KEY).params
        for labels in (data.labels, data.labels.astype(kind))
    )
    same(one, two)
