"""Backdoor attacks: a trigger, a label rule, and the poisoning of a data set."""

from ibau_jax.attacks.poison import ATTACKS, Attack, make_attack, poison
from ibau_jax.attacks.triggers import Trigger, badnets_square, trigger_from_files

__all__ = [
    "ATTACKS",
    "Attack",
    "Trigger",
    "badnets_square",
    "make_attack",
    "poison",
    "trigger_from_files",
]
