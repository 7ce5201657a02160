"""A model of the user's own: its code by a name, its weights in a file."""

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax.traverse_util import flatten_dict

from ibau_jax.commands.options import OURS, OwnModel
from ibau_jax.commands.own_file import remembered
from ibau_jax.data import DATASETS
from ibau_jax.errors import InputError, first_line
from ibau_jax.models.files import load_model
from ibau_jax.models.model import Model, Variables
from ibau_jax.models.normalised import normalised
from ibau_jax.models.stored import IMAGE, StoredModel

SIZES = (32, 224, 28, 64, 96, 128, 256, 299, 384)  # tried where nothing says how large images are
CHANNELS = (3, 1)


class Back(NamedTuple):
    """How cleaned weights are written in the format that came in.

    Attributes:
      suffix: of the file, such as `.pth`.
      write: `write(path, variables)`; what differs from the file that was read, or nothing.
      tensors: `tensors(variables)`, arrays by the names that the reader of safetensors takes.
    """

    suffix: str
    write: Callable[[Path, Variables], str]
    tensors: Callable[[Variables], Mapping[str, Any]]


def open_model(
    path: str | Path,
    own: OwnModel = OURS,
    dataset: str | None = None,
    image_size: int | None = None,
) -> tuple[StoredModel, Back | None]:
    """A model file of ours, or weights for the user's own code.

    Args:
      own: names the code, which is imported and run; nothing is where it names none.
      dataset: that the images are of, for their size.
      image_size: of the user's own images.

    Returns:
      The model; for the user's own the way back.

    Raises:
      InputError: the file, the code or the options cannot be used.
    """
    own = remembered(path, own)
    named = {name: value for name in LIBRARIES if (value := getattr(own, name)) is not None}
    if not named:
        for name in ("model_args", "mean", "std"):
            if getattr(own, name) is not None:
                raise InputError(
                    f"{name.replace('_', ' ')} for a model file of ours: expected code of your own "
                    f"({', '.join('--' + library for library in LIBRARIES)}); leave it out",
                    argument=name,
                )
        return load_model(path), None
    if len(named) > 1:
        raise InputError(f"code by {' and '.join('--' + n for n in named)}: expected one of them")
    ((library, spec),) = named.items()
    args = _arguments(own.model_args)
    model: Any
    model, variables, back = LIBRARIES[library](path, spec, args)
    fixed = image_size or (IMAGE[0] if dataset in DATASETS else None)
    size, channels, classes = _reads(model, variables, (fixed,) if fixed else SIZES)
    if library == "torch":
        from ibau_jax.defenses.torch_module import with_logits

        noise = np.random.default_rng(0).uniform(size=(4, size, size, channels))
        model = with_logits(model, variables, noise.astype(np.float32))
    if own.mean is not None or own.std is not None:
        mean, std = (_numbers(name, getattr(own, name)) for name in ("mean", "std"))
        model = normalised(model, mean, std, channels)
    about = {"library": library, "code": spec, "arguments": args}
    about |= {name: getattr(own, name) for name in ("mean", "std") if getattr(own, name)}
    stored = StoredModel(
        variables,
        f"{library}:{spec}",
        classes,
        dataset or "own",
        info={"own": about},
        model=model,
        shape=(fixed, fixed, channels),
    )
    return stored, back


def _arguments(text: str | None) -> dict[str, Any]:
    try:
        found = json.loads(text or "{}")
    except ValueError as error:
        found = error
    if not isinstance(found, dict):
        raise InputError(
            f"the arguments of the model are {text!r}: expected an object of JSON, such as "
            "'{\"num_classes\": 10}'",
            argument="model_args",
        )
    return found


def _numbers(name: str, text: str | None) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in (text or "").split(","))
    except ValueError:
        raise InputError(
            f"the {name} is {text!r}: expected numbers such as 0.49,0.48,0.45 for mean and std",
            argument=name,
        ) from None


def _reads(model: Model, variables: Variables, sizes: tuple[int, ...]) -> tuple[int, int, int]:
    """A size and the channels of images that a model reads, and how many classes it gives."""
    reasons = []
    for channels in CHANNELS:
        for size in sizes:
            image = jax.ShapeDtypeStruct((1, size, size, channels), np.float32)
            try:
                out = jax.eval_shape(model, variables, image)
            except Exception as error:  # whatever the user's code raises
                reasons.append(f"{size}x{size}x{channels}: {first_line(error)[:200]}")
                continue
            if getattr(out, "ndim", 0) == 2 and out.shape[0] == 1:
                return size, channels, out.shape[1]
            reasons.append(f"{size}x{size}x{channels}: it gives {out} and not [1, classes]")
    raise InputError(
        f"the model refuses images of {reasons[0]}; expected one that gives [N, classes] for "
        "images of the size that is given",
        argument="image_size",
    )


def _torch(path: str | Path, spec: str, args: Mapping[str, Any]):
    from ibau_jax.models.adapters.torch_files import load_torch, save_torch
    from ibau_jax.models.adapters.torch_model import to_state_dict

    def tensors(new: Variables) -> dict[str, Any]:
        state = to_state_dict(new, container.state, container.tied)
        return {
            name: (value.float() if value.is_floating_point() else value).detach().cpu().numpy()
            for name, value in state.items()
            if hasattr(value, "detach")
        }

    model, variables, container = load_torch(path, spec, args)
    suffix = ".safetensors" if container.kind == "safetensors" else Path(path).suffix or ".pth"
    return model, variables, Back(suffix, lambda to, new: save_torch(to, container, new), tensors)


def _of_flax(kind: str, path: str | Path, spec: str, args: Mapping[str, Any]):
    from ibau_jax.models.adapters import files

    load = {"linen": files.load_linen, "nnx": files.load_nnx}[kind]
    model, variables, loaded = load(path, spec, args)
    write = _alike(files.save_weights, loaded)
    return model, variables, Back(Path(path).suffix, write, partial(flatten_dict, sep="/"))


def _equinox(path: str | Path, spec: str, args: Mapping[str, Any]):
    try:
        from ibau_jax.models.adapters.eqx_files import load_equinox, save_equinox, tensors_of
    except ImportError as error:
        raise InputError(
            f"Equinox is missing ({first_line(error)}): install it with pip install "
            "'ibau_jax[equinox]'"
        ) from error

    model, variables, container = load_equinox(path, spec, args)
    suffix, write = Path(path).suffix or ".eqx", _alike(save_equinox, container)
    return model, variables, Back(suffix, write, partial(tensors_of, container))


def _alike(save: Callable[..., Any], container: Any) -> Callable[[Path, Variables], str]:
    """`Back.write` of a format in which nothing differs from the file that was read."""

    def write(path: Path, variables: Variables) -> str:
        save(path, container, variables)
        return ""

    return write


# (path, code, arguments) -> model, variables, way back
LIBRARIES: dict[str, Callable[..., tuple[Model, Variables, Back]]] = {
    "torch": _torch,
    "linen": partial(_of_flax, "linen"),
    "nnx": partial(_of_flax, "nnx"),
    "equinox": _equinox,
}
