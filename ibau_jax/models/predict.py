"""What a model says of any number of images, batch by batch."""

from collections.abc import Callable
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
    return 20 if jax.default_backend() == "cpu" else 500


def _in_batches(function: Callable, batch_size: int | None) -> Run:
    batch_size = batch_size or usual_batch()
    compiled = jax.jit(function)

    def run(params, images):
        # Arrays of NumPy's and of a device are compiled for apart, and the former sent each time.
        params = jax.device_put(params, jax.local_devices()[0])
        if not len(images):
            shape = jax.eval_shape(function, params, images)
            return np.empty(shape.shape, shape.dtype)
        found = []
        for start in range(0, len(images), batch_size):
            batch = np.asarray(images[start : start + batch_size])
            short = batch_size - len(batch) if start else 0  # one shape, one compilation
            batch = np.pad(batch, [(0, short)] + [(0, 0)] * (batch.ndim - 1))
            found.append(compiled(params, batch)[: batch_size - short])
        return np.concatenate([np.asarray(f) for f in found])

    return run
