"""Every defense of the table on a model of each JAX library: it runs, or says in a line why not."""

import functools
import json
from dataclasses import replace

import jax
import numpy as np
import pytest
from conftest import SQUARE, clean, same, small_digits
from libraries import KEY, trained
from test_contract import ONE, QUICK

from ibau_jax.attacks import poison
from ibau_jax.defenses import DEFENSES
from ibau_jax.defenses.nad import NADConfig
from ibau_jax.errors import InputError
from ibau_jax.results.metrics import evaluator

LIBRARIES = ("linen", "nnx", "equinox")
CONFIGS = {**QUICK, "nad": replace(QUICK["nad"], betas=(500.0, 1000.0))}
REFUSED = {
    ("fine-pruning", "linen"): "cuts channels of the last convolution: expected",
    ("fine-pruning", "nnx"): "cuts channels of the last convolution: expected",
    ("fine-pruning", "equinox"): "cuts channels of the last convolution: expected",
    ("dp-sgd", "nnx"): "initialises the network anew: expected",
    ("dp-sgd", "equinox"): "initialises the network anew: expected",
    ("clp", "equinox"): "clp cuts channels of convolutions with batch norm: expected",
    ("anp", "equinox"): "anp masks the channels of batch norms: expected",
}


@functools.cache
def measured(library: str):
    return evaluator(trained(library)[0], small_digits("test[400:]"), [SQUARE])


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("name", DEFENSES)
def test_contract(name, library):
    if library == "equinox":
        pytest.importorskip("equinox", reason="the extra `equinox` is not installed")
    model, variables = trained(library)
    given = jax.tree.map(np.array, variables)
    more = {}
    if DEFENSES[name].train_set:
        more["train_set"] = poison(small_digits("train"), SQUARE, 0.2, 0)[0]
    config = CONFIGS.get(name)
    run = DEFENSES[name].method.run(model, variables, clean(), config=config, key=KEY, **more)
    if (name, library) in REFUSED:
        with pytest.raises(InputError, match=REFUSED[name, library]) as refused:
            next(iter(run))
        assert "\n" not in str(refused.value)
        return
    found = run.result()
    assert jax.tree.structure(found.params) == jax.tree.structure(given)
    kinds = [[(a.shape, a.dtype) for a in jax.tree.leaves(p)] for p in (found.params, given)]
    assert kinds[0] == kinds[1] and len(found.history) >= 1
    json.dumps([dict(found.diagnostics), found.history], allow_nan=False)
    same(variables, given)
    if name == "ibau":  # the others' settings are for speed
        before, after = measured(library)(given).row(), measured(library)(found.params).row()
        assert before["acc"] > 0.85 and before["asr"] > 0.9
        assert after["acc"] > 0.85


def test_nad_of_more_maps_takes_the_last():
    model, variables = trained("linen")
    config = replace(QUICK["nad"], betas=(0.0,), teacher=ONE, student=ONE)
    assert isinstance(config, NADConfig)
    found = DEFENSES["nad"].method(model, variables, clean(), config=config, key=KEY)
    assert found.history[-1]["loss"] < 1
