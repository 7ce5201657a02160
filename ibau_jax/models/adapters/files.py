"""Models of linen and NNX from weights and the name of the user's class, and the weights back.

model, variables, container = load_linen("weights.msgpack", "net.py:Net", {"classes": 10})
result = unlearn(model, variables, clean, key=key)
save_linen("cleaned.msgpack", container, result.params)
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

from ibau_jax.errors import InputError
from ibau_jax.models.adapters.linen import Linen, from_linen
from ibau_jax.models.adapters.named import named
from ibau_jax.models.adapters.nnx import NNX, from_nnx
from ibau_jax.models.adapters.trees import Container, read_tree, replaced, write_tree
from ibau_jax.models.model import Variables

Place = tuple[str, ...]
WRAPPERS = ("params", "variables", "model", "state", "target")  # under which a file has them
APART = ("opt_state", "optimizer", "optimizer_state")  # what a train state has beside them


class Loaded(NamedTuple):
    """A file, and where in it the variables are.

    Attributes:
      container: the file.
      places: of each array of the variables by its path (collection first), its path in the file.
    """

    container: Container
    places: dict[Place, Place]


def load_linen(
    path: str | Path, spec: str, args: Mapping[str, Any]
) -> tuple[Linen, Variables, Loaded]:
    """A linen module with the weights of a file (see `trees`).

    The file holds `{"params": ..., "batch_stats": ..., ...}`, alone or in a train state beside
    other things (an optimiser's state, which is left as it is), or the parameters alone.

    Args:
      spec, args: of the module's class and its constructor's keyword arguments; see `named`.

    Raises:
      InputError: the file or the name cannot be read, or there are no parameters in it.
    """
    module = named(spec, args, nn.Module)
    container = read_tree(path)
    collections = _collections(container.tree)
    variables = {name: _at(container.tree, place) for name, place in collections.items()}
    if not jax.tree.leaves(variables["params"]):
        raise InputError(f"{str(path)!r} has no parameters: expected the variables of {spec!r}")
    places = {
        (name, *rest): (*place, *rest)
        for name, place in collections.items()
        for rest in flatten_dict(variables[name])
    }
    return from_linen(module), variables, Loaded(container, places)


def load_nnx(path: str | Path, spec: str, args: Mapping[str, Any]) -> tuple[NNX, Variables, Loaded]:
    """An NNX module with the weights of a file (see `trees`): of its state or the pure dict of it.

    Args:
      spec, args: as of `load_linen`; an argument `rngs` is given.

    Raises:
      InputError: the file or the name cannot be read, or they do not belong together.
    """
    module = named(spec, args, nnx.Module, {"rngs": nnx.Rngs(0)})
    model, own = from_nnx(module)
    container, where = read_tree(path), str(path)
    flat: dict[Place, Any] = flatten_dict(container.tree)
    wanted: dict[Place, Any] = flatten_dict(own)
    places, found = {}, {}
    for leaf, value in wanted.items():
        collection, *rest = leaf
        tops = ((), (collection,), *((name,) for name in WRAPPERS))
        # A state of flax has each array under the key `value`.
        tried = [(*top, *rest, *end) for top in tops for end in ((), ("value",))]
        place = next((place for place in tried if place in flat), None)
        name = "/".join(rest)
        if place is None:
            raise InputError(
                f"{where!r} has no {name!r}: expected the weights of {spec!r}{_args(args)}"
            )
        if np.shape(flat[place]) != np.shape(value):
            raise InputError(
                f"{where!r} has {name!r} of shape {np.shape(flat[place])}: expected "
                f"{np.shape(value)}, as {spec!r}{_args(args)} has it"
            )
        places[leaf], found[leaf] = place, flat[place]
    random = {tuple(map(str, path)) for path in model.leaves}  # of random numbers, among others
    for place in flat.keys() - set(places.values()):
        plain = place[:-1] if place[-1] == "value" else place
        if place[0] not in APART and plain not in random:
            raise InputError(
                f"{where!r} also has {'/'.join(plain)!r}, which {spec!r}{_args(args)} has not: "
                "expected the weights of that module"
            )
    return model, unflatten_dict(found), Loaded(container, places)


def save_weights(path: str | Path, loaded: Loaded, variables: Mapping[str, Any]) -> Path:
    """Write variables in the format that they came in, everything else in it as it was.

    Raises:
      InputError: the variables are not those of the file, or it cannot be written.
    """
    flat = flatten_dict(dict(variables))
    if flat.keys() != loaded.places.keys():
        other = "/".join(min(flat.keys() ^ loaded.places.keys()))
        raise InputError(
            f"the variables are not those that were loaded (first difference: {other!r}): give "
            "what came with them, with other values"
        )
    new = {loaded.places[leaf]: value for leaf, value in flat.items()}
    tree = replaced(loaded.container.tree, new)
    return write_tree(path, loaded.container._replace(tree=tree))


save_linen = save_nnx = save_weights  # the container knows all that differs


def _collections(tree: dict[str, Any]) -> dict[str, Place]:
    """Where in a file the collections of variables are; their names as far as there are any."""
    tops: tuple[Place, ...] = ((), *((name,) for name in WRAPPERS))
    for top in tops:
        inner = _at(tree, top)
        params = inner.get("params") if isinstance(inner, dict) else None
        if isinstance(params, dict) and not isinstance(params.get("params"), dict):
            dicts = {name for name, value in inner.items() if isinstance(value, dict) and value}
            return {name: (*top, name) for name in sorted(dicts | {"params"}) if name not in APART}
    return {"params": ()}


def _at(tree: Any, place: Place) -> Any:
    for name in place:
        tree = tree.get(name) if isinstance(tree, dict) else None
    return tree


def _args(args: Mapping[str, Any]) -> str:
    return f" with {dict(args)}" if args else ""
