"""H of equation (1) on batches of clean images, some of which carry the perturbation.

And what the default makes of it: perturbations that a search found beside delta, a delta
that leads to a label, the given model's own probabilities.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from ibau_jax.devices import mesh
from ibau_jax.devices.microbatch import summed
from ibau_jax.models.model import Logits, Params
from ibau_jax.unlearning.batches import UNTARGETED, Batch, images_in
from ibau_jax.unlearning.config import IBAUConfig


class Aim(NamedTuple):
    """What a search said is to be unlearned.

    Attributes:
      rule: int32 [num_classes], where delta leads the images of each class; `UNTARGETED`: away.
      start: [H, W, C], where the ascent of delta starts.
      pool: [K, H, W, C], perturbations that were found, the first `size` of them.
      rules: int32 [K, num_classes], of each the rule.
      size: int32 scalar, at most K.
      times: float32 scalar, how many times the shares of the config are taken.
    """

    rule: Any
    start: Any
    pool: Any
    rules: Any
    size: Any
    times: Any = 1.0


def make_loss(logits: Logits, config: IBAUConfig, axis: str | None = None):
    """H of equation (1) on one batch: `loss(delta, params, batch) -> scalar`.

    The mean cross-entropy over the batch (`batch.weights` add up to 1) with delta on the
    images that `batch.patched` marks. With `axis`, the batch is spread over the devices of
    that mapped axis, and the loss and its gradients are those of the whole batch.

    Where a batch has `taught`, a share `config.distilled` of each image's loss is against it. Where
    what is added leads to a label that is not the image's own, -log(1 - p(label)) comes on top:
    no more is asked than "not that label" (Wei et al., NeurIPS 2023: SAU).

    Where it has `mixed`, `config.mixed` times the mean loss of those against what they are taught
    comes on top: a few thousand images say what the model was there alone, and it drifts elsewhere
    (mixtures for distillation: Beyer et al., CVPR 2022).
    """

    def loss(delta, params, batch: Batch):
        found = logits(params, patched_images(delta, batch, config))
        each = cross_entropy(found, batch.labels)
        if batch.taught is not None:
            taught = optax.losses.softmax_cross_entropy(found, batch.taught)
            each = (1 - config.distilled) * each + config.distilled * taught
        if batch.towards is not None:
            misled = (batch.towards != UNTARGETED) & (batch.towards != batch.labels)
            each += jnp.where(misled, not_that_label(found, batch.towards), 0)
        return jnp.sum(batch.weights * each)

    def drift(delta, params, mixed: Batch):
        del delta
        found = logits(params, mixed.images)
        return jnp.sum(mixed.weights * optax.losses.softmax_cross_entropy(found, mixed.taught))

    loss_of, drift_of = (in_parts(one, config, axis) for one in (loss, drift))

    def both(delta, params, batch: Batch):
        of_images = loss_of(delta, params, batch)
        if batch.mixed is None:
            return of_images
        return of_images + config.mixed * drift_of(delta, params, batch.mixed)

    return both


def patched_images(delta: jax.Array, batch: Batch, config: IBAUConfig) -> jax.Array:
    """The images of a batch, with delta on those that `batch.patched` marks, and `batch.added`."""
    images = batch.images + batch.patched[:, None, None, None] * delta
    if batch.added is not None:
        images = images + batch.added
    return clip_images(images) if config.clip else images


def in_parts(loss, config: IBAUConfig, axis: str | None = None):
    """`loss(delta, params, batch)`, a sum over a batch, differentiated a few images at a time.

    Its mixtures are left out.
    """
    size = config.microbatch
    parts = summed(loss, size if isinstance(size, int) else None, axis)
    return lambda delta, params, batch: parts(delta, params, batch._replace(size=None, mixed=None))


def make_inner(loss, config: IBAUConfig):
    """What delta minimises: `inner(delta, params, batch) -> scalar`, minus H plus the penalty."""

    def inner(delta, params, batch: Batch):
        everywhere = batch._replace(patched=jnp.ones_like(batch.weights), mixed=None)
        # sum of squares and not norm squared: the latter has a NaN gradient at zero
        return config.penalty * jnp.sum(delta**2) - loss(delta, params, everywhere)

    return inner


def make_leading(logits: Logits, config: IBAUConfig, axis: str | None = None):
    """What a delta that leads to `batch.towards` minimises: `inner(delta, params, batch)`.

    The mean of -log p(label) over the images of other labels; where the label is `UNTARGETED`
    minus H, as in `make_inner`. Plus the penalty.
    """

    def loss(delta, params, batch: Batch):
        everywhere = batch._replace(patched=jnp.ones_like(batch.weights), added=None)
        found = logits(params, patched_images(delta, everywhere, config))
        to = cross_entropy(found, jnp.maximum(batch.towards, 0))
        to = jnp.where(batch.towards == batch.labels, 0, to)
        away = -cross_entropy(found, batch.labels)
        return jnp.sum(batch.weights * jnp.where(batch.towards == UNTARGETED, away, to))

    parts = in_parts(loss, config, axis)
    return lambda delta, params, batch: (
        config.penalty * jnp.sum(delta**2) + parts(delta, params, batch)
    )


def aimed(batch: Batch, rule: jax.Array) -> Batch:
    """A batch all of which is led where `rule` says."""
    return batch._replace(towards=rule[batch.labels])


def spread(
    key: jax.Array, batch: Batch, aim: Aim, config: IBAUConfig, axis: str | None = None
) -> Batch:
    """Mark `config.share` with delta, as `patch`, and put the pool on `config.searched` of others.

    Both shares `aim.times`.

    One of the pool drawn for each image, for half of the images at another place, drawn too: a
    model answers to a trigger wherever it is, and unlearns it only where it meets it.
    """
    keys = jax.random.split(key, 4)
    every = len(batch.weights) * mesh.width(axis)
    mine = mesh.numbers(len(batch.weights), axis)
    # The same key gives the same order, so that the second share holds the first.
    first, both = (
        patch(keys[0], batch, jnp.minimum(1.0, aim.times * share), axis).patched
        for share in (config.share, config.share + config.searched)
    )
    carries = (both > first) & (aim.size > 0)
    which = jax.random.randint(keys[1], (every,), 0, jnp.maximum(aim.size, 1))[mine]
    height, width = batch.images.shape[1:3]
    moves = jax.random.randint(keys[2], (every, 2), 0, jnp.array([height, width]))[mine]
    moves = jnp.where(jax.random.bernoulli(keys[3], 0.5, (every, 1))[mine], moves, 0)
    added = jax.vmap(lambda one, move: jnp.roll(one, move, (0, 1)))(aim.pool[which], moves)
    towards = jnp.where(carries, aim.rules[which, batch.labels], UNTARGETED)
    return batch._replace(
        patched=first,
        added=jnp.where(carries[:, None, None, None], added, 0),
        towards=jnp.where(first > 0, aim.rule[batch.labels], towards),
    )


def patch(key: jax.Array, batch: Batch, share: Any, axis: str | None = None) -> Batch:
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
