"""Progress bars on stderr; stdout stays free for results."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

console = Console(stderr=True)


@contextlib.contextmanager
def progress_bar(total: int, title: str, enabled: bool = True) -> Iterator[Callable[..., None]]:
    """Yield `advance(steps, note)`; prints nothing unless `enabled`.

    `note` (kept until the next one that is not empty) stands behind the bar.
    """
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", markup=False),
    )
    with Progress(*columns, console=console, disable=not enabled) as progress:
        task = progress.add_task(title, total=total, note="")

        def advance(steps: int, note: str = "") -> None:
            progress.advance(task, steps)
            if note:
                progress.update(task, note=note)

        yield advance


def note_of(row: Mapping[str, Any]) -> str:
    """What a row has of loss, fooling rate, ACC and ASR, as the note of a progress bar."""
    shown = (
        ("loss", "loss"),
        ("fooling_rate", "fooling rate"),
        ("acc", "ACC"),
        ("asr", "ASR"),
        ("asr_excl", "excl."),
    )
    return " ".join(f"{t} {row[k]:.3f}" for k, t in shown if row.get(k) is not None)
