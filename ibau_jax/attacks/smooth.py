"""Smooth trigger: a universal perturbation without high frequencies (Zeng et al., 2021)."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ibau_jax.attacks.optimised import Network
from ibau_jax.attacks.trigger import Trigger
from ibau_jax.errors import InputError

LIMIT = 0.2  # largest value of the trigger


def smooth_trigger(
    network: Network,
    images: np.ndarray,
    target: int,
    seed: int = 0,
    rate: float = 0.2,
    passes: int = 10,
) -> Trigger:
    """Add up smoothed targeted DeepFool steps until enough images change their label.

    As in the published code of Zeng et al. (2021): for each image that the perturbation v
    does not change yet, v <- norm(G(v + G(step))), where G is a Gaussian low-pass filter and
    `norm` brings the values to [0, 0.2]; after a pass over all images, the label that most of
    the changed ones get becomes the target. DeepFool works on the softmax output, as there.

    Args:
      network: clean model.
      images: [N, H, W, C] in [0, 1], clean; the first 100 are used.
      target: label to start with.
      seed: of the order of the images in each pass.
      rate: share of changed images (fooling rate) that is enough.
      passes: at most; the published code has no limit.

    Returns:
      The perturbation with the best rate (the later one of equals), rule `add`, float32
      [H, W, C] in [0, 0.2].

    Raises:
      InputError: DeepFool reaches the target from no image.
    """
    rows = jnp.asarray(images[:100])
    probabilities = _probabilities(network)
    changed_to = jax.jit(lambda v: jnp.argmax(network.logits(rows + v), -1))
    clean = changed_to(0.0)
    sweep = jax.jit(partial(_sweep, probabilities))
    rng = np.random.default_rng(seed)
    v = best = jnp.zeros(rows.shape[1:])
    best_rate = -1.0
    for _ in range(passes):
        order = rng.permutation(len(rows))
        v = sweep(v, rows[order], clean[order], target)
        found = np.asarray(changed_to(v))
        fooled = found != np.asarray(clean)
        found_rate = float(fooled.mean())
        if found_rate > 0.05:
            target = int(np.bincount(found[fooled]).argmax())
        if found_rate >= best_rate:
            best, best_rate = v, found_rate
        if found_rate >= rate:
            break
    if not np.asarray(best).any():
        raise InputError(
            "no step of DeepFool reached the target, so the smooth trigger is empty: expected a "
            "trained clean model of these images"
        )
    return Trigger("add", np.asarray(best, np.float32))


def low_pass(image: jax.Array) -> jax.Array:
    """Gaussian filter of 30 taps, deviation 6 pixels: [H, W, C] -> [H, W, C], zeros around.

    The number of taps is even, so the result lies half a pixel off, as in the published code.
    """
    taps = jnp.exp(-0.5 * jnp.square((jnp.arange(30) - 14.5) / 6))
    kernel = jnp.outer(taps, taps) / jnp.sum(taps) ** 2
    padded = jnp.pad(image, ((14, 15), (14, 15), (0, 0)))
    # As products, since this runs inside a loop (see convolution.py).
    height, width, _ = image.shape
    rows = jnp.stack([padded[i : i + height] for i in range(30)])  # [30, H, W + 29, C]
    smoothed = jnp.tensordot(jnp.sum(kernel, 1), rows, 1)
    columns = jnp.stack([smoothed[:, j : j + width] for j in range(30)])
    return jnp.tensordot(jnp.sum(kernel, 0), columns, 1)


def targeted_deepfool(
    probabilities,
    image: jax.Array,
    target: jax.Array | int,
    steps: int = 200,
    overshoot: float = 0.02,
) -> tuple[jax.Array, jax.Array]:
    """Walk towards the border to the target until the label is the target.

    Each step is |f_t - f_0| / ||w||^2 w with w = grad f_t - grad f_0, where 0 is the first
    label (Moosavi-Dezfooli et al., 2016, with one target).

    Args:
      probabilities: image [H, W, C] -> [num_classes].

    Returns:
      The perturbation [H, W, C], and how many steps it took (`steps`: not reached).
    """
    label = jnp.argmax(probabilities(image))

    def gap(x):
        f = probabilities(x)
        return f[target] - f[label], jnp.argmax(f)

    def look(total):
        (difference, now), w = jax.value_and_grad(gap, has_aux=True)(image + total)
        move = jnp.abs(difference) / jnp.sum(w * w) * w
        return now, (1 + overshoot) * jnp.where(jnp.isfinite(move).all(), move, 0)

    def go_on(carry):
        count, _, (now, _) = carry
        return (now != target) & (count < steps)

    def step(carry):
        count, total, (_, move) = carry
        total += move
        return count + 1, total, look(total)

    start = jnp.zeros_like(image)
    count, total, _ = lax.while_loop(go_on, step, (jnp.int32(0), start, look(start)))
    return total, count


def _sweep(probabilities, v, images, labels, target):
    """One pass over the images."""

    def visit(v, row):
        image, label = row

        def fool():
            step, count = targeted_deepfool(probabilities, image + v, target)
            # As published: an image that DeepFool does not get there counts for nothing.
            return jnp.where(count < 199, _norm(low_pass(v + low_pass(step))), v)

        changed = jnp.argmax(probabilities(image + v)) != label
        return lax.cond(changed, lambda: v, fool), None

    return lax.scan(visit, v, (images, labels))[0]


def _norm(v):
    spread = v.max() - v.min()
    return jnp.where(spread > 0, LIMIT * (v - v.min()) / jnp.where(spread > 0, spread, 1), v)


def _probabilities(network: Network):
    return lambda image: jax.nn.softmax(network.logits(image[None])[0])
