"""Rows, the table and the HTML report, opened in a real browser where there is one."""

import re
import shutil
import subprocess

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from ibau_jax import InputError
from ibau_jax.report import (
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
from ibau_jax.report_html import render, write_report


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


def chromium(*arguments):
    name = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chrome")
    if name is None:
        pytest.skip("no Chromium on this machine")
    flags = """--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync
        --disable-background-networking --disable-component-update""".split()
    done = subprocess.run([name, *flags, *arguments], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


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
