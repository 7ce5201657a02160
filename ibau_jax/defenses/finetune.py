"""Fine-tuning on clean data, the last step of most baselines and a control of its own."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import numpy as np
import optax

from ibau_jax.data import Dataset
from ibau_jax.defenses.run import Run, check_positive
from ibau_jax.devices import mesh
from ibau_jax.devices.mesh import Devices
from ibau_jax.errors import InputError, check_name
from ibau_jax.models.model import Logits, Model, Params, Variables, opened
from ibau_jax.training.loop import TrainState, batches_of, cross_entropy, fit
from ibau_jax.unlearning.batches import check_clean
from ibau_jax.unlearning.ibau import Result


@dataclass(frozen=True)
class Tuning:
    """How to fine-tune.

    Attributes:
      epochs: passes over the data.
      batch_size: a last partial batch of an epoch is left out.
      steps: at least so many. Where `epochs` of few images make fewer, batches get smaller, down to
        a tenth of the images (but not below ten), and the passes more; 0: exactly as told.
      optimizer: `adam`, or `sgd` with momentum and weight decay.
      rate: learning rate.
      momentum, nesterov, decay: of `sgd`; decay is the factor of the parameters in the gradient.
      cosine: let the rate fall to zero along a cosine.
      drops: (epoch, factor): from that epoch on (counted from 0) the rate is that much lower; an
        epoch of `epochs`, whatever `steps` makes of them.
    """

    epochs: int = 10
    batch_size: int = 128
    steps: int = 0
    optimizer: str = "sgd"
    rate: float = 0.01
    momentum: float = 0.9
    nesterov: bool = False
    decay: float = 0.0
    cosine: bool = False
    drops: tuple[tuple[int, float], ...] = ()

    def __post_init__(self):
        check_name("optimizer", self.optimizer, ("adam", "sgd"))
        check_positive(self, "epochs", "batch_size", "rate")
        if self.steps < 0:
            raise InputError(f"steps is {self.steps}: expected at least 0")

    def plan(self, count: int) -> tuple[int, int, int]:
        """For `count` images: batch size, batches an epoch, epochs (see `steps`)."""
        batch_size, per_epoch = batches_of(count, self.batch_size)
        if self.epochs * per_epoch >= self.steps:
            return batch_size, per_epoch, self.epochs
        batch_size, per_epoch = batches_of(count, min(batch_size, max(10, count // 10)))
        return batch_size, per_epoch, max(self.epochs, -(-self.steps // per_epoch))

    def transform(self, steps: int) -> optax.GradientTransformation:
        """The optimiser, for so many steps in all."""
        rate: Any = self.rate
        if self.cosine:
            rate = optax.cosine_decay_schedule(self.rate, steps)
        elif self.drops:
            boundaries = {round(steps * epoch / self.epochs): by for epoch, by in self.drops}
            rate = optax.piecewise_constant_schedule(self.rate, boundaries)
        if self.optimizer == "adam":
            return optax.adam(rate)
        return optax.chain(
            optax.add_decayed_weights(self.decay),
            optax.sgd(rate, self.momentum, self.nesterov),
        )


def tune(
    run: Run,
    model: Model,
    variables: Variables,
    data: Dataset,
    config: Tuning,
    *,
    key: jax.Array,
    devices: Devices,
    objective: Callable[..., Any] | None = None,
    project: Callable[[Any], Any] | None = None,
    record: bool = True,
    title: str = "fine-tuning",
    progress: bool = False,
) -> Variables:
    """Train on `data` from `variables`: batch statistics and dropout as in training.

    Args:
      run: gets a record after each epoch (unless `record` is off) and the compile time.
      objective: see `training.loop.make_step`; default: cross-entropy.
      project: applied to the parameters after each step.

    Raises:
      InputError: the loss is no longer finite.
    """
    order_key, key = jax.random.split(key)
    batch_size, per_epoch, epochs = config.plan(len(data.labels))
    optimizer = config.transform(epochs * per_epoch)

    def on_epoch(values: dict[str, Any], variables: Variables) -> dict[str, Any]:
        if not np.isfinite(values["loss"]):
            raise InputError(
                f"{title}: the loss is {values['loss']} in epoch {values['epoch']}; expected a "
                f"rate that the model bears, found {config.optimizer} with {config.rate:g}: "
                "choose a smaller one"
            )
        return {**values, **run.record(variables, loss=values["loss"])} if record else values

    with run.compiling():
        opt_state = jax.jit(optimizer.init)(variables["params"])
    variables, _ = fit(
        objective or cross_entropy(model, devices.axis),
        TrainState(variables, opt_state, key),
        data,
        optimizer=optimizer,
        epochs=epochs,
        batch_size=batch_size,
        order_key=order_key,
        on_epoch=on_epoch,
        project=project,
        title=title,
        progress=progress,
        devices=devices,
        compile=partial(run.compile, devices),
    )
    return variables


# The rate falls to zero. One epoch at a constant rate ends in the disorder of its first steps:
# after Neural Cleanse on the authors' Trojan WM model at an ACC of 0.59, where this gives 0.80.
# 78 steps are two epochs of 5000 images, for which this was chosen; fewer images are passed over
# until they make as many (400: 8 epochs).
SHORT = Tuning(epochs=2, steps=78, cosine=True)
MEASURED = ("cifar10", "gtsrb")  # what the presets `cpu` were first measured on, and keep to
PRESETS = {
    "cpu": lambda dataset: SHORT,
    # BackdoorBench's, but for the number of epochs (100 of 2500 images there).
    "paper": lambda dataset: Tuning(epochs=50, batch_size=256, decay=5e-4, cosine=True),
}


def finetune(
    logits: Logits,
    params: Params,
    clean: Dataset,
    *,
    config: Tuning = SHORT,
    key: jax.Array,
    evaluate: Callable[[Params], Mapping[str, Any]] | None = None,
    on_round: Callable[[dict[str, Any]], None] | None = None,
    progress: bool = False,
    devices: Devices | None = None,
) -> Result:
    """Plain fine-tuning on the clean set: the control of every comparison.

    Arguments and result are those of `ibau_jax.unlearn`; a `Classifier` is trained with batch
    statistics and dropout, a plain function as it is. A round is an epoch.
    """
    clean = check_clean(logits, params, clean)
    devices = devices or mesh.devices()
    model, variables = opened(logits, params)
    run = Run(model, params, evaluate, on_round)
    run.record(variables)
    variables = tune(
        run, model, variables, clean, config, key=key, devices=devices, progress=progress
    )
    return run.result(variables)
