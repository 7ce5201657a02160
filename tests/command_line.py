"""The command line `ibau` inside a test."""

import json

from ibau_jax.commands.cli import main


def run(capsys, *arguments):
    """Exit status, stdout and stderr of `ibau ARGUMENTS`."""
    status = main([str(a) for a in arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def printed(capsys, *arguments):
    """The JSON that a command prints, and stderr."""
    status, out, err = run(capsys, *arguments)
    assert status == 0, err
    return json.loads(out), err


def refused(capsys, *arguments):
    """The one line of a refused command."""
    status, out, err = run(capsys, *arguments)
    assert status == 2 and out == "" and "Traceback" not in err
    lines = [line for line in err.splitlines() if line]
    assert len(lines) == 1 and lines[0].startswith("ibau: "), err
    return lines[0]
