"""The work of `ibau demo`."""

from pathlib import Path
from typing import Any

from ibau_jax.commands.attack_options import make_attacks
from ibau_jax.commands.defend import defend
from ibau_jax.commands.train import train_model
from ibau_jax.files import make_folder


def demo(out: str | Path, *, seed: int = 0, progress: bool = False) -> dict[str, Any]:
    """Train a backdoored model on the embedded digits and clean it: everything in two minutes."""
    poisoned = make_folder(out, "out") / "poisoned.safetensors"
    attacks = make_attacks("digits", "badnets")
    trained = train_model(
        poisoned, "digits", attacks, seed=seed, keep_states=False, progress=progress
    )
    found = defend(poisoned, seed=seed, out=out, progress=progress, experiment="demo")
    return {**found, "train_seconds": trained["seconds"]}
