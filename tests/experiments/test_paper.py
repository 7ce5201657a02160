"""The paper's figures as data, and its tables from rows."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from ibau_jax.defenses import DEFENSES

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
PAPER = Path(__file__).parents[3] / "shared" / "docs" / "paper.md"


@pytest.fixture
def published(script):
    return script("paper.published")


@pytest.fixture
def tables(script):
    return script("paper.tables")


def numbers(line):
    """The figures of a line of a table that was read from the paper; × is None."""
    cells = [cell.strip().replace("$", "") for cell in line.split("\t")]
    kept = [c for c in cells if c == "×" or re.fullmatch(r"\d+(\.\d+)?", c)]
    return [None if c == "×" else float(c) for c in kept]


def lines(text, title):
    """The lines before the caption of a table, from the one before on."""
    before, _, _ = text.partition(f"\n{title}")
    return before.rpartition("Table ")[2].splitlines()


@pytest.mark.skipif(not PAPER.is_file(), reason="needs ../shared/docs/paper.md")
def test_the_published_figures_are_those_of_the_paper(published):
    text = PAPER.read_text()
    for name, title in {"table1": "Table 1:", "table2": "Table 2:"}.items():
        found = [n for line in lines(text, title) if len(n := numbers(line)) >= 12]
        ours = [
            [value for figure in row.values() for value in figure]
            for row in published.TABLES[name].values()
        ]
        assert found == ours, name


@pytest.mark.skipif(not PAPER.is_file(), reason="needs ../shared/docs/paper.md")
def test_the_published_figures_of_the_other_tables(published):
    text = PAPER.read_text()
    found = [n[-8:] for line in lines(text, "Table 3:") if len(n := numbers(line)) >= 8]
    wanted = []
    for case, row in published.TABLES["table3"].items():
        wanted += [[figure.acc for figure in row.values()], [figure.asr for figure in row.values()]]
        each = published.SEVEN_ASR[case]
        wanted += [[each[method][t] for method in each] for t in published.SEVEN]
    assert found == wanted
    for name, title, columns in (("table4", "Table 4:", 8), ("table5", "Table 5:", 7)):
        found = [n[-columns:] for x in lines(text, title) if len(n := numbers(x)) >= columns]
        wanted = []
        for row in published.TABLES[name].values():
            wanted += [[figure.acc for figure in row.values()], [f.asr for f in row.values()]]
        rounded = [[None if v is None else round(v + 1e-9, 2) for v in row] for row in found]
        assert rounded == wanted, name
    found = [n for line in lines(text, "Table 6:") if len(n := numbers(line)) == 2]
    seconds = published.SECONDS
    assert found == [[seconds["cifar10"][m], seconds["gtsrb"][m]] for m in seconds["cifar10"]]


def test_every_cell_names_a_model_and_a_method(script):
    cells, measure = script("cells"), script("measure")
    assert {method.defense for method in cells.METHODS.values()} == set(DEFENSES)
    listed = [cell for grid in cells.GRIDS.values() for cell in grid]
    assert {cell.model for cell in listed} <= {*cells.MODELS, *cells.UNSEEN}
    assert set(cells.UNSEEN) <= set(script("unseen").MODELS)
    assert {cell.method for cell in listed} <= set(cells.METHODS)
    files = {path.stem for path in (EXPERIMENTS / "zoo").glob("*.safetensors")}
    assert files == set(cells.ZOO) and set(cells.PUBLISHED) == set(
        script("published_models").MODELS
    )
    with measure.Models().file("BadNets") as path:
        assert path is None  # without the folder of the published ones


def row(model, method, seed=0, acc=0.8, asr=0.1, images=None, **more):
    first = {"acc": 0.85, "asr": 1.0, "asr_excl": 1.0, "ra": 0.0, "der": None, "seconds": 0.0}
    last = first | {"acc": acc, "asr": asr, "ra": 0.7, "der": 0.9, "seconds": 2.0} | more
    cell = {"model": model, "method": method, "seed": seed, "images": images, "rounds": None}
    return {"cell": cell, "rounds": [first, last], "alone": True}


def test_a_table_has_the_means_of_its_seeds_and_what_was_not_run(tables):
    name = "cifar10-l0"
    rows = [row(name, "ibau", seed, acc) for seed, acc in enumerate((0.8, 0.81, 0.82))]
    rows += [row(name, "ibau", 3, 0.1), row(name, "nad", acc=0.7, asr=0.05)]
    rows.append(row(name, "ibau", 0, 0.1, images=100))  # of another table
    found = {(e.case, e.method): e for e in tables.entries("table1", rows)}
    assert len(found) == 8 * 10
    ours = found[name, "ibau"]
    assert (ours.acc, ours.asr, ours.seeds) == (pytest.approx(81), 10, (0, 1, 2))
    assert ours.paper == (84.08, 9.54) and ours.works
    assert found[name, "none"].acc == 85 and found[name, "none"].asr_fails
    assert found[name, "nad"].acc_fails and not found[name, "nad"].works
    assert found["cifar10-l2", "ibau"].status == "not run"
    cells = tables.cells("table1", rows)
    (one,) = [c for c in cells if (c["attack"], c["preset"]) == ("l0", "default")]
    assert one == {
        **{"dataset": "cifar10", "attack": "l0", "scenario": "one-target", "defense": "ibau"},
        **{"preset": "default", "poison_ratio": 0.2, "n_clean": 5000, "seeds": [0, 1, 2]},
        **{"acc": 0.81, "asr": 0.1, "asr_excl": 1.0, "paper_acc": 0.8408, "paper_asr": 0.0954},
        "status": "run",
    }
    ratios = {c["poison_ratio"] for c in tables.cells("table4", rows)}
    assert ratios == {0.05, 0.005} and {c["n_clean"] for c in tables.cells("table5", [])} == {
        2500,
        500,
        100,
    }


def test_marks_are_those_of_the_paper(tables):
    name = "cifar10-l0"
    rows = [
        row(name, "ibau", acc=0.805, asr=0.11),
        row(name, "ibau-published", acc=0.7, asr=0.5),
        row(name, "nad", acc=0.76, asr=0.08),
        row(name, "tabor", acc=0.82, asr=0.1),
        row(name, "neural-cleanse", acc=0.84, asr=0.9),
    ]
    listed = [e for e in tables.entries("table1", rows) if e.case == name]
    found = tables.marks(listed)
    assert found["tabor"] == ("best", "") and found["nad"] == ("", "best")
    assert found["neural-cleanse"] == ("", "failed")
    assert found["ibau"] == ("comparable", "")  # 3 points of ASR above NAD's
    assert found["ibau-published"] == ("failed", "failed")
    text = tables.markdown("table1", rows)
    assert "**80.5** / 11.0 (84.1 / 9.5)" in text and "*82.0* / 10.0 (82.3 / 8.2)" in text
    assert "| TABOR | 1 of 8 | 3.0 | 3.1 | 10.0 | 8.2 |" in text


def test_tables_need_no_jax(tmp_path):
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); from paper import figures, seconds, tables; "
        "[tables.markdown(n, []) for n in tables.TABLES]; seconds.markdown([]); "
        "sys.exit('jax' in sys.modules)"
    )
    assert (
        subprocess.run([sys.executable, "-c", code, str(EXPERIMENTS)], check=False).returncode == 0
    )


def test_seconds_until_a_defense_works(script):
    seconds = script("paper.seconds")
    looks = [[1.0, 0.84, 0.9], [2.0, 0.7, 0.1], [3.0, 0.8, 0.1], [4.0, 0.8, 0.05]]
    slow = {"looks": [[s * 5, *rest] for s, *rest in looks], "acc_before": 0.85}
    quick = {"looks": looks, "acc_before": 0.85}
    assert seconds.effective(quick) == 3
    rows = [
        one | {"cell": {"model": "cifar10-l0", "method": method}, "machine": "2 cores"}
        for one, method in ((quick, "ibau"), (slow, "nad"), ({**slow, "looks": []}, "tabor"))
    ]
    text = seconds.markdown(rows)
    assert "| NAD | 15.0 | 1 of 1 | 5.0 | 79.9 | 11.7 |" in text and "On 2 cores." in text
    assert "| TABOR | never | 0 of 1 |" in text and "| NC | not run |" in text
    assert json.dumps(seconds.cells(rows))
