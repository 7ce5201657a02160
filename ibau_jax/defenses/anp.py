"""ANP (Wu and Wang, NeurIPS 2021): cut the channels that fail first when neurons are disturbed.

    min over masks m in [0, 1]   alpha CE(m) + (1 - alpha) max over |noise| <= eps CE(m + noise)

The masks multiply the scale of each batch norm, the noise both its scale and its offset. Channels
that a backdoor needs turn the model to its target when they are disturbed, so their masks fall.
Then channels are cut from the smallest mask upwards, as far as the clean accuracy bears it.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ibau_jax.data import Dataset
from ibau_jax.defenses.method import method
from ibau_jax.defenses.run import Job, Rounds, Told
from ibau_jax.devices import mesh
from ibau_jax.errors import InputError, check_positive
from ibau_jax.models.normed import Normed, changed, normed_layers
from ibau_jax.models.predict import predict
from ibau_jax.training.loop import Fit, TrainState, batch_mean, batches_of
from ibau_jax.unlearning.batches import parted
from ibau_jax.unlearning.objective import cross_entropy


@dataclass(frozen=True)
class ANPConfig:
    """Settings of ANP.

    Attributes:
      steps: of the masks' optimisation, rounded up to whole passes.
      batch_size: images of a step.
      rate, momentum: of its SGD.
      eps: largest relative noise of a scale and of an offset. (With the authors' 0.4 a third of
        the masks of a narrow network fall to zero, its accuracy with them.)
      alpha: weight of the loss without noise.
      held_back: share of the clean images that the threshold is chosen on. (The public bench
        chooses it by the ASR, which no defender knows.)
      drop: by how much the accuracy on them may fall, at most.
    """

    steps: int = 400
    batch_size: int = 64
    rate: float = 0.2
    momentum: float = 0.9
    eps: float = 0.2
    alpha: float = 0.2
    held_back: float = 0.2
    drop: float = 0.1

    def __post_init__(self):
        check_positive(self, "steps", "batch_size", "rate", "eps", "held_back", "drop")
        for name in ("alpha", "held_back"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}: expected a share below 1")


PRESETS = {
    "cpu": lambda dataset: ANPConfig(),
    "paper": lambda dataset: ANPConfig(steps=2000, batch_size=128, eps=0.4),
}


@method(ANPConfig())
def anp(job: Job) -> Rounds:
    """Find and cut the channels of the backdoor by disturbing them (Wu and Wang, NeurIPS 2021).

    The running statistics and dropout are as in evaluation. The one round tells how many `channels`
    were cut, the `threshold` of the masks, and the accuracy on the images that were held back
    (`held_back_acc`). The diagnostics have the `masks` of each layer.

    Raises:
      InputError: the model has no batch norm, or a part of the clean set is empty.
    """
    config, devices = job.config, job.devices
    layers = normed_layers(job.variables)
    if not layers:
        raise InputError(
            "anp masks the channels of batch norms: expected a Classifier whose variables have "
            "'batch_stats', found none"
        )
    count = round(config.held_back * len(job.clean.labels))
    if not 0 < count < len(job.clean.labels):
        raise InputError(
            f"{len(job.clean.labels)} clean images, {count} of them held back: expected at least "
            "one to choose the threshold by and one to find the masks with; give more images"
        )
    split_key, order_key, key = jax.random.split(job.key, 3)
    held_back, rest = parted(job.clean, split_key, count)
    job.advice = f"expected a rate that the masks bear, found {config.rate:g}; choose a smaller one"
    yield job.variables, {}
    masks = {layer.name: jnp.ones(layer.channels) for layer in layers}
    optimizer = optax.sgd(config.rate, config.momentum)
    batch_size, per_epoch = batches_of(len(rest.labels), config.batch_size)
    fitting = Fit(
        robust(job, layers),
        # The model is among the variables, unchanged: an argument of the program, not a constant.
        TrainState({"params": masks, "model": job.variables}, optimizer.init(masks), key),
        rest,
        optimizer=optimizer,
        epochs=-(-config.steps // per_epoch),
        batch_size=batch_size,
        order_key=order_key,
        project=lambda masks: jax.tree.map(lambda m: jnp.clip(m, 0, 1), masks),
        title="ANP",
        bar=job.progress,
        devices=devices,
        program=job.program,
    )
    for epoch in fitting:
        job.check_finite(f"the loss of pass {epoch['epoch']}", epoch["loss"])
    masks = {name: np.asarray(mask) for name, mask in fitting.variables["params"].items()}
    variables, row = cut(job, layers, masks, held_back)
    yield variables, row
    return Told(diagnostics={"masks": {name: mask.tolist() for name, mask in masks.items()}})


def robust(job: Job, layers: list[Normed]):
    """The objective (see `training.loop`), of which the masks are the parameters."""
    config, axis = job.config, job.devices.axis

    def objective(masks, others, images, labels, weights, key):
        def loss(masks, noise):
            variables = noisy(others["model"], layers, masks, noise)
            logits = job.model(variables, images)
            return batch_mean(cross_entropy(logits, labels), weights, axis)

        # One step of the sign from a random start, as large as the ball.
        fixed = jax.lax.stop_gradient(masks)
        draws = jax.random.split(key, len(layers))
        start = {
            layer.name: config.eps
            * jax.random.uniform(draw, (2, *masks[layer.name].shape), minval=-1)
            for layer, draw in zip(layers, draws, strict=True)
        }
        slope = mesh.total(jax.grad(loss, argnums=1)(fixed, start), axis)
        noise = jax.tree.map(
            lambda n, s: jnp.clip(n + config.eps * jnp.sign(s), -config.eps, config.eps),
            start,
            slope,
        )
        nothing = jax.tree.map(jnp.zeros_like, noise)
        calm, worst = loss(masks, nothing), loss(masks, noise)
        return config.alpha * calm + (1 - config.alpha) * worst, others

    return objective


def noisy(variables: Any, layers: list[Normed], masks: Any, noise: Any) -> Any:
    """The model with scales times mask + noise, offsets times 1 + noise; noise [2, C] a layer."""

    def change(params):
        new = {}
        for layer in layers:
            of_scale, of_offset = noise[layer.name]
            new[layer.scale] = params[layer.scale] * (masks[layer.name] + of_scale)
            new[layer.offset] = params[layer.offset] * (1 + of_offset)
        return new

    return changed(variables, change)


def cut(
    job: Job, layers: list[Normed], masks: Any, held_back: Dataset
) -> tuple[Any, dict[str, Any]]:
    """Cut at the largest threshold whose accuracy on the held back images is near the given one."""
    classify = predict(job.model)

    def without(threshold: float) -> Any:
        return changed(
            job.variables,
            lambda params: {
                layer.scale: jnp.where(masks[layer.name] < threshold, 0, params[layer.scale])
                for layer in layers
            },
        )

    def accuracy(variables: Any) -> float:
        return float(np.mean(classify(variables, held_back.images) == held_back.labels))

    found = job.variables, 0.0, accuracy(job.variables)
    least = found[2] - job.config.drop
    for threshold in np.arange(1, 20) / 20:
        variables = without(threshold)
        acc = accuracy(variables)
        if acc < least:
            break
        found = variables, float(threshold), acc
    channels = sum(int((mask < found[1]).sum()) for mask in masks.values())
    return found[0], {"channels": channels, "threshold": found[1], "held_back_acc": found[2]}
