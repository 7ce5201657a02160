"""The paper's VGG (Table 7) in PyTorch, for benchmarks to compare with (extra `torch`)."""

import torch
from torch import nn


def torch_vgg(num_classes: int = 10, inplace: bool = True) -> nn.ModuleDict:
    """`features` and `classifier`, with the names of the published checkpoints."""
    layers, channels = [], 3
    for width, rate in ((32, 0.3), (64, 0.4), (128, 0.4)):
        for _ in range(2):
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width)]
            layers += [nn.ELU(inplace=inplace)]
            channels = width
        layers += [nn.MaxPool2d(2), nn.Dropout(rate)]
    parts = {"features": nn.Sequential(*layers), "classifier": nn.Linear(2048, num_classes)}
    return nn.ModuleDict(parts)


def logits(modules: nn.ModuleDict, images: torch.Tensor) -> torch.Tensor:
    """[N, 3, 32, 32] -> [N, num_classes]."""
    return modules["classifier"](modules["features"](images).flatten(1))
