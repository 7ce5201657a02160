"""The loop of training and of fine-tuning: optax, jit; data and shuffling on the device."""

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ibau_jax.data import Dataset
from ibau_jax.devices import mesh
from ibau_jax.devices.losses import Losses
from ibau_jax.devices.mesh import Devices
from ibau_jax.progress import note_of, progress_bar
from ibau_jax.training.states import Checkpoints


class TrainState(NamedTuple):
    """What the next step needs: flax variables, optimiser state, random key."""

    variables: Any
    opt_state: optax.OptState
    key: jax.Array


class Fit:
    """Minimises an objective over shuffled batches: the loop of training and of fine-tuning.

    To be iterated over: after each epoch it yields a row with `epoch`, `loss` (its mean) and
    `seconds`, to which more may be added. Whoever iterates looks whether the loss is finite.

    Args:
      objective: see `make_step`; `cross_entropy` makes the usual one.
      state: where to start.
      batch_size: at most the number of images.
      order_key: of the shuffling.
      project: applied to the parameters after each step.
      title: of the progress bar.
      bar: makes it, of steps and title; see `progress.progress_bar`.
      program: in place of `devices.program`, for example to take the time of compiling.
      checkpoints: see `training.train.train`.

    Attributes:
      history: the rows of all epochs so far, those before a resumption too.
    """

    def __init__(
        self,
        objective: Callable[..., tuple[jax.Array, Any]],
        state: TrainState,
        data: Dataset,
        *,
        optimizer: optax.GradientTransformation,
        epochs: int,
        batch_size: int,
        order_key: jax.Array,
        project: Callable[[Any], Any] | None = None,
        title: str = "train",
        bar: Callable[[int, str], Any] = progress_bar,
        devices: Devices,
        program: Callable[..., Callable] | None = None,
        checkpoints: Checkpoints | None = None,
    ):
        self.history: list[dict[str, Any]] = []
        self._batch_size, self._per_epoch = batches_of(len(data.images), batch_size)
        self._epochs, self._order_key, self._devices = epochs, order_key, devices
        self._title, self._bar, self._checkpoints = title, bar, checkpoints
        self._data = devices.replicate((data.images, data.labels))
        devices.check_equal(data=self._data)  # processes may have made other triggers
        self._done, earlier, self._earlier = 0, [], 0.0
        if checkpoints is not None and (last := checkpoints.last(_stored(state))):
            self._done, (variables, opt_state, bits), about = last
            key = jax.random.wrap_key_data(jnp.asarray(bits), impl=jax.random.key_impl(state.key))
            state = TrainState(variables, opt_state, key)
            self.history, earlier = about["history"], about["losses"]
            self._earlier = about["seconds"]
        self._losses = Losses(devices, earlier=earlier)
        self._state = devices.replicate(state)
        step = make_step(objective, optimizer, devices.axis, project)
        self._step = (program or devices.program)(step, rows=(3,), donate=(0,))

    @property
    def variables(self) -> Any:
        """Of the model, on this process's devices; a copy, since the next step takes the memory."""
        return jax.tree.map(jnp.copy, self._devices.one(self._state.variables))

    def __iter__(self) -> Iterator[dict[str, Any]]:
        with self._bar(self._epochs * self._per_epoch, self._title) as advance:
            advance(self._done, "")
            for epoch in range(self._done // self._per_epoch + 1, self._epochs + 1):
                row = self._epoch(epoch, advance)
                yield row
                self.history.append(row)
                self._losses, self._earlier = Losses(self._devices), 0.0
                self._save(0.0)
                advance(0, note_of(row))

    def _epoch(self, epoch: int, advance: Callable[..., None]) -> dict[str, Any]:
        started, count = time.perf_counter() - self._earlier, len(self._data[1])
        rows = shuffled(
            self._order_key, epoch, count, self._per_epoch, self._batch_size, self._devices
        )
        for i in range(self._done % self._per_epoch, self._per_epoch):
            self._state, loss = self._step(self._state, *self._data, rows, i)
            self._losses.add(loss)
            self._done += 1
            advance(1)
            if not self._losses.finite:
                break
            due = self._checkpoints is not None and self._checkpoints.due()
            if due and self._done % self._per_epoch:
                self._save(time.perf_counter() - started)
        self._devices.check_equal(state=self._state)
        loss = float(np.mean(self._losses.read()))
        return {"epoch": epoch, "loss": loss, "seconds": time.perf_counter() - started}

    def _save(self, seconds: float) -> None:
        if self._checkpoints is not None:
            about = {"history": self.history, "losses": self._losses.read(), "seconds": seconds}
            self._checkpoints.save(self._done, _stored(self._devices.one(self._state)), about)


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

    To be mapped over the devices (`Devices.program`).

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
