"""Models of Equinox from an `.eqx` file and the name of the user's class, and the weights back.

model, variables, container = load_equinox("net.eqx", "net.py:Net", {"classes": 10})
result = unlearn(model, variables, clean, key=key)
save_equinox("cleaned.eqx", container, result.params)
"""

import functools
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import safetensors.numpy

from ibau_jax.errors import InputError, first_line
from ibau_jax.files import atomic_path
from ibau_jax.models.adapters.eqx import Equinox, from_equinox, to_equinox
from ibau_jax.models.adapters.named import exists, imported, made
from ibau_jax.models.model import Variables


class Container(NamedTuple):
    """What is in a file, and what it was read into.

    Attributes:
      module, state: as they were read; the state may be empty.
      header: a line of JSON before the arrays, as Equinox's own examples write it, or nothing.
      with_state: whether the file holds the state.
    """

    module: Any
    state: Any
    header: bytes
    with_state: bool


def load_equinox(
    path: str | Path, spec: str, args: Mapping[str, Any]
) -> tuple[Equinox, Variables, Container]:
    """A module of Equinox with what `eqx.tree_serialise_leaves` wrote of it.

    The file holds `(module, state)`, or the module alone where it has no state; a line of JSON may
    stand before it. Or it is a safetensors file of `tensors_of`.

    Args:
      spec, args: of the module's class, or of a function that gives a module or `(module, state)`,
        and the keyword arguments; an argument `key` is given. See `named.named`.

    Raises:
      InputError: the file or the name cannot be read, or they do not belong together.
    """
    thing = imported(spec)
    if not callable(thing) or isinstance(thing, eqx.Module):
        raise InputError(
            f"{spec!r} is a {type(thing).__name__}: expected a class of Equinox, or a function "
            "that gives a module"
        )
    call: Any = thing
    if inspect.isclass(thing):
        call = functools.wraps(thing)(lambda **all: eqx.nn.make_with_state(thing)(**all))
    found = made(spec, call, args, object, {"key": jax.random.key(0)})
    module, state = found if isinstance(found, tuple) else (found, None)
    stateful = bool(jax.tree.leaves(state))
    path = exists(path, "an .eqx file")
    if path.suffix == ".safetensors":
        module, state = _filled((module, state), path, spec)
        model, variables = from_equinox(module, state if stateful else None)
        return model, variables, Container(module, state, b"", stateful)
    with path.open("rb") as file:
        header = file.readline() if file.read(1) == b"{" else b""
        header = b"{" + header if header else b""
        start = len(header)
        reasons = []
        for like in ((module, state), module) if stateful else (module, (module, state)):
            file.seek(start)
            try:
                read = eqx.tree_deserialise_leaves(file, like)
            except Exception as error:  # of many types
                reasons.append(first_line(error)[:150])
                continue
            if file.read(1):
                reasons.append("there is more in it")
                continue
            with_state = isinstance(like, tuple)
            if stateful and not with_state:
                raise InputError(
                    f"{str(path)!r} holds the module without its state: expected (module, state), "
                    "since its batch norms are nothing without their statistics; serialise both"
                )
            module, state = read if isinstance(read, tuple) else (read, state)
            model, variables = from_equinox(module, state if stateful else None)
            return model, variables, Container(module, state, header, with_state)
    raise InputError(
        f"cannot read the weights {str(path)!r}: {reasons[0]}; expected what "
        f"eqx.tree_serialise_leaves wrote of {spec!r} with {dict(args)}"
    )


def tensors_of(container: Container, variables: Mapping[str, Any]) -> dict[str, Any]:
    """The arrays of a module and its state by their places in it."""
    module, state = to_equinox(container.module, variables)
    return {
        name: leaf
        for name, leaf in _named((module, container.state if state is None else state))
        if eqx.is_array(leaf)
    }


def _named(tree: Any) -> list[tuple[str, Any]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [(jax.tree_util.keystr(path), leaf) for path, leaf in leaves]


def _filled(tree: Any, path: Path, spec: str) -> Any:
    """The tree with its arrays as a file of `tensors_of` has them."""
    where = repr(str(path))
    try:
        found = safetensors.numpy.load_file(path)
    except Exception as error:  # of many types
        raise InputError(
            f"cannot read the weights {where}: {first_line(error)[:150]}; expected a whole "
            "safetensors file"
        ) from error
    leaves = []
    for name, leaf in _named(tree):
        if eqx.is_array(leaf):
            new = found.pop(name, None)
            if new is None or new.shape != leaf.shape:
                what = "not there" if new is None else f"of shape {new.shape}"
                raise InputError(
                    f"{name!r} is {what} in {where}: expected the weights of {spec!r}, of shape "
                    f"{leaf.shape}"
                )
            leaf = jnp.asarray(new, leaf.dtype)
        leaves.append(leaf)
    if found:
        raise InputError(f"{where} also has {min(found)!r}, which {spec!r} has not")
    return jax.tree.unflatten(jax.tree.structure(tree), leaves)


def save_equinox(path: str | Path, container: Container, variables: Mapping[str, Any]) -> Path:
    """Write variables as they came in.

    Raises:
      InputError: the variables are not those of the file, or it cannot be written.
    """
    module, state = to_equinox(container.module, variables)
    state = container.state if state is None else state
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        file.write(container.header)
        eqx.tree_serialise_leaves(file, (module, state) if container.with_state else module)
    return Path(path)
