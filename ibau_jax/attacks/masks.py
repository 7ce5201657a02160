"""Where the Trojan triggers lie (masks of zeros and ones, measured on the published pictures)."""

import numpy as np


def square() -> np.ndarray:
    """8x8 at rows and columns 21 to 28: float32 [32, 32]."""
    mask = np.zeros((32, 32), np.float32)
    mask[21:29, 21:29] = 1
    return mask


def watermark() -> np.ndarray:
    """A copyright sign at the lower right and a dashed diagonal: float32 [32, 32], 85 pixels.

    Stands in for the published watermark (a line of small letters from the lower left to the
    upper right and the sign), which on the 32x32 grid has about 80 pixels.
    """
    y, x = np.mgrid[:32, :32].astype(np.float32)
    down, right = y - 21.5, x - 21.5
    radius, angle = np.hypot(down, right), np.arctan2(-down, right)
    ring = (radius > 5.4) & (radius < 6.3)
    letter = (radius > 2.2) & (radius < 3.4) & (np.abs(angle) > np.pi / 4)  # a C, open on the right
    along, across = x - y, x + y - 30
    dashes = (across >= 0) & (across <= 1) & (np.abs(along) <= 28) & (along % 10 > 2)
    return (ring | letter | dashes).astype(np.float32)
