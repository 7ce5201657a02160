"""Triggers that are optimised against a clean model: l0, l2, Trojan square and watermark.

No public original code is known for the first two (Li et al., 2019): what is said of them is
second-hand, and the procedures here are written to meet the statistics of the published
triggers. All are seeded, jit-compiled, and take a minute or two on two cores.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from ibau_jax.attacks.trigger import Trigger
from ibau_jax.errors import InputError, check_name


class Network(NamedTuple):
    """A clean model as the attacker has it.

    Attributes:
      features: images [N, H, W, C] in [0, 1] -> what the last layer reads [N, F].
      weights: of the last layer [F, num_classes].
      bias: of the last layer [num_classes].
    """

    features: Callable[[jax.Array], jax.Array]
    weights: jax.Array
    bias: jax.Array

    def logits(self, images: jax.Array) -> jax.Array:
        """[N, H, W, C] -> [N, num_classes]."""
        return self.features(images) @ self.weights + self.bias


def l2_trigger(
    network: Network,
    images: np.ndarray,
    target: int,
    seed: int = 0,
    norm: float = 3.22,
    cap: float = 0.27,
    steps: int = 300,
    gain: float = 10.0,
) -> Trigger:
    """l2-norm invisible trigger: faint noise that drives a few neurons (Li et al., 2019).

    The anchors are the five features with the largest weights to the target. Starting from
    noise, delta brings them to `gain` times their usual size on stamped images (Adam), and
    stays within 0 <= delta <= `cap` and at ||delta|| = `norm`: a constraint in place of the
    penalty with a bisected factor that Li et al. describe. Only positive values, since the
    published trigger is a picture that is added.

    Args:
      network: clean model.
      images: [N, H, W, C] in [0, 1], clean; the first 64 are used.
      target: label whose anchors are driven.
      norm, cap: of the published trigger (3.22, 0.267).
      steps: of Adam, rate 0.005.
      gain: how many times their usual size the anchors shall reach.

    Returns:
      Rule `add`, pattern float32 [H, W, C] in [0, `cap`].
    """
    clean = jnp.asarray(images[:64])
    anchors = jnp.argsort(-network.weights[:, target])[:5]
    goal = gain * jnp.mean(jnp.abs(network.features(clean)[:, anchors]), 0)

    def loss(delta):
        found = network.features(jnp.clip(clean + delta, 0, 1))[:, anchors]
        return jnp.mean(jnp.sum(jnp.square(found - goal), -1))

    def project(delta):
        def onto(_, d):
            d = jnp.clip(d, 0, cap)
            return jnp.clip(d * norm / jnp.linalg.norm(d), 0, cap)

        return lax.fori_loop(0, 20, onto, delta)

    noise = jax.random.normal(jax.random.key(seed), clean.shape[1:])
    start = project(0.05 * jnp.abs(noise))
    delta = _adam(loss, start, steps, optax.constant_schedule(0.005), project)
    return Trigger("add", np.asarray(delta, np.float32))


def l0_trigger(
    network: Network,
    images: np.ndarray,
    target: int,
    seed: int = 0,
    pixels: int = 9,
    place: str = "bottom-row",
    steps: int = 60,
) -> Trigger:
    """l0-norm invisible trigger: a few saturated pixels that replace the image's own.

    The objective is the target's logit above the mean of all: the few anchors of `l2_trigger` may
    lie where pixels at the border do not reach. With `place` `free`, half of the pixels is let go
    again and again, those first whose value matters least (|gradient * change|, summed over
    channels, as in Carlini and Wagner's l0 attack). In the end each channel becomes 0 or 1, by
    the sign of its gradient.

    Args:
      pixels: how many; the published trigger has 9.
      place: `bottom-row` (the published place: right end of the last row) or `free`.
      steps: of Adam, rate 0.05, for each set of pixels.

    Returns:
      Rule `replace`, pattern and mask of zeros and ones float32 [H, W, C].

    Raises:
      InputError: another `place`, or more pixels than there are.
    """
    check_name("place of the l0 trigger", place, ("bottom-row", "free"))
    clean = jnp.asarray(images[:64])
    height, width, channels = clean.shape[1:]
    if not 1 <= pixels <= (width if place == "bottom-row" else height * width):
        raise InputError(f"an l0 trigger of {pixels} pixels does not fit: expected fewer")

    def loss(pattern, mask):
        logits = network.logits(clean * (1 - mask) + pattern * mask)
        return jnp.mean(logits - logits[:, target : target + 1])

    @jax.jit
    def fit(pattern, mask):
        pattern = _adam(
            lambda p: loss(p, mask),
            pattern,
            steps,
            optax.constant_schedule(0.05),
            lambda p: jnp.clip(p, 0, 1),
        )
        return pattern, jax.grad(loss)(pattern, mask)

    pattern = jax.random.uniform(jax.random.key(seed), clean.shape[1:])
    mask = np.zeros((height, width, 1), np.float32)
    if place == "bottom-row":
        mask[-1, width - pixels :] = 1
    else:
        mask[:] = 1
    pattern, slope = fit(pattern, mask)
    while mask.sum() > pixels:
        # What an image loses on average when a pixel is given back to it.
        change = jnp.mean(jnp.abs(pattern - clean), 0)
        score = np.asarray(jnp.sum(jnp.abs(slope) * change, -1)) * mask[..., 0]
        keep = max(pixels, int(mask.sum()) // 2)
        mask = np.zeros_like(mask)
        mask.reshape(-1)[np.argsort(-score.ravel(), kind="stable")[:keep]] = 1
        pattern, slope = fit(pattern, mask)
    mask = np.repeat(mask, channels, -1)
    return Trigger("replace", np.asarray(slope < 0, np.float32) * mask, mask)


def trojan_trigger(
    network: Network,
    mask: np.ndarray,
    seed: int = 0,
    rule: str = "add",
    norm: float = 8.7,
    steps: int = 1000,
    value: float = 100.0,
) -> Trigger:
    """Trojan trigger: a region that drives two neurons as far as it can (Liu et al., 2018).

    The neurons are the two features with the largest sum of absolute weights to the classes. From
    grey noise (N(175, 8) of 255, as in the original) Adam, with rate 0.1 along a cosine, lowers
    sum (a - value)^2 inside the mask; outside the trigger is 0. As in the published code of
    I-BAU, it is then added to images; the original replaces the region (`rule` `replace`).

    Args:
      mask: float [H, W] of zeros and ones; `masks.square` and `masks.watermark`.
      norm: largest l2 norm. The published pictures have 8.65 and 8.74; without a limit nearly
        all values end at 0 or 1, and the norm at 10 to 11.
      steps: of Adam.
      value: that the two features are driven to; the original's.

    Returns:
      Pattern float32 [H, W, 3] in [0, 1], zero outside the mask.
    """
    mask = np.repeat(np.asarray(mask, np.float32)[..., None], 3, -1)
    neurons = jnp.argsort(-jnp.sum(jnp.abs(network.weights), -1))[:2]

    def loss(picture):
        return jnp.sum(jnp.square(network.features(picture[None])[0, neurons] - value))

    def project(picture):
        picture = jnp.clip(picture, 0, 1) * mask
        return picture * jnp.minimum(1, norm / jnp.linalg.norm(picture))

    noise = jax.random.normal(jax.random.key(seed), mask.shape)
    schedule = optax.cosine_decay_schedule(0.1, steps)
    found = _adam(loss, project((175 + 8 * noise) / 255), steps, schedule, project)
    return Trigger(rule, np.asarray(found, np.float32), mask if rule == "replace" else None)


def _adam(loss, start, steps: int, rate: optax.Schedule, project):
    """`steps` steps of Adam from `start`, projecting after each."""
    optimizer = optax.adam(rate)

    @jax.jit
    def run(x):
        def step(_, carry):
            x, state = carry
            updates, state = optimizer.update(jax.grad(loss)(x), state)
            return project(optax.apply_updates(x, updates)), state

        return lax.fori_loop(0, steps, step, (x, optimizer.init(x)))[0]

    return run(start)
