"""Reverse engineering of triggers: for each label the mask and pattern that lead to it.

Shared by Neural Cleanse and TABOR, which differ in what they add to the cross-entropy and in
when they are content.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ibau_jax.defenses.run import Job
from ibau_jax.devices import mesh
from ibau_jax.devices.microbatch import accumulate
from ibau_jax.models.at_once import at_once, divisor
from ibau_jax.models.model import Model, Variables
from ibau_jax.training.loop import shuffled

EPSILON = 1e-7


class Found(NamedTuple):
    """The reconstructed trigger of a label.

    Attributes:
      mask: float [H, W, 1] in [0, 1].
      pattern: float [H, W, C] in [0, 1].
      norm: sum of the mask.
      success: share of the stamped images that get the label, in the step that gave it.
      steps: number of the step that gave it, from 1.
    """

    mask: np.ndarray
    pattern: np.ndarray
    norm: float
    success: float
    steps: int

    def stamp(self, images: np.ndarray) -> np.ndarray:
        """Put the trigger on images [N, H, W, C]."""
        return stamp(images, self.mask, self.pattern)

    @property
    def picture(self) -> np.ndarray:
        """The pattern as far as the mask shows it, [H, W, C] in [0, 1]."""
        return self.mask * self.pattern


class Step(NamedTuple):
    """Means over the batches of a step, for one label."""

    loss: float
    success: float
    norm: float


class Schedule(Protocol):
    """What decides over one label: the weight of the penalty, what is kept, when to end."""

    cost: float
    ended: bool

    def after(self, step: Step) -> bool:
        """Take note of a step; True: its trigger is the best so far."""
        ...


class Terms(NamedTuple):
    """What is minimised, `mean of rows + cost * penalty`.

    Attributes:
      rows: `rows(model, variables, mask, pattern, images, labels, target, cost) -> (losses [B],
        logits of the stamped images [B, classes])`.
      penalty: `penalty(model, variables, mask, pattern, target) -> scalar`.
    """

    rows: Callable[..., tuple[jax.Array, jax.Array]]
    penalty: Callable[..., jax.Array]


def stamp(images, mask, pattern):
    """x' = (1 - m) x + m p; images [N, H, W, C], mask [H, W, 1], pattern [H, W, C]."""
    return (1 - mask) * images + mask * pattern


def decode(raw):
    """Free numbers to values in [0, 1] (Wang et al. 2019: a tanh, so that they stay there)."""
    return jax.tree.map(lambda a: jnp.tanh(a) / (2 - EPSILON) + 0.5, raw)


def draw(key: jax.Array, shape: tuple[int, int, int]):
    """A random start: mask and pattern uniform in [0, 1], as free numbers."""
    height, width, channels = shape
    keys = jax.random.split(key)
    uniform = (
        jax.random.uniform(keys[0], (height, width, 1)),
        jax.random.uniform(keys[1], (height, width, channels)),
    )
    return jax.tree.map(lambda u: jnp.arctanh((u - 0.5) * (2 - EPSILON)), uniform)


def label_loss(model: Model, variables: Variables, mask, pattern, images, labels, target, cost):
    """Cross-entropy of the stamped images with the target: the rows of Neural Cleanse."""
    del labels, cost
    logits = model(variables, stamp(images, mask, pattern))
    wanted = jnp.full(len(images), target)
    return optax.losses.softmax_cross_entropy_with_integer_labels(logits, wanted), logits


def reverse_engineer(
    job: Job,
    terms: Terms,
    schedule: Callable[[], Schedule],
    *,
    optimizer: optax.GradientTransformation,
    key: jax.Array,
    title: str,
) -> list[Found]:
    """The trigger of each label, from the clean images.

    Args:
      job: its `config` has `steps` (at most so many for a label), `batches` and `batch_size` (so
        many batches a step, drawn anew; all images at most), and `labels_at_once`: how many labels
        are optimised side by side (`vmap`); None: one where the model is best differentiated in a
        loop (on a CPU), else all. Memory grows with it, the result does not depend on it.
      schedule: makes the schedule of a label.
      optimizer: of the free numbers; its state starts anew for each label.

    Returns:
      For each label the trigger that its schedule took for the best; where it never took one, the
      last.
    """
    config, devices, clean, labels = job.config, job.devices, job.clean, job.num_classes
    count = len(clean.labels)
    batch_size = min(config.batch_size, count)
    batches = min(config.batches, count // batch_size)
    share = -(-batch_size // len(devices.all))
    size = divisor(share, at_once(job.model, job.variables, clean.images[:share]))
    chunk = min(config.labels_at_once or (labels if size is None else 1), labels)
    order_key, key = jax.random.split(key)
    shape = clean.images.shape[1:]
    update = jax.vmap(
        make_update(job.model, terms, optimizer, size, devices.axis),
        in_axes=(0, 0, 0, None, None, None, None, None),
    )
    update = job.program(update, rows=(6,), donate=(0,))

    def start(label):
        raw = draw(jax.random.fold_in(key, label), shape)
        return raw, optimizer.init(raw)

    starts, shown = jax.jit(jax.vmap(start)), jax.jit(lambda raw: decode(raw))
    with job.compiling():
        shown(starts(np.arange(chunk, dtype=np.int32))[0])
    fixed = devices.replicate((job.variables, *clean))
    found: list[Found] = []
    with job.progress(labels * config.steps, title) as advance:
        for first in range(0, labels, chunk):
            # The last labels are repeated, so that all chunks have one shape.
            targets = np.minimum(np.arange(first, first + chunk), labels - 1).astype(np.int32)
            searches = devices.replicate(starts(targets))
            targets = devices.replicate(targets)
            schedules = [schedule() for _ in range(min(chunk, labels - first))]
            best: list[Found | None] = [None] * len(schedules)
            content = [False] * len(schedules)  # with one so far
            for number in range(1, config.steps + 1):
                rows = shuffled(order_key, number, count, batches, batch_size, devices)
                costs = [s.cost for s in schedules]
                costs += [0.0] * (chunk - len(costs))
                costs = devices.replicate(np.array(costs, clean.images.dtype))
                each = []
                for i in range(batches):
                    searches, values = update(searches, targets, costs, *fixed, rows, i)
                    each.append(values)
                loss, success = np.mean(devices.read(each), 0)
                masks, patterns = (np.asarray(a) for a in shown(devices.one(searches[0])))
                norms = masks.sum((1, 2, 3))
                for j, one in enumerate(schedules):
                    if one.ended:
                        continue
                    step = Step(float(loss[j]), float(success[j]), float(norms[j]))
                    better = one.after(step)
                    if better or not content[j]:
                        content[j] = better
                        best[j] = Found(masks[j], patterns[j], step.norm, step.success, number)
                advance(len(schedules), f"label {first}: {norms[0]:.1f}, {success[0]:.2f}")
                if all(s.ended for s in schedules):
                    advance((config.steps - number) * len(schedules))
                    break
            devices.check_equal(searches=searches)
            found += [trigger for trigger in best if trigger is not None]
    return found


def make_update(
    model: Model,
    terms: Terms,
    optimizer: optax.GradientTransformation,
    size: int | None,
    axis: str | None,
):
    """One batch for one label: `update(search, target, cost, ...) -> (search, (loss, success))`.

    `search` is (free numbers, optimiser state); the batch is number i of `Rows`.
    """

    def update(search, target, cost, variables, images, labels, rows, i):
        raw, opt_state = search
        index, weights = jax.tree.map(lambda a: a[i], rows)
        if weights is None:
            total = len(index) * mesh.width(axis)
            weights = jnp.full(len(index), 1 / total)
        weights = weights.astype(images.dtype)

        def part(batch):
            picked, weights = batch

            def loss(raw):
                losses, logits = terms.rows(
                    model, variables, *decode(raw), images[picked], labels[picked], target, cost
                )
                hits = jnp.sum(weights * (jnp.argmax(logits, -1) == target))
                return jnp.sum(weights * losses), hits

            return jax.value_and_grad(loss, has_aux=True)(raw)

        def penalty(raw):
            return cost * terms.penalty(model, variables, *decode(raw), target)

        (loss, hits), gradient = accumulate(part, (index, weights), size, axis)
        extra, slope = jax.value_and_grad(penalty)(raw)
        gradient = jax.tree.map(jnp.add, gradient, slope)
        updates: Any
        updates, opt_state = optimizer.update(gradient, opt_state, raw)
        return (optax.apply_updates(raw, updates), opt_state), (loss + extra, hits)

    return update
