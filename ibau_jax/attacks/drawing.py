"""A drawn picture in place of the one that the Blend attack mixes in (Chen et al., 2017).

`picture` draws ellipses, rectangles and stripes at random, and redraws them one at a time until
the whole has the statistics of the published trigger. It depicts nothing.
"""

import numpy as np
from PIL import Image, ImageDraw

# Measured on the published trigger, spec 2.2; `statistics` says what each one is.
TARGETS: dict[str, float] = {
    "mean_red": 0.785,
    "mean_green": 0.689,
    "mean_blue": 0.612,
    "std_red": 0.323,
    "std_green": 0.312,
    "std_blue": 0.368,
    "share_one": 0.29,
    "share_white": 0.24,
    "share_low": 0.19,
    "energy_radius_2": 0.23,
    "energy_radius_4": 0.36,
    "energy_radius_8": 0.57,
    "norm_fifth": 8.6,
}
TOLERANCE = 0.1  # relative, for each statistic
MAX_ATTEMPTS = 3000
SIDE = 32
CELL = 4  # the drawing is 4 times finer; shapes and stripes sit on whole cells and stay sharp
# Red > green > blue in the mean; the last one covers white and is not quite white.
FILLS = ("#ffcd14", "#fa8c14", "#eb3228", "#fa82aa", "#aadc46", "#a0d2fa", "#fad7aa", "#fafafa")
STRIPES = ("white", "black", *FILLS)
LARGE, SMALL = (8, 17), (3, 8)  # least side and one above the greatest, in cells
SIZES = 12 * (LARGE,) + 8 * (SMALL,)  # from the back to the front
TRAITS = 11  # numbers that describe a shape, see `_draw`

_FREQUENCIES = np.fft.fftfreq(SIDE, 1 / SIDE)
_RADIUS = np.hypot(_FREQUENCIES[:, None], _FREQUENCIES)
_DISCS = (_RADIUS <= 2, _RADIUS <= 4, _RADIUS < 8)


def picture(seed: int = 0) -> np.ndarray:
    """The seed's picture with the statistics in `TARGETS`: float32 [32, 32, 3] in [0, 1].

    Raises:
      RuntimeError: none within `TOLERANCE` among `MAX_ATTEMPTS` drawings.
    """
    rng = np.random.default_rng(seed)
    kept = shapes = rng.random((len(SIZES), TRAITS))
    least = np.inf
    for _ in range(MAX_ATTEMPTS):
        drawing = _render(shapes)
        found = statistics(drawing)
        errors = np.array([abs(found[name] / aim - 1) for name, aim in TARGETS.items()])
        if errors.max() <= TOLERANCE:
            return drawing
        # Errors up to half the tolerance do not count: they leave room to lower the others.
        loss = (np.maximum(errors - TOLERANCE / 2, 0) ** 2).sum()
        if loss <= least:
            kept, least = shapes, loss
        shapes = kept.copy()
        shapes[rng.integers(len(SIZES))] = rng.random(TRAITS)
    raise RuntimeError(f"no picture found for seed {seed} in {MAX_ATTEMPTS} drawings")


def statistics(picture: np.ndarray) -> dict[str, float]:
    """The statistics named in `TARGETS`, of a picture [32, 32, 3] in [0, 1].

    Mean and standard deviation of each channel; share of values that are 1, of pixels that are
    white, of values below 0.2; share of the spectral energy (constant part left out) at a radius
    of at most 2, at most 4 and below 8 frequency units; ||0.2 * picture||_2.
    """
    values = np.asarray(picture, np.float64)
    ones = values >= 1 - 1e-6
    energy = (np.abs(np.fft.fft2(values, axes=(0, 1))) ** 2).sum(-1) * (_RADIUS > 0)
    numbers = [
        *values.mean((0, 1)),
        *values.std((0, 1)),
        *(ones.mean(), ones.all(-1).mean(), (values < 0.2).mean()),
        *(energy[disc].sum() / energy.sum() for disc in _DISCS),
        0.2 * np.linalg.norm(values),
    ]
    return dict(zip(TARGETS, map(float, numbers), strict=True))


def _render(shapes: np.ndarray) -> np.ndarray:
    """Draw shapes [20, 11] in [0, 1) on white, in order: float32 [32, 32, 3] in [0, 1]."""
    image = Image.new("RGB", (SIDE * CELL, SIDE * CELL), "white")
    for traits, (least, end) in zip(shapes.tolist(), SIZES, strict=True):
        _draw(image, traits, least, end)
    return np.asarray(image.reduce(CELL), np.float32) / 255  # reduce: the mean of each cell


def _draw(image: Image.Image, traits: list[float], least: int, end: int) -> None:
    """Draw one shape with a black outline; traits [11] in [0, 1), sides in [least, end) cells."""
    kind, x, y, wide, high, fill, striped, stripe, upright, step, line = traits
    width, height = (int(least + share * (end - least)) for share in (wide, high))
    right, bottom = CELL * width - 1, CELL * height - 1
    cloth = Image.new("RGB", (right + 1, bottom + 1), FILLS[int(fill * len(FILLS))])
    mask = Image.new("1", cloth.size)
    pen, cutter = ImageDraw.Draw(cloth), ImageDraw.Draw(mask)
    if striped < 0.5:
        for at in range(0, max(cloth.size), CELL * (2 if step < 0.6 else 3)):
            to = at + CELL - 1
            band = (at, 0, to, bottom) if upright < 0.5 else (0, at, right, to)
            pen.rectangle(band, STRIPES[int(stripe * len(STRIPES))])
    trace, cut = (pen.ellipse, cutter.ellipse) if kind < 0.6 else (pen.rectangle, cutter.rectangle)
    trace((0, 0, right, bottom), outline="black", width=1 + int(line * CELL))
    cut((0, 0, right, bottom), fill=1)
    image.paste(cloth, (CELL * int(x * SIDE - width / 2), CELL * int(y * SIDE - height / 2)), mask)
