"""Fine-Pruning (Liu, Dolan-Gavitt, Garg 2018): cut channels that clean images do not use, tune.

A backdoor lives in channels that clean images leave dormant. Those of the last convolution are
cut in the order of their activity until the accuracy falls too far; fine-tuning with the cut
channels held at zero repairs the rest.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ibau_jax.data import Dataset
from ibau_jax.defenses.finetune import Tuning, tune
from ibau_jax.defenses.method import method
from ibau_jax.defenses.run import Job, Rounds, Told
from ibau_jax.errors import InputError, check_positive
from ibau_jax.models.model import Classifier, Params, needs_flax
from ibau_jax.training.optimizers import Adam
from ibau_jax.unlearning.batches import parted


@dataclass(frozen=True)
class FinePruningConfig:
    """Settings of Fine-Pruning.

    Attributes:
      drop: by how much the accuracy on the first part may fall, at most.
      part: share of the clean set that the pruning looks at; the other part is for fine-tuning.
      tuning: the fine-tuning.
    """

    drop: float = 0.2
    part: float = 0.2
    tuning: Tuning = Tuning(epochs=5, optimizer=Adam(1e-3))  # noqa: RUF009  (frozen)

    def __post_init__(self):
        check_positive(self, "drop", "part")
        if self.part >= 1:
            raise InputError(
                f"part is {self.part}: expected a share below 1, since the other images are for "
                "the fine-tuning"
            )


PRESETS = {
    "cpu": lambda dataset: FinePruningConfig(),
    "paper": lambda dataset: FinePruningConfig(tuning=Tuning(epochs=10, optimizer=Adam(1e-3))),
}


@method(FinePruningConfig())
def fine_pruning(job: Job) -> Rounds:
    """Prune the last convolution on a part of the clean set and fine-tune on the rest.

    Round 1 is the pruned model; the others are epochs of fine-tuning. The cut is made after
    the nonlinearity (a channel whose filter is zero still gives what its batch norm adds) and
    stays in the fine-tuning.

    The diagnostics: `pruned` channels in the order in which they were cut, and `activity` of all.

    Raises:
      InputError: the model is no `Classifier` or has no convolution to prune, or a part of the
        clean set is empty.
    """
    model = needs_flax(job.model, "fine-pruning", "cuts channels of the last convolution")
    count = round(job.config.part * len(job.clean.labels))
    if not 0 < count < len(job.clean.labels):
        raise InputError(
            f"{len(job.clean.labels)} clean images, {count} of them to prune by: expected at least "
            "one to prune by and one to fine-tune on; give more images or another part"
        )
    split_key, key = jax.random.split(job.key)
    prune_by, rest = parted(job.clean, split_key, count)
    yield job.variables, {}
    kept, activity, pruned, accuracy = prune(
        model, job.variables, prune_by, job.config.drop, compiling=job.compiling
    )
    cut = cutter(kept)
    variables = {**job.variables, "params": cut(job.variables["params"])}
    yield variables, {"channels": len(pruned), "clean_part_acc": accuracy}
    yield from tune(job, variables, rest, job.config.tuning, key=key, project=cut)
    return Told(diagnostics={"pruned": [int(c) for c in pruned], "activity": activity.tolist()})


def prune(
    model: Classifier,
    variables: Any,
    data: Dataset,
    drop: float,
    batch_size: int = 50,
    compiling: Callable[[], AbstractContextManager] = nullcontext,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
    """Which channels of the last convolution to keep.

    Channels are cut in ascending order of their activity as long as the accuracy on `data` is
    at least what it was minus `drop`. One channel is always left.

    The activity is the mean of max(a, 0) over images and places: a dormant channel of an ELU
    gives about -1, whose absolute value, which some toolkits take, would rank it as active.

    Args:
      compiling: entered while something is compiled.

    Returns:
      Mask bool [channels], activity [channels], channels cut in order, accuracy after it.

    Raises:
      InputError: the model gives no maps, or its last layer does not read the last one.
    """
    look = jax.jit(lambda variables, images: _activity_and_features(model, variables, images))
    batches = [data.images[i : i + batch_size] for i in range(0, len(data.labels), batch_size)]
    with compiling():
        for batch in {len(batch): batch for batch in batches}.values():
            look(variables, batch)
    parts = [look(variables, batch) for batch in batches]
    total = np.sum([np.asarray(activity) for activity, _ in parts], 0)
    features = np.concatenate([np.asarray(f) for _, f in parts])
    channels = len(total)
    last = variables["params"]["classifier"]
    kernel, bias = np.asarray(last["kernel"]), np.asarray(last["bias"])
    if len(kernel) % channels:
        raise InputError(
            f"the last layer reads {len(kernel)} values and the last convolution has {channels} "
            "channels: expected the values to be whole maps of them, channel last"
        )
    owner = np.arange(len(kernel)) % channels

    def accuracy(kept) -> float:
        rows = kept[owner]
        return float(np.mean((features[:, rows] @ kernel[rows] + bias).argmax(-1) == data.labels))

    kept, order, cut = np.ones(channels, bool), np.argsort(total, kind="stable"), 0
    found = before = accuracy(kept)
    for channel in order[:-1]:
        kept[channel] = False
        after = accuracy(kept)
        if after < before - drop:
            kept[channel] = True
            break
        cut, found = cut + 1, after
    return kept, total / len(data.labels), order[:cut], found


def cutter(kept: np.ndarray) -> Callable[[Params], Params]:
    """`cut(params) -> params` that holds channels of the last convolution at zero.

    Their weights in the last layer are zero. That is the same as a mask on the channels: what lies
    between, max pooling and dropout, does not mix channels and leaves zeros zero.
    """

    def cut(params: Params) -> Params:
        last = params["classifier"]
        mask = jnp.asarray(np.resize(kept, last["kernel"].shape[0]), last["kernel"].dtype)
        return {**params, "classifier": {**last, "kernel": last["kernel"] * mask[:, None]}}

    return cut


def _activity_and_features(model: Classifier, variables: Any, images: jax.Array):
    """Sum of each channel's activity over the images [channels]; what the last layer reads."""
    _, maps = model.look(variables, images)
    if not maps:
        raise InputError(
            "the model shows no maps of its convolutions: expected a module that sows them (see "
            "ibau_jax.models.VGG); fine-pruning needs a model with convolutions"
        )
    active = jnp.maximum(maps[-1], 0).mean((1, 2)).sum(0)
    return active, model.module.apply(variables, images, features=True)
