"""Images read, cropped and resized, as Pillow does it."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

GREY = (
    np.array([19595, 38470, 7471], np.float32) / 65536
)  # what Pillow makes grey of red, green and blue
DEEP = ("PNG", "PPM")  # formats of which Pillow's mode I has 16 bits, from 0 to 65535


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


def centre(image: Image.Image, size: int) -> Image.Image:
    """The centre of an image, `size` x `size`, after its shorter side was resized to `size`.

    Bilinear with antialiasing. The rounding is that of torchvision's `Resize(size)` and
    `CenterCrop(size)`, so that a model sees what it was trained with.
    """
    shorter = min(image.size)
    width, height = (side if side == size else int(size * side / shorter) for side in image.size)
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    left, top = round((width - size) / 2), round((height - size) / 2)
    return image.crop((left, top, left + size, top + size))


def scaled(pixels: np.ndarray) -> np.ndarray:
    """Pixels as float32 in [0, 1]: of 8 or 16 bits divided by their range, floats as they are."""
    if pixels.dtype.kind == "f":
        return pixels.astype(np.float32, copy=False)
    return np.divide(pixels, np.float32(np.iinfo(pixels.dtype).max), dtype=np.float32)


def fitted(image: np.ndarray, channels: int, size: int | None = None) -> np.ndarray:
    """An image as a model reads it.

    Args:
      image: uint8, uint16 or float [H, W, 1 or 3].
      channels: 1 (grey) or 3 (RGB): grey is repeated, colours are weighed as Pillow does it.
      size: of `centre`; None: as it is.

    Returns:
      float32 [H, W, channels] in [0, 1], H = W = `size` where that is given. Images of 8 bits are
      rounded to 8 bits after each step, as they are by Pillow and so by torchvision.
    """
    if image.dtype == np.uint8:
        picture = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
        picture = picture.convert("L" if channels == 1 else "RGB")
        if size is not None:
            picture = centre(picture, size)
        found = scaled(np.asarray(picture))
        return found[..., None] if channels == 1 else found
    image = scaled(image)
    if channels < image.shape[-1]:
        image = np.minimum(image @ GREY, np.float32(1))[..., None]
    if size is not None:
        parts = (centre(Image.fromarray(part), size) for part in np.moveaxis(image, -1, 0))
        image = np.stack([np.asarray(part) for part in parts], axis=-1)
    return np.repeat(image, channels, axis=-1) if image.shape[-1] < channels else image


def read_image(
    path: Path, channels: int, size: int | None = None, exif: bool = False
) -> np.ndarray:
    """One picture of a file as `fitted` gives it.

    Args:
      exif: turn it as its EXIF data say.

    Raises:
      ValueError: it has another mode than grey or RGB of 8 or 16 bits, is transparent anywhere, or
        has many frames; and whatever Pillow raises on damaged files.
    """
    with Image.open(path) as image:
        # A camera's JPEG (MPO) may hold a preview as a second frame.
        if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":
            raise ValueError("several frames")
        kind = image.format
        image.load()
        if exif:
            image = ImageOps.exif_transpose(image)
        return fitted(_pixels(image, kind), channels, size)


def _pixels(image: Image.Image, kind: str | None) -> np.ndarray:
    """uint8 or uint16 [H, W, 1 or 3] of a loaded picture of the format `kind`."""
    if image.mode.startswith("I;16") or (image.mode == "I" and kind in DEEP):
        if "transparency" in image.info:
            raise ValueError("transparent")
        return np.asarray(image).astype(np.uint16)[..., None]  # Pillow's own `convert` clips at 255
    if image.has_transparency_data:
        # What lies under transparent pixels is nowhere defined, and viewers show something else.
        image = image.convert("RGBA")
        if image.getchannel("A").getextrema() != (255, 255):
            raise ValueError("transparent")
        return np.asarray(image)[..., :3]
    if image.mode not in ("1", "L", "P", "RGB"):
        raise ValueError(f"mode {image.mode}")
    if image.mode in ("1", "L"):
        return np.asarray(image.convert("L"))[..., None]
    return np.asarray(image.convert("RGB"))
