"""The entry point `ibau`: asks for large pages of memory before anything else is imported.

A program of XLA's gets its memory from the system anew each time it runs, and the kernel hands it
out and clears it page by page. Of pages of 4 kB that is a third of a training step on a CPU
(experiments/speed.md). glibc asks for pages of 2 MB where a variable of the environment says so
when a process starts; so this one starts again with it.
"""

import os
import sys
from pathlib import Path

VARIABLE, VALUE = "GLIBC_TUNABLES", "glibc.malloc.hugetlb=1"
OF_KERNEL = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def run() -> None:
    """Start again with large pages where they have to be asked for, then run the command line."""
    if VARIABLE not in os.environ and sys.executable and asks():
        os.environ[VARIABLE] = VALUE
        try:
            os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
        except OSError:  # it is only for speed
            pass
    from ibau_jax.commands.cli import run

    run()


def asks() -> bool:
    """Does this kernel give large pages to those that ask, and can this C library ask?"""
    try:
        library, _, version = (os.confstr("CS_GNU_LIBC_VERSION") or "").partition(" ")
        new = library == "glibc" and tuple(map(int, version.split(".")[:2])) >= (2, 35)
        return new and "[madvise]" in OF_KERNEL.read_text()
    except (AttributeError, OSError, ValueError):  # another system
        return False
