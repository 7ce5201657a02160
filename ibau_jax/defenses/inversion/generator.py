"""A conditional generator of triggers: what it is, what it minimises, and its training."""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from ibau_jax.defenses.run import Job
from ibau_jax.devices import mesh
from ibau_jax.models.convolution import convolve
from ibau_jax.models.model import Model, Params, Variables
from ibau_jax.training.loop import Fit, TrainState, batch_mean, batches_of
from ibau_jax.unlearning.objective import clip_images, cross_entropy


class Generator(nn.Module):
    """G(z, t) of DeepInspect (Chen et al. 2019): one network for the triggers of all labels.

    Noise and label -> a grid of a quarter of the image's size -> twice ReLU, upsampling and a 3x3
    convolution -> tanh. Where it differs from the generators of the public reimplementations:

    1. No batch norm. It ties the images of a batch together (of a single image it makes a
       constant, which broke one of them), and with any norm, group norm as well, the l1 norm of a
       trigger falls several times more slowly: few values cannot be large while the rest is zero.
    2. The last convolution starts at zero: the search starts from no trigger at all, not from
       one that covers the image.
    3. The noise starts weaker than the label, which otherwise is one voice among a hundred.

    Attributes:
      shape: (H, W, C) of the images; sides that are no multiples of 4 are cut from larger ones.
      num_labels: labels that it can be asked for.
      channels: of the grid, and between the convolutions.
    """

    shape: tuple[int, int, int]
    num_labels: int
    channels: tuple[int, int] = (32, 16)

    @nn.compact
    def __call__(self, noise: jax.Array, labels: jax.Array) -> jax.Array:
        """noise [N, K], labels int [N] -> what is added to images, [N, H, W, C] in (-1, 1)."""
        height, width, colours = self.shape
        rows, columns = -(-height // 4), -(-width // 4)
        grid = rows * columns * self.channels[0]
        dtype = jnp.result_type(float)  # float64 where JAX is set to it
        normal, zeros = nn.initializers.normal, nn.initializers.zeros
        by_label = self.param("label", normal(1.0), (self.num_labels, grid), dtype)
        by_noise = self.param("noise", normal(0.3), (noise.shape[-1], grid), dtype)
        offset = self.param("offset", zeros, (grid,), dtype)
        # A product instead of by_label[labels], whose derivative adds up in any order on a GPU.
        x = jax.nn.one_hot(labels, self.num_labels, dtype=dtype) @ by_label + offset
        x = (x + noise @ by_noise / noise.shape[-1] ** 0.5).reshape(
            -1, rows, columns, self.channels[0]
        )
        layers = ((self.channels[1], nn.initializers.he_normal()), (colours, zeros))
        for i, (features, init) in enumerate(layers, 1):
            kernel = self.param(f"kernel{i}", init, (3, 3, x.shape[-1], features), dtype)
            bias = self.param(f"bias{i}", zeros, (features,), dtype)
            x = convolve(doubled(nn.relu(x)), kernel) + bias
        return jnp.tanh(x)[:, :height, :width]


def doubled(x: jax.Array) -> jax.Array:
    """Every value twice in both directions: [N, H, W, C] -> [N, 2H, 2W, C]."""
    return x.repeat(2, axis=1).repeat(2, axis=2)


def draw_noise(key: jax.Array, count: int, size: int, axis: str | None = None) -> jax.Array:
    """z ~ N(0, 1), [count, size], for this device's rows of the batch.

    Drawn for the whole batch, so that the number of devices does not matter.
    """
    whole = jax.random.normal(key, (count * mesh.width(axis), size), jnp.result_type(float))
    return mesh.own(whole, axis)


def draw_labels(key: jax.Array, count: int, classes: int, axis: str | None = None) -> jax.Array:
    """t uniform over the classes, int32 [count], in the same way."""
    whole = jax.random.randint(key, (count * mesh.width(axis),), 0, classes)
    return mesh.own(whole, axis)


class Attacked(NamedTuple):
    """What triggers do to images, one value each, [B].

    Attributes:
      losses: what the generator minimises.
      norms: l1 norm of the trigger.
      hits: whether the image gets the label.
    """

    losses: jax.Array
    norms: jax.Array
    hits: jax.Array


class Search(NamedTuple):
    """Triggers for a model, which stays as it is, and their loss.

    L = CE(f(x'), t) + gamma1 (1 - p_t(x'))^2 + gamma2 max(0, ||G(z, t)||_1 - tau)
    with x' = clip(x + G(z, t)); p_t is the probability that f gives to the label t.

    Attributes:
      classes: of the model; at most the labels of the generator.
      noise: size of z.
      squared: gamma1; penalty: gamma2; allowance: tau.
    """

    model: Model
    generator: Generator
    classes: int
    noise: int
    squared: float
    penalty: float
    allowance: float

    def attack(
        self, learned: Params, variables: Variables, images: jax.Array, key: jax.Array, targets,
        axis: str | None = None,
    ) -> Attacked:  # fmt: skip
        """Put triggers on this device's rows of a batch.

        Args:
          learned: parameters of the generator.
          variables: of the model.
          images: [B, H, W, C] in [0, 1]; targets: int [B].
          key: of the noise, which is fresh for each image.
        """
        added = self.triggers(learned, key, targets, axis)
        logits = self.model(variables, clip_images(images + added))
        norms = jnp.sum(jnp.abs(added), (1, 2, 3))
        losses = cross_entropy(logits, targets)
        losses += self.penalty * jnp.maximum(norms - self.allowance, 0)
        if self.squared:
            losses += self.squared * squared_distance(logits, targets)
        return Attacked(losses, norms, jnp.argmax(logits, -1) == targets)

    def triggers(
        self, learned: Params, key: jax.Array, targets: jax.Array, axis: str | None = None
    ) -> jax.Array:
        """G(z, t) with fresh noise for each row: int [B] -> [B, H, W, C] in (-1, 1)."""
        noise = draw_noise(key, len(targets), self.noise, axis)
        made: Any = self.generator.apply({"params": learned}, noise, targets)
        return made


def squared_distance(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """(1 - p_t)^2 of each row: logits [B, C], targets int [B] -> [B]."""
    chosen = jnp.take_along_axis(jax.nn.softmax(logits), targets[:, None], axis=1)
    return (1 - chosen[:, 0]) ** 2


def learn(job: Job, search: Search, key: jax.Array) -> Params:
    """Train the generator with Adam on the clean images, labels drawn uniformly.

    Args:
      job: its `config` has `steps` (rounded up to whole passes over the images), `batch_size` and
        `rate`.

    Returns:
      Its parameters.

    Raises:
      InputError: the loss is no longer finite.
    """
    config, axis, count = job.config, job.devices.axis, len(job.clean.labels)
    init_key, order_key, key = jax.random.split(key, 3)
    optimizer = optax.adam(config.rate)
    job.advice = (
        f"expected a rate that the generator bears, found {config.rate:g}; choose a smaller one"
    )
    with job.compiling():
        noise, label = jnp.zeros((1, search.noise)), jnp.zeros(1, jnp.int32)
        start = jax.jit(search.generator.init)(init_key, noise, label)["params"]
        opt_state = jax.jit(optimizer.init)(start)

    def objective(params, others, images, labels, weights, key):
        del labels  # any image is to get any label
        noise_key, label_key = jax.random.split(key)
        targets = draw_labels(label_key, len(images), search.classes, axis)
        found = search.attack(params, others["model"], images, noise_key, targets, axis)
        return batch_mean(found.losses, weights, axis), others

    batch_size, per_epoch = batches_of(count, config.batch_size)
    fitting = Fit(
        objective,
        # The model is among the variables, unchanged: an argument of the program, not a constant.
        TrainState({"params": start, "model": job.variables}, opt_state, key),
        job.clean,
        optimizer=optimizer,
        epochs=-(-config.steps // per_epoch),
        batch_size=batch_size,
        order_key=order_key,
        title="generator",
        bar=job.progress,
        devices=job.devices,
        program=job.program,
    )
    for epoch in fitting:
        job.check_finite(f"the generator's loss in pass {epoch['epoch']}", epoch["loss"])
    return fitting.variables["params"]
