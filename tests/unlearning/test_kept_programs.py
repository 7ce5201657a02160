"""A program that was compiled and kept serves the next model: none of the model is inside."""

from dataclasses import replace

import jax
import numpy as np
import pytest

from ibau_jax import Dataset, IBAUConfig
from ibau_jax.models.model import Classifier, of_params
from ibau_jax.models.vgg import VGG
from ibau_jax.unlearning.batches import make_batches, make_mixtures, resolve
from ibau_jax.unlearning.evidence import GEOMETRIES
from ibau_jax.unlearning.ibau import ibau
from ibau_jax.unlearning.objective import Aim
from ibau_jax.unlearning.search import Search

MODEL = Classifier(VGG(4, widths=(8, 8), dropout=(0.0, 0.0)))
KEY = jax.random.key(0)


def clean():
    draw = np.random.default_rng(0)
    return Dataset(draw.uniform(size=(24, 8, 8, 3)).astype(np.float32), np.arange(24) % 4)


def variables(seed):
    """Of a network whose batch statistics are its own too."""
    draw = np.random.default_rng(seed)
    shapes = jax.eval_shape(MODEL.module.init, KEY, clean().images[:1])
    return jax.tree.map(lambda a: draw.uniform(0.5, 1, a.shape).astype(np.float32), dict(shapes))


def programs_of_ibau(model, given, fixed):
    """What `ascend` and `descend` are compiled from, for the default."""
    texts, data = {}, clean()

    def program(function, rows):
        def call(*args):
            texts[function.__name__] = (lowered := jax.jit(function).lower(*args)).as_text()
            return lowered.out_info

        return call

    config = replace(IBAUConfig(), batch_size=12, rounds=1)
    config = resolve(config, of_params(MODEL, variables(0)), given, data.images, 1)
    taught = np.full((24, 4), 0.25, np.float32)
    batches, sizes = make_batches(data, config, taught=taught)
    mixed = make_mixtures(data, config, 0, lambda images: taught[: len(images)])
    batches = batches._replace(mixed=mixed)
    algorithm = ibau(model, config, len(sizes), program=program, fixed=fixed)
    pool, rules = np.zeros((3, 8, 8, 3), np.float32), np.zeros((3, 4), np.int32)
    aim = Aim(rules[0], pool[0], pool, rules, np.int32(1), np.float32(1))
    state = algorithm.init(given, KEY)
    delta, _ = algorithm.ascend(state.params, batches, np.int32(0), aim)
    algorithm.descend(state, delta, batches, np.int32(0), aim)
    return texts


def with_fixed(seed):
    rest = variables(seed)
    return programs_of_ibau(MODEL, rest.pop("params"), rest)


def closed_over(seed):
    given = variables(seed)
    return programs_of_ibau(of_params(MODEL, given), given["params"], None)


@pytest.mark.parametrize("made, same", [(with_fixed, True), (closed_over, False)])
def test_the_outer_step_and_the_ascent(made, same):
    first, second = made(1), made(2)
    assert len(first) == 2
    for name, text in first.items():
        assert (second[name] == text) == same


def test_the_search():
    def texts(seed):
        search, given, data = Search(MODEL, GEOMETRIES, steps=2), variables(seed), clean()
        found = []

        def run(function, *args, name=""):
            del name
            found.append((lowered := jax.jit(function).lower(*args)).as_text())
            return jax.tree.map(lambda a: np.zeros(a.shape, a.dtype), lowered.out_info)

        search._run = run
        search(given, data, [1], key=KEY)
        return found

    assert (first := texts(1)) and first == texts(2)
