"""Random changes of images that leave their classes as they are."""

import jax
import jax.numpy as jnp

from ibau_jax.devices import mesh


def augment(
    key: jax.Array, images: jax.Array, crop: int, flip: bool, cutout: int, axis: str | None = None
) -> jax.Array:
    """Random shifts, mirrored images and a square set to zero, each image its own [N, H, W, C].

    What an image gets does not depend on the number of devices. The square's middle lies anywhere
    in the image, so at the border less of it is left (as in the original, whose cutout of length 3
    halves to a 2x2 hole: of the pixel that is drawn and those before it).
    """
    height, width, channels = images.shape[1:]

    def one(number, image):
        keys = jax.random.split(jax.random.fold_in(key, number), 3)
        padded = jnp.pad(image, ((crop, crop), (crop, crop), (0, 0)))
        corner = jax.random.randint(keys[0], (2,), 0, 2 * crop + 1)
        image = jax.lax.dynamic_slice(padded, (*corner, 0), (height, width, channels))
        if flip:
            image = jnp.where(jax.random.bernoulli(keys[1]), image[:, ::-1], image)
        if cutout:
            top, left = (
                jax.random.randint(keys[2], (2,), 0, jnp.array([height, width])) - cutout // 2
            )
            y, x = jnp.arange(height)[:, None] - top, jnp.arange(width) - left
            hole = (y >= 0) & (y < cutout) & (x >= 0) & (x < cutout)
            image = jnp.where(hole[..., None], 0, image)
        return image

    return jax.vmap(one)(mesh.numbers(len(images), axis), images)
