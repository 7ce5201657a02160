"""Backdoor removal with the implicit hypergradient (I-BAU, ICLR 2022) in JAX.

from ibau_jax import Dataset, IBAUConfig, load, unlearn

result = unlearn(logits, params, clean, key=jax.random.key(0))
cleaned = result.params
"""

from ibau_jax.data import Dataset, load
from ibau_jax.defenses.ibau import unlearn
from ibau_jax.defenses.run import Result
from ibau_jax.errors import InputError
from ibau_jax.training.optimizers import SGD, Adam
from ibau_jax.unlearning.config import IBAUConfig
from ibau_jax.unlearning.evidence import inspect

__all__ = [
    "SGD",
    "Adam",
    "Dataset",
    "IBAUConfig",
    "InputError",
    "Result",
    "inspect",
    "load",
    "unlearn",
]
