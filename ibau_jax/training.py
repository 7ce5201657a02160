"""Training of (poisoned) models: Flax, optax, jit; data and shuffling on the device."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from ibau_jax import parallel, processes
from ibau_jax.data import Dataset
from ibau_jax.errors import InputError, check_name
from ibau_jax.models import VGG
from ibau_jax.parallel import Devices
from ibau_jax.progress import progress_bar
from ibau_jax.resume import Checkpoints


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


class TrainState(NamedTuple):
    """What the next step needs: flax variables, optimiser state, random key."""

    variables: Any
    opt_state: optax.OptState
    key: jax.Array


def train(
    module: VGG,
    data: Dataset,
    *,
    config: TrainConfig = TrainConfig(),  # noqa: B008  (frozen)
    key: jax.Array,
    evaluate: Callable[[Any], Mapping[str, Any]] | None = None,
    progress: bool = False,
    devices: Devices | None = None,
    checkpoints: Checkpoints | None = None,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Train with Adam; data, shuffling and every step are on the devices.

    Args:
      module: see `models.VGG`; another flax module needs the same arguments, `params` and
        `batch_stats`, and attributes `axis` and `dropout`.
      data: images [N, H, W, C] in [0, 1], labels [N]; poisoned or not.
      evaluate: `evaluate(variables) -> mapping`, after the last epoch and, with a progress bar
        on, after each.
      devices: over which each batch is spread (`parallel.devices`); default: all of all
        processes. The result is the same but for rounding. The images are on each of them.
      checkpoints: where states are kept. A run that goes on from one ends with the same model,
        bit for bit, as a run that was never stopped.

    Returns:
      The trained variables (NumPy arrays) and one dict an epoch: `epoch`, `loss`, `seconds`,
      and what `evaluate` gave.

    Raises:
      InputError: there is no image, or the loss is no longer finite.
    """
    count = len(data.images)
    if not count:
        raise InputError("the training set is empty: expected at least one image")
    batch_size = min(config.batch_size, count)
    per_epoch = count // batch_size
    steps = config.epochs * per_epoch
    optimizer = config.transform(steps)
    devices = devices or parallel.devices()
    images, labels = devices.replicate((data.images, data.labels))
    devices.check_equal(images=images, labels=labels)  # processes may have made other triggers

    rates = tuple(config.dropout * rate for rate in module.dropout)
    module = module.clone(axis=devices.axis, dropout=rates)
    init_key, order_key, key = jax.random.split(key, 3)
    variables = jax.jit(module.clone(axis=None).init)(init_key, jnp.asarray(data.images[:1]))
    state = TrainState(variables, optimizer.init(variables["params"]), key)
    history: list[dict[str, Any]] = []
    done, losses, earlier = 0, [], 0.0
    if checkpoints is not None and (last := checkpoints.last(_stored(state))):
        done, found, about = last
        variables, opt_state, bits = found
        key = jax.random.wrap_key_data(jnp.asarray(bits), impl=jax.random.key_impl(key))
        state = TrainState(variables, opt_state, key)
        history, losses, earlier = about["history"], about["losses"], about["seconds"]
    state = devices.replicate(state)
    step = None

    def save(seconds: float) -> None:
        if checkpoints is not None:
            about = {"history": history, "losses": losses, "seconds": seconds}
            checkpoints.save(done, _stored(devices.one(state)), about)

    with progress_bar(steps, "train", progress) as advance:
        advance(done, "")
        for epoch in range(done // per_epoch + 1, config.epochs + 1):
            started = time.perf_counter() - earlier
            order = jax.random.permutation(jax.random.fold_in(order_key, epoch), count)
            rows = np.asarray(order[: per_epoch * batch_size]).reshape(per_epoch, batch_size)
            shares = devices.share(partial(_share, rows, devices))
            for i in devices.each(per_epoch, done % per_epoch):
                if step is None:
                    program = make_step(module, optimizer, devices.axis)
                    arguments = (state, images, labels, shares, i)
                    step = devices.compile(program, *arguments, rows=(3,), donate=(0,))
                with processes.watch():
                    state, loss = step(state, images, labels, shares, i)
                    losses.append(float(devices.one(loss)))
                done += 1
                advance(1, "")
                due = checkpoints is not None and done % per_epoch and checkpoints.due()
                if due and np.isfinite(losses[-1]):
                    save(time.perf_counter() - started)
            devices.check_equal(state=state)
            record = {
                "epoch": epoch,
                "loss": float(np.mean(losses)),
                "seconds": time.perf_counter() - started,
            }
            if not np.isfinite(record["loss"]):
                raise InputError(
                    f"the loss is {record['loss']} in epoch {epoch}: training diverged; "
                    f"choose a smaller rate than {config.rate:g} (--preset cpu)"
                )
            if evaluate is not None and (progress or epoch == config.epochs):
                record |= dict(evaluate(devices.one(state.variables)))
            history.append(record)
            losses, earlier = [], 0.0
            save(0.0)
            shown = ("loss", "acc", "asr")
            values = [f"{k} {record[k]:.3f}" for k in shown if record.get(k) is not None]
            advance(0, " ".join(values))
    return jax.tree.map(np.asarray, devices.one(state.variables)), history


def _stored(state: TrainState) -> list:
    """A state as plain arrays."""
    return [state.variables, state.opt_state, jax.random.key_data(state.key)]


class Rows(NamedTuple):
    """What one device has of each batch of an epoch.

    Attributes:
      index: int32 [batches, B], row numbers in the data.
      weights: float [batches, B], 1 / images in the batch, 0 for padding; None: no padding.
    """

    index: Any
    weights: Any


def _share(rows: np.ndarray, devices: Devices, device: int) -> Rows:
    """Its part of the batches `rows` int [batches, B], as `parallel` spreads them."""
    batches, size = rows.shape
    num_devices = len(devices.all)
    count = -(-size // num_devices)
    numbers = devices.numbers(device, count)
    index = rows[:, np.minimum(numbers, size - 1)]
    if size % num_devices == 0:
        return Rows(index, None)
    weights = np.broadcast_to((numbers < size).astype(np.float32) / size, (batches, count))
    return Rows(index, weights)


def make_step(module: nn.Module, optimizer: optax.GradientTransformation, axis: str | None = None):
    """`step(state, images, labels, rows, i) -> (state, loss)`: batch number i of `Rows`.

    To be mapped over the devices (`Devices.compile`); `module` has the same axis.
    """

    def step(state: TrainState, images, labels, rows: Rows, i):
        key, dropout_key = jax.random.split(state.key)
        index, weights = jax.tree.map(lambda a: a[i], rows)
        weighted = {} if weights is None else {"weights": weights}

        def loss_of(params):
            logits, updated = module.apply(
                {**state.variables, "params": params},
                images[index],
                train=True,
                rngs={"dropout": dropout_key},
                mutable=["batch_stats"],
                **weighted,
            )
            losses = optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels[index])
            # This device's part of the batch's mean. Batch statistics tie the devices together;
            # JAX's derivative of their sum adds up what each part owes to it.
            if weights is None:
                return losses.mean() / parallel.width(axis), updated
            return jnp.sum(weights * losses), updated

        params = state.variables["params"]
        (loss, updated), gradient = jax.value_and_grad(loss_of, has_aux=True)(params)
        loss, gradient = parallel.total((loss, gradient), axis)
        updates, opt_state = optimizer.update(gradient, state.opt_state, params)
        variables = {"params": optax.apply_updates(params, updates), **updated}
        return TrainState(variables, opt_state, key), loss

    return step
