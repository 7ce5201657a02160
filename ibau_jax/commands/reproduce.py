"""The work of `ibau reproduce`: it lies with the experiments, which a clone of the source has."""

import sys
from pathlib import Path
from types import ModuleType

import ibau_jax
from ibau_jax.errors import InputError

EXPERIMENTS = Path(ibau_jax.__file__).resolve().parents[1] / "experiments"


def module() -> ModuleType:
    """`experiments/paper/reproduce.py`.

    Raises:
      InputError: the library was installed without its source.
    """
    if not (EXPERIMENTS / "paper" / "reproduce.py").is_file():
        raise InputError(
            f"the paper's tables are made by scripts that an installed library has not: expected "
            f"{str(EXPERIMENTS)!r}; clone the repository and install it with 'pip install -e .'"
        )
    if str(EXPERIMENTS) not in sys.path:
        sys.path.insert(0, str(EXPERIMENTS))
    from paper import reproduce  # pyright: ignore[reportMissingImports]

    return reproduce
