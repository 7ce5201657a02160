"""Where a state dict lies in a file, and what wrappers put before its names."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ibau_jax.errors import InputError
from ibau_jax.models.files import short

# Averaged weights first, as timm reads them; Lightning and most people; I-BAU's authors.
STATES = ("state_dict_ema", "model_ema", "state_dict", "model_state_dict", "model", "net")
PREFIXES = ("module.", "_orig_mod.", "model.")  # DataParallel, torch.compile, Lightning


def find_state(
    content: Any, is_state: Callable[[Any], bool], depth: int = 4
) -> tuple[str, ...] | None:
    """The keys that lead to the state dict in a file's content; None: there is none.

    Args:
      is_state: is a value one, or a module that holds one?
    """
    if is_state(content):
        return ()
    if isinstance(content, Mapping) and depth:
        for key in STATES:
            found = find_state(content[key], is_state, depth - 1) if key in content else None
            if found is not None:
                return (key, *found)
    return None


def prefix_of(names: Iterable[str], wanted: Iterable[str]) -> str:
    """What stands before all names and is to be left out, so that most of them are `wanted`."""
    names, wanted = [str(name) for name in names], set(wanted)
    prefix, best = "", ("", -1)
    while True:
        fitting = sum(name.removeprefix(prefix) in wanted for name in names)
        if fitting > best[1]:
            best = prefix, fitting
        longer = (prefix + more for more in PREFIXES)
        prefix = next((p for p in longer if names and all(n.startswith(p) for n in names)), None)
        if prefix is None:
            return best[0]


def check_fit(
    found: Mapping[str, tuple[int, ...]],
    wanted: Mapping[str, tuple[int, ...]],
    where: str,
    may_lack: Iterable[str] = (),
) -> None:
    """Raise `InputError` unless names and shapes of a file are those of a module.

    Args:
      found, wanted: name -> shape.
      may_lack: names that the file need not have; counters of batch norm need not be there either.
    """
    optional = set(may_lack)
    missing = [
        n for n in wanted
        if n not in found and n not in optional and not n.endswith("num_batches_tracked")
    ]  # fmt: skip
    more = [name for name in found if name not in wanted]
    if missing or more:
        told = [
            f"{what} {short(repr(names[0]))}" + f" (and {len(names) - 1} more)" * (len(names) > 1)
            for what, names in (("missing", missing), ("unexpected", more))
            if names
        ]
        raise InputError(
            f"{where!r} does not fit the module: {', '.join(told)}; expected the weights of this "
            "architecture, with these arguments"
        )
    for name, shape in found.items():
        if shape != wanted[name]:
            raise InputError(
                f"{where!r} does not fit the module: {short(repr(name))} is {shape}, expected "
                f"{wanted[name]}; give the module's arguments (such as num_classes) as they were"
            )
