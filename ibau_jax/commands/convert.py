"""The work of `ibau convert`."""

from pathlib import Path
from typing import Any

from ibau_jax.attacks import Attack, described
from ibau_jax.data import data_info
from ibau_jax.errors import InputError
from ibau_jax.models.files import save_model
from ibau_jax.models.stored import StoredModel
from ibau_jax.models.torch_import import convert_pth


def convert(
    source: str | Path,
    destination: str | Path,
    *,
    dataset: str = "cifar10",
    attacks: tuple[Attack, ...] = (),
) -> dict[str, Any]:
    """Import a published PyTorch checkpoint, with its trigger, as a model file of this project."""
    info = data_info(dataset)
    variables, classes, extra = convert_pth(source)
    if classes != info.num_classes:
        raise InputError(
            f"{str(source)!r} has {classes} classes, the data set {dataset!r} has "
            f"{info.num_classes}: give the data set that it was trained on",
            argument="dataset",
        )
    origin = {"source": Path(source).name, **extra}
    model = StoredModel(variables, "vgg", classes, dataset, attacks, origin)
    save_model(destination, model)
    return {
        "model": str(destination),
        "model_hash": model.hash,
        "dataset": dataset,
        "num_classes": classes,
        **described(attacks),
        **extra,
    }
