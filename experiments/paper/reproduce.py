"""`ibau reproduce`: each table and figure of the paper by its name."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from cells import GRIDS
from grid import ZOO, Row, fill, read, select

from ibau_jax.errors import InputError, check_name
from ibau_jax.files import atomic_path, make_folder, write_text
from paper import figures, seconds, tables
from paper.published import TABLES
from paper.scales import SCALES, rows_folder, thinned

FILES = {"table6": "steps.jsonl", "figure3": "figure3.jsonl"}  # of the others: cells.jsonl
NAMES = (*TABLES, "table6", *(f"figure{i}" for i in range(1, 6)))


def reproduce(
    name: str,
    *,
    scale: str = "cpu",
    out: str | Path = "runs",
    run: bool = False,
    models: str | Path | None = None,
    reference: Path | None = None,
    methods: Sequence[str] = (),
    seed: int = 0,
    data_dir: str | Path | None = None,
    on_note: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Make a table or figure of the paper from the rows that are there; write it into `out`.

    Args:
      name: of `NAMES`; `all`: each of them, and the pages of all.
      scale: of `SCALES`.
      run: measure the cells that are missing first.
      models: folder of model files `DATASET-ATTACK.safetensors`; None: the zoo, and at the scale
        `smoke` models that are trained for it.
      reference: folder of the published models (checkpoints/, triggers/).
      methods: run only these; none: all.
      seed: of Figure 2, which images are shown.
      on_note: called with the text of a table.

    Returns:
      For JSON: `file`, and of a table `cells`.

    Raises:
      InputError: unknown name or scale, or nothing was run yet.
    """
    check_name("table or figure", name, (*NAMES, "all"))
    check_name("scale", scale, SCALES)
    folder = make_folder(out, "out")
    if name == "all":
        settings = {"scale": scale, "run": run, "models": models, "reference": reference}
        settings |= {"methods": methods, "seed": seed, "data_dir": data_dir}
        return everything(folder, rows_folder(scale, folder), on_note, settings)
    size = SCALES[scale]
    zoo = Path(models or (folder / scale / "models" if size.dataset else ZOO))
    if name == "figure2":
        from paper.triggers import figure2

        datasets = (size.dataset,) if size.dataset else ("cifar10", "gtsrb")
        return figure2(zoo, datasets, folder, seed, data_dir)
    path = rows_folder(scale, folder) / FILES.get(name, "cells.jsonl")
    if run:
        measure_missing(name, scale, path, zoo, reference, methods)
    rows = read(path)
    if name.startswith("table"):
        return table(name, rows, folder, on_note, size.preset or "cpu")
    return figure(name, rows, path, folder)


def everything(
    folder: Path, where: Path, on_note: Callable[[str], None], settings: dict[str, Any]
) -> dict[str, Any]:
    """Each table and figure, and the pages `RESULTS.md` and `results.html` of all."""
    from paper import page

    pictures: dict[str, Path] = {}
    for name in NAMES:
        try:
            found = reproduce(name, out=folder, **settings)
        except InputError as error:  # of a figure nothing was run, or its models are not there
            on_note(f"{name}: {error}")
            continue
        if name.startswith("figure"):
            pictures[name] = Path(found["file"])
    rows = read(where / "cells.jsonl")
    timed, after = read(where / "steps.jsonl"), read(where / "after.jsonl")
    named = {name: path.name for name, path in pictures.items()}
    text = page.markdown(rows, timed, after, named)
    write_text(folder / "RESULTS.md", text)
    write_text(folder / "results.html", page.html(text, rows, pictures))
    return {"name": "all", "file": str(folder / "RESULTS.md"), "html": str(folder / "results.html")}


def measure_missing(
    name: str, scale: str, path: Path, zoo: Path, reference: Path | None, methods: Sequence[str]
) -> None:
    """Fill the cells of a table or figure."""
    import measure  # it imports JAX, as do the others here

    size = SCALES[scale]
    limits = {"rounds": size.rounds, "images": size.images, "preset": size.preset}
    if name == "table6":
        import race

        cells, run, shown = race.TABLE, race.measure, race.shown
    elif name == "figure3":
        from paper import features

        cells, run, shown = features.CELLS, features.measure, features.shown
        del limits["preset"]  # I-BAU's own only
    else:
        cells, run, shown = GRIDS[name], measure.measure, measure.shown
    few = thinned(cells, size, methods)
    if size.dataset:
        measure.train_stand_ins([cell.model for cell in few], size.dataset, zoo)
    models = measure.Models(reference, zoo=zoo, stands_in=size.dataset)
    fill(path, few, partial(run, models=models, **limits), shown)


def table(
    name: str, rows: list[Row], folder: Path, on_note: Callable[[str], None], preset: str
) -> dict[str, Any]:
    """Write a table as Markdown; `preset`: of the defenses that are not I-BAU."""
    if name == "table6":
        text, cells = seconds.markdown(rows), seconds.cells(rows)
    else:
        text, cells = tables.markdown(name, rows), tables.cells(name, rows, preset)
        text = f"{tables.LEGEND}\n\n{text}"
    path = folder / f"{name}.md"
    write_text(path, text + "\n")
    on_note(text)
    return {"name": name, "file": str(path), "cells": cells}


def figure(name: str, rows: list[Row], path: Path, folder: Path) -> dict[str, Any]:
    """Draw a figure."""
    if name == "figure3":
        found = [row | {"title": title(row)} for row in rows]
    else:
        found = select(rows, GRIDS[name])
    if not found:
        raise InputError(
            f"nothing of {name} was run yet: expected rows of its cells in {str(path)!r}; measure "
            "them with --run (hours at the scale cpu)"
        )
    drawn = folder / f"{name}.png"
    with atomic_path(drawn) as temporary:
        figures.FIGURES[name](found).savefig(temporary, format="png", dpi=150)
    return {"name": name, "file": str(drawn)}


def title(row: Row) -> str:
    """Of a picture of Figure 3."""
    method = row["cell"]["method"]
    return "as given" if method == "none" else f"after {figures.NAMES.get(method, method)}"
