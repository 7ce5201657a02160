"""Many processes in one run: how they find each other, and how they end when one is lost."""

import atexit
import contextlib
import os
import sys
import threading
import time
from collections.abc import Iterator

import jax

from ibau_jax.errors import InputError, LostProcess, first_line

# Seconds without a sign of life after which a process counts as lost.
SILENCE = float(os.environ.get("IBAU_SILENCE", 20))


def start(
    coordinator: str, num_processes: int | None = None, process_id: int | None = None
) -> None:
    """Join the other processes of a run (`jax.distributed`), before anything else uses JAX.

    From now on this process ends, with a line on stderr and status 3, when another is lost.

    Args:
      coordinator: HOST:PORT of process 0, or `auto`: this and the other two are found from
        SLURM, Open MPI, a TPU pod or Kubernetes, as JAX does it.

    Raises:
      InputError: nothing was found, or the other processes did not come within 5 minutes.
    """
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        jax.distributed.initialize(
            None if coordinator == "auto" else coordinator,
            num_processes,
            process_id,
            heartbeat_timeout_seconds=int(3 * SILENCE),  # ours comes first: it explains itself
        )
    except (ValueError, RuntimeError) as error:
        raise InputError(
            f"cannot join the other processes: {first_line(error)}; give each process HOST:PORT of "
            "process 0, the number of processes and its own, or 'auto' on a cluster that JAX knows",
            argument="coordinator",
        ) from error
    ended = threading.Event()
    threading.Thread(target=_watch_others, args=(ended,), daemon=True).start()
    atexit.register(ended.set)  # before jax.distributed waits for the others


def is_first() -> bool:
    """Is this the process that writes files and prints results?"""
    return not jax.distributed.is_initialized() or jax.process_index() == 0


@contextlib.contextmanager
def watch() -> Iterator[None]:
    """Tell a lost process from other failures of a step.

    Raises:
      LostProcess: a collective failed, which with many processes has that one reason.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() == 1:
            raise
        raise LostProcess(_lost(first_line(error))) from error


def leave(status: int) -> None:
    """End this process without waiting for the others, which may never answer."""
    if jax.distributed.is_initialized() and jax.process_count() > 1:
        os._exit(status)


def _lost(reason: str) -> str:
    return f"process {jax.process_index()} lost another process of this run and ends: {reason}"


def _watch_others(ended: threading.Event) -> None:
    """Show the others that this process lives, and end it when one of them does not.

    A thread, since the main one may wait for ever in a collective with a process that is gone.
    JAX's own heartbeats abort with a stack trace, or not at all.
    """
    from jax._src.distributed import global_state  # no public way to the key-value store

    client, me = global_state.client, jax.process_index()
    assert client is not None, "started before"
    last: dict[int, tuple[str, float]] = {}
    for beat in range(sys.maxsize):
        if ended.is_set():
            client.key_value_set(f"ibau/alive/{me}", "ended", allow_overwrite=True)
            return
        try:
            client.key_value_set(f"ibau/alive/{me}", str(beat), allow_overwrite=True)
            found = dict(client.key_value_dir_get("ibau/alive"))
        except Exception as error:  # whatever JAX raises when process 0, which keeps it, is gone
            if not ended.is_set():
                _end(first_line(error))
            return
        now = time.monotonic()
        for other in range(jax.process_count()):
            value = found.get(f"ibau/alive/{other}", "")
            if value == "ended" or value != last.get(other, (None,))[0]:
                last[other] = (value, now)
            elif now - last[other][1] > SILENCE:
                _end(f"no sign of life from process {other} for {SILENCE:g} s")
        ended.wait(1.0)


def _end(reason: str) -> None:
    print(f"ibau: {_lost(reason)}", file=sys.stderr, flush=True)
    os._exit(3)
