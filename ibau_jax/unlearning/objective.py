"""H of equation (1) on batches of clean images, some of which carry the perturbation."""

import jax
import jax.numpy as jnp
import optax
from jax import lax

from ibau_jax.devices import mesh
from ibau_jax.devices.microbatch import summed
from ibau_jax.models.model import Logits, Params
from ibau_jax.unlearning.batches import Batch, images_in
from ibau_jax.unlearning.config import IBAUConfig


def make_loss(logits: Logits, config: IBAUConfig, axis: str | None = None):
    """H of equation (1) on one batch: `loss(delta, params, batch) -> scalar`.

    The mean cross-entropy over the batch (`batch.weights` add up to 1) with delta on the
    images that `batch.patched` marks. With `axis`, the batch is spread over the devices of
    that mapped axis, and the loss and its gradients are those of the whole batch.
    """

    def loss(delta, params, batch: Batch):
        images = patched_images(delta, batch, config)
        return jnp.sum(batch.weights * cross_entropy(logits(params, images), batch.labels))

    return in_parts(loss, config, axis)


def patched_images(delta: jax.Array, batch: Batch, config: IBAUConfig) -> jax.Array:
    """The images of a batch, with delta on those that `batch.patched` marks."""
    images = batch.images + batch.patched[:, None, None, None] * delta
    return clip_images(images) if config.clip else images


def in_parts(loss, config: IBAUConfig, axis: str | None = None):
    """`loss(delta, params, batch)`, a sum over a batch, differentiated a few images at a time."""
    size = config.microbatch
    parts = summed(loss, size if isinstance(size, int) else None, axis)
    return lambda delta, params, batch: parts(delta, params, batch._replace(size=None))


def make_inner(loss, config: IBAUConfig):
    """What delta minimises: `inner(delta, params, batch) -> scalar`, minus H plus the penalty."""

    def inner(delta, params, batch: Batch):
        everywhere = batch._replace(patched=jnp.ones_like(batch.weights))
        # sum of squares and not norm squared: the latter has a NaN gradient at zero
        return config.penalty * jnp.sum(delta**2) - loss(delta, params, everywhere)

    return inner


def patch(key: jax.Array, batch: Batch, share: float, axis: str | None = None) -> Batch:
    """Mark a share of the images (never padding), drawn at random, as those that carry delta.

    The same images whatever the number of devices. The published code marks int(0.01 * batch)
    images; in a batch below 100 that is none, and then nothing is unlearned. At least one image
    is marked here.
    """
    size, rows = images_in(batch), len(batch.weights)
    count = jnp.maximum(1, jnp.floor(share * size + 1e-4))
    scores = jax.random.uniform(key, (rows * mesh.width(axis),), batch.weights.dtype)
    scores = jnp.where(jnp.arange(len(scores)) < size, scores, jnp.inf)
    rank = jnp.argsort(jnp.argsort(scores))[mesh.numbers(rows, axis)]
    return batch._replace(patched=(rank < count).astype(batch.weights.dtype))


def pick(batches: Batch, index) -> Batch:
    """Batch number `index` of a stack."""
    return jax.tree.map(lambda a: a[index], batches)


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Cross-entropy of each row: [N, C] and int [N] -> [N]."""
    return optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels)


def not_that_label(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """-log(1 - p[label]): logits [N, C], int [N] -> [N]; computed from the others' logits."""
    others = jnp.where(jax.nn.one_hot(labels, logits.shape[-1], dtype=bool), -jnp.inf, logits)
    return jax.nn.logsumexp(logits, -1) - jax.nn.logsumexp(others, -1)


def clip_images(images: jax.Array) -> jax.Array:
    """Clip to [0, 1]; a value on the border passes its gradient, as in PyTorch.

    (`jnp.clip` halves it there, and real images have many zeros and ones.)
    """
    inside = (images >= 0) & (images <= 1)
    return jnp.where(inside, images, jnp.where(images > 0, 1.0, 0.0).astype(images.dtype))


def predicted(logits: Logits, params: Params, images: jax.Array, config: IBAUConfig) -> jax.Array:
    """Labels that the model gives: images [batches, B, H, W, C] -> int32 [batches, B]."""
    rows = config.microbatch if isinstance(config.microbatch, int) else images.shape[1]
    parts = images.reshape(-1, rows, *images.shape[2:])
    labels = lax.map(lambda part: jnp.argmax(logits(params, part), -1), parts)
    return labels.reshape(images.shape[:2]).astype(jnp.int32)
