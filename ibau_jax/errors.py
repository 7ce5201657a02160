"""The exception for wrong input (what was expected, what was found, what to do), and another."""

import difflib
from collections.abc import Iterable
from typing import Any


class InputError(ValueError):
    """A mistake in what the user gave (argument, file, array), told in one line.

    The command line prints the text, with the option that mends it, and exits with status 2; a
    library user sees a `ValueError`.

    Attributes:
      argument: name of the argument at fault, which is also that of the option; None: none, or
        none in particular.
    """

    def __init__(self, text: str, argument: str | None = None):
        super().__init__(text)
        self.argument = argument


class LostProcess(RuntimeError):
    """Another process of a run on many machines is gone; the command line exits with status 3."""


def printable(value: object) -> str:
    """`str(value)` in one line: what is not printable (line ends, control characters) is escaped.

    For text of unknown origin, such as names in a model file, on its way to a person.
    """
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in str(value)
    )


def first_line(error: BaseException) -> str:
    """The first line of an error's text; its `repr` where it has none."""
    return (str(error).strip() or repr(error)).splitlines()[0]


def why(error: BaseException) -> str:
    """Why a file could not be read, in one line and without its path, which the message has."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return first_line(error)


def check_name(kind: str, name: str, known: Iterable[str]) -> None:
    """Raise `InputError` when `name` is not among `known`; name the nearest one.

    Args:
      kind: what `name` is, for the message, for example "attack".
    """
    options = list(known)
    if name in options:
        return
    close = difflib.get_close_matches(name, options, n=1, cutoff=0.4)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise InputError(f"unknown {kind} {name!r}: expected one of {', '.join(options)}{hint}")


def check_positive(config: Any, *names: str) -> None:
    """Fields of a config that are numbers above zero (None: left open)."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not value > 0:
            raise InputError(f"{name} is {value}: expected a positive number")
