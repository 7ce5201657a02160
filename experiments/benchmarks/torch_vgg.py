"""The paper's VGG (Table 7) in PyTorch, for benchmarks to compare with (extra `torch`)."""

import numpy as np
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


def load_variables(modules: nn.ModuleDict, variables) -> nn.ModuleDict:
    """Weights of the flax VGG into the modules, which are put into evaluation mode."""
    params, statistics = variables["params"], variables["batch_stats"]
    state = {}
    for i, place in enumerate((0, 3, 8, 11, 16, 19)):  # of the convolutions; batch norms come next
        layer, norm = params[f"conv{i + 1}"], statistics[f"conv{i + 1}"]
        state[f"features.{place}.weight"] = np.transpose(layer["kernel"], (3, 2, 0, 1))
        state[f"features.{place}.bias"] = layer["bias"]
        after = f"features.{place + 1}"
        state |= {f"{after}.weight": layer["scale"], f"{after}.bias": layer["offset"]}
        state |= {f"{after}.running_mean": norm["mean"], f"{after}.running_var": norm["var"]}
    kernel = np.reshape(params["classifier"]["kernel"], (4, 4, 128, -1))  # height, width, channel
    state["classifier.weight"] = np.reshape(np.transpose(kernel, (3, 2, 0, 1)), (-1, 2048))
    state["classifier.bias"] = params["classifier"]["bias"]
    tensors = {name: torch.from_numpy(np.array(value)) for name, value in state.items()}
    missing = modules.load_state_dict(tensors, strict=False).missing_keys
    assert all("num_batches" in name for name in missing), missing
    return modules.eval()
