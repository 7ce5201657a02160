"""Pickles read as data: what they name is neither imported nor called.

A pickle is a program that names functions and calls them. Here a name gives one of a few classes of
our own, or an inert `Stub` that only keeps what it was given. So files load whose classes are not
installed, and a file that wants to run something runs nothing.
"""

import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ibau_jax.errors import InputError, first_line, printable
from ibau_jax.models.files import short

KINDS = {  # of torch's storages
    "DoubleStorage": "float64", "FloatStorage": "float32", "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16", "LongStorage": "int64", "IntStorage": "int32",
    "ShortStorage": "int16", "CharStorage": "int8", "ByteStorage": "uint8", "BoolStorage": "bool",
}  # fmt: skip
ITEMS = {
    kind: int(re.sub(r"\D", "", kind)) // 8 if re.search(r"\d", kind) else 1
    for kind in KINDS.values()
}
MAGIC = 0x1950A86A20F9469CFC6C


class Stub:
    """What a name of a pickle that is not known gives: it keeps what it was made with.

    Attributes:
      origin: module and name that the pickle wrote.
      args: it was called with.
      state: what `__setstate__` was given.
      items: what was appended or set.
    """

    __slots__ = ("args", "items", "state")
    origin: tuple[str, str] = ("", "")
    args: tuple[Any, ...]
    state: Any
    items: list[Any]

    def __new__(cls, *args: Any, **kwargs: Any) -> "Stub":
        made = object.__new__(cls)
        made.args, made.state, made.items = (*args, kwargs) if kwargs else args, None, []
        return made

    def __init__(self, *args: Any, **kwargs: Any):
        del args, kwargs

    def __call__(self, *args: Any, **kwargs: Any) -> "Stub":
        return Stub(self, *args, **kwargs)

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        self.items.append((key, value))

    def append(self, value: Any) -> None:
        self.items.append(value)

    add = append

    def extend(self, values: Any) -> None:
        self.items.extend(values)


class Stored(NamedTuple):
    """The numbers of tensors: a name in the file, a dtype of torch's, and how many."""

    key: str
    kind: str
    count: int


class Weights(NamedTuple):
    """A tensor as a pickle describes it: a view of `Stored` numbers."""

    storage: Stored
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


class _Rebuild:
    """A function that a pickle may call. Of a class without a dict, so that it cannot be changed.

    Attributes:
      parameter: it is given a tensor, else what a tensor is made of.
    """

    __slots__ = ("parameter",)

    def __init__(self, parameter: bool):
        object.__setattr__(self, "parameter", parameter)

    def __setattr__(self, name: str, value: Any) -> None:
        raise pickle.UnpicklingError("it changes a function")

    def __call__(self, *args: Any) -> Weights:
        if self.parameter:
            (found,) = args[:1]
            if not isinstance(found, Weights):
                raise pickle.UnpicklingError("a parameter that is no tensor")
            return found
        storage, offset, size, stride = args[:4]
        numbers = (offset, *size, *stride)
        if not isinstance(storage, Stored) or any(type(n) is not int or n < 0 for n in numbers):
            raise pickle.UnpicklingError("a tensor that is not made of plain numbers")
        return Weights(storage, offset, tuple(size), tuple(stride))


ALLOWED: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch._utils", "_rebuild_tensor"): _Rebuild(False),
    ("torch._utils", "_rebuild_tensor_v2"): _Rebuild(False),
    ("torch._utils", "_rebuild_parameter"): _Rebuild(True),
    ("torch._utils", "_rebuild_parameter_with_state"): _Rebuild(True),
}


class Unpickler(pickle.Unpickler):
    """Reads one pickle of PyTorch's. The C implementation asks it for every name."""

    def find_class(self, module: str, name: str) -> Any:
        if known := ALLOWED.get((module, name)):
            return known
        if module in ("builtins", "__builtin__") and name == "set":
            return set
        return type("Stub", (Stub,), {"__slots__": (), "origin": (module, name)})

    def persistent_load(self, pid: Any) -> Any:
        if isinstance(pid, tuple) and pid[:1] == ("module",) and len(pid) > 1:
            return pid[1]  # a class, in old files with its source
        # ('storage', its class or dtype, key, device, count) and, in old files, a view
        if not isinstance(pid, tuple) or len(pid) < 5 or pid[0] != "storage":
            raise pickle.UnpicklingError("a reference that is no storage")
        _, kind, key, _, count = pid[:5]
        name = getattr(kind, "origin", ("", ""))[1]
        if name not in KINDS or type(count) is not int or not isinstance(key, str):
            raise pickle.UnpicklingError(f"numbers of the kind {printable(name)!r}")
        return Stored(key, KINDS[name], count)


def read_archive(path: Path) -> tuple[Any, dict[Stored, bytes], bool]:
    """The content of a file in PyTorch's zip format (since 1.6), also of a TorchScript.

    Returns:
      What was pickled, with `Weights` for tensors; the bytes of their numbers; is it a TorchScript?

    Raises:
      InputError: it is no such file, or it is damaged.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            names = set(archive.namelist())
            top = next((n.removesuffix("data.pkl") for n in names if n.endswith("/data.pkl")), None)
            if top is None:
                raise ValueError("it has no data.pkl")
            if top + "byteorder" in names and archive.read(top + "byteorder") != b"little":
                raise ValueError("its numbers are big-endian")
            with archive.open(top + "data.pkl") as file:
                content = _load(file)
            stored = {s: archive.read(f"{top}data/{s.key}") for s in _storages(content)}
            return content, stored, top + "constants.pkl" in names
    except Exception as error:  # the pickle decides which
        raise _damaged(path, error) from error


def read_old(path: Path) -> tuple[Any, dict[Stored, bytes]]:
    """The content of a file in the format before: pickles one after the other, then numbers.

    Returns, Raises:
      As `read_archive`, without the last.
    """
    try:
        with path.open("rb") as file:
            magic, protocol, _ = (_load(file) for _ in range(3))
            if (magic, protocol) != (MAGIC, 1001):
                raise ValueError("it does not begin as one")
            content, keys = _load(file), _load(file)
            by_key = {s.key: s for s in _storages(content)}
            stored = {}
            for key in keys:
                place = by_key[key]
                count = int.from_bytes(file.read(8), "little")
                stored[place] = file.read(count * ITEMS[place.kind])
            return content, stored
    except Exception as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> InputError:
    return InputError(
        f"cannot read {str(path)!r}: {short(printable(first_line(error)), 150)}; expected a whole "
        "PyTorch file"
    )


def _load(file: Any) -> Any:
    return Unpickler(file, encoding="utf-8").load()


def _storages(content: Any) -> set[Stored]:
    return {weights.storage for weights in walk(content) if isinstance(weights, Weights)}


def walk(content: Any) -> Iterator[Any]:
    """All values inside, each once, however they are nested."""
    seen: set[int] = set()
    left = [content]
    while left:
        value = left.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        yield value
        if isinstance(value, Weights | Stored):
            continue
        if isinstance(value, dict):
            left.extend([*value.keys(), *value.values()])
        elif isinstance(value, list | tuple | set):
            left.extend(value)
        elif isinstance(value, Stub):
            left.extend([value.args, value.state, value.items])


def tensor(weights: Weights, stored: dict[Stored, Any]) -> Any:
    """A `torch.Tensor`; those of one storage share memory, as they did.

    Args:
      stored: bytes, which become tensors of one axis here.
    """
    import torch

    place = weights.storage
    if not isinstance(stored[place], torch.Tensor):
        raw = bytearray(stored[place])
        kind = getattr(torch, place.kind)
        if len(raw) != place.count * kind.itemsize:
            raise ValueError(f"{len(raw)} bytes for {place.count} numbers of {place.kind}")
        flat = torch.frombuffer(raw, dtype=kind) if raw else torch.empty(0, dtype=kind)
        stored[place] = flat
    return torch.as_strided(stored[place], weights.size, weights.stride, weights.offset)
