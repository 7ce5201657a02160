"""Fine-tuning on clean data, the last step of most baselines and a control of its own."""

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any

import jax

from ibau_jax.data import Dataset
from ibau_jax.defenses.method import method
from ibau_jax.defenses.run import Job, Rounds, Told
from ibau_jax.errors import InputError, check_positive
from ibau_jax.models.model import Variables
from ibau_jax.training.loop import Fit, TrainState, batches_of, cross_entropy
from ibau_jax.training.optimizers import SGD, Optimizer, shown, transform


@dataclass(frozen=True)
class Tuning:
    """How to fine-tune.

    Attributes:
      epochs: passes over the data.
      batch_size: a last partial batch of an epoch is left out.
      steps: at least so many. Where `epochs` of few images make fewer, batches get smaller, down to
        a tenth of the images (but not below ten), and the passes more; 0: exactly as told.
      optimizer: any `Optimizer`.
    """

    epochs: int = 10
    batch_size: int = 128
    steps: int = 0
    optimizer: Optimizer = SGD(0.01, momentum=0.9)  # noqa: RUF009  (frozen)

    def __post_init__(self):
        check_positive(self, "epochs", "batch_size")
        if self.steps < 0:
            raise InputError(f"steps is {self.steps}: expected at least 0")

    def plan(self, count: int) -> tuple[int, int, int]:
        """For `count` images: batch size, batches an epoch, epochs (see `steps`)."""
        batch_size, per_epoch = batches_of(count, self.batch_size)
        if self.epochs * per_epoch >= self.steps:
            return batch_size, per_epoch, self.epochs
        batch_size, per_epoch = batches_of(count, min(batch_size, max(10, count // 10)))
        return batch_size, per_epoch, max(self.epochs, -(-self.steps // per_epoch))


def tune(
    job: Job,
    variables: Variables,
    data: Dataset,
    config: Tuning,
    *,
    key: jax.Array,
    objective: Callable[..., Any] | None = None,
    project: Callable[[Any], Any] | None = None,
    title: str = "fine-tuning",
) -> Generator[tuple[Variables, dict[str, Any]], None, Variables]:
    """Train on `data` from `variables`: batch statistics and dropout as in training.

    Args:
      objective: see `training.loop.make_step`; default: cross-entropy.
      project: applied to the parameters after each step.

    Yields:
      The variables after each epoch, and a row with its `loss`.

    Returns:
      The variables (`variables = yield from tune(...)`).

    Raises:
      InputError: the loss is no longer finite.
    """
    order_key, key = jax.random.split(key)
    batch_size, per_epoch, epochs = config.plan(len(data.labels))
    optimizer = transform(config.optimizer, epochs * per_epoch)
    job.advice = (
        f"expected an optimizer that the model bears, found {shown(config.optimizer)}: choose a "
        "smaller rate"
    )
    with job.compiling():
        opt_state = jax.jit(optimizer.init)(variables["params"])
    fitting = Fit(
        objective or cross_entropy(job.model, job.devices.axis),
        TrainState(variables, opt_state, key),
        data,
        optimizer=optimizer,
        epochs=epochs,
        batch_size=batch_size,
        order_key=order_key,
        project=project,
        title=title,
        bar=job.progress,
        devices=job.devices,
        program=job.program,
    )
    for epoch in fitting:
        job.check_finite(f"{title}: the loss of epoch {epoch['epoch']}", epoch["loss"])
        row = {"loss": epoch["loss"]}
        yield fitting.variables, row
        epoch |= row  # with what was measured, for the progress bar
    return fitting.variables


# The rate falls to zero. One epoch at a constant rate ends in the disorder of its first steps:
# after Neural Cleanse on the authors' Trojan WM model at an ACC of 0.59, where this gives 0.80.
# 78 steps are two epochs of 5000 images, for which this was chosen; fewer images are passed over
# until they make as many (400: 8 epochs).
SHORT = Tuning(epochs=2, steps=78, optimizer=SGD(0.01, momentum=0.9, schedule="cosine"))
MEASURED = ("cifar10", "gtsrb")  # what the presets `cpu` were first measured on, and keep to
PRESETS = {
    "cpu": lambda dataset: SHORT,
    # BackdoorBench's, but for the number of epochs (100 of 2500 images there).
    "paper": lambda dataset: Tuning(
        epochs=50,
        batch_size=256,
        optimizer=SGD(0.01, momentum=0.9, decay=5e-4, schedule="cosine"),
    ),
}


@method(SHORT)
def finetune(job: Job) -> Rounds:
    """Plain fine-tuning on the clean set: the control of every comparison.

    A `Classifier` is trained with batch statistics and dropout, a plain function as it is. A round
    is an epoch, with its mean `loss`.
    """
    yield job.variables, {}
    yield from tune(job, job.variables, job.clean, job.config, key=job.key)
    return Told()
