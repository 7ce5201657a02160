"""Names of classes: their order, which is that of the labels, and files that list them."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from ibau_jax.data.check import name_some
from ibau_jax.errors import InputError, why


def sort_names(names: Sequence[str]) -> list[str]:
    """Names as torchvision sorts them; as numbers where all of them are."""
    if all(name.isascii() and name.isdigit() for name in names):
        return sorted(names, key=lambda name: (int(name), name))
    return sorted(names)


def read_names(path: Path) -> list[str]:
    """Names of classes of a text file (UTF-8), one a line, whose place is the label.

    Raises:
      InputError: it cannot be read, or has an empty line or a name twice.
    """
    try:
        lines = path.read_text("utf-8-sig").rstrip().split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"cannot read the names of classes in {str(path)!r}: {why(error)}; expected a text "
            "file in UTF-8, one name a line",
            argument="classes",
        ) from error
    names = [line.strip() for line in lines]
    twice = [name for name, count in Counter(names).items() if count > 1]
    if "" in names or twice:
        what = "has an empty line" if "" in names else f"has {quoted(twice)} more than once"
        raise InputError(
            f"the file of classes {str(path)!r} {what}: expected one name a line, each once",
            argument="classes",
        )
    return names


def told(classes: Mapping[str, int], most: int = 20) -> str:
    """Which label each class has, for people: `0 = 'cat', 1 = 'dog'`."""
    return name_some([f"{label} = {name!r}" for name, label in classes.items()], most)


def quoted(names: Sequence[str]) -> str:
    """Names in quotes, at most ten: `'cat', 'dog' and 3 more`."""
    return name_some([repr(name) for name in names])
