"""Models on disk: safetensors with metadata, and the import of published PyTorch files.

One file holds the weights, what they mean, and the trigger, so that the attack success rate
can be measured anywhere with nothing else.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy
from flax.traverse_util import flatten_dict, unflatten_dict

from ibau_jax.attacks import Attack, Trigger, check_target
from ibau_jax.errors import InputError
from ibau_jax.files import atomic_path
from ibau_jax.models import build

FORMAT = "ibau_jax model 3"  # the only key: safetensors writes several in random order
MAX_COPIES = 1000  # of the training set that a model was trained on


@dataclass(frozen=True)
class Model:
    """A model with what is needed to use and to measure it.

    Attributes:
      variables: flax variables, `params` and `batch_stats`.
      architecture: a name of `ibau_jax.models.ARCHITECTURES`.
      num_classes: size of the output.
      dataset: the data set it was trained on.
      attacks: those on it, as far as they are known.
      info: anything else, JSON values (seed, epochs, versions, where it came from).
    """

    variables: dict[str, Any]
    architecture: str
    num_classes: int
    dataset: str
    attacks: tuple[Attack, ...] = ()
    info: dict[str, Any] = field(default_factory=dict)


def save_model(path: str | Path, model: Model, dtype: Any = np.float32) -> Path:
    """Write a model to `path` (safetensors), whole or not at all.

    Args:
      dtype: of the stored weights; float16 halves the file and rounds them.

    Raises:
      InputError: a trigger is a function of the user's, or the folder cannot be written to.
    """
    triggers = triggers_of(model.attacks)
    tensors = {
        name: np.ascontiguousarray(value, dtype)
        for name, value in flatten_dict(model.variables, sep="/").items()
    }
    header = {
        "architecture": model.architecture,
        "num_classes": model.num_classes,
        "dataset": model.dataset,
        "info": model.info,
        "attacks": [
            {"name": attack.name, "target": attack.target, "rule": trigger.rule}
            for attack, trigger in zip(model.attacks, triggers, strict=True)
        ],
    }
    for i, trigger in enumerate(triggers):
        tensors |= {
            f"trigger/{i}/{name}": np.ascontiguousarray(array, np.float32)
            for name, array in (("pattern", trigger.pattern), ("mask", trigger.mask))
            if array is not None
        }
    metadata = {FORMAT: json.dumps(header)}
    with atomic_path(path) as temporary:
        temporary.write_bytes(safetensors.numpy.save(tensors, metadata))
    return Path(path)


def triggers_of(attacks: Sequence[Attack]) -> list[Trigger]:
    """The triggers of attacks, for a model file.

    Raises:
      InputError: one of them is a function.
    """
    triggers = []
    for attack in attacks:
        if not isinstance(attack.trigger, Trigger):
            raise InputError(
                f"the trigger {attack.trigger!r} is a function: a model file holds a `Trigger`; "
                "leave the attack out of the model, or make a `Trigger` of it"
            )
        triggers.append(attack.trigger)
    return triggers


def load_model(path: str | Path) -> Model:
    """Read a model that `save_model` wrote.

    Raises:
      InputError: the file is missing, truncated, of another kind, does not fit its
        architecture, or holds values that are not finite.
    """
    path = _existing(path)
    try:
        with safetensors.safe_open(path, framework="np") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        hint = "; convert a .pth file with 'ibau convert'" if path.suffix == ".pth" else ""
        raise InputError(
            f"cannot read the model {str(path)!r}: {error}; expected a whole safetensors file{hint}"
        ) from error
    if FORMAT not in metadata:
        raise InputError(
            f"{str(path)!r} has no metadata {FORMAT!r} (found {sorted(metadata)}); "
            "make model files with 'ibau train' or 'ibau convert'"
        )
    try:
        header = json.loads(metadata[FORMAT])
        fields = {k: header[k] for k in ("architecture", "num_classes", "dataset", "info")}
        attacks = tuple(
            Attack(
                attack["name"],
                Trigger(
                    attack["rule"],
                    tensors[f"trigger/{i}/pattern"],
                    tensors.get(f"trigger/{i}/mask"),
                ),
                attack["target"],
                fields["num_classes"],
            )
            for i, attack in enumerate(header["attacks"])
        )
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise InputError(
            f"the metadata of {str(path)!r} is damaged ({error!r}); make the file again"
        ) from error
    weights = {
        name: value.astype(np.float32)
        for name, value in tensors.items()
        if not name.startswith("trigger/")
    }
    check_weights(weights, fields["architecture"], fields["num_classes"], str(path))
    for attack in attacks:
        if attack.target is not None:
            check_target(attack.target, fields["num_classes"])
    return Model(variables=unflatten_dict(weights, sep="/"), attacks=attacks, **fields)


def convert_pth(path: str | Path) -> tuple[dict[str, Any], int, dict[str, Any]]:
    """Read a published PyTorch checkpoint of `small_VGG16` (never executed).

    The layouts differ: kernels are [out, in, 3, 3] there, and the last layer reads channels
    first. See `ibau_reference`'s README for the table of layers.

    Returns:
      Flax variables, the number of classes, and what else the file says (`acc`, `epoch`).

    Raises:
      InputError: PyTorch is missing, or the file is not such a checkpoint.
    """
    path = _existing(path)
    try:
        import torch
    except ImportError as error:
        raise InputError(
            "reading a .pth file needs PyTorch, which is not installed: run "
            "pip install 'ibau_jax[torch]'"
        ) from error
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many types on a damaged or refused file
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else repr(error)
        raise InputError(
            f"cannot read {str(path)!r}: {reason}; expected a PyTorch file that holds only "
            "tensors and plain values (anything else is refused and never executed)"
        ) from error
    state = content.get("net", content) if isinstance(content, dict) else None
    if not isinstance(state, dict):
        raise InputError(
            f"{str(path)!r} holds {type(content).__name__}: expected a dict of tensors, or a dict "
            "with such a dict under 'net'"
        )
    weights = _vgg_from_torch({str(k): v.numpy() for k, v in state.items() if hasattr(v, "numpy")})
    classes = len(weights.get("params/classifier/bias", ()))
    check_weights(weights, "vgg", classes, str(path))
    extra = {k: content[k] for k in ("acc", "epoch") if isinstance(content.get(k), int | float)}
    return unflatten_dict(weights, sep="/"), classes, extra


def check_weights(
    weights: dict[str, np.ndarray], architecture: str, num_classes: int, where: str
) -> None:
    """Raise `InputError` unless `weights` (flat names) fit an architecture and are finite."""
    expected = _expected_shapes(architecture, num_classes)
    for name in sorted(expected.keys() | weights.keys()):
        found = tuple(weights[name].shape) if name in weights else "missing"
        if found != expected.get(name, "no such layer"):
            raise InputError(
                f"{where!r} does not fit the architecture {architecture!r} with {num_classes} "
                f"classes: {name} is {found}, expected {expected.get(name, 'no such layer')}"
            )
    for name, value in weights.items():
        if not np.isfinite(value).all():
            raise InputError(
                f"{where!r} holds NaN or infinite weights (first in {name}): expected finite "
                "values; train or convert the model again"
            )


def model_hash(model: Model) -> str:
    """First 16 hex digits of a SHA-256 over names and weights; metadata does not change it."""
    digest = hashlib.sha256()
    for name, value in sorted(flatten_dict(model.variables, sep="/").items()):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(value, np.float32).tobytes())
    return digest.hexdigest()[:16]


def _expected_shapes(architecture: str, num_classes: int) -> dict[str, tuple[int, ...]]:
    import jax

    module = build(architecture, max(num_classes, 1))
    shapes = jax.eval_shape(module.init, jax.random.key(0), jax.numpy.zeros((1, 32, 32, 3)))
    flat: dict[str, Any] = flatten_dict(shapes, sep="/")
    return {name: tuple(leaf.shape) for name, leaf in flat.items()}


# Place in the published `features` of each convolution; its batch norm comes next.
_TORCH_CONVOLUTIONS = (0, 3, 8, 11, 16, 19)


def _vgg_from_torch(state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    names = {}
    for i, place in enumerate(_TORCH_CONVOLUTIONS):
        names |= {
            f"features.{place}.weight": f"params/conv{i + 1}/kernel",
            f"features.{place}.bias": f"params/conv{i + 1}/bias",
            f"features.{place + 1}.weight": f"params/conv{i + 1}/scale",
            f"features.{place + 1}.bias": f"params/conv{i + 1}/offset",
            f"features.{place + 1}.running_mean": f"batch_stats/conv{i + 1}/mean",
            f"features.{place + 1}.running_var": f"batch_stats/conv{i + 1}/var",
        }
    names |= {
        "classifier.weight": "params/classifier/kernel",
        "classifier.bias": "params/classifier/bias",
    }
    weights = {}
    for name, value in state.items():
        if name.endswith("num_batches_tracked"):
            continue
        name = name.removeprefix("module.")  # written by nn.DataParallel
        if value.ndim == 4:
            value = value.transpose(2, 3, 1, 0)
        elif name == "classifier.weight" and value.shape[-1:] == (2048,):
            # PyTorch flattens (C, H, W), flax (H, W, C).
            value = value.reshape(-1, 128, 4, 4).transpose(2, 3, 1, 0).reshape(2048, -1)
        weights[names.get(name, name)] = value.astype(np.float32)
    return weights


def _existing(path: str | Path) -> Path:
    path = Path(path)
    if not path.is_file():
        what = "a folder" if path.is_dir() else "no such file"
        raise InputError(f"cannot read the model {str(path)!r}: {what}; expected a model file")
    return path
