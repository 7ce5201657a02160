"""The paper's VGG (Table 7) in PyTorch, for benchmarks to compare with (extra `torch`)."""

import numpy as np
import torch
from flax.traverse_util import flatten_dict
from torch import nn

from ibau_jax.models.torch_import import VGG_NAMES


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


def load_variables(modules: nn.ModuleDict, variables) -> nn.ModuleDict:
    """Weights of the flax VGG into the modules, which are put into evaluation mode."""
    ours, state = flatten_dict(variables, sep="/"), {}
    for name, path in VGG_NAMES.items():
        value = np.array(ours[path])
        if value.ndim == 4:
            value = value.transpose(3, 2, 0, 1)
        elif name == "classifier.weight":  # flax flattens (H, W, C), PyTorch (C, H, W)
            value = value.reshape(4, 4, 128, -1).transpose(3, 2, 0, 1).reshape(-1, 2048)
        state[name] = torch.from_numpy(value.copy())
    missing = modules.load_state_dict(state, strict=False).missing_keys
    assert all("num_batches" in name for name in missing), missing
    return modules.eval()
