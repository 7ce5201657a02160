"""The page of the paper's tables and figures."""

import re
from pathlib import Path

import numpy as np
import pytest
from conftest import chromium
from PIL import Image
from test_paper import row


def with_rounds(one, rounds, by_attack=()):
    middle = [one["rounds"][1] | {"round": i, "acc": 0.8 - i / 100} for i in range(1, rounds + 1)]
    found = [one["rounds"][0] | {"round": 0}, *middle]
    if by_attack:
        found = [r | {"by_attack": dict.fromkeys(by_attack, r["asr"])} for r in found]
    return one | {"rounds": found}


@pytest.fixture
def rows(script):
    """Of some cells of each table and figure."""
    cells, found = script("cells"), []
    for name, grid in cells.GRIDS.items():
        for cell in grid[:7]:
            several = ("l0", "l2") if name == "figure5" else ()
            one = with_rounds(row(cell.model, cell.method, cell.seed), 3, several)
            one["cell"] |= {"images": cell.images, "rounds": cell.rounds}
            found.append(one)
    return found


@pytest.fixture
def written(script, rows, tmp_path):
    """The page as Markdown and HTML, with one picture."""
    page, figures, cells = script("paper.page"), script("paper.figures"), script("cells")
    drawn = figures.figure4(script("grid").select(rows, cells.GRIDS["figure4"]))
    drawn.savefig(tmp_path / "figure4.png")
    again = {f"{k}_{w}": 0.5 for k in ("acc", "asr") for w in ("cleaned", "again")}
    after = [{"cell": {"model": "l2", "method": "nad"}, **again, "nearest": 0.3}]
    text = page.markdown(rows, [], after, {"figure4": "figure4.png"})
    return text, page.html(text, rows, {"figure4": tmp_path / "figure4.png"})


def test_the_page_has_every_table_and_figure(written):
    text, html = written
    for number in range(1, 7):
        assert f"### Table {number}: " in text and f"<h3>Table {number}: " in html
    for number in range(1, 6):
        assert f"### Figure {number}: " in text
    assert re.search(r"one to three\): table1 \d+ of 104, table2", text)
    assert "| l2 | nad | 50.0 / 50.0 | 50.0 / 50.0 | 0.30 |" in text
    assert "cifar10-clean" in text and "<s>" in html and "data:image/png" in html
    assert len(html) < 5e6


def test_what_is_far_from_the_paper_has_a_sentence(script):
    """One for the case before one for its data set, and that before one for the defense."""
    differences = script("paper.differences")
    case, data = ("cifar10-l0", "nad"), ("gtsrb", "nad")
    why = {"nad": "the rate", data: "signs", case: "this one"}
    cases = ("cifar10-l0", "cifar10-l2", "gtsrb-l2", "cifar10-badnets")
    rows = [row(name, "nad", acc=0.9, asr=0.5) for name in cases]
    rows.append(row("cifar10-l0", "tabor", acc=0.8, asr=0.1))  # near to the paper's
    lines = differences.markdown(rows, why).splitlines()[2:]
    assert len(lines) == len(cases)
    for name, sentence in zip(cases, ("this one", "the rate", "signs", "the rate"), strict=True):
        (line,) = [one for one in lines if f"| {name} | NAD |" in one]
        assert line.endswith(f"| {sentence} |")
    assert "ACC 90.0 (78.7), ASR 50.0 (11.7)" in lines[0]  # the paper's order: badnets is first
    (line, *_) = differences.markdown(rows[:1], {}).splitlines()[2:]
    assert line.endswith(f"| {differences.UNKNOWN} |")
    for key in differences.WHY:
        method = key if isinstance(key, str) else key[1]
        assert method in script("paper.tables").SHORT


def test_the_round_of_the_papers_rule(script):
    nearest = script("paper.matched").nearest_round
    rounds = [{"round": i, "acc": acc} for i, acc in enumerate((0.9, 0.8, 0.85, 0.7))]
    assert nearest(rounds, 0.9)["round"] == 2 and nearest(rounds, 0.1)["round"] == 3


def test_the_page_opens_in_a_browser(written, tmp_path):
    probe = """<script>addEventListener('load', () => setTimeout(() => { document.title =
        JSON.stringify([Bokeh.documents.length, Bokeh.documents[0].roots().length, performance
        .getEntriesByType('resource').filter(e => !/^(data|blob):/.test(e.name)).length]) }, 1500))
        </script></body>"""
    path = tmp_path / "results.html"
    path.write_text(written[1].replace("</body>", probe))
    profile = f"--user-data-dir={tmp_path / 'profile'}"
    dom = chromium(profile, "--virtual-time-budget=9000", "--dump-dom", path.as_uri())
    # One document of eight plots, and nothing from elsewhere.
    assert "<title>[1,8,0]</title>" in dom
    picture = tmp_path / "page.png"
    chromium(profile, f"--screenshot={picture}", "--window-size=1200,1600", path.as_uri())
    assert np.asarray(Image.open(picture).convert("L")).std() > 10
    assert Path(picture).stat().st_size > 10_000
