"""A user's class or function by its name: `package.module:Name` or `path/to/file.py:Name`.

It is the user's own code, run with all rights, as `python file.py` would.
"""

import contextlib
import difflib
import hashlib
import importlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ibau_jax.errors import InputError, first_line
from ibau_jax.files import user_path


def named(
    spec: str, args: Mapping[str, Any], kind: type, given: Mapping[str, Any] | None = None
) -> Any:
    """The object that a name stands for.

    Args:
      spec: of a class or a function, which is called with `args`, or of an object of that kind.
      args: keyword arguments.
      kind: what it has to be or to give.
      given: more arguments, where it has some of these names and `args` have not.

    Raises:
      InputError: the module cannot be imported, has no such name, its call refuses the arguments,
        or gives something else.
    """
    thing = imported(spec)
    if isinstance(thing, kind) and not isinstance(thing, type):
        if args:
            raise InputError(
                f"{spec!r} is a {type(thing).__name__} already, and takes no arguments (found "
                f"{', '.join(args)}): leave them out, or name its class"
            )
        return thing
    if not callable(thing):
        raise InputError(
            f"{spec!r} is a {type(thing).__name__}: expected a class or a function that gives a "
            f"{kind.__module__}.{kind.__name__}"
        )
    return made(spec, thing, args, kind, given)


def made(
    spec: str,
    call: Callable[..., Any],
    args: Mapping[str, Any],
    kind: type,
    given: Mapping[str, Any] | None = None,
) -> Any:
    """What a class or a function that was named so gives; see `named`."""
    taken = _arguments_of(call)
    more = {name: value for name, value in (given or {}).items() if name in taken}
    with _folder(spec):
        try:
            found = call(**{**more, **args})
        except Exception as error:  # whatever the user's code raises
            raise InputError(
                f"{spec!r} cannot be made with the arguments {_shown(args)}: "
                f"{type(error).__name__}: {first_line(error)}"
            ) from error
    if not isinstance(found, kind):
        raise InputError(
            f"{spec!r} gives a {type(found).__name__}: expected a {kind.__module__}.{kind.__name__}"
        )
    return found


def _arguments_of(call: Callable[..., Any]) -> set[str]:
    """Names of the arguments, as far as they can be read."""
    found: set[str] = set()
    # The metaclass of NNX takes any arguments, and passes them on.
    for function in (call, call.__init__) if inspect.isclass(call) else (call,):
        with contextlib.suppress(TypeError, ValueError):  # it has no signature
            found |= inspect.signature(function).parameters.keys()
    return found


def imported(spec: str) -> Any:
    """The class, function or object of this name; its module is imported for it.

    Raises:
      InputError: see `named`.
    """
    module, colon, name = spec.rpartition(":")
    if not colon or not module or not name:
        raise InputError(
            f"{spec!r} names no class: expected package.module:Name or path/to/file.py:Name"
        )
    with _folder(spec):
        try:
            thing = (
                _from_file(module) if module.endswith(".py") else importlib.import_module(module)
            )
        except InputError:
            raise
        except (Exception, SystemExit) as error:  # whatever the user's code raises
            raise InputError(
                f"cannot import {module!r}: {type(error).__name__}: {first_line(error)}; expected "
                "a module that can be imported from here, or the path of a .py file"
            ) from error
    for part in name.split("."):
        if not hasattr(thing, part):
            close = difflib.get_close_matches(part, dir(thing), n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise InputError(f"{module!r} has no {part!r}{hint}")
        thing = getattr(thing, part)
    return thing


def _from_file(path: str) -> Any:
    file = user_path(path)
    if not file.is_file():
        raise InputError(f"cannot import {path!r}: no such file; expected a .py file")
    # A name of its own, by which pickle and dataclasses find it; a file is run once.
    digest = hashlib.sha256(str(file.resolve()).encode()).hexdigest()[:8]
    name = f"ibau_user_{digest}_{file.stem}"
    if name in sys.modules:
        return sys.modules[name]
    found = importlib.util.spec_from_file_location(name, file)
    assert found is not None and found.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(found)
    try:
        found.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


@contextlib.contextmanager
def _folder(spec: str) -> Iterator[None]:
    """Inside, modules beside the file (or in the current folder) can be imported.

    They come last, so that none of them hides another module.
    """
    module = spec.rpartition(":")[0]
    folder = str(user_path(module).resolve().parent) if module.endswith(".py") else os.getcwd()
    sys.path.append(folder)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):  # the user's code took it out
            sys.path.reverse()
            sys.path.remove(folder)
        sys.path.reverse()


def _shown(args: Mapping[str, Any]) -> str:
    text = ", ".join(f"{name}={value!r}" for name, value in args.items())
    return f"({text if len(text) <= 60 else text[:57] + '...'})"


def exists(path: str | Path, what: str) -> Path:
    """A path that a user named, which is there.

    Raises:
      InputError: it is not.
    """
    found = user_path(path)
    if not found.exists():
        raise InputError(f"cannot read the weights {str(path)!r}: no such file; expected {what}")
    return found
