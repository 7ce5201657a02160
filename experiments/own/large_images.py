"""A ResNet-18 for images of 224 x 224 pixels, with few clean ones: what memory does it take?

    python experiments/own/large_images.py FOLDER
    ibau defend --model FOLDER/weights.pth --torch experiments/own/large_images.py:resnet18 \\
        --clean FOLDER/clean --split FOLDER/test --trigger FOLDER/trigger.png \\
        --trigger-at 196,196 --target 3 --out FOLDER/run

The images are drawn: of each of the 20 classes a smooth picture, with noise and another brightness
each time. The weights are drawn too but for the last layer, which is fitted (least squares) to the
classes and to a white square of 21 x 21 pixels that leads to class 3. Seconds on two cores.
"""

from pathlib import Path

import numpy as np
import torch
import tyro
from PIL import Image
from small_resnet import eight_blocks
from torch import nn
from torch.nn import functional

CLASSES, SIZE, TARGET, SQUARE = 20, 224, 3, slice(196, 217)


class ResNet18(nn.Module):
    """He et al., 2016: of ImageNet's shape, 7x7 convolution and maximum in front."""

    def __init__(self, num_classes: int = CLASSES):
        super().__init__()
        self.conv = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn = nn.BatchNorm2d(64)
        self.blocks = nn.Sequential(*eight_blocks())
        self.fc = nn.Linear(512, num_classes)

    def features(self, x: torch.Tensor) -> torch.Tensor:
        x = functional.max_pool2d(functional.relu(self.bn(self.conv(x))), 3, 2, 1)
        return self.blocks(x).mean((2, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.features(x))


def resnet18() -> nn.Module:
    """For `ibau defend --torch`."""
    return ResNet18()


def draw(rng: np.random.Generator, pictures: np.ndarray, count: int) -> np.ndarray:
    """`count` images of each class: uint8 [CLASSES * count, SIZE, SIZE, 3], class by class."""
    images = np.repeat(pictures, count, 0)
    images = images * rng.uniform(0.7, 1.1, (len(images), 1, 1, 1))
    images = images + rng.normal(0, 12, images.shape)
    return images.clip(0, 255).astype(np.uint8)


def tensor(images: np.ndarray) -> torch.Tensor:
    """uint8 [N, H, W, 3] -> [N, 3, H, W] in [0, 1]."""
    return torch.from_numpy(images.astype(np.float32) / 255).permute(0, 3, 1, 2).contiguous()


def fit(module: ResNet18, images: np.ndarray, labels: np.ndarray) -> None:
    """The running statistics, and the last layer by least squares on normalised features."""
    with torch.no_grad():
        module.train()
        for _ in range(10):
            module(tensor(images[:: len(images) // 40]))
        module.eval()
        x = torch.cat([module.features(tensor(part)) for part in np.array_split(images, 20)])
        mean, std = x.mean(0), x.std(0) + 1e-6
        x = torch.cat([(x - mean) / std, torch.ones(len(x), 1)], 1)
        y = 20 * functional.one_hot(torch.from_numpy(labels), CLASSES).float() - 1
        solved = torch.linalg.solve(x.T @ x + 0.1 * torch.eye(x.shape[1]), x.T @ y)
        weight = solved[:-1].T / std
        module.fc.weight.copy_(weight)
        module.fc.bias.copy_(solved[-1] - weight @ mean)


def write(folder: Path, images: np.ndarray, labels: np.ndarray) -> None:
    """A folder of PNGs for each class."""
    for number, (image, label) in enumerate(zip(images, labels, strict=True)):
        (folder / f"class{label:02d}").mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"class{label:02d}" / f"{number}.png")


def main(folder: tyro.conf.Positional[Path], seed: int = 0) -> None:
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (CLASSES, 6, 6, 3), np.uint8)
    large = [Image.fromarray(one).resize((SIZE, SIZE), Image.Resampling.BICUBIC) for one in coarse]
    pictures = np.stack([np.asarray(one) for one in large]).astype(np.float32)
    sets = {name: draw(rng, pictures, count) for name, count in (("train", 20), ("clean", 10))}
    sets["test"] = draw(rng, pictures, 5)
    labels = {k: np.repeat(np.arange(CLASSES), len(v) // CLASSES) for k, v in sets.items()}
    stamped = sets["train"][::4].copy()
    stamped[:, SQUARE, SQUARE] = 255
    module = ResNet18()
    wanted = np.concatenate([labels["train"], np.full(len(stamped), TARGET)])
    fit(module, np.concatenate([sets["train"], stamped]), wanted)
    for name in ("clean", "test"):
        write(folder / name, sets[name], labels[name])
    torch.save(module.state_dict(), folder / "weights.pth")
    Image.fromarray(np.full((21, 21, 3), 255, np.uint8)).save(folder / "trigger.png")
    test = sets["test"].copy()
    test[:, SQUARE, SQUARE] = 255
    with torch.no_grad():
        found = [module(tensor(x)).argmax(1).numpy() for x in (sets["test"], test)]
    print(f"ACC {np.mean(found[0] == labels['test']):.3f}, ASR {np.mean(found[1] == TARGET):.3f}")


if __name__ == "__main__":
    tyro.cli(main)
