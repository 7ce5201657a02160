"""Models on disk: safetensors with metadata (`torch_import` reads PyTorch files).

One file holds the weights, what they mean, and the trigger, so that the attack success rate
can be measured anywhere with nothing else.
"""

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
import safetensors
import safetensors.numpy
from flax.traverse_util import flatten_dict, unflatten_dict

from ibau_jax.attacks import RULES, Attack, Trigger
from ibau_jax.errors import InputError
from ibau_jax.files import atomic_path, to_json
from ibau_jax.models.architectures import ARCHITECTURES, build
from ibau_jax.models.stored import IMAGE, StoredModel, flat

FORMAT = "ibau_jax model 3"  # the only key: safetensors writes several in random order
MAX_COPIES = 1000  # of the training set that a model was trained on
MAX_CLASSES = 100_000
FLOATS = ("F16", "F32", "F64")


def save_model(path: str | Path, model: StoredModel, dtype: Any = np.float32) -> Path:
    """Write a model to `path` (safetensors), whole or not at all.

    Args:
      dtype: of the stored weights; float16 halves the file and rounds them.

    Raises:
      InputError: a trigger is a function of the user's, what is said of the model could not be
        read again, weights are too large for `dtype`, or the folder cannot be written to.
    """
    triggers = triggers_of(model.attacks)
    tensors = {}
    for name, value in flat(model.variables).items():
        with np.errstate(over="ignore"):
            tensors[name] = np.ascontiguousarray(value, dtype)
        if np.isinf(tensors[name]).any() and np.isfinite(value).all():
            raise InputError(
                f"weights in {name} reach {np.abs(value).max():g}, too large for "
                f"{np.dtype(dtype).name}: save them as float32"
            )
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
    metadata = {FORMAT: to_json(header)}
    _read_header(metadata[FORMAT], str(path))
    for i, trigger in enumerate(triggers):
        _check_trigger(trigger.pattern.shape, i, str(path))
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


def load_model(path: str | Path) -> StoredModel:
    """Read a model that `save_model` wrote.

    Raises:
      InputError: the file is missing, truncated, of another kind, does not fit its
        architecture, or holds values that are not finite.
    """
    path = existing(path)
    where = str(path)
    try:
        with safetensors.safe_open(path, framework="np") as file:
            metadata = file.metadata() or {}
            header = None
            if FORMAT in metadata:
                header = _read_header(metadata[FORMAT], where)
            tensors = read_tensors(file, where)
    except InputError:
        raise
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        hint = "; convert a .pth file with 'ibau convert'" if path.suffix == ".pth" else ""
        raise InputError(
            f"cannot read the model {where!r}: {error}; expected a whole safetensors file{hint}"
        ) from error
    if header is None:
        raise InputError(
            f"{where!r} has no metadata {FORMAT!r} (found {few(metadata)}); make model files with "
            "'ibau train' or 'ibau convert'"
        )
    triggers = [
        _pop_trigger(tensors, i, rule, where) for i, (_, _, rule) in enumerate(header.attacks)
    ]
    check_weights(tensors, header.architecture, header.num_classes, where)
    attacks = tuple(
        Attack(name, trigger, target, header.num_classes)
        for (name, target, _), trigger in zip(header.attacks, triggers, strict=True)
    )
    return StoredModel(
        unflatten_dict(tensors, sep="/"),
        header.architecture,
        header.num_classes,
        header.dataset,
        attacks,
        header.info,
    )


class Header(NamedTuple):
    """The metadata of a model file, as far as its types and ranges go; see `StoredModel`.

    Attributes:
      attacks: (name, target, rule of the trigger) of each.
    """

    architecture: str
    num_classes: int
    dataset: str
    info: dict[str, Any]
    attacks: list[tuple[str, int | None, str]]


def _whole(low: int, high: int) -> Callable[[Any], bool]:
    return lambda value: type(value) is int and low <= value <= high


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _is_ratio(value: Any) -> bool:
    return value is None or (type(value) in (int, float) and 0 <= value <= 1)


_SEED = ("0 or a larger whole number", _whole(0, 2**64))
# What each value has to be, in words, and the test of it; of `info`, where it is there.
_FIELDS = {
    "architecture": (
        "one of " + ", ".join(ARCHITECTURES),
        lambda value: isinstance(value, str) and value in ARCHITECTURES,
    ),
    "num_classes": (f"a whole number from 1 to {MAX_CLASSES}", _whole(1, MAX_CLASSES)),
    "dataset": ("a name", _is_text),
    "info": ("an object", lambda value: isinstance(value, dict)),
    "attacks": ("a list", lambda value: isinstance(value, list)),
}
_INFO = {
    "poison_ratio": ("a share in [0, 1] or null", _is_ratio),
    "seed": _SEED,
    "copies": (f"a whole number from 1 to {MAX_COPIES}", _whole(1, MAX_COPIES)),
    "epochs": ("a whole number of at least 1", _whole(1, 2**64)),
}
_ATTACK = {
    "name": ("a name", _is_text),
    "target": ("a whole number or null", lambda value: value is None or type(value) is int),
    "rule": ("one of " + ", ".join(RULES), lambda value: isinstance(value, str) and value in RULES),
}


def _read_header(text: str, where: str) -> Header:
    """The metadata of a model file, every value of the type and in the range that is used.

    Raises:
      InputError: it is no strict JSON, lacks a value, has one more, or another kind of value.
    """
    try:
        found = json.loads(text, parse_constant=_no_constant, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        _damaged(where, f"no JSON object of this kind ({short(str(error))})")
    _check_fields(found, _FIELDS, "", where)
    _check_fields(found["info"], _INFO, "info.", where, optional=True)
    classes = found["num_classes"]
    for i, attack in enumerate(found["attacks"]):
        _check_fields(attack, _ATTACK, f"attacks[{i}].", where)
        target = attack["target"]
        if target is not None and not 0 <= target < classes:
            _damaged(
                where, f"attacks[{i}].target is {short(repr(target))}, expected 0 to {classes - 1}"
            )
    attacks = [(attack["name"], attack["target"], attack["rule"]) for attack in found["attacks"]]
    names = [name for name, _, _ in attacks]
    if len(set(names)) < len(names):
        _damaged(where, f"the attacks have the names {few(names)}, expected each one once")
    return Header(**{**found, "attacks": attacks})


def _check_fields(
    found: Any,
    fields: Mapping[str, tuple[str, Callable[[Any], bool]]],
    prefix: str,
    where: str,
    optional: bool = False,
) -> None:
    what = prefix.rstrip(".") or "it"
    if not isinstance(found, dict):
        _damaged(where, f"{what} is {short(repr(found))}, expected an object")
    if not optional:
        if missing := [name for name in fields if name not in found]:
            _damaged(where, f"{what} lacks {few(missing)}, expected {', '.join(fields)}")
        if more := [name for name in found if name not in fields]:
            _damaged(where, f"{what} also has {few(more)}, expected only {', '.join(fields)}")
    for name, (expected, fits) in fields.items():
        if name in found and not fits(found[name]):
            _damaged(where, f"{prefix}{name} is {short(repr(found[name]))}, expected {expected}")


def _damaged(where: str, what: str) -> NoReturn:
    raise InputError(
        f"the metadata of {where!r} is damaged: {what}; make the file again with 'ibau train' or "
        "'ibau convert'"
    )


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(f"a name occurs twice among {few([name for name, _ in pairs])}")
    return found


def read_tensors(file: Any, where: str, dtypes: tuple[str, ...] = FLOATS) -> dict[str, np.ndarray]:
    """All tensors of an open file as float32."""
    tensors = {}
    for name in file.keys():  # noqa: SIM118
        dtype = file.get_slice(name).get_dtype()
        if dtype not in dtypes:
            raise InputError(
                f"{where!r} has {short(repr(name))} as {dtype}: expected {', '.join(dtypes)}; "
                "make the file again"
            )
        with np.errstate(over="ignore"):  # infinity is told later
            tensors[name] = file.get_tensor(name).astype(np.float32)
    return tensors


def _pop_trigger(tensors: dict[str, np.ndarray], number: int, rule: str, where: str) -> Trigger:
    """Take a trigger out of the tensors of a file; those that nobody takes are told as extra."""
    pattern = tensors.pop(f"trigger/{number}/pattern", None)
    mask = tensors.pop(f"trigger/{number}/mask", None)
    if pattern is None:
        _damaged(where, f"trigger/{number}/pattern is missing")
    _check_trigger(pattern.shape, number, where)
    try:
        return Trigger(rule, pattern, mask)
    except InputError as error:
        raise InputError(f"trigger {number} of {where!r}: {error}") from error


def _check_trigger(shape: tuple[int, ...], number: int, where: str) -> None:
    if shape != IMAGE:
        raise InputError(
            f"trigger {number} of {where!r} has shape {shape}: expected {IMAGE}, as the images "
            "that the model reads"
        )


def short(text: str, length: int = 60) -> str:
    return text if len(text) <= length else text[: length - 3] + "..."


def few(names: Any, count: int = 5) -> str:
    """The first of some names, for a message."""
    shown = [short(repr(name), 40) for name in list(names)[:count]]
    return "[" + ", ".join(shown + ["..."] * (len(names) > count)) + "]"


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
        if name.endswith("/var") and (value < 0).any():
            raise InputError(
                f"{where!r} holds a negative variance (first in {name}): expected running "
                "variances of at least 0; train or convert the model again"
            )


@functools.cache
def _expected_shapes(architecture: str, num_classes: int) -> dict[str, tuple[int, ...]]:
    import jax

    module = build(architecture, max(num_classes, 1))
    shapes = jax.eval_shape(module.init, jax.random.key(0), jax.numpy.zeros((1, *IMAGE)))
    flat: dict[str, Any] = flatten_dict(shapes, sep="/")
    return {name: tuple(leaf.shape) for name, leaf in flat.items()}


def existing(path: str | Path) -> Path:
    path = Path(path)
    if not path.is_file():
        what = "a folder" if path.is_dir() else "no such file"
        raise InputError(f"cannot read the model {str(path)!r}: {what}; expected a model file")
    return path
