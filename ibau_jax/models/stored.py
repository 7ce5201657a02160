"""A model as a file of ours holds it, and what can be done with it."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from ibau_jax.attacks import Attack, Network, poison_all
from ibau_jax.data import DATASETS, DataInfo, Dataset, Reader, data_info, load
from ibau_jax.errors import InputError
from ibau_jax.models.architectures import build
from ibau_jax.models.model import Classifier, Model
from ibau_jax.models.predict import predict

IMAGE = (32, 32, 3)  # what the architectures read, so the shape of triggers


@dataclass(frozen=True)
class StoredModel:
    """A model with what is needed to use and to measure it.

    Attributes:
      variables: flax variables, `params` and `batch_stats`.
      architecture: a name of `ibau_jax.models.architectures.ARCHITECTURES`.
      num_classes: size of the output.
      dataset: the data set it was trained on.
      attacks: those on it, as far as they are known.
      info: anything else, JSON values (seed, epochs, versions, where it came from).
      model: of another architecture, what is called with `variables`; None: the architecture.
      shape: of the images that it reads, height, width and channels; None: any.
    """

    variables: dict[str, Any]
    architecture: str
    num_classes: int
    dataset: str
    attacks: tuple[Attack, ...] = ()
    info: dict[str, Any] = field(default_factory=dict)
    model: Model | None = None
    shape: tuple[int | None, int | None, int] = IMAGE

    @property
    def classifier(self) -> Model:
        """The network, to be called with `variables`."""
        return self.model or Classifier(self.module)

    @property
    def module(self) -> Any:
        """The flax module of the architecture."""
        return build(self.architecture, self.num_classes)

    @property
    def network(self) -> Network:
        """Features and last layer apart, in evaluation mode, for triggers that are optimised."""
        module, last = (
            build(self.architecture, self.num_classes),
            self.variables["params"]["classifier"],
        )

        def features(images: jax.Array) -> Any:
            return module.apply(self.variables, images, features=True)

        return Network(features, jnp.asarray(last["kernel"]), jnp.asarray(last["bias"]))

    @property
    def hash(self) -> str:
        """First 16 hex digits of a SHA-256 over names and weights, whatever else is in the file."""
        digest = hashlib.sha256()
        for name, value in sorted(named(self.variables).items()):
            digest.update(name.encode())
            digest.update(np.ascontiguousarray(value, np.float32).tobytes())
        return digest.hexdigest()[:16]

    def data_info(self, dataset: str | None = None) -> DataInfo:
        """The data set it is measured on: its own, or another one of as many classes.

        Raises:
          InputError: its own is not known here, or the other one has other classes.
        """
        if dataset is None and self.dataset not in DATASETS:
            raise InputError(
                f"the model was trained on {self.dataset!r}, which is not known here: choose the "
                f"data set among {', '.join(DATASETS)}, or give images of your own",
                argument="dataset",
            )
        info = data_info(dataset or self.dataset)
        if info.num_classes != self.num_classes:
            raise InputError(
                f"the model has {self.num_classes} classes, the data set {info.name!r} has "
                f"{info.num_classes}: choose the data set that it was trained on",
                argument="dataset",
            )
        return info

    def reader(self, dataset: str | None = None, **options: Any) -> Reader:
        """What reads images for the model: its data set's splits, folders and files.

        Args:
          dataset: as of `data_info`; its own need not be known here, and then has no splits.
          options: fields of `Reader`.
        """
        known = dataset is not None or self.dataset in DATASETS
        info = self.data_info(dataset) if known else None
        return Reader(self.num_classes, self.shape, info, **options)

    def relabelled(self, data: Dataset) -> Dataset:
        """The same images with the labels that the model gives them."""
        return data._replace(labels=predict(self.classifier)(self.variables, data.images))

    def accuracy(self, data: Dataset) -> float:
        """How many of the images get their labels, as a fraction."""
        return float(np.mean(self.relabelled(data).labels == data.labels))

    def train_set(
        self, info: DataInfo, ratio: float | None = None, data_dir: str | Path | None = None
    ) -> Dataset | None:
        """The training set as it was poisoned; None where it is not known how much of it was.

        Args:
          ratio: poison ratio; None: as `self.info` has it.
        """
        ratio = self.info.get("poison_ratio") if ratio is None else ratio
        if self.attacks and ratio is None:
            return None
        data = load(info.name, "train", data_dir)
        attacks = self.attacks * self.info.get("copies", 1)
        return poison_all(data, attacks, ratio or 0.0, self.info.get("seed", 0))[0]


def named(variables: Mapping[str, Any]) -> dict[str, Any]:
    """`flat`, also of variables that are no dicts inside (Equinox)."""
    leaves = jax.tree_util.tree_leaves_with_path(dict(variables))
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def flat(variables: Mapping[str, Any]) -> dict[str, Any]:
    """Variables by their names, such as `params/conv1/kernel`."""
    return flatten_dict(variables, sep="/")
