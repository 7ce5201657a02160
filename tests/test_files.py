"""Files and paths: whole or not at all, with the mode of any other file; strict JSON."""

import json
import os
import stat
import threading
from dataclasses import dataclass

import numpy as np
import pytest

from ibau_jax import InputError
from ibau_jax.data.tfds import dataset_folder
from ibau_jax.files import atomic_path, cache_folder, to_json, user_path, write_text


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_a_file_has_the_mode_that_the_umask_leaves(tmp_path, monkeypatch, mask):
    old = os.umask(mask)
    try:
        with monkeypatch.context() as patched:
            # Another thread (Orbax writes in some) would make files that anyone may write to.
            patched.setattr(os, "umask", lambda mask: pytest.fail("the umask is of all threads"))
            patched.setattr(os, "chmod", lambda *_: pytest.fail("the kernel sets the mode"))
            write_text(tmp_path / "a.txt", "text")
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "a.txt").stat().st_mode) == 0o666 & ~mask
    assert (tmp_path / "a.txt").read_text() == "text"


def test_many_threads_write_one_file(tmp_path):
    texts = [str(i) * 10_000 for i in range(8)]
    threads = [
        threading.Thread(target=write_text, args=(tmp_path / "a.txt", text)) for text in texts
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (tmp_path / "a.txt").read_text() in texts
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_a_write_that_fails_leaves_what_was_there(tmp_path):
    path = tmp_path / ("é" * 127)  # so long that nothing could be added to the name
    write_text(path, "before")
    with pytest.raises(ZeroDivisionError), atomic_path(path) as temporary:
        temporary.write_text("half")
        raise ZeroDivisionError
    assert path.read_text() == "before" and list(tmp_path.iterdir()) == [path]


@dataclass
class Settings:
    rate: float = 0.5


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (float("nan"), "null"),
        ([1.5, float("inf"), {"x": -float("inf")}], '[1.5, null, {"x": null}]'),
        (np.float32("inf"), "null"),
        (np.float64("nan"), "null"),
        (np.int64(3), "3"),
        (np.bool_(True), "true"),
        (np.array([[1.0, np.nan]]), "[[1.0, null]]"),
        ((True, None, "é\ud800"), '[true, null, "\\u00e9\\ud800"]'),
        ({1: Settings()}, '{"1": "Settings(rate=0.5)"}'),
        (1 + 2j, '"(1+2j)"'),
    ],
)
def test_json_is_strict(value, expected):
    assert to_json(value) == expected
    json.loads(expected, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def test_home_folders(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert user_path("~") == tmp_path and user_path("~/a/~") == tmp_path / "a" / "~"
    assert str(user_path("a/~")) == "a/~"
    with pytest.raises(InputError, match="home folder of '~no-such-user/x'"):
        user_path("~no-such-user/x")
    monkeypatch.setenv("IBAU_CACHE", "~/cache")
    monkeypatch.setenv("TFDS_DATA_DIR", "~/tfds")
    assert cache_folder() == tmp_path / "cache"
    assert dataset_folder("cifar10") == tmp_path / "tfds" / "cifar10" / "3.0.2"
    assert dataset_folder("gtsrb", "~/other") == tmp_path / "other" / "gtsrb" / "1.0.0"
    monkeypatch.setenv("IBAU_CACHE", "~no-such-user")
    with pytest.raises(InputError, match="home folder of '~no-such-user'"):
        cache_folder()
