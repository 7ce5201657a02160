"""The check of a GPU, on what is here."""

import json
from pathlib import Path

import numpy as np
import pytest

from ibau_jax.errors import InputError

EXPERIMENTS = Path(__file__).parents[2] / "experiments"


@pytest.fixture
def check(script, monkeypatch):
    """The script as a module; it imports benchmarks."""
    monkeypatch.syspath_prepend(str(EXPERIMENTS / "benchmarks"))
    return script("gpu_check")


def run(check, tmp_path, *parts, **more) -> tuple[int, list[dict]]:
    out = tmp_path / "gpu.jsonl"
    failed = check.run(check.Settings(tiny=True, parts=parts, out=out, **more))
    return failed, [json.loads(line) for line in out.read_text().splitlines()]


def test_parts_that_compile_little(check, tmp_path):
    failed, rows = run(check, tmp_path, "device", "hypergradients")
    assert not failed and [row["part"] for row in rows] == ["device", "hypergradients"]
    assert min(rows[0][f"{name}_tflops"] for name in (*check.RATES, "bfloat16")) > 0
    errors = {k: v for k, v in rows[1].items() if "hypergradient_" in k}
    assert len(errors) == 8 and max(errors.values()) < 1e-8
    assert 0 < rows[1]["finite_differences"] < 1e-7


def test_a_part_is_run_once_and_a_failure_stops_no_other(check, tmp_path, monkeypatch):
    calls = []

    def good(settings):
        calls.append("good")
        return {"rate": 2.0}

    def bad(settings):
        calls.append("bad")
        raise ValueError("no such kernel")

    monkeypatch.setattr(check, "PARTS", {"bad": bad, "good": good})
    failed, rows = run(check, tmp_path)
    assert failed == 1 and rows[0]["error"] == "ValueError: no such kernel"
    assert rows[1]["rate"] == 2.0
    run(check, tmp_path)  # only what has no figures
    assert calls == ["bad", "good", "bad"]
    run(check, tmp_path, "good", budget=-1, again=True)  # too late
    assert len(calls) == 3
    _, rows = run(check, tmp_path, "good", again=True)
    assert len(calls) == 4 and len(rows) == 2
    with pytest.raises(InputError, match="unknown part 'goood'.*did you mean 'good'"):
        run(check, tmp_path, "goood")


def test_weights_go_to_pytorch(check):
    torch = pytest.importorskip("torch")
    from torch_vgg import load_variables, logits, torch_vgg  # pyright: ignore[reportMissingImports]

    model = check.load_model(check.ZOO / "cifar10-badnets.safetensors")
    images = np.random.default_rng(0).uniform(size=(4, 32, 32, 3)).astype(np.float32)
    with torch.no_grad():
        modules = load_variables(torch_vgg(), model.variables)
        found = logits(modules, torch.from_numpy(images.transpose(0, 3, 1, 2).copy()))
    expected = model.classifier(model.variables, images)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4, atol=1e-4)
