"""Commands that show what was measured or proved: `report`, `reproduce`, `bound`."""

from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from ibau_jax.commands.options import (
    AsJson,
    DataDir,
    DataName,
    Seed,
)
from ibau_jax.commands.output import finish, note


def report(folder: Positional[Path], seed: Seed = 0, json: AsJson = False) -> None:
    """Show the table of a run and write its report.html again."""
    from ibau_jax.results.report import write_report
    from ibau_jax.results.rows import read_rows

    del seed  # nothing here is random
    rows = read_rows(folder)
    finish({"rows": rows, "report": str(write_report(folder))}, json, rows=folder)


def reproduce(
    name: Positional[str],
    scale: Annotated[
        str, arg(help="smoke (digits, seconds), cpu (what is there) or paper")
    ] = "cpu",
    run: Annotated[bool, arg(help="first measure what is missing: hours at the scale cpu")] = False,
    methods: Annotated[tuple[str, ...], arg(help="measure only these, as ibau nad")] = (),
    models: Annotated[
        Path | None,
        arg(help="folder of poisoned models, DATASET-ATTACK.safetensors; default: the zoo"),
    ] = None,
    reference: Annotated[
        Path | None, arg(help="folder of the authors' published models (checkpoints/, triggers/)")
    ] = None,
    out: Annotated[Path, arg(help="folder to write to")] = Path("runs"),
    seed: Seed = 0,
    data_dir: DataDir = None,
    json: AsJson = False,
) -> None:
    """Make a table or figure of the paper again: table1 to table6, figure1 to figure5."""
    from ibau_jax.commands.reproduce import module

    found = module().reproduce(
        name,
        scale=scale,
        run=run,
        methods=methods,
        models=models,
        reference=reference,
        out=out,
        seed=seed,
        data_dir=data_dir,
        on_note=lambda text: None if json else print(text),
    )
    finish(found if json else {k: v for k, v in found.items() if k != "cells"}, json)


def bound(
    model: Annotated[Path, arg(help="model file")],
    dataset: DataName = None,
    clean: Annotated[str | None, arg(help="split of clean images")] = None,
    radius: Annotated[float, arg(help="C, the largest l2 norm of a perturbation")] = 10.0,
    margin: Annotated[float, arg(help="gamma, by which the true logit has to lead")] = 1.0,
    xi: Annotated[float, arg(help="the bound holds with probability 1 - xi")] = 0.05,
    seed: Seed = 0,
    data_dir: DataDir = None,
    json: AsJson = False,
) -> None:
    """Evaluate the paper's Theorem 3 on a model, term by term (a diagnostic, not a guarantee)."""
    from ibau_jax.commands import bound as work

    del seed  # nothing here is random
    found = work.bound(
        model,
        dataset=dataset,
        clean=clean,
        radius=radius,
        margin=margin,
        xi=xi,
        data_dir=data_dir,
    )
    if not json:
        for row in found["layers"]:
            note(
                "{layer:>10}: spectral norm {spectral:.3f}, (2,1) norm {two_one:.1f}".format(**row)
            )
    finish(found, json)
    if found["vacuous"]:
        note(f"the bound is vacuous: {found['total']:.3g}, where 1 is true of every model")
