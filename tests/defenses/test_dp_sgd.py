"""DP-SGD: the clipped, noisy mean against optax and by hand, its privacy, and what it learns."""

import subprocess
import sys
from dataclasses import replace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import on_devices
from scipy.special import gammaln, logsumexp

from ibau_jax import Dataset, InputError, load
from ibau_jax.attacks import make_attack, poison
from ibau_jax.defenses.dp_sgd import DPSGD, PRESETS, dp_sgd, epsilon, make_step
from ibau_jax.devices.mesh import devices
from ibau_jax.models.model import Classifier
from ibau_jax.results.metrics import evaluator
from ibau_jax.training.loop import Rows

KEY = jax.random.key(0)


class Small(nn.Module):
    """Batch norm and a dense layer: two arrays of each kind, gradients by hand."""

    width: int = 3

    @nn.compact
    def __call__(self, images, train=False):
        x = images.reshape(len(images), -1)
        x = nn.BatchNorm(use_running_average=not train, param_dtype=x.dtype, name="norm")(x)
        return nn.Dense(self.width, param_dtype=x.dtype, name="dense")(x)


def start(side, width, dtype=np.float32, seed=0):
    """Variables of `Small` for images of a size, with statistics that are not the identity."""
    rng = np.random.default_rng(seed)
    size = side * side * 3
    norm = {"scale": rng.uniform(0.5, 1.5, size), "bias": rng.normal(size=size)}
    kernel = rng.normal(size=(size, width)) / size**0.5
    variables = {
        "params": {"dense": {"kernel": kernel, "bias": np.zeros(width)}, "norm": norm},
        "batch_stats": {"norm": {"mean": norm["bias"], "var": norm["scale"]}},
    }
    return jax.tree.map(lambda a: a.astype(dtype), variables)


def make(count=8, side=2, width=3, dtype=np.float32):
    """A model, its variables and a batch of different gradients: some images are dark."""
    rng = np.random.default_rng(0)
    images = rng.uniform(size=(count, side, side, 3)) * rng.uniform(size=(count, 1, 1, 1))
    labels = rng.integers(0, width, count).astype(np.int32)
    data = Dataset(images.astype(dtype), labels)
    return Classifier(Small(width)), start(side, width, dtype), data


def walk(model, variables, data, config, steps=1):
    """Parameters after some steps on all of the data, on one device; and the losses."""
    noise = optax.contrib.differentially_private_aggregate(
        config.l2_norm_clip, config.noise_multiplier, KEY
    )
    fixed = {"batch_stats": variables["batch_stats"]}
    count = len(data.labels)
    step = jax.jit(make_step(model, fixed, config, noise, count))
    state, losses = (variables["params"], noise.init(variables["params"])), []
    for _ in range(steps):
        rows = Rows(np.arange(count)[None], None)
        state, loss = step(state, jnp.asarray(data.images), jnp.asarray(data.labels), rows, 0)
        losses.append(float(loss))
    return jax.tree.map(np.asarray, state[0]), losses


def close(one, two, **tolerance):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerance), one, two)


@pytest.mark.parametrize("chunk", [1, 3, None])
def test_steps_are_those_of_optax(x64, chunk):
    """Whatever the chunk (3 leaves a rest): its aggregate of all gradients, and plain SGD."""
    model, variables, data = make(dtype=np.float64)
    config = DPSGD(rate=0.3, l2_norm_clip=1.6, noise_multiplier=0.7, chunk=chunk)
    optimizer = optax.chain(
        optax.contrib.differentially_private_aggregate(1.6, 0.7, KEY), optax.sgd(0.3)
    )

    def loss(params, image, label):
        logits = model({**variables, "params": params}, image[None])[0]
        return optax.losses.softmax_cross_entropy_with_integer_labels(logits, label)

    params = variables["params"]
    state = optimizer.init(params)
    expected = []
    for _ in range(2):
        values, gradients = jax.vmap(jax.value_and_grad(loss), (None, 0, 0))(params, *data)
        updates, state = optimizer.update(gradients, state, params)
        params = optax.apply_updates(params, updates)
        expected.append(float(values.mean()))
    found, losses = walk(model, variables, data, config, steps=2)
    close(found, params, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(losses, expected, rtol=1e-10)


def test_the_clipped_mean_by_hand(x64):
    model, variables, data = make(dtype=np.float64)
    params = jax.tree.map(np.asarray, variables["params"])
    clip, rate = 1.6, 0.3
    total, norms = None, []
    for image, label in zip(*data, strict=True):
        mean, var = variables["batch_stats"]["norm"].values()
        x = (image.ravel() - mean) / np.sqrt(var + 1e-5)
        h = x * params["norm"]["scale"] + params["norm"]["bias"]
        z = h @ params["dense"]["kernel"] + params["dense"]["bias"]
        r = np.exp(z - z.max()) / np.exp(z - z.max()).sum() - np.eye(3)[label]
        to_h = params["dense"]["kernel"] @ r
        gradient = {
            "dense": {"kernel": np.outer(h, r), "bias": r},
            "norm": {"scale": to_h * x, "bias": to_h},
        }
        norms.append(np.sqrt(sum(np.sum(g**2) for g in jax.tree.leaves(gradient))))
        clipped = jax.tree.map(lambda g, n=norms[-1]: g * min(1, clip / n), gradient)
        total = clipped if total is None else jax.tree.map(np.add, total, clipped)
    assert min(norms) < 0.9 * clip < 1.1 * clip < max(norms), "both cases"
    expected = jax.tree.map(lambda p, g: p - rate * g / len(data.labels), params, total)
    config = DPSGD(rate=rate, l2_norm_clip=clip, noise_multiplier=0, chunk=2)
    close(walk(model, variables, data, config)[0], expected, rtol=1e-10, atol=1e-12)


def test_the_noise_has_the_deviation_sigma_times_clip(x64):
    model, variables, data = make(side=16, width=40, dtype=np.float64)
    rate, clip, sigma = 0.3, 0.5, 3.0
    config = DPSGD(rate=rate, l2_norm_clip=clip, noise_multiplier=sigma)
    quiet = replace(config, noise_multiplier=0)
    with_it, without = (walk(model, variables, data, c)[0] for c in (config, quiet))
    noise = jax.tree.map(lambda a, b: (a - b) * len(data.labels) / rate, with_it, without)
    kernel = noise["dense"]["kernel"]  # 30720 numbers: 0.4 %
    np.testing.assert_allclose(kernel.std(), sigma * clip, rtol=0.02)
    assert abs(kernel.mean()) < 0.03
    assert all(np.abs(n).min() > 0 for n in jax.tree.leaves(noise))
    scale, bias = noise["norm"]["scale"], noise["norm"]["bias"]
    assert abs(np.corrcoef(scale, bias)[0, 1]) < 0.15, "each array has its own"
    again = walk(model, variables, data, config, steps=2)[0]
    second = jax.tree.map(lambda a, b: (a - b) * len(data.labels) / rate, again, with_it)
    assert abs(np.corrcoef(second["dense"]["kernel"].ravel(), kernel.ravel())[0, 1]) < 0.05


def test_only_a_chunk_of_gradients_exists():
    model, variables, data = make(count=64, side=16, width=40)
    noise = optax.contrib.differentially_private_aggregate(1.0, 1.0, KEY)
    state = variables["params"], noise.init(variables["params"])
    rows = Rows(np.arange(64)[None], None)

    def memory(chunk):
        step = make_step(
            model, {"batch_stats": variables["batch_stats"]}, DPSGD(chunk=chunk), noise, 64
        )
        program = jax.jit(step).lower(state, *data, rows, 0).compile()
        return program.memory_analysis().temp_size_in_bytes

    gradient = sum(p.nbytes for p in jax.tree.leaves(variables["params"]))
    assert memory(64) > 60 * gradient and memory(4) < 16 * gradient


def test_it_trains_anew_with_identity_statistics():
    model, variables, data = make(count=24)
    config = DPSGD(epochs=3, batch_size=10, noise_multiplier=0.5)
    other = jax.tree.map(lambda a: a + np.float32(0.5), variables)
    run = dict(config=config, key=KEY, train_set=data)
    running = dp_sgd.run(model, variables, data, **run)
    seen = [record.row for record in running]
    first = running.result()
    second = dp_sgd(model, other, data, **run, evaluate=lambda v: v["batch_stats"]["norm"])
    close(first.params, second.params, rtol=0)  # nothing is left of the given values
    loud = replace(config, noise_multiplier=100.0, l2_norm_clip=0.5)
    third = dp_sgd(model, variables, data, **{**run, "config": loud})
    moved = jax.tree.map(jnp.subtract, third.params["params"], first.params["params"])
    moved = np.concatenate([m.ravel() for m in jax.tree.leaves(moved)])  # 63 numbers: 9 %
    np.testing.assert_allclose(moved.std(), 0.15 / 10 * (100 - 1) * 0.5 * 6**0.5, rtol=0.25)
    fourth = dp_sgd(model, variables, data, **{**run, "key": jax.random.key(1)})
    kernels = (result.params["params"]["dense"]["kernel"] for result in (first, fourth))
    assert (next(kernels) != next(kernels)).any()
    statistics = first.params["batch_stats"]["norm"]
    assert (statistics["mean"] == 0).all() and (statistics["var"] == 1).all()
    assert all((p != 0).all() for p in jax.tree.leaves(first.params["params"]["norm"])), "trained"
    assert (seen[0]["round"], len(seen), [r["round"] for r in first.history]) == (0, 4, [1, 2, 3])
    assert all(np.isfinite(r["loss"]) and r["seconds"] > 0 for r in first.history)
    same = jax.tree.map(
        lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype), first.params, variables
    )
    assert all(jax.tree.leaves(same))
    assert (second.history[0]["mean"] == 0).all()
    found = dict(first.diagnostics)
    np.testing.assert_allclose(found.pop("epsilon"), epsilon(0.5, 10 / 24, 6))
    assert found == {
        "delta": 1e-5,
        "noise_multiplier": 0.5,
        "l2_norm_clip": 1.0,
        "steps": 6,
        "sampling_probability": 10 / 24,
        "batch_norm": "frozen at identity",
    }


def on_many_devices():
    """Run in a process of its own: the same on 1 device and on 4, noise included."""
    jax.config.update("jax_enable_x64", True)
    model, variables, data = make(count=24, dtype=np.float64)
    config = DPSGD(epochs=2, batch_size=10, noise_multiplier=0.5, chunk=2)
    one, four = (
        dp_sgd(model, variables, data, config=config, key=KEY, train_set=data, devices=devices(n))
        for n in (1, 4)  # 10 rows: 3, 3, 2, 2 in chunks of 2
    )
    close(four.params, one.params, rtol=1e-10, atol=1e-12)
    losses = ([record["loss"] for record in result.history] for result in (one, four))
    np.testing.assert_allclose(*losses, rtol=1e-10)


def test_many_devices_are_as_one():
    done = subprocess.run(
        [sys.executable, __file__],
        env=on_devices(4),
        capture_output=True,
        text=True,
    )
    assert not done.returncode, done.stderr


def renyi(sigma, q, order):
    """Of the Gaussian mechanism on Poisson samples, at an integer order (Mironov et al. 2019)."""
    k = np.arange(order + 1)
    log_binomial = gammaln(order + 1) - gammaln(k + 1) - gammaln(order - k + 1)
    terms = log_binomial + k * np.log(q) + (order - k) * np.log1p(-q) + k * (k - 1) / (2 * sigma**2)
    return logsumexp(terms) / (order - 1)


def test_privacy():
    """Values from the tests of TensorFlow Privacy, and by hand for its tutorial on MNIST."""
    np.testing.assert_allclose(epsilon(1.3, 150 / 60000, 15 * 400), 0.7242234026109595, rtol=1e-6)
    sigma, q, steps = 1.1, 256 / 60000, 60 * 60000 // 256
    classical, improved = [], []
    for order in range(2, 64):
        loss = steps * renyi(sigma, q, order)
        classical.append(loss + np.log(1e5) / (order - 1))
        # Canonne, Kamath, Steinke 2020, proposition 12
        improved.append(loss + np.log1p(-1 / order) - np.log(1e-5 * order) / (order - 1))
    assert abs(min(classical) - 3.01) < 0.01, "the tutorial's value, by the older conversion"
    found = epsilon(sigma, q, steps)
    assert found is not None and min(improved) - 0.01 < found <= min(improved)
    assert epsilon(0.0, q, steps) is None


def test_it_learns_digits_where_the_noise_is_small():
    attack = make_attack("badnets", 10)
    poisoned, _ = poison(load("digits", "train"), attack, 0.2)
    clean, held_out = load("digits", "test[:50]"), load("digits", "test[400:]")
    model, variables = Classifier(Small(10)), start(32, 10)
    measure = evaluator(model, held_out, [attack])
    config = DPSGD(epochs=6, batch_size=50, noise_multiplier=0.5, chunk=50)
    result = dp_sgd(
        model,
        variables,
        clean,
        config=config,
        key=KEY,
        train_set=poisoned,
        evaluate=lambda v: measure(v).row(),
    )
    last = result.history[-1]
    assert last["acc"] > 0.5 and last["loss"] < 0.6 * result.history[0]["loss"]
    assert last["asr"] > 0.9, "so little noise does not keep the backdoor out"


def test_presets():
    assert set(PRESETS) == {"cpu", "paper"} and next(iter(PRESETS)) == "cpu"
    for preset in PRESETS.values():
        sigmas = [preset(name).noise_multiplier for name in ("cifar10", "digits", "gtsrb")]
        assert sigmas == [50.0, 50.0, 1.5]
    paper = PRESETS["paper"]("gtsrb")
    assert (paper.epochs, paper.batch_size, paper.rate, paper.l2_norm_clip) == (60, 200, 0.15, 1.0)
    assert PRESETS["cpu"]("cifar10") == DPSGD()


def test_wrong_input(linear):
    model, variables, data = make()
    with pytest.raises(InputError, match="expected train_set, found none"):
        dp_sgd(model, variables, data, key=KEY)
    with pytest.raises(InputError, match="dp-sgd initialises the network anew.*plain function"):
        dp_sgd(*linear, key=KEY, train_set=linear[2])
    pixels = Dataset((data.images * 255).astype(np.uint8), data.labels)
    with pytest.raises(InputError, match="train_set: training images are uint8.*divide"):
        dp_sgd(model, variables, data, key=KEY, train_set=pixels)
    with pytest.raises(InputError, match="^clean images are uint8"):
        dp_sgd(model, variables, pixels, key=KEY, train_set=data)
    for name, value in (("noise_multiplier", -1), ("l2_norm_clip", np.inf), ("chunk", 0)):
        with pytest.raises(InputError, match=f"{name} is {value}: expected a"):
            DPSGD(**{name: value})


def test_lost_parameters_are_told():
    model, variables, data = make()
    config = DPSGD(epochs=3, rate=1e38, noise_multiplier=50.0)
    with pytest.raises(InputError, match="no longer finite.*1e\\+38 and 50: choose"):
        dp_sgd(model, variables, data, config=config, key=KEY, train_set=data)


if __name__ == "__main__":
    on_many_devices()
