"""What a model says of any number of images, batch by batch."""

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ibau_jax.models.model import Logits

Run = Callable[[Any, Any], np.ndarray]


def predict(logits: Logits, batch_size: int | None = None) -> Run:
    """A compiled `predict(params, images [N, H, W, C]) -> labels int32 [N]`.

    The batch size does not change the result; by default it suits the backend's memory.
    """
    return _in_batches(lambda *args: jnp.argmax(logits(*args), -1).astype(jnp.int32), batch_size)


def probabilities(logits: Logits, batch_size: int | None = None) -> Run:
    """`predict` for the probabilities of all labels: [N, num_classes]."""
    return _in_batches(lambda *args: jax.nn.softmax(logits(*args)), batch_size)


def usual_batch() -> int:
    """The batch size that suits the backend's memory."""
    return 10 if jax.default_backend() == "cpu" else 500


def _in_batches(function: Callable, batch_size: int | None) -> Run:
    batch_size = batch_size or usual_batch()
    compiled = jax.jit(function)

    def run(params, images):
        # Arrays of NumPy's and of a device are compiled for apart, and the former sent each time.
        params = jax.device_put(params, jax.local_devices()[0])
        if not len(images):
            shape = jax.eval_shape(function, params, images)
            return np.empty(shape.shape, shape.dtype)

        def call(start: int) -> jax.Array:
            batch = np.asarray(images[start : start + batch_size])
            short = batch_size - len(batch) if start else 0  # one shape, one compilation
            batch = np.pad(batch, [(0, short)] + [(0, 0)] * (batch.ndim - 1))
            return compiled(params, batch)[: batch_size - short]

        first = call(0)
        rest = in_threads(call, range(batch_size, len(images), batch_size))
        return np.concatenate([np.asarray(found) for found in (first, *rest)])

    return run


def in_threads(call: Callable[[Any], jax.Array], args: Iterable[Any]) -> Iterator[jax.Array]:
    """Each `call(arg)`, in their order; on a CPU one in a thread for each core.

    What XLA spreads over the cores itself, operation by operation, takes 1.4 times as long there
    (two cores, the paper's VGG), and a program that loops runs on one core. Accelerators compute
    while the next call is made.
    """
    if jax.default_backend() != "cpu":
        yield from map(call, args)
        return
    config: Any = jax.config
    wide, precision = config.jax_enable_x64, config.jax_default_matmul_precision

    def computed(arg: Any) -> jax.Array:
        # A thread does not see what was set with `with` in another one.
        with jax.enable_x64(wide), jax.default_matmul_precision(precision):
            return call(arg).block_until_ready()

    with ThreadPoolExecutor(_cores()) as pool:
        yield from pool.map(computed, args)


def _cores() -> int:
    """Those that this process may use."""
    told = getattr(os, "sched_getaffinity", None)
    return len(told(0)) if told else os.cpu_count() or 1
