"""Where compiled programs are kept."""

import os
import subprocess
import sys

import pytest

from ibau_jax.commands.compiled import keep_programs, programs_folder

NAMES = ("JAX_COMPILATION_CACHE_DIR", "JAX_COMPILATION_CACHE_MAX_SIZE")


@pytest.fixture
def environment(monkeypatch, tmp_path):
    # `setdefault` on a copy: what `keep_programs` sets must not outlive the test.
    monkeypatch.setattr(os, "environ", {**os.environ, "IBAU_CACHE": str(tmp_path)})
    for name in NAMES:
        os.environ.pop(name, None)
    return tmp_path


def test_programs_are_kept_and_used_again(environment):
    keep_programs()
    assert os.environ[NAMES[0]] == str(programs_folder())
    assert programs_folder().parent == environment / "programs"
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    code = "import jax, jax.numpy as jnp; jax.jit(lambda x: jnp.sin(x) @ x.T)(jnp.eye(7))"
    kept = []
    for _ in range(2):
        assert not subprocess.run([sys.executable, "-c", code], env=os.environ).returncode
        kept.append(sorted(path.name for path in programs_folder().glob("*-cache")))
    assert kept[0] and kept[0] == kept[1]


def test_the_user_comes_first(environment, monkeypatch):
    os.environ[NAMES[0]], os.environ[NAMES[1]] = "elsewhere", "7"
    keep_programs()
    assert [os.environ[name] for name in NAMES] == ["elsewhere", "7"]


def test_machines_of_another_kind_have_another_folder(environment, monkeypatch):
    here = programs_folder()
    assert programs_folder() == here
    monkeypatch.setattr("platform.machine", lambda: "pdp11")
    assert programs_folder() != here
