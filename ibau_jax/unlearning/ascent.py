"""The inner problem: lines 1 to 5 of Algorithm 1."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from ibau_jax.models.model import Logits, Params
from ibau_jax.unlearning.batches import Batch
from ibau_jax.unlearning.config import IBAUConfig
from ibau_jax.unlearning.objective import make_inner, make_loss, pick


def make_ascent(logits: Logits, config: IBAUConfig, axis: str | None = None):
    """The inner problem: `ascend(params, batches, start) -> (delta, loss)`.

    Starts from zero and takes the batches in turn from number `start`. `loss` is H on the last
    batch at the last delta before its final step.
    """
    loss = make_loss(logits, config, axis)
    inner = jax.value_and_grad(make_inner(loss, config))

    def ascend(params, batches: Batch, start):
        num_batches = len(batches.weights)
        steps = config.inner_steps or num_batches
        optimizer = config.inner_transform(steps)
        zero = jnp.zeros(batches.images.shape[2:], batches.images.dtype)
        if config.inner_labels == "predicted":  # of the clean images: they do not change here
            batches = batches._replace(labels=predicted(logits, params, batches.images, config))

        def step(i, carry):
            delta, opt_state, _ = carry
            batch = pick(batches, (start + i) % num_batches)
            value, gradient = inner(delta, params, batch)
            height = config.penalty * jnp.sum(delta**2) - value  # H, at the delta it belongs to
            update: Any
            update, opt_state = optimizer.update(gradient, opt_state, delta)
            delta = delta + update
            if config.project == "every-step":
                delta = config.ball.project(delta)
            return delta, opt_state, height

        start_state = (zero, optimizer.init(zero), jnp.zeros((), zero.dtype))
        delta, _, value = lax.fori_loop(0, steps, step, start_state)
        return (config.ball.project(delta) if config.project == "at-end" else delta), value

    return ascend


def predicted(logits: Logits, params: Params, images: jax.Array, config: IBAUConfig) -> jax.Array:
    """Labels that the model gives: images [batches, B, H, W, C] -> int32 [batches, B]."""
    rows = config.microbatch if isinstance(config.microbatch, int) else images.shape[1]
    parts = images.reshape(-1, rows, *images.shape[2:])
    labels = lax.map(lambda part: jnp.argmax(logits(params, part), -1), parts)
    return labels.reshape(images.shape[:2]).astype(jnp.int32)
