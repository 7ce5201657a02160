"""The command line `ibau`: results on stdout, progress and notes on stderr.

Exit status 0: done; 2: a bad argument or unreadable input, told in one line; 3: another process
of the run is gone. Of many processes the first prints the result.
"""

import contextlib
import functools
import io
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import tyro

from ibau_jax.commands import cleaning, making, showing
from ibau_jax.commands.compiled import keep_programs
from ibau_jax.commands.output import fail
from ibau_jax.errors import InputError, LostProcess, printable
from ibau_jax.files import user_path

# In the order of `ibau --help`.
COMMANDS = (
    making.demo,
    making.train,
    cleaning.inspect,
    cleaning.evaluate,
    cleaning.defend,
    making.convert,
    showing.report,
    showing.reproduce,
    showing.bound,
    making.prepare,
)


def _later(function: Callable[..., None]) -> Callable[..., Callable[[], None]]:
    """A command of which parsing gives the call to make, so that the two can fail apart."""

    @functools.wraps(function)
    def bind(*args: Any, **kwargs: Any) -> Callable[[], None]:
        if not 0 <= kwargs.get("seed", 0) < 2**32:  # JAX takes larger ones modulo 2**32
            raise InputError(f"the seed is {kwargs['seed']}: expected 0 to {2**32 - 1}")
        return functools.partial(
            function, *map(_expanded, args), **{k: _expanded(v) for k, v in kwargs.items()}
        )

    return bind


def _expanded(value: Any) -> Any:
    """An option's value, or a group of them; of a path, with the home folder in place of `~`."""
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{f.name: _expanded(getattr(value, f.name)) for f in fields(value)})
    return user_path(value) if isinstance(value, Path) else value


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax: tracebacks of what we tell
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    try:
        keep_programs()
        _parse(arguments)()
    except InputError as error:
        option = error.argument and f" (--{error.argument.replace('_', '-')})"
        return fail(f"{error}{option or ''}", 2)
    except LostProcess as error:
        return fail(str(error), 3)
    except KeyboardInterrupt:
        kept = "results of earlier runs are untouched"
        return fail(f"interrupted; {kept}, and 'ibau train --resume' goes on with a training", 130)
    except OSError as error:  # for example a full disk
        return fail(f"cannot read or write: {error}", 2)
    return 0


def app() -> tyro.extras.SubcommandApp:
    """All commands."""
    found = tyro.extras.SubcommandApp()
    for function in COMMANDS:
        found.command(_later(function))
    return found


def _parse(arguments: list[str] | None) -> Callable[[], None]:
    """The call that a command line asks for; tyro's box of errors becomes one line."""
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            return app().cli(
                prog="ibau",
                description="Backdoor removal with I-BAU in JAX.",
                args=arguments,
                config=(tyro.conf.FlagCreatePairsOff, tyro.conf.OmitArgPrefixes),
            )
    except SystemExit as stop:
        if not stop.code:  # --help
            raise
        printable = re.sub(r"[^ -~]+|-{3,}", " ", complaint.getvalue())
        words = " ".join(printable.split()).partition("Argument helptext")[0]
        words = words.partition("For full helptext")[0].strip()
        raise InputError(f"{words}; see 'ibau --help' or 'ibau COMMAND --help'") from None


def run() -> None:
    """Entry point of the console script."""
    warnings.formatwarning = lambda message, *_: f"ibau: warning: {printable(message)}\n"
    if isinstance(sys.stdout, io.TextIOWrapper):  # a name may hold what its encoding has not
        sys.stdout.reconfigure(errors="backslashreplace")
    sys.exit(main())


if __name__ == "__main__":
    sys.exit(main())
