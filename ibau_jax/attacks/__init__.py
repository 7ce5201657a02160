"""Backdoor attacks: a trigger, a label rule, and the poisoning of a data set."""

from ibau_jax.attacks.attack import (
    SCENARIOS,
    Attack,
    check_ratio,
    check_target,
    described,
    names_of,
    poison,
    poison_all,
    scenario_of,
)
from ibau_jax.attacks.catalogue import ATTACKS, make_attack, make_trigger
from ibau_jax.attacks.optimised import Network
from ibau_jax.attacks.trigger import (
    BLEND,
    RULES,
    Trigger,
    badnets_square,
    blend,
    trigger_from_files,
)

__all__ = [
    "ATTACKS",
    "BLEND",
    "RULES",
    "SCENARIOS",
    "Attack",
    "Network",
    "Trigger",
    "badnets_square",
    "blend",
    "check_ratio",
    "check_target",
    "described",
    "make_attack",
    "make_trigger",
    "names_of",
    "poison",
    "poison_all",
    "scenario_of",
    "trigger_from_files",
]
