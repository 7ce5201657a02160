"""Rows, the table and the HTML report, opened in a real browser where there is one."""

import io
import json
import re

import numpy as np
import pytest
from conftest import chromium
from PIL import Image
from rich.console import Console

from ibau_jax import InputError
from ibau_jax.results import report
from ibau_jax.results.report import render, write_report
from ibau_jax.results.rows import (
    HTML,
    PARTIAL,
    ROWS,
    Pictures,
    print_table,
    read_pictures,
    read_rows,
    write_pictures,
    write_rows,
)


def row(round_, **values):
    common = {
        "experiment": "test",
        "dataset": "digits",
        "attack": "<badnets>",
        "defense": "ibau",
        "preset": "default",
        "seed": 0,
        "n_clean": 20,
        "n": 40,
        "device": "cpu",
        "versions": {"jax": "0"},
        "model_hash": "abc",
        "config": {"radius": 2.0},
        "round": round_,
    }
    return common | values


ROWS_OF_A_RUN = [
    row(0, acc=0.99, asr=1.0, asr_excl=1.0, ra=0.0, der=None, seconds=0.0),
    row(1, acc=0.97, asr=0.125, asr_excl=0.0625, ra=0.9, der=0.93, seconds=2.5, delta_norm=2.0),
]


def pictures():
    rng = np.random.default_rng(0)
    images = rng.uniform(size=(6, 32, 32, 3)).astype(np.float32)
    labels = np.arange(6)
    return Pictures(
        triggers=images[:1],
        deltas=rng.normal(size=(1, 32, 32, 3)).astype(np.float32),
        images=images,
        triggered=images,
        labels=labels,
        before=np.full(6, 8),
        after=labels,
    )


@pytest.fixture
def folder(tmp_path):
    write_rows(tmp_path / ROWS, ROWS_OF_A_RUN)
    write_pictures(tmp_path, pictures())
    return tmp_path


def test_rows_and_pictures_round_trip(folder):
    assert read_rows(folder) == ROWS_OF_A_RUN
    for one, two in zip(read_pictures(folder), pictures(), strict=True):
        np.testing.assert_array_equal(one, two)


def test_rows_of_an_interrupted_run_are_read(tmp_path):
    write_rows(tmp_path / PARTIAL, ROWS_OF_A_RUN[:1])
    assert read_rows(tmp_path) == ROWS_OF_A_RUN[:1]
    assert read_pictures(tmp_path) is None
    assert write_report(tmp_path).is_file()


def test_damaged_pictures_are_told(folder):
    path = folder / "report.npz"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(InputError, match="damaged"):
        write_report(folder)


def test_table(capsys):
    print_table(ROWS_OF_A_RUN, Console(width=120))
    printed = capsys.readouterr().out
    assert re.search(r"before.*0\.990.*1\.000", printed)
    assert re.search(r"1.*0\.970.*0\.125.*0\.062.*0\.930.*2\.00.*2\.5", printed)


def test_html_is_self_contained_and_escaped(folder):
    page = write_report(folder).read_text()
    assert not re.search(r"""(src|href)=["'](?!data:)""", page)
    assert "<badnets>" not in page and "&lt;badnets&gt;" in page
    assert "0.990 &rarr; 0.970" in page and "the true trigger" in page
    assert page.count("<figure>") == 1 + 1 + 6  # trigger, one round, six images


def test_html_shows_each_of_several_attacks():
    rows = [dict(r, by_attack={"l2": r["asr"], "<b>": 0.5}) for r in ROWS_OF_A_RUN]
    page = render(rows, None)
    assert "<td>l2</td><td>1.000</td><td>0.125</td>" in page and "&lt;b&gt;" in page
    assert "each attack" not in render(ROWS_OF_A_RUN, None)


ODD = [None, True, -1, 1e400, "0.9", "<b>[/x]\x1b[2J\n", [1], {"a": [1]}, float("nan")]


@pytest.mark.parametrize("name", sorted({*ROWS_OF_A_RUN[1], "by_attack", "flagged", "residual"}))
def test_a_row_that_lacks_a_value_or_has_another_kind_is_shown(name, monkeypatch):
    """Rows of other versions; one value at a time is missing or odd."""
    if name not in ("round", "acc", "asr_excl"):  # the curve takes most of the time
        monkeypatch.setattr(report, "_curve", lambda rows: "")
    arrays = pictures() if name in ("round", "dataset", "attack", "delta_norm") else None
    missing = object()
    for value in (missing, *ODD):
        rows = [dict(r) for r in ROWS_OF_A_RUN]
        for i in range(value is missing, 2):
            rows[i].pop(name, None)
            rows[i] |= {} if value is missing else {name: value}
        page = render(rows, arrays)
        page.encode()
        assert "<b>[" not in page and "\x1b" not in page
        console = Console(width=120, file=io.StringIO())
        print_table(rows, console)
        printed = console.file.getvalue()
        assert "\x1b[2J" not in printed
        for key, found in (("acc", "0.970"), ("asr", "0.125"), ("seconds", "2.5")):
            if key != name:
                assert found in printed and found in page


@pytest.mark.parametrize("rows", [[{}], [{}, {}], [{"round": 7}], [{"acc": 0.5}]])
def test_rows_of_nothing_are_a_report(rows, tmp_path):
    write_rows(tmp_path / ROWS, rows)
    page = write_report(tmp_path).read_text()
    assert "on - (-)" in page and len(re.findall("<tr>", page)) == 1 + len(rows)
    assert ("0.500" in page) == ("acc" in rows[0])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("3", "expected a JSON object a line, found 3"),
        ("[1, 2]", r"found \[1, 2\]"),
        ("null", "found None"),
        ('"text"', "found 'text'"),
        ("{", "damaged"),
        ("[" * 100_000, "damaged"),
        ("9" * 5000, "damaged"),
        (b"\xff\xfe", "damaged"),
        ("", "no results"),
        ("\n\n", "no results"),
    ],
)
def test_rows_that_are_no_objects_are_told_in_one_line(tmp_path, line, message):
    content = line if isinstance(line, bytes) else line.encode()
    (tmp_path / ROWS).write_bytes(content)
    with pytest.raises(InputError, match=message) as told:
        read_rows(tmp_path)
    assert "\n" not in str(told.value) and len(str(told.value)) < 500


def test_rows_are_strict_json(tmp_path):
    write_rows(tmp_path / ROWS, [row(0, acc=np.float32(0.5), loss=float("inf"), x=[np.nan])])
    text = (tmp_path / ROWS).read_text()
    found = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert (found["acc"], found["loss"], found["x"]) == (0.5, None, [None])
    # An older file has them, and is read: a number that is none becomes a dash.
    (tmp_path / ROWS).write_text(text.replace("0.5", "NaN"))
    console = Console(width=120, file=io.StringIO())
    print_table(read_rows(tmp_path), console)
    assert "before" in console.file.getvalue() and "nan" not in console.file.getvalue()
    assert "nan" not in re.sub("src='[^']*'", "", write_report(tmp_path).read_text()).lower()


CHANGED = {
    "no triggers": ({"triggers": None}, "triggers"),
    "no labels": ({"labels": None}, "labels"),
    "triggers of two dimensions": ({"triggers": np.zeros((3, 4))}, r"triggers is float64 \(3, 4\)"),
    "seven channels": ({"images": np.zeros((6, 8, 8, 7))}, r"images is float64 \(6, 8, 8, 7\)"),
    "text for images": ({"triggered": np.full((6, 8, 8, 3), "x")}, "triggered is <U1"),
    "complex deltas": ({"deltas": np.zeros((1, 8, 8, 3), complex)}, "deltas is complex128"),
    "labels of another length": ({"labels": np.arange(5)}, r"labels is int64 \(5,\), .* \(6,\)"),
    "labels that are floats": ({"after": np.zeros(6)}, r"after is float64 \(6,\)"),
    "captions without pictures": ({"captions": np.array(["a"])}, "captions have shape"),
    "objects": ({"labels": np.array([{}] * 6)}, "allow_pickle"),
}


@pytest.mark.parametrize("case", CHANGED)
def test_wrong_arrays_are_told_in_one_line(folder, case):
    changes, message = CHANGED[case]
    arrays = {k: v for k, v in (pictures()._asdict() | changes).items() if v is not None}
    np.savez(folder / "report.npz", **arrays)
    with pytest.raises(InputError, match=f"report.npz' is damaged: .*{message}"):
        write_report(folder)


def test_a_truncated_file_of_arrays_is_told_at_every_length(folder):
    path = folder / "report.npz"
    whole = path.read_bytes()
    for size in range(0, len(whole), len(whole) // 40):
        path.write_bytes(whole[:size])
        with pytest.raises(InputError, match="damaged") as told:
            write_report(folder)
        assert "\n" not in str(told.value)


def test_pictures_with_odd_values_are_shown(folder):
    odd = pictures()
    odd.deltas[0, 0] = np.nan
    odd.images[0, 0] = np.inf
    write_pictures(folder, odd._replace(labels=np.array([0, -1, 10, 99, 2, 3])))
    page = write_report(folder).read_text()
    assert "true: 99" in page and "true: -1" in page
    write_rows(folder / ROWS, [r | {"dataset": "imagenet"} for r in ROWS_OF_A_RUN])
    assert "true: 99" in write_report(folder).read_text()


def test_html_opens_in_a_browser(folder, tmp_path):
    path = write_report(folder)
    # A copy that writes what the browser made of it into the title.
    probe = """<script>addEventListener('load', () => { document.title = JSON.stringify([
        document.images.length, [...document.images].filter(i => i.naturalWidth > 0).length,
        document.documentElement.scrollWidth <= innerWidth, performance.getEntriesByType(
        'resource').filter(e => !e.name.startsWith('data:')).length]) })</script></body>"""
    copy = tmp_path / "probe.html"
    copy.write_text(path.read_text().replace("</body>", probe))
    profile = f"--user-data-dir={tmp_path / 'profile'}"
    dom = chromium(profile, "--dump-dom", copy.as_uri())
    # All nine pictures load, nothing is wider than the window, nothing comes from elsewhere.
    assert "<title>[9,9,true,0]</title>" in dom
    picture = tmp_path / "page.png"
    chromium(
        profile, f"--screenshot={picture}", "--window-size=1000,1600", (folder / HTML).as_uri()
    )
    assert np.asarray(Image.open(picture).convert("L")).std() > 10
