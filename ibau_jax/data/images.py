"""Images cropped and resized."""

import numpy as np
from PIL import Image


def crop(image: np.ndarray, bbox: np.ndarray) -> np.ndarray:
    """Crop to a region and resize.

    Args:
      image: uint8 [H, W, 3].
      bbox: (ymin, xmin, ymax, xmax), each in [0, 1] of the image.

    Returns:
      uint8 [32, 32, 3].
    """
    height, width = image.shape[:2]
    top, left, bottom, right = (float(b) for b in bbox)
    return resize(image, (left * width, top * height, right * width, bottom * height))


def resize(image: np.ndarray, box: tuple[float, float, float, float] | None = None) -> np.ndarray:
    """Bilinear to 32x32; `box`: (left, upper, right, lower) part of the image, in pixels."""
    resized = Image.fromarray(image).resize((32, 32), Image.Resampling.BILINEAR, box=box)
    return np.asarray(resized)
