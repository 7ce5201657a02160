"""What the commands print: results on stdout, notes and failures on stderr."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ibau_jax.errors import printable
from ibau_jax.files import to_json

if TYPE_CHECKING:
    from rich.table import Table


def fail(text: str, status: int) -> int:
    print(f"ibau: {printable(text)}", file=sys.stderr, flush=True)
    if "jax" in sys.modules:  # without it there are no other processes
        from ibau_jax.devices import processes

        processes.leave(status)
    return status


def note(text: str) -> None:
    print(f"ibau: {printable(text)}", file=sys.stderr)


def finish(
    found: dict[str, Any], as_json: bool, rows: Path | None = None, shown: "Table | None" = None
) -> None:
    """Print a result: JSON, or a table (of rows, or the one `shown`) and the other values."""
    from ibau_jax.devices import processes

    if not processes.is_first():
        return
    if as_json:
        print(to_json(found))
        return
    from rich.console import Console
    from rich.text import Text

    from ibau_jax.results.rows import print_table, read_rows

    console = Console()
    if rows is not None:
        print_table(read_rows(rows), console)
    if shown is not None:
        console.print(shown)
    for name, value in found.items():
        if isinstance(value, float):
            value = f"{value:.4f}" if abs(value) < 1e6 else f"{value:.3e}"
        if isinstance(value, list) and all(isinstance(v, int | str) for v in value):
            value = ", ".join(map(str, value)) or "none"
        if not isinstance(value, dict | list) and value is not None:
            # As `Text`: in a plain string rich would look for markup and emoji.
            console.print(Text(f"{name:>16}  {printable(value)}"), soft_wrap=True)
