"""Run by test_parallel.py with eight forced CPU devices; prints one JSON object."""

import json
import sys
from dataclasses import replace

import jax

jax.config.update("jax_enable_x64", True)

import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from jax.sharding import NamedSharding, PartitionSpec  # noqa: E402

from ibau_jax import unlearn  # noqa: E402
from ibau_jax.data import Dataset  # noqa: E402
from ibau_jax.defenses.finetune import Tuning  # noqa: E402
from ibau_jax.defenses.inversion.neural_cleanse import NeuralCleanseConfig, neural_cleanse  # noqa: E402
from ibau_jax.defenses.nad import NADConfig, nad  # noqa: E402
from ibau_jax.devices.mesh import MAPPINGS, devices  # noqa: E402
from ibau_jax.models.model import Classifier, evaluation_logits  # noqa: E402
from ibau_jax.models.vgg import VGG  # noqa: E402
from ibau_jax.training.train import TrainConfig, train  # noqa: E402
from ibau_jax.unlearning.batches import make_batches, resolve  # noqa: E402
from ibau_jax.unlearning.config import PRESETS  # noqa: E402
from ibau_jax.unlearning.ibau import ibau  # noqa: E402

KEY = jax.random.key(0)
CONFIG = TrainConfig(epochs=1, batch_size=32, rate=1e-3)
MODULE = VGG(5, conv="patches", widths=(4,), dropout=(0.3,))
RNG = np.random.default_rng(0)
IMAGES, LABELS = RNG.uniform(size=(103, 16, 16, 3)), RNG.integers(0, 5, 103)
VARIABLES = jax.jit(MODULE.init)(KEY, jnp.zeros((1, 16, 16, 3)))
ROUNDS = (
    ("untargeted", 103, "float64", (8, 5)),
    ("published", 103, "float64", (8,)),
    ("untargeted", 103, "float32", (8,)),
    ("untargeted", 3, "float64", (8,)),
)

TUNING = Tuning(epochs=1, batch_size=20)
BASELINES = {
    "nad": (nad, NADConfig(betas=(500.0,), teacher=TUNING, student=TUNING)),
    # So low a threshold flags labels, which are unlearned then.
    "neural-cleanse": (
        neural_cleanse,
        NeuralCleanseConfig(
            steps=3,
            batches=2,
            batch_size=20,
            labels_at_once=3,
            success=0.0,
            threshold=0.1,
            tuning=TUNING,
        ),
    ),
}


def cast(tree, dtype):
    return jax.tree.map(lambda a: np.asarray(a, dtype), tree)


def distance(one, two) -> float:
    """The largest difference, relative to the largest parameter of its array."""
    gaps = jax.tree.map(lambda a, b: np.abs(a - b).max() / (np.abs(a).max() + 1e-3), one, two)
    return float(max(jax.tree.leaves(gaps)))


def round_(preset: str, count: int | None, images: int, dtype, mapping: str = "pmap") -> tuple:
    variables = cast(VARIABLES, dtype)
    config = PRESETS[preset]("cifar10")
    # The collectives of eight devices on two cores are slow, and five steps show as much.
    config = replace(config, rounds=1, inner_steps=min(config.inner_steps or 5, 5))
    clean = Dataset(IMAGES[:images].astype(dtype), LABELS[:images])
    logits = evaluation_logits(MODULE, variables)
    on = devices(count, mapping)
    found = unlearn(logits, variables["params"], clean, config=config, key=KEY, devices=on)
    return cast(found.params, dtype), variables["params"]


def epoch(count: int | None, mapping: str = "pmap"):
    data = Dataset(IMAGES, LABELS)
    found, _ = train(MODULE, data, config=CONFIG, key=KEY, devices=devices(count, mapping))
    return found


def baseline(run, config, count: int | None, dtype=np.float64):
    """The cleaned variables; the remainder of a batch is spread too."""
    data = Dataset(IMAGES.astype(dtype), LABELS)
    found = run(
        Classifier(MODULE), cast(VARIABLES, dtype), data, config=config, key=KEY,
        devices=devices(count),
    )  # fmt: skip
    return cast(found.params, np.float64), found.diagnostics


def collectives(preset: str, mapping: str) -> dict[str, dict[str, int]]:
    """All-reduces written in the programs of an ascent and of an outer step.

    The arguments are global arrays already: the compiled programs take them as they lie.
    """
    on = devices(mapping=mapping)
    clean = Dataset(IMAGES.astype(np.float32), LABELS.astype(np.int32))
    variables = cast(VARIABLES, np.float32)
    logits, params = evaluation_logits(MODULE, variables), variables["params"]
    config = resolve(PRESETS[preset]("cifar10"), logits, params, clean.images, len(on.all))
    batches, sizes = make_batches(clean, config, on)
    algorithm = ibau(logits, config, len(sizes), on.axis)
    state = on.replicate(algorithm.init(params, KEY))
    zero, first = on.replicate((np.zeros((16, 16, 3), np.float32), np.int32(0)))
    programs = {
        "ascent": on.compile(algorithm.ascend, state.params, batches, first, rows=(1,)),
        "step": on.compile(algorithm.descend, state, zero, batches, first, rows=(2,)),
    }
    delta, _ = programs["ascent"](state.params, batches, first)
    programs["step"](state, delta, batches, first)
    return {name: text(program) for name, program in programs.items()}


def text(program) -> dict[str, int]:
    lines = program.as_text().splitlines()
    found = [line for line in lines if " all-reduce(" in line or " all-reduce-start(" in line]
    others = [line for line in lines if " all-gather(" in line or " collective-permute(" in line]
    return {"all_reduces": len(found), "others": len(others)}


def broken(mapping: str) -> str:
    """What `check_equal` says when one device has another bit."""
    on = devices(mapping=mapping)
    same, odd = np.ones(3, np.float32), np.array([1, 1, np.nextafter(1, 2, dtype=np.float32)])
    pieces = [
        jax.device_put(odd.astype(np.float32) if i == 3 else same, d) for i, d in enumerate(on.all)
    ]
    sharding = NamedSharding(on._mesh, PartitionSpec())
    array = jax.make_array_from_single_device_arrays((3,), sharding, pieces)
    on.check_equal(params=on.replicate(same))
    try:
        on.check_equal(params={"w": array})
    except RuntimeError as error:
        return str(error)
    return ""


def main() -> dict:
    found: dict = {"broken": [broken(mapping) for mapping in MAPPINGS], "collectives": {}}
    for preset in ("untargeted", "published"):
        found["collectives"][preset] = [collectives(preset, mapping) for mapping in MAPPINGS]
    for preset, images, dtype, counts in ROUNDS:
        one, start = round_(preset, 1, images, dtype)
        for count in counts:
            many, _ = round_(preset, count, images, dtype)
            found[f"{preset} {images} {dtype} {count}"] = distance(one, many)
            if (preset, images, dtype, count) == ("untargeted", 103, "float64", 8):
                mapped, _ = round_(preset, count, images, dtype, "shard_map")
                found["a round by shard_map"] = distance(mapped, many)
        found[f"{preset} {images} {dtype} moved"] = distance(start, one)
    one = epoch(1)
    for count in (8, 5):
        many = epoch(count)
        found[f"train {count}"] = distance(one, many)
        if count == 8:
            found["an epoch by shard_map"] = distance(epoch(count, "shard_map"), many)
    for name, (run, config) in BASELINES.items():
        one, told = baseline(run, config, 1)
        found[f"{name} flagged"] = len(told.get("flagged", ()))
        found[f"{name} moved"] = distance(cast(VARIABLES, np.float64), one)
        found[f"{name} 8"] = distance(one, baseline(run, config, 8)[0])
    return found


if __name__ == "__main__":
    json.dump(main(), sys.stdout)
