"""The architectures that can be trained here, by the names that model files have."""

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn

from ibau_jax.errors import check_name
from ibau_jax.models.resnet import PreActResNet
from ibau_jax.models.vgg import VGG
from ibau_jax.models.vit import ViT

ARCHITECTURES: dict[str, Callable[..., nn.Module]] = {
    "vgg": VGG,  # the paper's
    "vgg-mini": partial(VGG, widths=(16,), dropout=(0.3,)),  # its first block, for quick trials
    "preact-resnet18": PreActResNet,  # the benchmarks'
    "preact-resnet18-16": partial(PreActResNet, widths=(16, 32, 64, 128)),  # a quarter as wide
    "vit-tiny": ViT,  # DeiT-Ti's width, depth and heads
    "vit-mini": partial(ViT, width=64, depth=4, heads=4),
}


def build(architecture: str, num_classes: int, **settings: Any) -> Any:
    """A module by name; an unknown name raises and tells the nearest.

    All are called as `VGG` is, have its attributes `axis` and `dropout` and a last layer
    `classifier`, and sow maps.
    """
    check_name("architecture", architecture, ARCHITECTURES)
    return ARCHITECTURES[architecture](num_classes, **settings)
