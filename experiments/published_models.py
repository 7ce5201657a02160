"""The five poisoned models that the authors of the paper published, as model files of ours.

Their checkpoints and triggers are read from a folder of the user's (checkpoints/, triggers/).
"""

from pathlib import Path

from ibau_jax.commands.attack_options import make_attacks, read_trigger
from ibau_jax.commands.convert import convert

MODELS = {  # file, data set, trigger, target
    "BadNets": ("badnets_8_02", "cifar10", None, 8),
    "l2": ("l2_inv_0_02", "cifar10", "l2_inv", 0),
    "Trojan WM": ("trojan_wm_2_02", "cifar10", "trojan_wm", 2),
    "GTSRB BadNets": ("gtsrbbadnets_8_02", "gtsrb", None, 8),
    "GTSRB Trojan WM": ("gtsrbtrojan_wm_2_02", "gtsrb", "trojan_wm", 2),
}


def import_model(reference: Path, name: str, folder: Path) -> Path:
    """Convert a published checkpoint, with its trigger, to a model file in `folder`."""
    file, dataset, trigger, target = MODELS[name]
    picture = reference / "triggers" / f"{trigger}.png" if trigger else None
    own = read_trigger(picture) if picture else None
    attacks = make_attacks(dataset, trigger or "badnets", target=target, trigger=own)
    model = folder / f"{file}.safetensors"
    source = reference / "checkpoints" / f"{file}_ckpt.pth"
    convert(source, model, dataset=dataset, attacks=attacks)
    return model
