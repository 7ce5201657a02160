"""Split strings as in TensorFlow Datasets: `test`, `test[:5000]`, `train[10%:20%]+test`.

TFDS has a parser of its own (`ReadInstruction`), but importing TFDS takes seconds and a
cached data set is loaded in a fraction of one; these few lines keep the same meaning.
"""

import re
from collections.abc import Mapping

import numpy as np

from ibau_jax.errors import InputError

_PART = re.compile(r"^(\w+)(?:\[(-?\d+%?)?:(-?\d+%?)?\])?$")


def split_indices(spec: str, sizes: Mapping[str, int]) -> list[tuple[str, np.ndarray]]:
    """The rows that a split string names.

    Args:
      spec: for example `"test[5000:]"`, `"train[:10%]"`, `"train+test[:100]"`.
      sizes: number of rows of each split, for example `{"train": 50000, "test": 10000}`.

    Returns:
      A list of (split, row numbers [n] int64), in the order of the string.

    Raises:
      InputError: the string cannot be read, names an unknown split, or selects nothing.
    """
    parts = []
    for part in spec.split("+"):
        match = _PART.match(part.strip())
        if match is None:
            raise InputError(
                f"cannot read the split {spec!r}: expected NAME, NAME[FROM:TO] or a sum of "
                "such, for example 'test[:5000]'"
            )
        name, start, stop = match.groups()
        if name not in sizes:
            raise InputError(f"unknown split {name!r} in {spec!r}: expected one of {list(sizes)}")
        rows = np.arange(sizes[name])[_bound(start, sizes[name]) : _bound(stop, sizes[name])]
        parts.append((name, rows))
    if not sum(len(rows) for _, rows in parts):
        raise InputError(f"the split {spec!r} is empty: sizes are {dict(sizes)}")
    return parts


def names_splits(spec: str, sizes: Mapping[str, int]) -> bool:
    """Is it a split string of these splits, whatever rows it selects?"""
    matches = [_PART.match(part.strip()) for part in spec.split("+")]
    return all(match is not None and match[1] in sizes for match in matches)


def check_disjoint(clean: str, evaluation: str, sizes: Mapping[str, int]) -> None:
    """Raise `InputError` when two splits share a row.

    A defense that is measured on the images it was tuned with looks better than it is.
    """
    for name, rows in split_indices(clean, sizes):
        for other, other_rows in split_indices(evaluation, sizes):
            shared = np.intersect1d(rows, other_rows) if name == other else []
            if len(shared):
                raise InputError(
                    f"the clean split {clean!r} and the evaluation split {evaluation!r} share "
                    f"{len(shared)} images (first: {name} row {shared[0]}): expected disjoint "
                    "splits, for example test[:5000] and test[5000:]"
                )


def _bound(text: str | None, size: int) -> int | None:
    if text is None:
        return None
    if text.endswith("%"):  # TFDS rounds a percentage to the nearest row
        return round(size * int(text[:-1]) / 100)
    return int(text)
