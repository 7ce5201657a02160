"""I-BAU on small models: presets, balls, partial batches, one compilation, bad input."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ibau_jax import Dataset, IBAUConfig, InputError, unlearn
from ibau_jax.hypergradient import Direct, Neumann
from ibau_jax.models.convolution import convolve
from ibau_jax.models.model import evaluation_logits
from ibau_jax.models.vgg import VGG
from ibau_jax.training.optimizers import SGD, Adam
from ibau_jax.unlearning.batches import Batch, make_batches, resolve
from ibau_jax.unlearning.config import PRESETS, Relative
from ibau_jax.unlearning.ibau import ibau
from ibau_jax.unlearning.objective import clip_images, make_loss, patch

KEY = jax.random.key(0)
SMALL = replace(IBAUConfig.untargeted(), rounds=2, batch_size=8, inner_steps=4, hessian_images=4)


def poisoned_mlp(seed=0):
    """A two-layer network trained in NumPy terms only (optax), with a backdoor; images 7x6x1.

    Class 0 is dark, class 1 is bright; the trigger is one white corner, its target class 0.
    """
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, 400)
    base = np.where(labels == 1, 0.6, 0.2)[:, None, None, None]
    images = np.clip(base + rng.normal(scale=0.1, size=(400, 7, 6, 1)), 0, 1).astype(np.float32)

    def stamp(x):
        x = np.array(x)
        x[:, :2, :2] = 1
        return x

    def logits(params, x):
        hidden = jnp.tanh(x.reshape(len(x), -1) @ params[0] + params[1])
        return hidden @ params[2] + params[3]

    params = [rng.normal(size=s).astype(np.float32) * 0.3 for s in ((42, 16), 16, (16, 2), 2)]
    train = np.concatenate([images[:200], stamp(images[:200])])
    goal = np.concatenate([labels[:200], np.zeros(200, int)])
    optimizer = optax.adam(1e-2)

    @jax.jit
    def fit(params):
        def step(carry, _):
            p, s = carry

            def loss(p):
                return optax.losses.softmax_cross_entropy_with_integer_labels(
                    logits(p, train), goal
                ).mean()

            updates, s = optimizer.update(jax.grad(loss)(p), s)
            return (optax.apply_updates(p, updates), s), None

        return jax.lax.scan(step, (params, optimizer.init(params)), length=300)[0][0]

    return logits, fit(params), Dataset(images[200:], labels[200:].astype(np.int32)), stamp


def rates(logits, params, data, stamp):
    acc = np.mean(np.argmax(logits(params, data.images), -1) == data.labels)
    bright = data.images[data.labels == 1]
    return float(acc), float(np.mean(np.argmax(logits(params, stamp(bright)), -1) == 0))


def test_cleans_a_model_that_is_not_of_this_package():
    logits, params, data, stamp = poisoned_mlp()
    clean = Dataset(data.images[:100], data.labels[:100])
    held_out = Dataset(data.images[100:], data.labels[100:])
    acc, asr = rates(logits, params, held_out, stamp)
    assert acc > 0.95 and asr > 0.95
    config = replace(
        IBAUConfig.untargeted(),
        rounds=20,
        batch_size=20,
        radius=1.0,
        share=0.1,
        outer_optimizer=Adam(1e-2, schedule="cosine", clip=1.0),
    )
    run, seen = unlearn.run(logits, params, clean, config=config, key=KEY), []
    for record in run:
        acc_asr = rates(logits, record.params, held_out, stamp)
        record.row.update(zip(("acc", "asr"), acc_asr, strict=True))
        seen.append(record.row)
    result = run.result()
    assert seen[0]["round"] == 0 and seen[0]["asr"] == asr
    assert seen[1:] == result.history and len(result.history) == 20
    assert result.history[-1]["acc"] >= acc - 0.03
    assert result.history[-1]["asr"] <= 0.1
    assert all(r["delta_norm"] <= 1.0 + 1e-4 for r in result.history)
    assert result.deltas.shape == (20, 7, 6, 1)
    assert jax.tree.structure(result.params) == jax.tree.structure(params)


def test_default_is_the_config_of_no_argument():
    assert PRESETS["default"]("cifar10") == IBAUConfig()
    assert unlearn.config == IBAUConfig()


def test_a_config_that_searches_needs_what_was_found(linear):
    logits, params, clean = linear
    config = resolve(IBAUConfig(), logits, params, clean.images)
    batches, sizes = make_batches(clean, config)
    with pytest.raises(InputError, match=r"take IBAUConfig.untargeted\(\) for Algorithm 1 alone"):
        ibau(logits, config, len(sizes)).ascend(params, batches, 0)


def test_published_is_every_row_of_the_table():
    cifar, gtsrb = IBAUConfig.published("cifar10"), IBAUConfig.published("gtsrb")
    assert (cifar.inner_labels, cifar.inner_optimizer) == ("predicted", SGD(10))
    assert (cifar.inner_steps, cifar.batch_size, cifar.penalty) == (None, 100, 0.001)
    assert (cifar.project, cifar.radius, cifar.norm, cifar.clip) == ("at-end", 10, "l2", False)
    assert (cifar.share, cifar.hessian, cifar.hessian_images) == (0.01, "first", None)
    assert cifar.solver == Neumann(terms=5, step=0.1)
    assert cifar.outer_optimizer == Adam(1e-3)
    assert (cifar.rounds, cifar.outer_steps) == (1, None)
    assert gtsrb == replace(cifar, inner_optimizer=Adam(1.0), clip=True)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_run_and_are_reproducible(name, linear):
    logits, params, clean = linear
    config = replace(PRESETS[name]("cifar10"), rounds=1, batch_size=8)
    one, two = (unlearn(logits, params, clean, config=config, key=KEY) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, one.params, two.params)
    moved = jax.tree.map(lambda a, b: np.abs(np.asarray(a) - b).max(), one.params, params)
    assert all(x > 0 for x in jax.tree.leaves(moved))
    assert np.isfinite(one.history[0]["outer_loss"]) and one.history[0]["seconds"] > 0


def test_one_compilation_for_all_rounds(linear):
    logits, params, clean = linear
    traces = []

    def counted(p, x):
        traces.append(x.shape)
        return logits(p, x)

    config = replace(SMALL, rounds=4, outer_steps=2)
    run = unlearn.run(counted, params, clean, config=config, key=KEY)
    at_round = [len(traces) for _ in run]
    assert 0 < at_round[1] == at_round[-1] == len(traces)


def test_routes_give_the_same_parameters(linear, x64):
    logits, params, clean = linear
    params = jax.tree.map(lambda a: a.astype(np.float64), params)
    clean = Dataset(clean.images.astype(np.float64), clean.labels)
    one, two = (
        unlearn(logits, params, clean, config=replace(SMALL, route=route), key=KEY).params
        for route in ("explicit", "jaxopt")
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-10), one, two)


@pytest.mark.parametrize("microbatch", [1, 2, 3, 8, None])
def test_microbatches_change_nothing(linear, microbatch, x64):
    logits, params, clean = linear
    params = jax.tree.map(lambda a: a.astype(np.float64), params)
    clean = Dataset(clean.images[:21].astype(np.float64), clean.labels[:21])  # 8 + 8 + 5
    config = replace(SMALL, solver=Neumann(3, 0.1), hessian_images=None)
    # Padding changes the shape that the patched images are drawn in, so patch all of them.
    config = replace(config, share=1.0)
    whole = unlearn(logits, params, clean, config=replace(config, microbatch=None), key=KEY)
    split = unlearn(logits, params, clean, config=replace(config, microbatch=microbatch), key=KEY)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-11),
        whole.params,
        split.params,
    )


@given(count=st.integers(1, 40), batch=st.integers(1, 16), micro=st.sampled_from([None, 1, 3, 10]))
def test_batches_hold_each_image_once(count, batch, micro):
    images = np.linspace(0, 1, count, dtype=np.float32).reshape(-1, 1, 1, 1)
    batch = min(batch, count)
    config = replace(IBAUConfig.untargeted(), batch_size=batch, microbatch=micro)
    stack, sizes = make_batches(Dataset(images, np.arange(count)), config)
    real = np.asarray(stack.weights) > 0
    np.testing.assert_array_equal(np.asarray(stack.labels)[real], np.arange(count))
    np.testing.assert_allclose(stack.weights.sum(1), 1, rtol=1e-6)
    np.testing.assert_array_equal(real.sum(1), sizes)
    assert stack.weights.shape[1] % (micro or 1) == 0


@given(real=st.integers(1, 30), share=st.floats(0.001, 1), seed=st.integers(0, 99))
def test_at_least_one_real_image_is_patched(real, share, seed):
    weights = np.r_[np.full(real, 1 / real), np.zeros(5)].astype(np.float32)
    batch = Batch(np.zeros((real + 5, 1, 1, 1)), np.zeros(real + 5), weights, 0 * weights)
    patched = np.asarray(patch(jax.random.key(seed), batch, share).patched)
    assert patched[real:].sum() == 0
    assert patched.sum() == max(1, int(share * real + 1e-4))


def test_published_share_of_a_batch_of_100_is_one_image():
    weights = np.full(100, 0.01, np.float32)
    batch = Batch(np.zeros((100, 1, 1, 1)), np.zeros(100), weights, 0 * weights)
    assert patch(KEY, batch, 0.01).patched.sum() == 1


@pytest.mark.parametrize("norm", ["l2", "linf"])
@pytest.mark.parametrize("optimizer", [Relative(0.4), SGD(0.4), Adam(0.4), optax.adam(0.4)])
def test_ascent_stays_in_the_ball_and_raises_the_loss(linear, norm, optimizer):
    logits, params, clean = linear
    config = replace(SMALL, norm=norm, radius=0.5, inner_optimizer=optimizer, inner_steps=9)
    batches, sizes = make_batches(clean, config)
    delta, _ = ibau(logits, config, len(sizes)).ascend(params, batches, 0)
    assert 0 < config.ball.size(delta) <= 0.5 + 1e-6
    loss = make_loss(logits, config)
    whole = jax.tree.map(lambda a: a[0], batches)._replace(patched=jnp.ones(8))
    assert loss(delta, params, whole) > loss(0 * delta, params, whole)


@given(norm=st.sampled_from(["l2", "linf"]), radius=st.floats(0.01, 5), seed=st.integers(0, 99))
def test_projection(norm, radius, seed):
    config = replace(SMALL, norm=norm, radius=radius)
    delta = np.random.default_rng(seed).normal(size=(4, 4, 1)).astype(np.float32)
    inside = config.ball.project(delta)
    assert config.ball.size(inside) <= radius * (1 + 1e-5)
    np.testing.assert_allclose(config.ball.project(inside), inside, rtol=1e-5)
    if config.ball.size(delta) <= radius:
        np.testing.assert_array_equal(inside, delta)
    assert not np.asarray(config.ball.project(jnp.zeros(3))).any()


def test_clipping_passes_the_gradient_at_the_border():
    x = jnp.array([-0.5, 0.0, 0.4, 1.0, 1.5])
    np.testing.assert_array_equal(clip_images(x), jnp.clip(x, 0, 1))
    slope = jax.grad(lambda x: clip_images(x).sum())(x)
    np.testing.assert_array_equal(slope, [0, 1, 1, 1, 0])


def test_the_outer_step_descends(linear):
    """Direct gradient, plain SGD: one step is params - rate * gradient of the patched loss."""
    logits, params, clean = linear
    config = replace(SMALL, solver=Direct(), share=1.0, outer_optimizer=SGD(0.1))
    batches, sizes = make_batches(clean, config)
    delta = 0.1 * jnp.ones(clean.images.shape[1:])
    algorithm = ibau(logits, config, len(sizes))
    state, step = algorithm.descend(algorithm.init(params, KEY), delta, batches, 1)
    new = state.params

    def loss(p):
        images = jnp.clip(clean.images[8:16] + delta, 0, 1)
        return optax.losses.softmax_cross_entropy_with_integer_labels(
            logits(p, images), clean.labels[8:16]
        ).mean()

    np.testing.assert_allclose(step.loss, loss(params), rtol=1e-5)
    expected = jax.tree.map(lambda p, g: p - 0.1 * g, params, jax.grad(loss)(params))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), new, expected)


@pytest.mark.parametrize(
    ("count", "batch_size", "rounds"), [(5000, 100, 2), (400, 40, 8), (100, 10, 8), (3, 3, 80)]
)
def test_small_clean_sets_get_more_rounds_and_smaller_batches(linear, count, batch_size, rounds):
    logits, params, clean = linear
    images = np.repeat(clean.images[:1], count, axis=0)
    found = resolve(IBAUConfig(), logits, params, images)
    assert (found.batch_size, found.rounds) == (batch_size, rounds)
    fixed = resolve(IBAUConfig.published(), logits, params, images)
    assert (fixed.batch_size, fixed.rounds) == (min(100, count), 1)


def test_a_model_with_lax_conv_is_not_put_into_a_loop_on_a_cpu():
    def convolution(params, x):
        return convolve(x, params, "lax").mean((1, 2))

    def products(params, x):
        return convolve(x, params, "patches").mean((1, 2))

    kernel, images = np.zeros((3, 3, 3, 4), np.float32), np.zeros((200, 8, 8, 3), np.float32)
    assert resolve(IBAUConfig(), convolution, kernel, images).microbatch is None
    expected = 10 if jax.default_backend() == "cpu" else None
    assert resolve(IBAUConfig(), products, kernel, images).microbatch == expected


def test_where_it_searches_the_radius_follows_the_size_of_the_images():
    def logits(params, images):
        return images.mean((1, 2)) * params

    for config, wanted in ((IBAUConfig(), (10, 20)), (IBAUConfig.untargeted(), (10, 10))):
        for side, radius in zip((32, 64), wanted, strict=True):
            images = np.zeros((20, side, side + 9, 3), np.float32)
            assert resolve(config, logits, np.ones(3, np.float32), images).radius == radius


def test_a_clean_set_smaller_than_a_batch_works(linear):
    logits, params, clean = linear
    few = Dataset(clean.images[:3], clean.labels[:3])
    result = unlearn(logits, params, few, config=replace(SMALL, batch_size=100), key=KEY)
    assert result.history[-1]["outer_loss"] > 0


BAD_CLEAN = {
    "0 to 255|range from": lambda c: Dataset(c.images * 255, c.labels),
    "divide pixels by 255": lambda c: Dataset((c.images * 255).astype(np.uint8), c.labels),
    "NaN": lambda c: Dataset(c.images * np.nan, c.labels),
    r"\[N, H, W, C\]": lambda c: Dataset(c.images[0], c.labels),
    "empty": lambda c: Dataset(c.images[:0], c.labels[:0]),
    "refuses images of shape": lambda c: Dataset(c.images[:, 1:], c.labels),
    "3 classes": lambda c: Dataset(c.images, c.labels + 2),
    "integers of shape": lambda c: Dataset(c.images, c.labels[:5]),
}


@pytest.mark.parametrize("message", BAD_CLEAN)
def test_bad_clean_sets_are_refused(linear, message):
    logits, params, clean = linear
    with pytest.raises(InputError, match=message):
        unlearn(logits, params, BAD_CLEAN[message](clean), key=KEY)


def test_bad_parameters_are_refused(linear):
    logits, params, clean = linear
    with pytest.raises(InputError, match="'b'.*NaN"):
        unlearn(logits, params | {"b": params["b"] * np.nan}, clean, key=KEY)


@pytest.mark.parametrize(
    ("field", "value"),
    [("rounds", 0), ("share", 0.0), ("radius", -1.0), ("norm", "l3"), ("microbatch", 0)],
)
def test_bad_settings_are_refused(field, value):
    with pytest.raises(InputError, match=f"{field}.*expected"):
        replace(IBAUConfig(), **{field: value})


def test_parameters_that_diverge_are_refused(linear):
    logits, params, clean = linear
    config = replace(SMALL, outer_optimizer=SGD(1e38))
    with pytest.raises(InputError, match=r"no longer finite.*1e\+38"):
        unlearn(logits, params, clean, config=config, key=KEY)


def test_a_round_says_how_well_its_systems_were_solved(linear):
    """A step of 1e4 makes the series diverge: the direct gradient is taken, and counted."""
    logits, params, clean = linear
    steps = 2 * 3  # batches of 8 from 24 images
    diverging = replace(SMALL, solver=Neumann(3, 1e4))
    for record in unlearn(logits, params, clean, config=diverging, key=KEY).history:
        assert record["failed_solves"] == record["fallbacks"] == steps / 2
        assert record["contraction"] > 1 and record["residual"] > 1
        assert record["products"] == 2 * steps / 2
    kept = replace(diverging, keep_diverged=True, outer_optimizer=Adam(1e-9, clip=1.0))
    for record in unlearn(logits, params, clean, config=kept, key=KEY).history:
        assert record["failed_solves"] == steps / 2 and record["fallbacks"] == 0
    direct = unlearn(logits, params, clean, config=replace(SMALL, solver=Direct()), key=KEY)
    fallen = unlearn(logits, params, clean, config=diverging, key=KEY)
    jax.tree.map(np.testing.assert_array_equal, direct.params, fallen.params)


def test_the_constraint_reaches_the_hypergradient(linear):
    """On the border of a small ball the two formulas differ; far inside they do not."""
    logits, params, clean = linear
    for radius, same in ((0.05, False), (50.0, True)):
        config = replace(
            SMALL, radius=radius, rounds=1, inner_optimizer=Relative(1e-4 if same else 0.5)
        )
        results = [
            unlearn(logits, params, clean, config=replace(config, constrained=c), key=KEY).params
            for c in (False, True)
        ]
        assert np.allclose(results[0]["w"], results[1]["w"], rtol=0, atol=1e-7) == same


def test_the_microbatch_bounds_the_memory_of_a_step():
    """The batch may grow: what a step needs beside its arguments hardly does."""
    module = VGG(10, conv="patches", widths=(8,), dropout=(0,))
    rng = np.random.default_rng(0)
    data = Dataset(rng.uniform(size=(160, 16, 16, 3)).astype(np.float32), np.zeros(160, np.int32))
    variables = jax.eval_shape(module.init, jax.random.key(0), data.images[:1])
    variables = jax.tree.map(lambda a: jnp.ones(a.shape, a.dtype), variables)
    logits, params = evaluation_logits(module, variables), variables["params"]

    def memory(images: int, microbatch: int | None) -> int:
        clean = Dataset(data.images[:images], data.labels[:images])
        config = replace(
            IBAUConfig.untargeted(), batch_size=images, microbatch=microbatch, rounds=1
        )
        batches, sizes = make_batches(clean, config)
        algorithm = ibau(logits, config, len(sizes))
        state = algorithm.init(params, jax.random.key(0))
        program = jax.jit(algorithm.descend).lower(state, data.images[0], batches, 0).compile()
        return program.memory_analysis().temp_size_in_bytes

    small, large, whole = memory(40, 10), memory(160, 10), memory(160, None)
    assert large < small + 2 * 120 * data.images[0].nbytes, "the images of a batch, no activations"
    assert whole > 3 * large
