"""The grid that perturbations are searched on: of large images not each pixel."""

from collections.abc import Sequence
from typing import Any

LEAST = 32
"""Pixels of the grid's shorter side, at least: those of the images that the search was made for."""


def scale(shape: Sequence[int]) -> int:
    """How many pixels of an image [H, W, C] a pixel of the grid has a side; 1 below 64."""
    return max(1, min(shape[:2]) // LEAST)


def on_grid(shape: Sequence[int]) -> tuple[int, int, int]:
    """The shape of a perturbation on the grid, of images of `shape` [H, W, C]."""
    size = scale(shape)
    return -(-shape[0] // size), -(-shape[1] // size), shape[2]


def enlarged(picture: Any, shape: Sequence[int]) -> Any:
    """From the grid [..., h, w, C] to images of `shape` [H, W, C]; what sticks out is cut off."""
    size = scale(shape)
    if size == 1:
        return picture
    return picture.repeat(size, -3).repeat(size, -2)[..., : shape[0], : shape[1], :]
