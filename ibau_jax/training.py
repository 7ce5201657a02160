"""Training of (poisoned) models: Flax, optax, jit; data and shuffling on the device."""

import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from ibau_jax.data import Dataset
from ibau_jax.errors import InputError
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
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Train with Adam and a rate that falls to zero along a cosine.

    The paper (A.3) states Adam with rate 0.05 and 50 epochs and leaves the rest open; that rate
    is 50 times the usual one, and the published models look trained without augmentation.

    Args:
      module: flax module called as `module(images, train=...)`, with `params` and `batch_stats`.
      data: images [N, H, W, C] in [0, 1], labels [N]; poisoned or not. A last partial batch
        of an epoch is left out (another order of images comes with the next epoch).
      epochs: passes over the data.
      rate: highest learning rate.
      evaluate: `evaluate(variables) -> mapping`, after the last epoch and, with a progress bar
        on, after each.

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
    images, labels = jnp.asarray(data.images), jnp.asarray(data.labels)

    init_key, order_key, key = jax.random.split(key, 3)
    variables = jax.jit(module.init)(init_key, images[:1])
    state = TrainState(variables, optimizer.init(variables["params"]), key)
    step = jax.jit(make_step(module, optimizer), donate_argnums=0)

    history = []
    with progress_bar(epochs * per_epoch, "train", progress) as advance:
        for epoch in range(1, epochs + 1):
            started = time.perf_counter()
            order = jax.random.permutation(jax.random.fold_in(order_key, epoch), count)
            losses = []
            for rows in order[: per_epoch * batch_size].reshape(per_epoch, batch_size):
                state, loss = step(state, images, labels, rows)
                losses.append(jax.block_until_ready(loss))
                advance(1, "")
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
                record |= dict(evaluate(state.variables))
            history.append(record)
            shown = [f"{k} {record[k]:.3f}" for k in ("loss", "acc", "asr") if record.get(k)]
            advance(0, " ".join(shown))
    return jax.tree.map(np.asarray, state.variables), history


def make_step(module: nn.Module, optimizer: optax.GradientTransformation):
    """`step(state, images, labels, rows) -> (state, loss)`: one batch of rows int [B]."""

    def step(state: TrainState, images, labels, rows):
        key, dropout_key = jax.random.split(state.key)

        def loss_of(params):
            logits, updated = module.apply(
                {**state.variables, "params": params},
                images[rows],
                train=True,
                rngs={"dropout": dropout_key},
                mutable=["batch_stats"],
            )
            losses = optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels[rows])
            return losses.mean(), updated

        params = state.variables["params"]
        (loss, updated), gradient = jax.value_and_grad(loss_of, has_aux=True)(params)
        updates, opt_state = optimizer.update(gradient, state.opt_state, params)
        variables = {"params": optax.apply_updates(params, updates), **updated}
        return TrainState(variables, opt_state, key), loss

    return step
