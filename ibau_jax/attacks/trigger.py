"""Triggers: pure functions images -> images, kept as a pattern, a mask and a rule."""

from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from ibau_jax.attacks.drawing import picture
from ibau_jax.errors import InputError, check_name

RULES = ("add", "replace", "renormalise")
BLEND = 0.2  # share of the picture in Blend


@dataclass(frozen=True)
class Trigger:
    """A trigger that is stamped on images.

    Rule `add` gives clip(image + pattern), rule `replace` gives
    clip(image * (1 - mask) + pattern); both clip to [0, 1] (published code, `patching`).
    Rule `renormalise` brings image + pattern to [0, 1] by its smallest and largest value, each
    image by its own (Zeng et al., 2021, for the Smooth trigger).

    Attributes:
      rule: of `RULES`.
      pattern: float32 [H, W, C] in [0, 1].
      mask: float32 [H, W, C] in [0, 1], for `replace` only.

    Raises:
      InputError: another rule, or arrays that are not as said here.
    """

    rule: str
    pattern: np.ndarray
    mask: np.ndarray | None = None

    def __post_init__(self):
        check_name("trigger rule", self.rule, RULES)
        if (self.mask is None) == (self.rule == "replace"):
            raise InputError(
                f"trigger rule {self.rule!r}: expected a mask with 'replace' (an .npy file, or "
                "a picture that is transparent in part) and none with another rule"
            )
        for what, array in (("pattern", self.pattern), ("mask", self.mask)):
            if array is not None:
                _check_values(what, array)
        if self.mask is not None and self.mask.shape != self.pattern.shape:
            raise InputError(
                f"the trigger's mask has shape {self.mask.shape}, its pattern "
                f"{self.pattern.shape}: expected the same"
            )

    def __call__(self, images: jax.Array | np.ndarray) -> jax.Array:
        """Stamp the trigger: images [..., H, W, C] in [0, 1] -> the same shape, in [0, 1].

        Raises:
          InputError: the images are of another height, width or number of channels.
        """
        if jnp.shape(images)[-3:] != self.pattern.shape:
            raise InputError(
                f"a trigger of shape {self.pattern.shape} on images of shape {jnp.shape(images)}: "
                "expected the same height, width and channels; make it for these images, for "
                "example badnets_square(shape=...) or blend(shape=...)"
            )
        if self.mask is not None:
            return jnp.clip(images * (1 - self.mask) + self.pattern, 0, 1)
        added = jnp.asarray(images) + self.pattern
        if self.rule == "add":
            return jnp.clip(added, 0, 1)
        low = jnp.min(added, (-3, -2, -1), keepdims=True)
        high = jnp.max(added, (-3, -2, -1), keepdims=True)
        return (added - low) / jnp.maximum(high - low, 1e-6)

    def scaled(self) -> np.ndarray:
        """The pattern to look at, its largest value 1: float32 [H, W, C]."""
        return self.pattern / max(float(self.pattern.max()), 1e-6)


def badnets_square(shape: tuple[int, int, int] = (32, 32, 3), size: int = 4) -> Trigger:
    """BadNets: a white square, one pixel from the lower right corner (Gu et al., 2017).

    At 32x32 these are rows and columns 27 to 30, as in the published code.

    Args:
      shape: height, width and channels of the images.
      size: of the square, in pixels.

    Raises:
      InputError: the square does not fit.
    """
    height, width, _ = _checked_shape(shape)
    if not 1 <= size < min(height, width):
        raise InputError(
            f"a square of {size} pixels and one pixel of border on images of shape {tuple(shape)}: "
            f"expected a size from 1 to {min(height, width) - 1}"
        )
    mask = np.zeros(shape, np.float32)
    mask[-size - 1 : -1, -size - 1 : -1] = 1
    return Trigger("replace", pattern=mask, mask=mask)


def blend(
    alpha: float = BLEND,
    rule: str = "additive",
    seed: int = 0,
    shape: tuple[int, int, int] = (32, 32, 3),
) -> Trigger:
    """Blend: a picture over the whole image (Chen et al., 2017).

    `additive` is clip(x + alpha K), as the authors of I-BAU did; `convex` is
    (1 - alpha) x + alpha K, as Chen et al. write. K is drawn by `drawing.picture`: the
    original shows a figure that is under copyright.

    Args:
      alpha: share of the picture, in [0, 1].
      seed: of the picture.
      shape: height, width and channels of the images. The picture is 32x32x3, and resized
        (bilinear) to another height and width; one channel is the mean of its colours, and other
        numbers of channels repeat them.

    Raises:
      InputError: another rule, or no share or shape of an image.
      RuntimeError: `drawing.picture` finds none for this seed (0 has one).
    """
    check_name("rule of blend", rule, ("additive", "convex"))
    if not 0 <= alpha <= 1:
        raise InputError(f"alpha is {alpha}: expected a share in [0, 1]")
    pattern = np.float32(alpha) * _resized(picture(seed), _checked_shape(shape))
    if rule == "additive":
        return Trigger("add", pattern)
    return Trigger("replace", pattern, np.full_like(pattern, alpha))


def _resized(picture: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
    """A picture float32 [32, 32, 3] in [0, 1] for images of another shape [H, W, C]."""
    height, width, channels = shape
    if (height, width) != picture.shape[:2]:
        colours = [Image.fromarray(colour) for colour in np.moveaxis(picture, -1, 0)]
        resized = [c.resize((width, height), Image.Resampling.BILINEAR) for c in colours]
        picture = np.clip(np.stack([np.asarray(c) for c in resized], -1), 0, 1)
    if channels == 1:
        return picture.mean(-1, keepdims=True)
    return picture[..., np.arange(channels) % 3]


def _checked_shape(shape: tuple[int, int, int]) -> tuple[int, int, int]:
    if len(shape) != 3 or min(shape) < 1:
        raise InputError(
            f"images of shape {tuple(shape)}: expected height, width and channels, each at least 1"
        )
    return shape


def trigger_from_files(
    pattern: str | Path, rule: str = "add", mask: str | Path | None = None, patch: bool = False
) -> Trigger:
    """A trigger from a picture and, for `replace`, a mask.

    What is transparent in the picture counts as black, so that it adds nothing.

    Args:
      pattern: PNG or another format of 8 bits a channel; values are divided by 255.
      rule: of `RULES`.
      mask: .npy, [H, W], [H, W, C] or channels first [C, H, W], values in [0, 1]; None: with
        `replace`, how opaque the picture is. Where the mask is 0 the picture does not count.
      patch: it is a part of an image, so that with `replace` it may be opaque everywhere.

    Raises:
      InputError: a file is missing or unreadable, or does not fit.
    """
    try:
        with Image.open(pattern) as opened:
            if opened.mode[0] in "IF":
                raise ValueError(f"its pixels are of mode {opened.mode}, not 8 bits a channel")
            rgba = np.asarray(opened.convert("RGBA"), np.float32) / np.float32(255)
        array = None if mask is None else np.load(mask, allow_pickle=False)
        if array is not None and array.dtype.kind not in "buif":
            raise ValueError(f"the mask is {array.dtype}, not numbers in [0, 1]")
    except Exception as error:  # damaged files raise many types
        raise InputError(
            f"cannot read the trigger {str(pattern)!r} (mask {mask}): {error}; expected a picture "
            "of 8 bits a channel, and an .npy file as mask"
        ) from error
    opaque = rgba[..., 3:]
    picture = rgba[..., :3] * opaque
    if array is not None:
        array = array.astype(np.float32)
        if array.ndim == 2:
            array = np.repeat(array[..., None], 3, axis=-1)
        elif array.ndim == 3 and array.shape[0] == 3 and array.shape != picture.shape:
            array = array.transpose(1, 2, 0)
        if array.shape == picture.shape:
            picture = picture * (array > 0)
    elif rule == "replace" and (patch or opaque.min() < 1):
        array = np.repeat(opaque, 3, axis=-1)
    return Trigger(rule, picture, array)


def _check_values(what: str, array: np.ndarray) -> None:
    if array.ndim != 3 or not np.issubdtype(array.dtype, np.floating):
        raise InputError(
            f"the trigger's {what} is {array.dtype} {array.shape}: expected float32 [H, W, C] in "
            "[0, 1]; divide pixels by 255"
        )
    low, high = float(array.min(initial=0)), float(array.max(initial=0))
    if not (low >= 0 and high <= 1):  # also true where one is NaN
        raise InputError(
            f"the trigger's {what} ranges from {low:g} to {high:g}: expected values in [0, 1] "
            "without NaN; divide pixels by 255"
        )
