"""Small PyTorch modules for tests, built as those that people hold."""

import torch
from torch import nn

torch.set_num_threads(1)  # the workers are as many as cores, and threads would wait for each other


class Block(nn.Module):
    """Two convolutions with batch norm, and a shortcut (as kuangliu's and torchvision's)."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x):
        y = torch.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        y += x if self.downsample is None else self.downsample(x)
        return torch.relu(y)


class TinyResNet(nn.Module):
    def __init__(self, channels: int = 3, classes: int = 10, widths: tuple[int, int] = (4, 8)):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, widths[0], 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = nn.Sequential(Block(widths[0], widths[0], 1))
        self.layer2 = nn.Sequential(Block(widths[0], widths[1], 2))
        self.fc = nn.Linear(widths[1], classes)

    def forward(self, x):
        x = self.relu(self.bn1(self.conv1(x)))
        return self.fc(self.layer2(self.layer1(x)).mean((2, 3)))


class PreActBlock(nn.Module):
    """Batch norm, then convolution (as BackdoorBench's PreActResNet18)."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False))

    def forward(self, x):
        y = torch.relu(self.bn1(x))
        shortcut = self.shortcut(y) if hasattr(self, "shortcut") else x
        return self.conv2(torch.relu(self.bn2(self.conv1(y)))) + shortcut


class PreActNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, 1, 1, bias=False)
        self.layer1 = nn.Sequential(PreActBlock(4, 4, 1), PreActBlock(4, 4, 1))
        self.layer2 = nn.Sequential(PreActBlock(4, 8, 2), PreActBlock(8, 8, 1))
        self.linear = nn.Linear(8, 10)

    def forward(self, x):
        return self.linear(self.layer2(self.layer1(self.conv1(x))).mean((2, 3)))


def seeded(make, seed: int = 0, **settings) -> nn.Module:
    """A module whose weights come of a seed, torch's own random state left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make(**settings)


def trained_statistics(module: nn.Module) -> nn.Module:
    """With scales, offsets and statistics of batch norm that are not 0 and 1."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for one in module.modules():
            if isinstance(one, nn.BatchNorm2d):
                for value, low in (
                    (one.weight, 0.5), (one.bias, -0.5), (one.running_mean, -0.5),
                    (one.running_var, 0.5),
                ):  # fmt: skip
                    value.copy_(torch.rand(value.shape, generator=generator) + low)
                one.num_batches_tracked += 7
    return module
