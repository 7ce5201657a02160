"""Training of (poisoned) models: presets, initialisation, measurement."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ibau_jax.data import Dataset, check_data, check_labels
from ibau_jax.devices import mesh
from ibau_jax.devices.mesh import Devices
from ibau_jax.errors import InputError, check_name
from ibau_jax.models.model import Classifier
from ibau_jax.progress import progress_bar
from ibau_jax.training.loop import Fit, TrainState, batches_of, cross_entropy
from ibau_jax.training.states import Checkpoints


@dataclass(frozen=True)
class TrainConfig:
    """How to train; `TrainConfig()` is the preset `cpu`.

    Attributes:
      epochs: passes over the data.
      batch_size: a last partial batch of an epoch is left out (another order of images comes
        with the next epoch).
      rate: highest learning rate of Adam.
      schedule: `one-cycle` (up along a cosine in a quarter of the steps, then down to zero), or
        `constant`.
      dropout: factor of the model's dropout rates.
    """

    epochs: int = 8
    batch_size: int = 64
    rate: float = 3e-3
    schedule: str = "one-cycle"
    dropout: float = 0.5

    def __post_init__(self):
        check_name("schedule", self.schedule, ("one-cycle", "constant"))
        for name in ("epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}: expected at least 1")
        if not self.rate > 0:
            raise InputError(f"rate is {self.rate}: expected a positive number")
        if not self.dropout >= 0:
            raise InputError(f"dropout is {self.dropout}: expected a factor of at least 0")

    @classmethod
    def cpu(cls, dataset: str = "cifar10") -> "TrainConfig":
        """As few epochs as still give about the clean accuracy of the paper's models."""
        return {
            "digits": cls(batch_size=32),  # a small data set: it needs the steps
            "gtsrb": cls(epochs=5),
        }.get(dataset, cls())

    @classmethod
    def paper(cls, dataset: str = "cifar10") -> "TrainConfig":
        """Section A.3: Adam with rate 0.05, 50 epochs.

        The paper is silent on the batch size (here 128), decay (none) and augmentation (none:
        the published models' accuracy speaks against it). The rate is 50 times the usual one
        for Adam, which makes it doubtful.
        """
        del dataset  # the same for both
        return cls(epochs=50, batch_size=128, rate=0.05, schedule="constant", dropout=1.0)

    def transform(self, steps: int) -> optax.GradientTransformation:
        """The optimiser, for `steps` steps in all."""
        if self.schedule == "constant":
            return optax.adam(self.rate)
        return optax.adam(optax.cosine_onecycle_schedule(steps, self.rate, pct_start=0.25))


PRESETS: dict[str, Callable[[str], TrainConfig]] = {
    "cpu": TrainConfig.cpu,
    "paper": TrainConfig.paper,
}


def train(
    module: Any,
    data: Dataset,
    *,
    config: TrainConfig = TrainConfig(),  # noqa: B008  (frozen)
    key: jax.Array,
    evaluate: Callable[[Any], Mapping[str, Any]] | None = None,
    progress: bool = False,
    devices: Devices | None = None,
    checkpoints: Checkpoints | None = None,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Train with Adam; the data, the draw of each epoch's order and every step are on the devices.

    Args:
      module: of `models.architectures`; another flax module needs the same arguments as `VGG`, and
        attributes `axis` and `dropout`.
      data: images [N, H, W, C] in [0, 1], labels [N]; poisoned or not.
      evaluate: `evaluate(variables) -> mapping`, after the last epoch and, with a progress bar
        on, after each.
      devices: over which each batch is spread (`mesh.devices`); default: all of all
        processes. The result is the same but for rounding. The images are on each of them.
      checkpoints: where states are kept. A run that goes on from one ends with the same model,
        bit for bit, as a run that was never stopped.

    Returns:
      The trained variables (NumPy arrays) and one dict an epoch: `epoch`, `loss`, `seconds`,
      and what `evaluate` gave.

    Raises:
      InputError: images or labels that cannot be trained on, or the loss is no longer finite.
    """
    data = check_data(data, "training")
    devices = devices or mesh.devices()
    rates = tuple(config.dropout * rate for rate in module.dropout)
    if rates and max(rates) >= 1:
        raise InputError(
            f"dropout is {config.dropout}: it makes rates of {rates}, expected below 1"
        )
    module = module.clone(dropout=rates)
    init_key, order_key, key = jax.random.split(key, 3)
    variables = jax.jit(module.init)(init_key, jnp.asarray(data.images[:1]))
    out = jax.eval_shape(module.apply, variables, data.images[:1])
    check_labels(data.labels, out.shape[-1], "training")
    batch_size, per_epoch = batches_of(len(data.images), config.batch_size)
    optimizer = config.transform(config.epochs * per_epoch)

    fitting = Fit(
        cross_entropy(Classifier(module), devices.axis),
        TrainState(variables, optimizer.init(variables["params"]), key),
        data,
        optimizer=optimizer,
        epochs=config.epochs,
        batch_size=batch_size,
        order_key=order_key,
        bar=partial(progress_bar, enabled=progress),
        devices=devices,
        checkpoints=checkpoints,
    )
    for row in fitting:
        if not np.isfinite(row["loss"]):
            raise InputError(
                f"the loss is {row['loss']} in epoch {row['epoch']}: training diverged; choose a "
                f"smaller rate than {config.rate:g}, for example that of the preset cpu",
                argument="preset",
            )
        if evaluate is not None and (progress or row["epoch"] == config.epochs):
            row |= evaluate(fitting.variables)
    return jax.tree.map(np.asarray, fitting.variables), fitting.history
