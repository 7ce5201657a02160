"""The seven attacks of the paper by name."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ibau_jax.attacks import masks
from ibau_jax.attacks.attack import Attack, check_target
from ibau_jax.attacks.optimised import Network, l0_trigger, l2_trigger, trojan_trigger
from ibau_jax.attacks.smooth import smooth_trigger
from ibau_jax.attacks.trigger import Trigger, badnets_square, blend
from ibau_jax.errors import InputError, check_name


@dataclass(frozen=True)
class AttackInfo:
    """What the paper says of an attack, and how its trigger is made.

    Attributes:
      target: in the scenario one-target (A.3.1).
      seven_target: in the scenario seven-target (Table 3).
      fixed: `fixed(shape=)` makes a trigger that needs no model.
      optimise: `optimise(network, images, target, seed)` makes one that does.
    """

    target: int
    seven_target: int
    fixed: Callable[..., Trigger] | None = None
    optimise: Callable[[Network, np.ndarray, int, int], Trigger] | None = None


def _trojan(mask: Callable[[], np.ndarray]):
    def optimise(network: Network, images: np.ndarray, target: int, seed: int) -> Trigger:
        del target  # the neurons are chosen by their weights to all classes
        region = mask()
        if images.shape[1:] != (*region.shape, 3):
            raise InputError(
                f"a Trojan trigger for images of shape {images.shape[1:]}: its mask is for "
                f"{(*region.shape, 3)}; give a mask of your own to optimised.trojan_trigger"
            )
        return trojan_trigger(network, region, seed)

    return optimise


ATTACKS: dict[str, AttackInfo] = {
    "badnets": AttackInfo(8, 0, fixed=badnets_square),
    "blend": AttackInfo(1, 3, fixed=blend),
    "l0": AttackInfo(0, 4, optimise=l0_trigger),
    "l2": AttackInfo(0, 5, optimise=l2_trigger),
    "smooth": AttackInfo(6, 1, optimise=smooth_trigger),
    "trojan-square": AttackInfo(2, 2, optimise=_trojan(masks.square)),
    "trojan-watermark": AttackInfo(2, 9, optimise=_trojan(masks.watermark)),
}


def make_trigger(
    name: str,
    network: Network | None = None,
    images: np.ndarray | None = None,
    seed: int = 0,
    target: int | None = None,
) -> Trigger:
    """A trigger of the paper by name.

    Args:
      network: a clean model, for the triggers that are optimised.
      images: [N, H, W, C] in [0, 1], clean images for these; the others need only their shape
        (None: 32x32x3).
      target: label that l0, l2 and smooth are made for; None: the paper's one-target label (in
        the scenario seven-target too, where the paper uses the same triggers).

    Raises:
      InputError: unknown name, or a clean model is needed and not given.
    """
    check_name("attack", name, ATTACKS)
    info = ATTACKS[name]
    if info.fixed is not None:
        return info.fixed() if images is None else info.fixed(shape=np.shape(images)[1:])
    assert info.optimise is not None
    if network is None or images is None:
        raise InputError(
            f"the trigger {name!r} is optimised against a clean model: expected one, found none; "
            "train one without an attack, or give a picture of the trigger",
            argument="clean_model",
        )
    return info.optimise(network, images, info.target if target is None else target, seed)


def make_attack(
    name: str, num_classes: int, target: int | None = None, trigger: Trigger | None = None
) -> Attack:
    """A one-target attack by name, with the paper's target unless another is given.

    Args:
      trigger: from `make_trigger`; None: made here, for attacks that need no model.

    Raises:
      InputError: unknown attack, or a target outside the classes.
    """
    check_name("attack", name, ATTACKS)
    target = ATTACKS[name].target if target is None else target
    check_target(target, num_classes)
    return Attack(name, make_trigger(name) if trigger is None else trigger, target)
