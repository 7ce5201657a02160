"""Universal adversarial perturbations (Moosavi-Dezfooli et al., 2017) by DeepFool (2016).

    v = 0
    repeat until v changes the labels of enough images:
        for each image x, shuffled, whose label v does not change yet:
            v <- project(v + deepfool(x + v))

As in the published code; the functions say where they differ.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ibau_jax.errors import InputError, check_name, check_positive
from ibau_jax.hypergradient import Ball
from ibau_jax.models.model import Logits, Params
from ibau_jax.models.predict import predict

CHUNK = 10  # images between two looks at the clock


class Fooling(NamedTuple):
    """What DeepFool found for one image.

    Attributes:
      delta: perturbation [H, W, C].
      steps: how many it took, int32.
      fooled: whether the label has changed, bool.
    """

    delta: Any
    steps: Any
    fooled: Any


def deepfool(
    logits: Logits,
    params: Params,
    image: jax.Array,
    *,
    label: jax.Array | int | None = None,
    candidates: int = 10,
    max_steps: int = 10,
    overshoot: float = 0.02,
) -> Fooling:
    """Walk towards the nearest other class, as if logits were linear, until the label changes.

    Each step is |f_k - f_l| / ||w_k||^2 w_k with w_k = grad (f_k - f_l), where l is the label
    that is to be left and k the class whose border is nearest: |f_k - f_l| / ||w_k|| is least
    (Moosavi-Dezfooli et al., 2016, algorithm 2; on logits, as in the published code). Unlike
    that code, the length of a step has no 1e-4 on top; images are not clipped, as there.

    Args:
      logits: `logits(params, images [N, H, W, C]) -> [N, num_classes]`, two classes or more.
      image: [H, W, C].
      label: default: the model's for `image`. Where that is another one, no step is taken.
      candidates: classes looked at, the label among them: those with the highest logits.
      max_steps: at most.
      overshoot: how much further than the border, as a share of the way.
    """

    def scores(x):
        return logits(params, x[None])[0]

    start = scores(image)
    order = lax.top_k(start, min(candidates, len(start)))[1]
    label = order[0] if label is None else label
    classes = jnp.eye(len(start), dtype=start.dtype)
    towards = classes[order[1:]] - classes[label]  # the first is the label while there are steps

    def go_on(carry):
        count, _, now = carry
        return (now == label) & (count < max_steps)

    def step(carry):
        count, total, _ = carry
        f, pull = jax.vjp(scores, image + total)
        gaps = jnp.abs(towards @ f)
        w = jax.vmap(lambda direction: pull(direction)[0])(towards)
        squares = jnp.sum(w * w, (1, 2, 3))
        distance = jnp.where(squares > 0, gaps / jnp.sqrt(squares), jnp.inf)
        nearest = jnp.argmin(distance)
        move = (1 + overshoot) * gaps[nearest] / squares[nearest] * w[nearest]
        total += jnp.where(jnp.isfinite(move).all(), move, 0)
        return count + 1, total, jnp.argmax(scores(image + total))

    first = jnp.int32(0), jnp.zeros_like(image), jnp.argmax(start)
    count, total, now = lax.while_loop(go_on, step, first)
    return Fooling(total, count, now != label)


@dataclass(frozen=True)
class Universal:
    """How to look for a universal perturbation; the defaults are those of the published code.

    But for the ball: there it is linf with radius 10 of 255; in I-BAU's setting l2 with radius
    10, images in [0, 1].

    Attributes:
      norm: of the ball, `l2` or `linf`.
      radius: of the ball.
      fooling_rate: share of images with a changed label that is enough.
      passes: over the images, at most (the published code has no limit).
      candidates, max_steps, overshoot: of DeepFool, see `deepfool`.
    """

    norm: str = "l2"
    radius: float = 10.0
    fooling_rate: float = 0.8
    passes: int = 2
    candidates: int = 10
    max_steps: int = 10
    overshoot: float = 0.02

    def __post_init__(self):
        check_name("norm", self.norm, ("l2", "linf"))
        check_positive(self, "radius", "passes", "max_steps")
        if not 0 < self.fooling_rate <= 1:
            raise InputError(
                f"fooling_rate is {self.fooling_rate}: expected a share of the images in (0, 1]"
            )
        if self.candidates < 2:
            raise InputError(
                f"candidates is {self.candidates}: expected at least 2 classes, the label is one"
            )
        if self.overshoot < 0:
            raise InputError(f"overshoot is {self.overshoot}: expected 0 or a positive number")

    @property
    def ball(self) -> Ball:
        """The set that the perturbation is held in."""
        return Ball(self.radius, self.norm)


class Found(NamedTuple):
    """A universal perturbation.

    Attributes:
      delta: [H, W, C].
      fooling_rate: share of the images whose label it changes. Images + delta are not clipped.
      unconverged: how often DeepFool did not reach another class, so that an image counted for
        nothing; an image may do so once in each pass.
      passes: how many were made.
    """

    delta: jax.Array
    fooling_rate: float
    unconverged: int
    passes: int


def make_sweep(logits: Logits, config: Universal):
    """`sweep(params, v, images, labels, start) -> (v, unconverged)`: `CHUNK` images from `start`.

    `labels` int [N] are the model's own for the images without v.
    """

    def sweep(params, v, images, labels, start):
        def visit(i, carry):
            v, unconverged = carry
            # No step, hence nothing to add, where v fools this image already.
            found = deepfool(
                logits,
                params,
                images[i] + v,
                label=labels[i],
                candidates=config.candidates,
                max_steps=config.max_steps,
                overshoot=config.overshoot,
            )
            # The published code also leaves out those that take all, or all but one, of the steps.
            v = jnp.where(found.fooled, config.ball.project(v + found.delta), v)
            return v, unconverged + ~found.fooled

        stop = jnp.minimum(start + CHUNK, len(images))
        return lax.fori_loop(start, stop, visit, (v, jnp.int32(0)))

    return sweep


def chunks(images: int) -> int:
    """Calls of `advance` in a pass over so many images."""
    return -(-images // CHUNK)


def make_search(
    logits: Logits, params: Params, images: Any, config: Universal
) -> Callable[..., Found]:
    """A compiled `search(params, images, rng, advance) -> Found`, for arguments like these.

    `rng` (`numpy.random.Generator`) shuffles the images before each pass, `advance(1)` is called
    `chunks(N)` times a pass.

    What DeepFool does next depends on the sign of differences of logits, so rounding (another
    kind of device, another number of them in the training before) can lead to another v.

    Args:
      logits: `logits(params, images) -> [N, num_classes]`, in evaluation mode.
      images: [N, H, W, C] in [0, 1].
    """
    classify = predict(logits)
    images = jnp.asarray(images)
    labels = classify(params, images)  # compiles
    zero = jnp.zeros_like(images[0])
    arguments = (params, zero, images, labels, np.int32(0))
    sweep = jax.jit(make_sweep(logits, config)).lower(*arguments).compile()
    return partial(_search, classify, sweep, zero, config)


def _search(classify, sweep, v, config: Universal, params, images, rng, advance) -> Found:
    images = jnp.asarray(images)
    labels = classify(params, images)
    rate, unconverged, done = 0.0, 0, 0
    while done < config.passes and rate < config.fooling_rate:
        done += 1
        order = rng.permutation(len(images))
        shuffled, own = images[order], labels[order]
        for start in range(0, len(images), CHUNK):
            v, failed = sweep(params, v, shuffled, own, np.int32(start))
            unconverged += int(failed)
            advance(1)
        rate = float(np.mean(classify(params, images + v) != labels))
    return Found(v, rate, unconverged, done)
