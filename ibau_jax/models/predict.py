"""Labels that a model gives, batch by batch."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ibau_jax.models.model import Logits


def predict(logits: Logits, batch_size: int | None = None) -> Callable[[Any, Any], np.ndarray]:
    """A compiled `predict(params, images [N, H, W, C]) -> labels int32 [N]`.

    The batch size does not change the result; by default it suits the backend's memory.
    """
    if batch_size is None:
        batch_size = 20 if jax.default_backend() == "cpu" else 500
    compiled = jax.jit(lambda params, images: jnp.argmax(logits(params, images), -1))

    def run(params, images):
        # Arrays of NumPy's and of a device are compiled for apart, and the former sent each time.
        params = jax.device_put(params, jax.local_devices()[0])
        found = [np.empty(0, np.int32)]
        for start in range(0, len(images), batch_size):
            batch = np.asarray(images[start : start + batch_size])
            short = batch_size - len(batch) if start else 0  # one shape, one compilation
            batch = np.pad(batch, [(0, short)] + [(0, 0)] * (batch.ndim - 1))
            found.append(compiled(params, batch)[: batch_size - short])
        return np.concatenate([np.asarray(f) for f in found]).astype(np.int32)

    return run
