"""Training of (poisoned) models: Flax, optax, jit; data and shuffling on the device."""

import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from ibau_jax import parallel, processes
from ibau_jax.data import Dataset
from ibau_jax.errors import InputError
from ibau_jax.parallel import Devices
from ibau_jax.progress import progress_bar


class TrainState(NamedTuple):
    """What the next step needs: flax variables, optimiser state, random key."""

    variables: Any
    opt_state: optax.OptState
    key: jax.Array


def train(
    module: nn.Module,
    data: Dataset,
    *,
    epochs: int,
    key: jax.Array,
    rate: float = 1e-3,
    batch_size: int = 32,
    evaluate: Callable[[Any], Mapping[str, Any]] | None = None,
    progress: bool = False,
    devices: Devices | None = None,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Train with Adam and a rate that falls to zero along a cosine.

    The paper (A.3) states Adam with rate 0.05 and 50 epochs and leaves the rest open; that rate
    is 50 times the usual one, and the published models look trained without augmentation.

    Args:
      module: flax module called as `module(images, train=..., weights=...)`, with `params` and
        `batch_stats`, and an attribute `axis`; see `models.VGG`.
      data: images [N, H, W, C] in [0, 1], labels [N]; poisoned or not. A last partial batch
        of an epoch is left out (another order of images comes with the next epoch).
      epochs: passes over the data.
      rate: highest learning rate.
      evaluate: `evaluate(variables) -> mapping`, after the last epoch and, with a progress bar
        on, after each.
      devices: over which each batch is spread (`parallel.devices`); default: all of all
        processes. The result is the same but for rounding. The images are on each of them.

    Returns:
      The trained variables (NumPy arrays) and one dict an epoch: `epoch`, `loss`, `seconds`,
      and what `evaluate` gave.

    Raises:
      InputError: no epoch or no image, or the loss is no longer finite.
    """
    count = len(data.images)
    if epochs < 1 or not count:
        raise InputError(f"{epochs} epochs over {count} images: expected at least one of each")
    batch_size = min(batch_size, count)
    per_epoch = count // batch_size
    optimizer = optax.adam(optax.cosine_decay_schedule(rate, epochs * per_epoch))
    devices = devices or parallel.devices()
    images, labels = devices.replicate((data.images, data.labels))

    init_key, order_key, key = jax.random.split(key, 3)
    variables = jax.jit(module.init)(init_key, jnp.asarray(data.images[:1]))
    state = TrainState(variables, optimizer.init(variables["params"]), key)
    state = devices.replicate(state)
    step = None

    history = []
    with progress_bar(epochs * per_epoch, "train", progress) as advance:
        for epoch in range(1, epochs + 1):
            started = time.perf_counter()
            order = jax.random.permutation(jax.random.fold_in(order_key, epoch), count)
            rows = np.asarray(order[: per_epoch * batch_size]).reshape(per_epoch, batch_size)
            shares = devices.share(partial(_share, rows, devices))
            losses = []
            for i in devices.each(per_epoch):
                if step is None:
                    program = make_step(module.clone(axis=devices.axis), optimizer, devices.axis)
                    arguments = (state, images, labels, shares, i)
                    step = devices.compile(program, *arguments, rows=(3,), donate=(0,))
                with processes.watch():
                    state, loss = step(state, images, labels, shares, i)
                    losses.append(jax.block_until_ready(devices.one(loss)))
                advance(1, "")
            devices.check_equal(state=state)
            record = {
                "epoch": epoch,
                "loss": float(np.mean(losses)),
                "seconds": time.perf_counter() - started,
            }
            if not np.isfinite(record["loss"]):
                raise InputError(
                    f"the loss is {record['loss']} in epoch {epoch}: training diverged; "
                    f"choose a smaller rate than {rate:g}"
                )
            if evaluate is not None and (progress or epoch == epochs):
                record |= dict(evaluate(devices.one(state.variables)))
            history.append(record)
            shown = [f"{k} {record[k]:.3f}" for k in ("loss", "acc", "asr") if record.get(k)]
            advance(0, " ".join(shown))
    return jax.tree.map(np.asarray, devices.one(state.variables)), history


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
