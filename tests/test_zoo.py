"""The models in `experiments/zoo/`: their rows, and the statistics of their triggers (spec 2)."""

import json
from pathlib import Path

import numpy as np
import pytest

from ibau_jax.attacks import Trigger, badnets_square, scenario_of
from ibau_jax.checkpoint import load_model, model_hash

EXPERIMENTS = Path(__file__).parents[1] / "experiments"
FILES = sorted((EXPERIMENTS / "zoo").glob("*.safetensors"))
ROWS = [
    json.loads(line) for line in (EXPERIMENTS / "results" / "zoo.jsonl").read_text().splitlines()
]


def check_badnets(trigger: Trigger):
    np.testing.assert_array_equal(trigger.pattern, badnets_square().pattern)


def check_blend(trigger: Trigger):
    assert np.linalg.norm(trigger.pattern) == pytest.approx(8.6, rel=0.1)
    assert 0.19 < trigger.pattern.max() <= 0.2 + 1e-6


def check_l0(trigger: Trigger):
    assert trigger.mask is not None and trigger.mask[31, 23:].all()
    assert trigger.mask[..., 0].sum() == 9 and set(np.unique(trigger.pattern)) <= {0, 1}


def check_l2(trigger: Trigger):
    assert 3.0 <= np.linalg.norm(trigger.pattern) <= 3.4 and trigger.pattern.max() <= 0.28
    assert (trigger.pattern > 0).mean() > 0.5


def check_smooth(trigger: Trigger):
    """Published: norms 3.8 to 6.1, 98 % of the energy within a radius of 2."""
    assert trigger.pattern.min() == 0 and trigger.pattern.max() == pytest.approx(0.2)
    assert 3 <= np.linalg.norm(trigger.pattern) <= 7
    planes = np.fft.fft2(trigger.pattern - trigger.pattern.mean((0, 1)), axes=(0, 1))
    frequencies = np.fft.fftfreq(32, 1 / 32)
    near = np.hypot(frequencies[:, None], frequencies) <= 2
    energy = np.abs(planes) ** 2
    assert energy[near].sum() > 0.95 * energy.sum()


def check_trojan(trigger: Trigger, low: int, high: int):
    assert low <= (trigger.pattern > 0).any(-1).sum() <= high
    assert np.linalg.norm(trigger.pattern) == pytest.approx(8.7, rel=0.05)


CHECKS = {
    "badnets": check_badnets,
    "blend": check_blend,
    "l0": check_l0,
    "l2": check_l2,
    "smooth": check_smooth,
    "trojan-square": lambda trigger: check_trojan(trigger, 60, 64),
    "trojan-watermark": lambda trigger: check_trojan(trigger, 75, 90),
}


def test_each_model_has_its_row():
    assert {path.stem for path in FILES} == {row["model"] for row in ROWS}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_model_is_what_its_row_says(path):
    model = load_model(path)
    (row,) = [row for row in ROWS if row["model"] == path.stem]
    assert (model.dataset, scenario_of(model.attacks)) == (row["dataset"], row["scenario"])
    assert (model_hash(model), model.info["epochs"]) == (row["model_hash"], row["epochs"])
    assert path.stat().st_size < 1e6
    for attack in model.attacks:
        assert isinstance(attack.trigger, Trigger)
        CHECKS[attack.name](attack.trigger)
