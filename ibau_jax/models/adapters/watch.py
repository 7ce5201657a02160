"""The calls of a module's parts, for libraries that cannot be asked what happens inside.

What is called is always a copy of our own, made of its arrays while JAX traces, so its parts can be
of a class that tells.
"""

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from typing import Any

Path = tuple[str, ...]
# each(path, part, its own call, args, kwargs) -> what the call is to give
Each = Callable[[Path, Any, Callable, tuple, dict], Any]
_each: ContextVar[tuple[Each, dict[int, Path]]] = ContextVar("each")


@contextlib.contextmanager
def watching(parts: Iterable[tuple[Iterable[Any], Any]], each: Each) -> Iterator[None]:
    """Inside, the parts (paths and objects of a copy) are called by `each`."""
    paths = {}
    for path, part in parts:
        if callable(part):
            paths[id(part)] = tuple(map(str, path))
            object.__setattr__(part, "__class__", _watched(type(part)))
    token = _each.set((each, paths))
    try:
        yield
    finally:
        _each.reset(token)


class Feeds:
    """An `Each` that finds of each part the one whose output it is given as it is.

    Attributes:
      found: their paths.
    """

    def __init__(self):
        self.found: dict[Path, Path] = {}
        self._made: dict[int, tuple[Path, Any]] = {}  # with the arrays: an `id` is used again

    def __call__(self, path: Path, part: Any, next_call: Callable, args: tuple, kwargs: dict):
        out = next_call(*args, **kwargs)
        self.note(path, args[0] if args else None, out)
        return out

    def note(self, path: Path, given: Any, out: Any) -> None:
        """Take down a call that is over, of the parts inside a part first."""
        if given is not None and id(given) in self._made:
            self.found[path] = self._made[id(given)][0]
        self._made.setdefault(id(out), (path, out))  # the innermost part is the one that made it


@functools.cache
def _watched(kind: type) -> type:
    def call(self, *args, **kwargs):
        each, paths = _each.get()
        return each(paths.get(id(self), ()), self, super(new, self).__call__, args, kwargs)

    # With the signature, by which the switch of training is found.
    call.__signature__ = inspect.signature(kind.__call__)  # pyright: ignore
    new: Any = type(kind)(kind.__name__, (kind,), {"__call__": call})
    return new
