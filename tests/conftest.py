"""Shared settings: strict arrays, a private cache, and the places of real data where there are."""

import atexit
import functools
import gc
import importlib
import itertools
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

# The same programs are compiled in many tests and in the commands that they start.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="ibau-jax-cache-")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.05"

# Most of the time is spent on optimising programs that run for a moment. With these flags it is
# half; the workers are as many as cores, so that more threads only wait for each other. XLA ends a
# process that names a flag which it does not know, as it does one of them later.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=1 --xla_cpu_parallel_codegen_split_count=1 "
    "--xla_cpu_multi_thread_eigen=false"
    + " --xla_cpu_use_fusion_emitters=false"
    * (int(version("jax").split(".")[1]) < 11),
)
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # two workers share one GPU

import jax
import numpy as np
import pytest
from hypothesis import settings

from ibau_jax.attacks import Attack, Trigger, make_attack, poison
from ibau_jax.data import Dataset, load
from ibau_jax.defenses.run import Job
from ibau_jax.devices.mesh import devices
from ibau_jax.models.architectures import build
from ibau_jax.models.files import save_model
from ibau_jax.models.model import Classifier
from ibau_jax.models.stored import StoredModel
from ibau_jax.models.vgg import VGG
from ibau_jax.results.metrics import evaluator
from ibau_jax.training.train import TrainConfig, train

settings.register_profile("ci", deadline=None, max_examples=8, derandomize=True)
settings.load_profile("ci")

# For processes that run their programs once: made in half the time, and slow.
UNOPTIMISED = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
UNOPTIMISED = f"{os.environ['XLA_FLAGS']} {UNOPTIMISED}"  # the last one counts


def on_devices(number: int) -> dict[str, str]:
    """The environment of such a process that has `number` devices and imports what tests do."""
    flags = f"--xla_force_host_platform_device_count={number} {UNOPTIMISED}"
    paths = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    return os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": paths}


_tests = itertools.count(1)


@pytest.fixture(scope="session", autouse=True)
def private_cache(tmp_path_factory):
    """Tests neither use nor fill the user's cache of decoded data (`.ci/run` sets its own)."""
    os.environ.setdefault("IBAU_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def script(monkeypatch) -> Callable[[str], ModuleType]:
    """`script(name)`: one of `experiments/` as a module."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "experiments"))
    return importlib.import_module


@pytest.fixture(autouse=True)
def room_for_programs():
    """XLA maps each compiled program into memory, and Linux allows a process 65530 maps.

    A worker that runs into the limit dies of a segmentation fault, in whichever test it is.
    """
    yield
    maps = Path("/proc/self/maps")
    if next(_tests) % 10 == 0 and maps.is_file() and maps.read_bytes().count(b"\n") > 25_000:
        jax.clear_caches()
        gc.collect()


@pytest.fixture
def x64():
    """Float64 for one test."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="session")
def reference() -> Path:
    """The folder of the published models, or skip."""
    folder = os.environ.get("IBAU_REFERENCE")
    if not folder:
        pytest.skip("IBAU_REFERENCE does not name the folder of the published models")
    return Path(folder)


@pytest.fixture(scope="session")
def cifar10() -> Dataset:
    """The first 5000 and the last 5000 test images of the real CIFAR-10, or skip."""
    if not os.environ.get("TFDS_DATA_DIR"):
        pytest.skip("TFDS_DATA_DIR does not name a folder with prepared data sets")
    return load("cifar10", "test")


@pytest.fixture
def linear():
    """A small model that is not of this package: `logits`, parameters, and images of 6x5x2."""
    rng = np.random.default_rng(0)
    params = {
        "w": rng.normal(size=(60, 3)).astype(np.float32),
        "b": np.zeros(3, np.float32),
    }
    images = rng.uniform(size=(24, 6, 5, 2)).astype(np.float32)

    def logits(params, images):
        return images.reshape(len(images), -1) @ params["w"] + params["b"]

    labels = np.asarray(logits(params, images)).argmax(-1).astype(np.int32)
    return logits, params, Dataset(images, labels)


def random_variables(classes: int = 10, seed: int = 0, name: str = "vgg") -> dict:
    """Flax variables of a VGG with random weights, without compiling its initialisation."""
    images = jax.numpy.zeros((1, 32, 32, 3))
    shapes = jax.eval_shape(build(name, classes).init, jax.random.key(0), images)
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        name = path[-1].key
        if name == "kernel":  # He
            spread = (2 / leaf.size * leaf.shape[-1]) ** 0.5
            return rng.normal(scale=spread, size=leaf.shape).astype(np.float32)
        if name in ("scale", "var"):
            return rng.uniform(0.5, 1.5, leaf.shape).astype(np.float32)
        return rng.normal(scale=0.1, size=leaf.shape).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


@pytest.fixture(scope="session")
def digits_model(tmp_path_factory) -> Path:
    """A file of a small model for `digits` with random weights and the BadNets trigger."""
    path = tmp_path_factory.mktemp("model") / "random.safetensors"
    return save_model(path, small_stored((make_attack("badnets", 10),), {"seed": 0}))


def small_stored(attacks: tuple[Attack, ...] = (), info: dict | None = None) -> StoredModel:
    """With random weights, for `digits`: what is to be compiled for it is small."""
    name = "vgg-mini"
    return StoredModel(random_variables(name=name), name, 10, "digits", attacks, info or {})


SMALL = VGG(10, widths=(8, 16), dropout=(0.0, 0.0))
MODEL = Classifier(SMALL)
CORNER = np.zeros((16, 16, 1), np.float32)
CORNER[12:15, 12:15] = 1
SQUARE = Attack("square", Trigger("replace", CORNER, CORNER), 7, 10)


def small_digits(split: str) -> Dataset:
    """Digits as images of 16x16x1."""
    data = load("digits", split)
    return Dataset(np.ascontiguousarray(data.images[:, ::2, ::2, :1]), data.labels)


@functools.cache
def small_model(seed: int, poisoned: bool) -> dict:
    """Variables of `SMALL` after training on small digits, with a backdoor (`SQUARE`) or not."""
    data = small_digits("train")
    if poisoned:
        data, _ = poison(data, SQUARE, 0.2, seed)
    config = TrainConfig(epochs=10, batch_size=32, rate=1e-2)
    return train(SMALL, data, config=config, key=jax.random.key(seed))[0]


def clean() -> Dataset:
    """The clean set of the tests of defenses: small digits that no model was trained on."""
    return small_digits("test[:400]")


def measure(variables) -> dict:
    """ACC and ASR (of `SQUARE`) of `MODEL` on the other test images."""
    return _evaluator()(variables).row()


@functools.cache
def _evaluator():
    return evaluator(MODEL, small_digits("test[400:]"), [SQUARE])


def same(one, two):
    """Two pytrees are the same, bit for bit."""
    jax.tree.map(np.testing.assert_array_equal, one, two)


def job(model, variables, data, config=None, on=None) -> Job:
    """What a part of a defense is given, on one device."""
    classes = jax.eval_shape(lambda v, x: model(v, x), variables, data.images[:1]).shape[1]
    on = devices(1) if on is None else on
    return Job(model, variables, data, config, jax.random.key(0), on, classes)


def chromium(*arguments):
    name = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chrome")
    if name is None:
        pytest.skip("no Chromium on this machine")
    flags = """--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync
        --disable-background-networking --disable-component-update""".split()
    done = subprocess.run([name, *flags, *arguments], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout
