"""The clean set as a stack of equal batches on the device, checked first."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ibau_jax.data import Dataset, check_data, check_labels
from ibau_jax.devices import mesh
from ibau_jax.devices.mesh import Devices
from ibau_jax.errors import InputError, first_line
from ibau_jax.models.at_once import at_once
from ibau_jax.models.model import Logits, Model, Params
from ibau_jax.unlearning.config import IBAUConfig
from ibau_jax.unlearning.grid import scale


class Batch(NamedTuple):
    """One batch, or a stack of batches with one more axis in front.

    Attributes:
      images: [B, H, W, C]; rows of padding repeat an image and have weight 0.
      labels: int32 [B].
      weights: [B], adding up to 1 over the real rows.
      patched: [B], 1 where the image carries delta.
      size: int32 scalar, images in the whole batch, over all devices; None: one device has all.
      taught: [B, num_classes], what the given model says of the image; None: it is not asked.
      added: [B, H, W, C], what else is added to the image; None: nothing.
      towards: int32 [B], the label that what is added leads to, `UNTARGETED` where to none; None:
        nowhere.
      mixed: half as many mixtures of clean images, a `Batch` with `taught` and without labels that
        count; None: there are none.
    """

    images: Any
    labels: Any
    weights: Any
    patched: Any
    size: Any = None
    taught: Any = None
    added: Any = None
    towards: Any = None
    mixed: Any = None


UNTARGETED = -1  # away from the true label, wherever to


def make_batches(
    clean: Dataset,
    config: IBAUConfig,
    on: Devices | None = None,
    taught: np.ndarray | None = None,
) -> tuple[Batch, np.ndarray]:
    """Cut a clean set, in its order, into batches; the last one may be smaller.

    (`shuffled` brings it into an order drawn at random: a set that is sorted by class, as a
    folder of images is, would make batches of one class.)

    All have one shape (so everything compiles once): what is missing is filled up with rows
    of weight 0, which count nowhere.

    Args:
      config: from `resolve`.
      on: spread the rows of each batch over these devices; None: leave them where JAX puts
        arrays.
      taught: for each image, see `Batch`.

    Returns:
      The stack, and the number of real images in each batch.
    """
    count, real = len(clean.labels), config.batch_size
    assert real is not None, "the config is resolved first"
    starts = np.arange(0, count, real)
    sizes = np.minimum(real, count - starts)
    shares = 1 if on is None else len(on.all)
    rows = _multiple(-(-real // shares), config.rows_multiple)

    def rows_of(device: int) -> Batch:
        row = np.arange(rows) if on is None else on.numbers(device, rows)
        index = starts[:, None] + np.minimum(row, sizes[:, None] - 1)
        weights = (row < sizes[:, None]) / sizes[:, None]
        return Batch(
            images=clean.images[index],
            labels=clean.labels[index],
            weights=weights.astype(clean.images.dtype),
            patched=np.zeros(index.shape, clean.images.dtype),
            size=sizes.astype(np.int32),
            taught=None if taught is None else taught[index],
        )

    return (jax.tree.map(jnp.asarray, rows_of(0)) if on is None else on.share(rows_of)), sizes


def shuffled(clean: Dataset, key: jax.Array) -> Dataset:
    """The same images and labels in an order drawn from `key`."""
    order = np.asarray(jax.random.permutation(key, len(clean.labels)))
    return Dataset(clean.images[order], clean.labels[order])


def mixtures(images: np.ndarray, number: int, count: int) -> np.ndarray:
    """So many means of two images [N, H, W, C] each; of each `number` (of a round) other pairs.

    N / 2 of them use each image once.
    """
    half = (len(images) + 1) // 2  # an image of the first half and one of the second
    rows = np.arange(count)
    second = half + (rows + number) % max(1, len(images) - half)
    return (images[rows % half] + images[second % len(images)]) / 2


def make_mixtures(
    clean: Dataset,
    config: IBAUConfig,
    number: int,
    teach: Callable[[np.ndarray], np.ndarray],
    on: Devices | None = None,
) -> Batch:
    """A stack of half as many mixtures as the batches of a round have images: their `mixed`.

    Args:
      number: of the round.
      teach: `teach(images)`, what the given model says: [N, num_classes].
    """
    assert config.batch_size is not None, "the config is resolved first"
    half = -(-config.batch_size // 2)
    images = mixtures(clean.images, number, half * -(-len(clean.labels) // config.batch_size))
    unlabelled = Dataset(images, np.zeros(len(images), np.int32))
    return make_batches(unlabelled, replace(config, batch_size=half), on, teach(images))[0]


def parted(clean: Dataset, key: jax.Array, count: int) -> tuple[Dataset, Dataset]:
    """`count` images drawn from `key`, and the others."""
    images, labels = shuffled(clean, key)
    return Dataset(images[:count], labels[:count]), Dataset(images[count:], labels[count:])


def first_rows(batch: Batch, count: int | None, multiple: int, axis: str | None = None) -> Batch:
    """The first `count` images of a batch, weights adding up to 1 again; None: all.

    On each device a multiple of `multiple` rows.
    """
    if count is None:
        return batch
    rows = _multiple(-(-count // mesh.width(axis)), multiple)
    batch = jax.tree.map(lambda a: a[:rows] if a.ndim else a, batch)
    size = jnp.minimum(count, images_in(batch))
    real = mesh.numbers(len(batch.weights), axis) < size
    return batch._replace(weights=(real / size).astype(batch.weights.dtype), size=size)


def images_in(batch: Batch) -> jax.Array:
    """How many images a batch has, over all devices."""
    return jnp.sum(batch.weights > 0) if batch.size is None else batch.size


def _multiple(count: int, of: int) -> int:
    return -(-count // of) * of


def resolve(
    config: IBAUConfig, logits: Logits, params: Params, images: Any, num_devices: int = 1
) -> IBAUConfig:
    """Settle what `config` leaves open for this clean set.

    That is the batch size, the rounds, the microbatch (`models.at_once`), and where it searches,
    the radius for images larger than those of 32 x 32 pixels (`grid`).
    """
    count = len(images)
    batch_size = images_a_batch(config, count)
    rounds = config.rounds or max(2, -(-80 // -(-count // batch_size)))
    microbatch = config.microbatch
    if microbatch == "auto":
        share = -(-batch_size // num_devices)
        most = at_once(logits, params, images[:share])
        microbatch = most and -(-share // -(-share // most))
    config = replace(config, batch_size=batch_size, rounds=rounds, microbatch=microbatch)
    if config.searched:
        config = replace(config, radius=config.radius * scale(images.shape[1:]))
    return config


def images_a_batch(config: IBAUConfig, count: int) -> int:
    """The batch size for a clean set of `count` images."""
    return min(config.batch_size or max(10, min(100, count // 10)), count)


def check_clean(logits: Logits, params: Params, clean: Dataset) -> Dataset:
    """The clean set as arrays, after checking it and the parameters against the model.

    Raises:
      InputError: says what was expected, what was found and what to do.
    """
    images, labels = clean = check_data(clean)
    check_params(logits, params)
    try:
        out = jax.eval_shape(logits, params, jax.ShapeDtypeStruct(images[:1].shape, images.dtype))
    except Exception as error:  # whatever the user's own function raises
        raise InputError(
            f"the model refuses images of shape {images[:1].shape}: {first_line(error)}"
        ) from error
    if getattr(out, "ndim", 0) != 2 or out.shape[0] != 1:
        raise InputError(
            f"logits(params, images) gives {out} for one image: expected an array [1, classes]"
        )
    check_labels(labels, out.shape[1])
    return clean


def check_params(logits: Logits, params: Params) -> None:
    """Raise `InputError` unless `params` are what can be trained, in the form that belongs to
    `logits`: the variables of a `Model`, or the parameters of a plain function."""
    trained = params
    if isinstance(logits, Model):
        if not isinstance(params, Mapping) or "params" not in params:
            found = sorted(params) if isinstance(params, Mapping) else type(params).__name__
            raise InputError(
                f"the variables of a model have no collection 'params' (found {found}): give "
                "all that module.init returns, {'params': ..., 'batch_stats': ...}"
            )
        trained = params["params"]
    elif isinstance(params, Mapping) and "batch_stats" in params:
        # They would be trained like weights, and no one would notice.
        raise InputError(
            "the parameters of a plain function hold 'batch_stats', which are no weights: give "
            "Classifier(module) with the variables, or evaluation_logits(module, variables) with "
            "variables['params'] (both in ibau_jax.models)"
        )
    if not jax.tree.leaves(trained):
        raise InputError("the model has no parameters: expected at least one array to train")
    for path, leaf in jax.tree_util.tree_leaves_with_path(trained):
        name = jax.tree_util.keystr(path)
        if not hasattr(leaf, "dtype") or not jnp.issubdtype(leaf.dtype, jnp.floating):
            found = getattr(leaf, "dtype", type(leaf).__name__)
            raise InputError(
                f"the parameter {name} is {found}: expected an array of floating point; put what "
                "is not trained into the function"
            )
        if not bool(jnp.isfinite(leaf).all()):
            raise InputError(f"the parameter {name} holds NaN or infinite values")
