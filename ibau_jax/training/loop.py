"""The loop of training and of fine-tuning: optax, jit; data and shuffling on the device."""

import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ibau_jax.data import Dataset
from ibau_jax.devices import mesh, processes
from ibau_jax.devices.mesh import Devices
from ibau_jax.progress import progress_bar
from ibau_jax.training.states import Checkpoints


class TrainState(NamedTuple):
    """What the next step needs: flax variables, optimiser state, random key."""

    variables: Any
    opt_state: optax.OptState
    key: jax.Array


def fit(
    objective: Callable[..., tuple[jax.Array, Any]],
    state: TrainState,
    data: Dataset,
    *,
    optimizer: optax.GradientTransformation,
    epochs: int,
    batch_size: int,
    order_key: jax.Array,
    on_epoch: Callable[[dict[str, Any], Any], dict[str, Any]] = lambda record, variables: record,
    project: Callable[[Any], Any] | None = None,
    title: str = "train",
    progress: bool = False,
    devices: Devices,
    compile: Callable[..., Callable] | None = None,
    checkpoints: Checkpoints | None = None,
) -> tuple[Any, list[dict[str, Any]]]:
    """Minimise an objective over shuffled batches: the loop of training and of fine-tuning.

    Args:
      objective: see `make_step`; `cross_entropy` makes the usual one.
      state: where to start.
      batch_size: at most the number of images.
      order_key: of the shuffling.
      on_epoch: `on_epoch(record, variables) -> record` with `epoch`, `loss` (its mean) and
        `seconds`.
      project: applied to the parameters after each step.
      title: of the progress bar.
      compile: in place of `devices.compile`, for example to take its time.
      checkpoints: see `training.train.train`.

    Returns:
      The variables, on this process's own devices, and the records of the epochs.
    """
    batch_size, per_epoch = batches_of(len(data.images), batch_size)
    images, labels = devices.replicate((data.images, data.labels))
    devices.check_equal(images=images, labels=labels)  # processes may have made other triggers
    history: list[dict[str, Any]] = []
    done, losses, earlier = 0, [], 0.0
    if checkpoints is not None and (last := checkpoints.last(_stored(state))):
        done, found, about = last
        variables, opt_state, bits = found
        key = jax.random.wrap_key_data(jnp.asarray(bits), impl=jax.random.key_impl(state.key))
        state = TrainState(variables, opt_state, key)
        history, losses, earlier = about["history"], about["losses"], about["seconds"]
    state = devices.replicate(state)
    step = None

    def save(seconds: float) -> None:
        if checkpoints is not None:
            about = {"history": history, "losses": losses, "seconds": seconds}
            checkpoints.save(done, _stored(devices.one(state)), about)

    with progress_bar(epochs * per_epoch, title, progress) as advance:
        advance(done, "")
        for epoch in range(done // per_epoch + 1, epochs + 1):
            started = time.perf_counter() - earlier
            shares = shuffled(order_key, epoch, len(data.images), per_epoch, batch_size, devices)
            for i in devices.each(per_epoch, done % per_epoch):
                if step is None:
                    program = make_step(objective, optimizer, devices.axis, project)
                    arguments = (state, images, labels, shares, i)
                    build = compile or devices.compile
                    step = build(program, *arguments, rows=(3,), donate=(0,))
                with processes.watch():
                    state, loss = step(state, images, labels, shares, i)
                    losses.append(float(devices.one(loss)))
                done += 1
                advance(1, "")
                if not np.isfinite(losses[-1]):
                    break  # `on_epoch` sees it
                if checkpoints is not None and done % per_epoch and checkpoints.due():
                    save(time.perf_counter() - started)
            devices.check_equal(state=state)
            record = {
                "epoch": epoch,
                "loss": float(np.mean(losses)),
                "seconds": time.perf_counter() - started,
            }
            # A copy: the next step takes the memory of the state.
            record = on_epoch(record, jax.tree.map(jnp.copy, devices.one(state.variables)))
            history.append(record)
            losses, earlier = [], 0.0
            save(0.0)
            shown = ("loss", "acc", "asr")
            values = [f"{k} {record[k]:.3f}" for k in shown if record.get(k) is not None]
            advance(0, " ".join(values))
    return devices.one(state.variables), history


def batches_of(count: int, batch_size: int) -> tuple[int, int]:
    """The batch size for `count` images, and how many whole batches an epoch has."""
    batch_size = min(batch_size, count)
    return batch_size, count // batch_size


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


def shuffled(
    key: jax.Array, epoch: int, count: int, batches: int, batch_size: int, devices: Devices
) -> Rows:
    """The rows of an epoch: `batches` of `batch_size` in an order drawn from `key` and `epoch`."""
    order = jax.random.permutation(jax.random.fold_in(key, epoch), count)
    rows = np.asarray(order[: batches * batch_size]).reshape(batches, batch_size)
    return devices.share(partial(_share, rows, devices))


def _share(rows: np.ndarray, devices: Devices, device: int) -> Rows:
    """Its part of the batches `rows` int [batches, B], as `parallel` spreads them."""
    batches, size = rows.shape
    num_devices = len(devices.all)
    count = -(-size // num_devices)
    numbers = devices.numbers(device, count)
    index = rows[:, np.minimum(numbers, size - 1)]
    if size % num_devices == 0:
        return Rows(index, None)
    weights = (numbers < size).astype(jnp.result_type(float)) / size
    return Rows(index, np.broadcast_to(weights, (batches, count)))


def make_step(
    objective: Callable[..., tuple[jax.Array, Any]],
    optimizer: optax.GradientTransformation,
    axis: str | None = None,
    project: Callable[[Any], Any] | None = None,
):
    """`step(state, images, labels, rows, i) -> (state, loss)`: batch number i of `Rows`.

    To be mapped over the devices (`Devices.compile`).

    Args:
      objective: `objective(params, others, images, labels, weights, key) -> (loss, others)` on
        this device's rows of a batch: its part of the batch's loss (the parts of all devices
        add up to it), and the variables besides `params`, updated.
      project: applied to the parameters after the optimiser's step.
    """

    def step(state: TrainState, images, labels, rows: Rows, i):
        key, subkey = jax.random.split(state.key)
        index, weights = jax.tree.map(lambda a: a[i], rows)
        if weights is not None:
            weights = weights.astype(images.dtype)
        others = {name: value for name, value in state.variables.items() if name != "params"}

        def loss_of(params):
            return objective(params, others, images[index], labels[index], weights, subkey)

        params = state.variables["params"]
        (loss, updated), gradient = jax.value_and_grad(loss_of, has_aux=True)(params)
        loss, gradient = mesh.total((loss, gradient), axis)
        updates, opt_state = optimizer.update(gradient, state.opt_state, params)
        params = optax.apply_updates(params, updates)
        if project is not None:
            params = project(params)
        return TrainState({"params": params, **updated}, opt_state, key), loss

    return step


def cross_entropy(model: Any, axis: str | None = None):
    """The objective of plain training; `model` as `models.model.Classifier`."""

    def objective(params, others, images, labels, weights, key):
        variables = {"params": params, **others}
        logits, _, updated = model.train(variables, images, key, weights, axis)
        losses = optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels)
        return batch_mean(losses, weights, axis), updated

    return objective


def batch_mean(values: jax.Array, weights: jax.Array | None, axis: str | None) -> jax.Array:
    """This device's part of the mean over a batch: [B] -> scalar.

    Batch statistics tie the devices together; JAX's derivative of their sum adds up what each
    part owes to it.
    """
    if weights is None:
        return values.mean() / mesh.width(axis)
    return jnp.sum(weights * values)
