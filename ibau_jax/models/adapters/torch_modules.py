"""A PyTorch module by name: of the user's own code, of torchvision, timm or transformers."""

import difflib
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ibau_jax.errors import InputError, first_line, printable
from ibau_jax.files import user_path
from ibau_jax.models.adapters.torch_pass import need_torch
from ibau_jax.models.files import short

FORMS = "'package.module:name', 'file.py:name', 'torchvision:resnet18', 'timm:...'"


def module_by_name(spec: str, args: Mapping[str, Any] | None = None) -> Any:
    """A `torch.nn.Module`, with the weights that its constructor gives it.

    The user's code is imported and run, and only that which `spec` names.

    Args:
      spec: `package.module:name` (from the current folder too) or `file.py:name` of a class, a
        function or a module itself; `torchvision:`, `timm:` or `transformers:` with a name of
        theirs, without their weights (transformers: a class such as
        `ViTForImageClassification`, `args` for its configuration).
      args: keyword arguments.

    Raises:
      InputError: it cannot be imported, has no such name, refuses the arguments, or gives no
        module.
    """
    torch = need_torch()
    place, _, name = spec.rpartition(":")
    if not place or not name:
        raise InputError(f"the model is {spec!r}: expected one of {FORMS}")
    arguments = dict(args or {})
    known = _LIBRARIES.get(place)
    make = known(name) if known else _own_code(place, name)
    if isinstance(make, torch.nn.Module):
        if arguments:
            raise InputError(f"{spec!r} is a module already: expected no arguments for it")
        return make
    if not callable(make):
        raise InputError(f"{spec!r} is {type(make).__name__}: expected a module, or what makes one")
    try:
        made = make(**arguments)
    except InputError:
        raise
    except Exception as error:
        shown = ", ".join(f"{key}={short(repr(value), 30)}" for key, value in arguments.items())
        raise InputError(
            f"{spec!r} refuses the arguments ({shown}): {_text(error)}; expected keyword arguments "
            "of its constructor"
        ) from error
    if not isinstance(made, torch.nn.Module):
        raise InputError(f"{spec!r} gives {type(made).__name__}: expected a torch.nn.Module")
    return made


def _own_code(place: str, name: str) -> Any:
    if place.endswith(".py"):
        path = user_path(place)
        if not path.is_file():
            raise InputError(f"cannot import {place!r}: no such file; expected one of {FORMS}")
        with _importing(path.parent, place):
            # Of its own name, so that it hides no package, and can be found by what it defines
            called = f"ibau_jax_user_{path.stem}"
            described = importlib.util.spec_from_file_location(called, path)
            assert described is not None and described.loader is not None
            found = sys.modules[called] = importlib.util.module_from_spec(described)
            described.loader.exec_module(found)
    else:
        with _importing(Path.cwd(), place):
            found = importlib.import_module(place)
    try:
        for part in name.split("."):
            found = getattr(found, part)
    except AttributeError as error:
        raise _unknown(place, name, (n for n in vars(found) if not n.startswith("_"))) from error
    return found


@contextmanager
def _importing(folder: Path, place: str) -> Iterator[None]:
    """Imports find what lies in `folder`; whatever they raise is told in one line."""
    sys.path.insert(0, str(folder.resolve()))
    try:
        yield
    except (Exception, SystemExit) as error:  # the user's code decides which
        raise InputError(
            f"cannot import {place!r}: {_text(error)}; expected one of {FORMS}"
        ) from error
    finally:
        sys.path.remove(str(folder.resolve()))


def _torchvision(name: str) -> Callable[..., Any]:
    models = _library("torchvision", "torchvision.models")
    if name not in (known := models.list_models()):
        raise _unknown("torchvision", name, known)
    return lambda **args: models.get_model(name, **{"weights": None, **args})


def _timm(name: str) -> Callable[..., Any]:
    timm = _library("timm", "timm")
    if not timm.is_model(name):
        raise _unknown("timm", name, timm.list_models())
    return lambda **args: timm.create_model(name, **{"pretrained": False, **args})


def _transformers(name: str) -> Callable[..., Any]:
    found = getattr(_library("transformers", "transformers"), name, None)
    config = getattr(found, "config_class", None)
    if found is None or config is None:
        raise _unknown("transformers", name, ["ViTForImageClassification"])
    return lambda **args: found(config(**args))


_LIBRARIES: dict[str, Callable[[str], Callable[..., Any]]] = {
    "torchvision": _torchvision,
    "timm": _timm,
    "transformers": _transformers,
}


def _library(name: str, module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise InputError(
            f"{name} is needed and cannot be imported ({_text(error)}): run pip install {name}"
        ) from error


def _unknown(place: str, name: str, known: Iterable[str]) -> InputError:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    return InputError(f"{place!r} has no {name!r}: expected the name of a model in it{hint}")


def _text(error: BaseException) -> str:
    return short(printable(first_line(error)), 160)
