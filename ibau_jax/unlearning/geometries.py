"""Sets of perturbations, each known by its vertex in a direction and by members drawn at random."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


class Geometry(NamedTuple):
    """A set of perturbations.

    Attributes:
      name: for tables.
      vertex: of a direction [H, W, C], the perturbation of the set that goes farthest along it.
      draw: `draw(key, count, shape)`: random perturbations [count, H, W, C] to start from; None:
        start at zero.
      lift: by how much it is raised on images that are black in many places, and lowered on white
        ones: where clipping would cut off half of it (see `lift_of`).
    """

    name: str
    vertex: Callable[[jax.Array], jax.Array]
    draw: Callable[[jax.Array, int, tuple[int, int, int]], jax.Array] | None
    lift: float = 0.0


CUT_OFF = 0.25  # share of values that clipping would change
NEAR = 0.07  # to black or white


def lift_of(images: np.ndarray) -> float:
    """1 where images [N, H, W, C] in [0, 1] are black in many places, -1 where white; else 0.

    Digits on a black ground are (.41 of the values are below .07), photographs are not (.03 to .06
    of CIFAR-10's and GTSRB's are near to either).
    """
    black, white = float((images < NEAR).mean()), float((images > 1 - NEAR).mean())
    if max(black, white) < CUT_OFF:
        return 0.0
    return 1.0 if black >= white else -1.0


def window(size: int) -> Geometry:
    """A square of `size` x `size` pixels anywhere, each colour channel at 0 or at 1."""

    def vertex(direction):
        gain = jnp.abs(direction).sum(-1)
        inside = (min(size, gain.shape[0]), min(size, gain.shape[1]))
        sums = lax.reduce_window(gain, 0.0, lax.add, inside, (1, 1), "valid")
        corner = jnp.unravel_index(jnp.argmax(sums), sums.shape)
        return _in_window(jnp.sign(direction), corner, inside)

    return Geometry(f"{size}x{size} window", vertex, lambda *args: _windows(size, *args))


def square(size: int) -> Geometry:
    """A square of `size` x `size` pixels anywhere, of one colour, each channel at 0 or at 1."""

    def vertex(direction):
        inside = (min(size, direction.shape[0]), min(size, direction.shape[1]))
        sums = lax.reduce_window(direction, 0.0, lax.add, (*inside, 1), (1, 1, 1), "valid")
        gain = jnp.abs(sums).sum(-1)
        corner = jnp.unravel_index(jnp.argmax(gain), gain.shape)
        return _in_window(jnp.broadcast_to(jnp.sign(sums[corner]), direction.shape), corner, inside)

    def draw(key, count, shape):
        return _windows(size, key, 3 * count, shape)[2::3]  # of three the one of one colour

    return Geometry(f"{size}x{size} square", vertex, draw)


def pixels(count: int) -> Geometry:
    """Any `count` pixels, each colour channel at 0 or at 1."""

    def vertex(direction):
        gain = jnp.abs(direction).sum(-1).ravel()
        best = lax.top_k(gain, min(count, len(gain)))[1]
        chosen = jnp.zeros_like(gain).at[best].set(1).reshape(direction.shape[:2])
        return chosen[..., None] * jnp.sign(direction)

    return Geometry(f"{count} pixels", vertex, lambda *args: _windows(math.isqrt(count), *args))


def cosine(amplitude: float, frequencies: int = 8) -> Geometry:
    """A cosine of one frequency over the whole image, a phase for each colour channel.

    Random ones have at most so many `frequencies` (periods) along each side.
    """

    def vertex(direction):
        spectrum = jnp.fft.fft2(direction - direction.mean((0, 1)), axes=(0, 1))
        size = jnp.abs(spectrum).sum(-1)
        which = jnp.unravel_index(jnp.argmax(size), size.shape)
        wave = _wave(direction.shape[:2], which, jnp.angle(spectrum[which]))
        return (amplitude * wave).astype(direction.dtype)  # where JAX is set to 64 bits too

    def draw(key, count, shape):
        keys = jax.random.split(key, 3)
        which = jax.random.randint(keys[0], (count, 2), -frequencies, frequencies + 1)
        phases = jax.random.uniform(keys[1], (count, shape[2]), maxval=2 * jnp.pi)
        grey = jax.random.bernoulli(keys[2], 0.5, (count, 1))
        phases = jnp.where(grey, phases[:, :1], phases)
        return amplitude * jax.vmap(lambda w, p: _wave(shape[:2], w, p))(which, phases)

    return Geometry(f"cosine {amplitude:g}", vertex, draw, lift=amplitude)


def field(size: float, waves: int = 4) -> Geometry:
    """What changes slowly over the image: sums of its lowest cosines, of root mean square `size`.

    Of each side the constant and the next ones, with one half period more each, `waves` in all.
    """

    def vertex(direction):
        rows, columns = _lowest(direction.shape[0], waves), _lowest(direction.shape[1], waves)
        parts = jnp.einsum("kh,lw,hwc->klc", rows, columns, direction)
        picture = jnp.einsum("kh,lw,klc->hwc", rows, columns, parts)
        return sized(picture).astype(direction.dtype)

    def draw(key, count, shape):
        rows, columns = _lowest(shape[0], waves), _lowest(shape[1], waves)
        keys = jax.random.split(key)
        parts = jax.random.normal(keys[0], (count, len(rows), len(columns), shape[2]))
        grey = jax.random.bernoulli(keys[1], 0.5, (count, 1, 1, 1))
        parts = jnp.where(grey, parts[..., :1], parts)
        return jax.vmap(sized)(jnp.einsum("kh,lw,nklc->nhwc", rows, columns, parts))

    def sized(picture):
        return _of_norm(size * math.sqrt(picture.size), picture)

    return Geometry(f"field {size:g}", vertex, draw)


def sphere(radius: float) -> Geometry:
    """An l2 norm of `radius`, in the units of images in [0, 1]."""

    return Geometry(f"l2 {radius:g}", lambda direction: _of_norm(radius, direction), None)


GEOMETRIES = (window(3), pixels(9), window(5), pixels(25), cosine(0.1), sphere(1.0))


def _of_norm(radius: float, picture: jax.Array) -> jax.Array:
    """`picture` with an l2 norm of `radius`; zero stays zero."""
    norm = jnp.linalg.norm(picture.ravel())
    return radius * picture / jnp.where(norm > 0, norm, 1)


def _lowest(length: int, waves: int) -> jax.Array:
    """The lowest cosines of a side (DCT-II), orthonormal: [waves, length]."""
    wave, place = jnp.arange(min(waves, length))[:, None], jnp.arange(length)
    cosines = jnp.cos(jnp.pi * wave * (2 * place + 1) / (2 * length))
    return cosines / jnp.linalg.norm(cosines, axis=1, keepdims=True)


def _in_window(picture: jax.Array, corner: Any, size: tuple[int, int]) -> jax.Array:
    """`picture` [H, W, C] inside a window, zero outside."""
    rows, columns = jnp.ogrid[: picture.shape[0], : picture.shape[1]]
    inside = (rows >= corner[0]) & (rows < corner[0] + size[0])
    inside &= (columns >= corner[1]) & (columns < corner[1] + size[1])
    return jnp.where(inside[..., None], picture, 0)


def _windows(size: int, key: jax.Array, count: int, shape: tuple[int, int, int]) -> jax.Array:
    """Random windows of extreme colours: each pixel its own, its own of grey, or one for all.

    What would stick out is moved to the border: triggers are put there, and models answer to some
    of them nowhere else (GTSRB BadNets: experiments/default_trials.md).
    """
    keys = jax.random.split(key, 4)
    inside = min(size, shape[0]), min(size, shape[1])
    room = jnp.array([shape[0] - inside[0] + 1, shape[1] - inside[1] + 1])
    corners = jax.random.randint(keys[0], (count, 2), -size, room + size)
    corners = jnp.clip(corners, 0, room - 1)
    colours = jax.random.rademacher(keys[1], (count, *shape), jnp.float32)
    colours = colours.at[1::3].set(colours[1::3, :, :, :1])
    solid = jax.random.rademacher(keys[2], (count, 1, 1, shape[2]), jnp.float32)
    grey = jax.random.bernoulli(keys[3], 0.5, (count, 1, 1, 1))
    solid = jnp.where(grey, solid[..., :1], solid)
    colours = colours.at[2::3].set(jnp.broadcast_to(solid, colours.shape)[2::3])
    return jax.vmap(lambda picture, corner: _in_window(picture, corner, inside))(colours, corners)


def _wave(shape: tuple[int, int], which: Any, phases: jax.Array) -> jax.Array:
    """cos(2 pi (f_y y / H + f_x x / W) + phase) [H, W, C]."""
    y, x = jnp.arange(shape[0])[:, None] / shape[0], jnp.arange(shape[1]) / shape[1]
    return jnp.cos(2 * jnp.pi * (which[0] * y + which[1] * x)[..., None] + phases)
