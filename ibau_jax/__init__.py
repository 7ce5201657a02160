"""Backdoor removal with the implicit hypergradient (I-BAU, ICLR 2022) in JAX.

from ibau_jax import Dataset, IBAUConfig, load, unlearn

result = unlearn(logits, params, clean, key=jax.random.key(0))
cleaned = result.params
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ibau_jax.data import Dataset, load
    from ibau_jax.defenses.ibau import unlearn
    from ibau_jax.defenses.run import Result
    from ibau_jax.defenses.torch_module import clean_torch
    from ibau_jax.errors import InputError
    from ibau_jax.training.optimizers import SGD, Adam
    from ibau_jax.unlearning.config import IBAUConfig
    from ibau_jax.unlearning.look import inspect

__all__ = [
    "SGD",
    "Adam",
    "Dataset",
    "IBAUConfig",
    "InputError",
    "Result",
    "clean_torch",
    "inspect",
    "load",
    "unlearn",
]

# Imported when they are asked for: JAX takes a second, and `ibau --help` and tables do without it.
_HOME = {
    **dict.fromkeys(("SGD", "Adam"), "training.optimizers"),
    **dict.fromkeys(("Dataset", "load"), "data"),
    "IBAUConfig": "unlearning.config",
    "InputError": "errors",
    "Result": "defenses.run",
    "clean_torch": "defenses.torch_module",
    "inspect": "unlearning.look",
    "unlearn": "defenses.ibau",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
