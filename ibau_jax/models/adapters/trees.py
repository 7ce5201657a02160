"""Weights of flax models in files of other programs: read, and written in the format they came in.

safetensors (names joined by `/` or `.`), msgpack (`flax.serialization`), and folders of Orbax.
"""

import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import flax.serialization
import numpy as np
import safetensors
import safetensors.flax
import safetensors.numpy
from flax.traverse_util import flatten_dict, unflatten_dict

from ibau_jax.errors import InputError, first_line
from ibau_jax.files import atomic_path, make_folder
from ibau_jax.models.adapters.named import exists

FORMATS = ("safetensors", "msgpack", "orbax")
Tree = Any


class Container(NamedTuple):
    """All that a file holds, and how.

    Attributes:
      format: of `FORMATS`.
      tree: nested dicts of NumPy arrays, by strings, and whatever else is in it.
      separator: of the names in safetensors.
      metadata: of safetensors.
    """

    format: str
    tree: dict[str, Any]
    separator: str = "/"
    metadata: dict[str, str] | None = None


def read_tree(path: str | Path) -> Container:
    """The content of a file or of a folder of Orbax.

    Raises:
      InputError: there is none, or it is none of these.
    """
    where = str(path)
    path = exists(path, "a .safetensors or .msgpack file, or a folder of Orbax")
    try:
        if path.is_dir():
            return Container("orbax", _read_orbax(path))
        if path.suffix == ".safetensors":
            return _read_safetensors(path)
        tree = flax.serialization.msgpack_restore(path.read_bytes())
    except InputError:
        raise
    except Exception as error:  # a damaged file raises many types
        raise InputError(
            f"cannot read the weights {where!r}: {first_line(error)[:200]}; expected a whole "
            ".safetensors file, msgpack of flax.serialization, or a folder of Orbax"
        ) from error
    if not isinstance(tree, dict):
        raise InputError(
            f"{where!r} holds a {type(tree).__name__}: expected nested dicts of arrays, as "
            "flax.serialization.to_bytes(variables) writes them"
        )
    return Container("msgpack", tree)


def write_tree(path: str | Path, container: Container) -> Path:
    """Write a file or a folder, whole or not at all; one that was there is replaced.

    Raises:
      InputError: the folder around it cannot be written to.
    """
    path, tree = Path(path), container.tree
    if container.format == "orbax":
        _write_orbax(path, tree)
        return path
    if container.format == "msgpack":
        data = flax.serialization.msgpack_serialize(tree)
    else:
        flat = flatten_dict(tree, sep=container.separator)
        arrays = {name: np.asarray(value, order="C") for name, value in flat.items()}
        data = safetensors.numpy.save(arrays, container.metadata)
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)
    return path


def replaced(tree: Tree, new: Mapping[tuple[str, ...], Any]) -> Tree:
    """A tree of nested dicts with the arrays at these paths replaced, in their old dtypes."""
    if () in new:
        return np.asarray(new[()], np.asarray(tree).dtype)
    inner: dict[str, dict[tuple[str, ...], Any]] = {}
    for (name, *rest), value in new.items():
        inner.setdefault(name, {})[tuple(rest)] = value
    return {name: replaced(tree[name], inner[name]) if name in inner else tree[name]
            for name in tree}  # fmt: skip


def _read_safetensors(path: Path) -> Container:
    with safetensors.safe_open(path, framework="np") as file:
        metadata, names = file.metadata(), list(file.keys())
    try:
        flat = safetensors.numpy.load_file(path)
    except KeyError:  # bfloat16, which NumPy has by the help of JAX
        flat = {name: np.asarray(a) for name, a in safetensors.flax.load_file(path).items()}
    separator = "/" if any("/" in name for name in names) else "."
    tree: Any = unflatten_dict(flat, sep=separator)
    return Container("safetensors", tree, separator, metadata)


def _read_orbax(path: Path) -> dict[str, Any]:
    import jax
    import orbax.checkpoint as ocp  # takes a second

    folder = _checkpoint(path)
    checkpointer = ocp.PyTreeCheckpointer()
    found: Any = checkpointer.metadata(folder)
    found = getattr(found, "item_metadata", found)
    found = getattr(found, "tree", found)
    # As NumPy's arrays, whichever devices they were on.
    options = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), found)
    tree = checkpointer.restore(folder, restore_args=options)
    if not isinstance(tree, dict):
        raise InputError(f"{str(path)!r} holds a {type(tree).__name__}: expected nested dicts")
    return tree


def _checkpoint(path: Path) -> Path:
    """The folder of the arrays in that of a checkpoint, or of a manager's last step."""
    path = path.absolute()
    if (path / "_METADATA").is_file():
        return path
    steps = [p for p in path.iterdir() if p.name.isdigit() and p.is_dir()]
    if steps:
        return _checkpoint(max(steps, key=lambda p: int(p.name)))
    for name in ("default", "state", "params", "model"):
        if (path / name).is_dir():
            return _checkpoint(path / name)
    raise InputError(
        f"{str(path)!r} is no checkpoint of Orbax: expected a folder with _METADATA, or one of a "
        "CheckpointManager"
    )


def _write_orbax(path: Path, tree: Tree) -> None:
    import orbax.checkpoint as ocp

    make_folder(path.parent)
    folder = tempfile.mkdtemp(prefix=".ibau-", dir=path.absolute().parent)
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(os.path.join(folder, "new"), tree)
        if path.exists():
            os.rename(path, os.path.join(folder, "old"))
        os.rename(os.path.join(folder, "new"), path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
