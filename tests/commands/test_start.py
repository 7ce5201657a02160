"""The command starts again with large pages of memory, once, and only where that does something."""

import os
import subprocess
import sys

import pytest

from ibau_jax.commands import cli, start


class Started(Exception):
    """In the place of a new process."""


@pytest.fixture
def system(monkeypatch, tmp_path):
    """A kernel that gives large pages to those that ask, and a C library that can."""
    kernel = tmp_path / "enabled"
    kernel.write_text("always [madvise] never\n")
    monkeypatch.setattr(start, "OF_KERNEL", kernel)
    monkeypatch.setattr(os, "confstr", lambda name: "glibc 2.36", raising=False)
    monkeypatch.setenv(start.VARIABLE, "to be taken back")
    monkeypatch.delenv(start.VARIABLE)
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "ibau_jax", "--help"])
    monkeypatch.setattr(cli, "run", lambda: None)

    def execv(path, arguments):
        raise Started(path, arguments, os.environ[start.VARIABLE])

    monkeypatch.setattr(os, "execv", execv)
    return kernel


def test_it_starts_again_with_the_same_arguments(system):
    with pytest.raises(Started) as told:
        start.run()
    arguments = [sys.executable, "-m", "ibau_jax", "--help"]
    assert told.value.args == (sys.executable, arguments, start.VALUE)


def test_what_the_user_set_stays(system, monkeypatch):
    monkeypatch.setenv(start.VARIABLE, "")
    start.run()
    assert os.environ[start.VARIABLE] == ""


@pytest.mark.parametrize(
    "kernel, library",
    [
        ("[always] madvise never", "glibc 2.36"),
        ("always madvise [never]", "glibc 2.36"),
        (None, "glibc 2.36"),
        ("always [madvise] never", "glibc 2.31"),
        ("always [madvise] never", "musl"),
        ("always [madvise] never", None),
    ],
)
def test_elsewhere_it_does_not(system, monkeypatch, kernel, library):
    monkeypatch.setattr(os, "confstr", lambda name: library)
    if kernel is None:
        system.unlink()
    else:
        system.write_text(kernel)
    start.run()
    assert start.VARIABLE not in os.environ


def test_it_goes_on_where_it_cannot_start_again(system, monkeypatch):
    def execv(path, arguments):
        raise PermissionError

    ran = []
    monkeypatch.setattr(os, "execv", execv)
    monkeypatch.setattr(cli, "run", lambda: ran.append(1))
    start.run()
    assert ran


def test_the_real_command(tmp_path):
    """Whichever way it starts, it does what it was asked for, and tells its status."""
    without = {k: v for k, v in os.environ.items() if k != start.VARIABLE}
    command = [sys.executable, "-m", "ibau_jax", "report", str(tmp_path / "no folder")]
    done = subprocess.run(command, env=without, capture_output=True, text=True)
    assert done.returncode == 2 and "no folder" in done.stderr and done.stderr.count("\n") == 1
