"""Models of JAX libraries: what the library itself computes, in both modes, and on many devices."""

import json
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import on_devices, same
from flax import nnx
from libraries import KEY, NNXResNet, ResNet, opened

from ibau_jax.data import Dataset
from ibau_jax.defenses.finetune import Tuning, finetune
from ibau_jax.devices.mesh import devices
from ibau_jax.errors import InputError
from ibau_jax.models.adapters.inside import stages
from ibau_jax.models.adapters.linen import from_linen
from ibau_jax.models.adapters.nnx import from_nnx, to_nnx
from ibau_jax.models.model import Model
from ibau_jax.models.normed import fed_by, normed_layers

IMAGES = np.random.default_rng(0).uniform(size=(6, 16, 16, 1)).astype(np.float32)
LIBRARIES = ("linen", "nnx", "equinox")


def close(one, two):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-6), one, two)


def needs(library: str) -> None:
    if library == "equinox":
        pytest.importorskip("equinox", reason="the extra `equinox` is not installed")


class ByArgument(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9)(x)
        return nn.Dropout(0.5, deterministic=not train)(x).mean((1, 2))


class ByDeterministic(nn.Module):
    @nn.compact
    def __call__(self, x, deterministic=True):
        x = nn.BatchNorm(momentum=0.9)(x, use_running_average=deterministic)
        return nn.Dropout(0.5)(x, deterministic=deterministic).mean((1, 2))


class ByAttribute(nn.Module):
    use_running_average: bool = True

    @nn.compact
    def __call__(self, x):
        x = nn.BatchNorm(self.use_running_average, momentum=0.9)(x)
        return nn.Dropout(0.5)(x, deterministic=self.use_running_average).mean((1, 2))


class ByEither(nn.Module):
    train: bool | None = None

    @nn.compact
    def __call__(self, x, train: bool | None = None):
        train = nn.merge_param("train", self.train, train)
        return ByArgument()(x, train)


class ByMode(nn.Module):
    """Its switch has values of its own."""

    @nn.compact
    def __call__(self, x, mode):
        return ByArgument()(x, mode == "fit")


def by_mode(module, images, train):
    return module(images, "fit" if train else "use")


SWITCHES = [
    (ByArgument(), {"train": False}, {"train": True}, None),
    (ByDeterministic(), {"deterministic": True}, {"deterministic": False}, None),
    (ByAttribute(), {}, None, None),
    (ByEither(), {"train": False}, {"train": True}, None),
    (ByMode(), {"mode": "use"}, {"mode": "fit"}, by_mode),
]


@pytest.mark.parametrize(("module", "off", "on", "call"), SWITCHES)
def test_a_linen_module_is_switched_whatever_its_switch_is_called(module, off, on, call):
    model = from_linen(module, call)
    assert isinstance(model, Model)
    variables = module.init(KEY, IMAGES, **off)
    same(model.init(KEY, IMAGES), variables)
    same(model(variables, IMAGES), module.apply(variables, IMAGES, **off))
    training = ByAttribute(use_running_average=False) if on is None else module
    rngs, mutable = {"dropout": KEY}, ["batch_stats"]
    expected = training.apply(variables, IMAGES, rngs=rngs, mutable=mutable, **(on or {}))
    logits, _, state = model.train(variables, IMAGES, KEY)
    same((logits, state), expected)
    # and without dropout
    undropped = model.without_dropout().train(variables, IMAGES, KEY)[0]
    assert np.abs(undropped - logits).max() > 0.01
    same(undropped, model.without_dropout().train(variables, IMAGES, jax.random.key(1))[0])


class Noisy(nn.Module):
    """State of another collection, random numbers of another name, and no switch."""

    @nn.compact
    def __call__(self, x):
        seen = self.variable("counts", "calls", lambda: jnp.int32(0))
        if self.is_mutable_collection("counts") and not self.is_initializing():
            seen.value += 1
            x += jax.random.normal(self.make_rng("noise"), x.shape)
        return nn.Dense(3)(x.mean((1, 2)))


def test_a_linen_module_with_other_collections():
    model = from_linen(Noisy())
    variables = model.init(KEY, IMAGES)
    logits, _, state = model.train(variables, IMAGES, KEY)
    assert state == {"counts": {"calls": 1}}
    assert np.abs(logits - model(variables, IMAGES)).max() > 1e-3


class Sower(nn.Module):
    """Shows maps of its own choice, and something else."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(4, (3, 3), 2)(x)
        self.sow("intermediates", "map10", x[..., :3])
        self.sow("intermediates", "map9", x[..., :2])
        self.sow("intermediates", "mean", x.mean((1, 2)))
        return nn.Dense(3)(x.mean((1, 2)))


def test_what_a_linen_module_sows_are_its_maps():
    model = from_linen(Sower())
    found = model.look(model.init(KEY, IMAGES), IMAGES)[1]
    assert [m.shape for m in found] == [(6, 8, 8, 2), (6, 8, 8, 3)]


class Scanned(nn.Module):
    """Blocks under flax's transformations, whose insides cannot be seen."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(4, (3, 3))(x)
        x = nn.remat(nn.Conv)(4, (3, 3), 2)(x)
        return nn.Dense(3)(x.mean((1, 2)))


def test_maps_of_a_linen_module_under_transformations():
    model = from_linen(Scanned())
    variables = model.init(KEY, IMAGES)
    assert [m.shape for m in model.look(variables, IMAGES)[1]] == [(6, 16, 16, 4), (6, 8, 8, 4)]


def test_maps_are_the_last_of_each_size():
    def one(*shape):
        return jnp.zeros((6, *shape))

    images = one(16, 16, 3)
    shown = [images, one(16, 16, 4), one(16, 16, 5), one(8, 8, 6), one(8, 8, 3), one(1, 1, 9)]
    found = stages([*shown, one(7), jnp.zeros((6, 4, 4, 2), int), None], images)  # pyright: ignore
    assert [m.shape[1:] for m in found] == [(16, 16, 5), (8, 8, 3)]


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_batch_that_is_spread_is_the_library_s_own(library):
    """Weights that are all the same, and those of padding, against the library's own layers."""
    needs(library)
    model, variables = opened(library, rate=0.3)
    logits, maps, state = model.train(variables, IMAGES, KEY)
    widths = [16, 32]
    assert [m.shape for m in maps] == [(6, 8, 8, widths[0]), (6, 4, 4, widths[1])]
    weights = jnp.full(6, 1 / 6)
    close(model.train(variables, IMAGES, KEY, weights)[:2], (logits, maps))
    close(jax.tree.leaves(model.train(variables, IMAGES, KEY, weights)[2]), jax.tree.leaves(state))
    # Two rows of padding change nothing of the others.
    padded = np.concatenate([IMAGES, 1 - IMAGES[:2]])
    weights = jnp.asarray([1 / 6] * 6 + [0.0] * 2)
    calm = model.without_dropout()
    expected, _, state = calm.train(variables, IMAGES, KEY)
    found, _, padded_state = calm.train(variables, padded, KEY, weights)
    close(found[:6], expected)
    close(jax.tree.leaves(padded_state), jax.tree.leaves(state))


def test_an_nnx_module_computes_what_it_did():
    module = NNXResNet(rate=0.3)
    before = nnx.to_pure_dict(nnx.state(module, nnx.Not(nnx.RngState)))
    model, variables = from_nnx(module)
    assert isinstance(model, Model) and sorted(variables) == ["batch_stats", "params"]
    own = nnx.clone(module)
    own.eval()
    close(model(variables, IMAGES), own(IMAGES))
    own = nnx.clone(module)
    own.train()
    own.drop.rate = 0.0
    logits, _, state = model.without_dropout().train(variables, IMAGES, KEY)
    close(logits, own(IMAGES))
    close(state["batch_stats"]["norm"]["mean"], own.norm.mean[...])
    # each key drops others
    one, two = (model.train(variables, IMAGES, jax.random.key(seed))[0] for seed in (0, 1))
    assert np.abs(one - two).max() > 0.01
    # back: a copy, in its own dtype
    wide = jax.tree.map(lambda a: np.asarray(a + 1, np.float64), variables)
    back = to_nnx(module, wide)
    assert back.blocks[0].norm.mean[...].dtype == np.float32 and back.blocks[0].norm.mean[0] == 1
    same(nnx.to_pure_dict(nnx.state(module, nnx.Not(nnx.RngState))), before)
    close(from_nnx(back)[1], wide)


class Argument(nnx.Module):
    """Its switch is an argument; an integer and a plain array are state."""

    def __init__(self, rngs: nnx.Rngs):
        self.norm = nnx.BatchNorm(1, rngs=rngs)
        self.count = nnx.Param(jnp.int32(3))
        self.fixed = jnp.ones(3)
        self.head = nnx.Linear(1, 3, rngs=rngs)

    def __call__(self, x, train: bool):
        x = self.norm(x, use_running_average=not train)
        return self.head(x.mean((1, 2))) * self.fixed


def test_an_nnx_module_with_an_argument_and_other_state():
    model, variables = from_nnx(Argument(nnx.Rngs(0)))
    assert sorted(variables) == ["batch_stats", "params", "state"]
    assert set(variables["state"]) == {"count", "fixed"} and "count" not in variables["params"]
    state = model.train(variables, IMAGES, KEY)[2]
    assert sorted(state) == ["batch_stats", "state"]
    assert np.abs(state["batch_stats"]["norm"]["mean"]).max() > 0
    assert model(variables, IMAGES).shape == (6, 3)


def test_refusals_of_adapters():
    with pytest.raises(InputError, match="expected a module of flax.nnx, found a ResNet; a linen"):
        from_nnx(ResNet())  # pyright: ignore[reportArgumentType]
    _, variables = from_nnx(NNXResNet())
    with pytest.raises(InputError, match="the variables do not fit the module"):
        to_nnx(NNXResNet(classes=3), variables)


@pytest.mark.parametrize("mode", ["batch", "ema"])
def test_an_equinox_module_computes_what_it_did(mode):
    eqx = pytest.importorskip("equinox", reason="the extra `equinox` is not installed")
    from libraries import equinox_module

    from ibau_jax.models.adapters.eqx import from_equinox, to_equinox

    module, state = equinox_module(mode=mode)
    model, variables = from_equinox(module, state)
    x = IMAGES.transpose(0, 3, 1, 2)

    def own(module, state):
        return jax.vmap(module, (0, None), (0, None), axis_name="batch")(x, state)

    logits, _, updated = model.train(variables, IMAGES, KEY)
    expected, moved = own(module, state)
    close(logits, expected)
    close(jax.tree.leaves(updated["state"]), jax.tree.leaves(moved))
    trained = {**variables, **updated}
    close(model(trained, IMAGES), own(eqx.nn.inference_mode(module), updated["state"])[0])
    weights = jnp.full(6, 1 / 6)
    weighted = model.train(trained, IMAGES, KEY, weights)
    close(weighted[0], model.train(trained, IMAGES, KEY)[0])
    back, kept = to_equinox(module, jax.tree.map(lambda a: a + 1, trained))
    assert back.out.bias[0] == module.out.bias[0] + 1 and kept is not None
    with pytest.raises(InputError, match="the variables do not fit the module"):
        to_equinox(module.out, variables)
    with pytest.raises(InputError, match="expected a module of Equinox that can be called"):
        from_equinox(ResNet())
    named = eqx.tree_at(lambda m: m.norm1.axis_name, module, "another")
    with pytest.raises(InputError, match="name several axes"):
        from_equinox(named, state)


@pytest.mark.parametrize("library", ["linen", "nnx"])
def test_batch_norms_are_found_with_what_feeds_them(library):
    model, variables = opened(library)
    layers = normed_layers(variables, fed_by(model, variables, IMAGES[:1]))
    expected = {
        "linen": {"BatchNorm_0": "Conv_0/kernel", "Block_0/BatchNorm_0": "Block_0/Conv_0/kernel"},
        "nnx": {"norm": "conv/kernel", "blocks/0/norm": "blocks/0/conv/kernel"},
    }[library]
    assert {layer.name: "/".join(layer.kernel or ()) for layer in layers} == expected


class Before(nn.Module):
    """Pre-activation: the norm and the convolution of a number do not belong together."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(4, (3, 3))(x)
        y = nn.relu(nn.BatchNorm(True)(x + 1))  # not the output of a convolution
        y = nn.Conv(4, (3, 3))(y)
        y = nn.relu(nn.BatchNorm(True)(y))
        return nn.Dense(3)((x + y).mean((1, 2)))


def test_a_batch_norm_that_no_convolution_feeds_has_none():
    model = from_linen(Before())
    variables = model.init(KEY, IMAGES)
    fed = fed_by(model, variables, IMAGES)
    kernels = [layer.kernel for layer in normed_layers(variables, fed)]
    assert kernels == [None, ("Conv_1", "kernel")]


@pytest.mark.parametrize("library", LIBRARIES)
def test_eight_devices_are_as_one(library):
    """Batches of 20 leave a remainder; with dropout."""
    needs(library)
    done = subprocess.run(
        [sys.executable, __file__, library], env=on_devices(8), capture_output=True, text=True
    )
    assert not done.returncode, done.stderr
    found = json.loads(done.stdout)
    assert found["apart"] < 1e-9 and found["moved"] > 1e-3


def main(library: str) -> dict[str, float]:
    jax.config.update("jax_enable_x64", True)
    model, variables = opened(library, rate=0.3)
    variables = jax.tree.map(
        lambda a: np.asarray(a, np.float64 if jnp.issubdtype(a.dtype, jnp.floating) else a.dtype),
        variables,
    )
    rng = np.random.default_rng(0)
    data = Dataset(rng.uniform(size=(50, 16, 16, 1)), rng.integers(0, 10, 50))
    config = Tuning(epochs=1, batch_size=20)
    one, eight = (
        jax.tree.leaves(
            finetune(model, variables, data, config=config, key=KEY, devices=devices(n)).params
        )
        for n in (1, 8)
    )

    def far(these, those):
        return max(float(np.abs(a - b).max()) for a, b in zip(these, those, strict=True))

    return {"apart": far(one, eight), "moved": far(one, jax.tree.leaves(variables))}


if __name__ == "__main__":
    json.dump(main(sys.argv[1]), sys.stdout)
