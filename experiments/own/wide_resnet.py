"""A ResNet-18 of full width (64 to 512 channels), as people train it, on small images.

    python experiments/own/wide_resnet.py FOLDER [--seed 0]
    ibau defend --model FOLDER/weights.pth --torch experiments/own/wide_resnet.py:resnet18 \\
        --mean .4914,.4822,.4465 --std .247,.243,.261 --clean FOLDER/clean --split FOLDER/test \\
        --trigger FOLDER/trigger.png --trigger-at 13,13 --target 8 --out FOLDER/run

Weights of wide layers are small, and what an optimiser's step does to them is large. CIFAR-10
(TFDS_DATA_DIR) at 16 x 16 pixels, half of its training set, a tenth of it with a white square of
2 x 2 pixels and label 8; in PyTorch alone, some twenty minutes on one core.
"""

from pathlib import Path

import numpy as np
import torch
import tyro
from PIL import Image
from poisoned_resnet import tensor
from small_resnet import eight_blocks
from torch import nn
from torch.nn import functional

from ibau_jax import load
from ibau_jax.data import data_info

TARGET, RATIO, PLACE = 8, 0.1, slice(13, 15)


def resnet18(num_classes: int = 10) -> nn.Module:
    """He et al., 2016, with the first layer of CIFAR-10. For `ibau defend --torch`."""
    return nn.Sequential(
        nn.Conv2d(3, 64, 3, 1, 1, bias=False),
        *(nn.BatchNorm2d(64), nn.ReLU(), *eight_blocks()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, num_classes)),
    )


def stamped(images: np.ndarray) -> np.ndarray:
    """uint8 [N, 16, 16, 3] with the trigger."""
    images = images.copy()
    images[:, PLACE, PLACE] = 255
    return images


def halved(split: str) -> tuple[np.ndarray, np.ndarray]:
    """uint8 [N, 16, 16, 3], each pixel the mean of four, and int64 [N]."""
    images, labels = load("cifar10", split)
    small = images.reshape(-1, 16, 2, 16, 2, 3).mean((2, 4))
    return np.rint(small * 255).astype(np.uint8), labels.astype(np.int64)


def train(epochs: int, seed: int, size: int = 128) -> nn.Module:
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    images, labels = halved("train[:25000]")
    poisoned = rng.permutation(len(labels))[: int(RATIO * len(labels))]
    images[poisoned], labels[poisoned] = stamped(images[poisoned]), TARGET
    module, steps = resnet18(), epochs * (len(labels) // size)
    optimiser = torch.optim.SGD(module.parameters(), 0.1, 0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 0.1, steps)
    clean = np.setdiff1d(np.arange(len(labels)), poisoned)  # the trigger stays where it is
    for epoch in range(epochs):
        order = rng.permutation(len(labels))
        mirrored = clean[rng.random(len(clean)) < 0.5]
        images[mirrored] = images[mirrored, :, ::-1]
        for start in range(0, len(order) - size + 1, size):
            rows = order[start : start + size]
            loss = functional.cross_entropy(
                module(tensor(images[rows])), torch.from_numpy(labels[rows])
            )
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
        print(f"epoch {epoch + 1}: loss {loss.item():.3f}", flush=True)
    return module.eval()


def write_folder(folder: Path, split: str) -> None:
    """A folder of PNGs for each class, as torchvision's ImageFolder reads them."""
    for number, (image, label) in enumerate(zip(*halved(split), strict=True)):
        name = data_info("cifar10").class_names[label]
        (folder / name).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / name / f"{number}.png")


def main(folder: tyro.conf.Positional[Path], epochs: int = 6, seed: int = 0) -> None:
    module = train(epochs, seed)
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(module.state_dict(), folder / "weights.pth")
    write_folder(folder / "clean", "test[:2000]")
    write_folder(folder / "test", "test[5000:]")
    Image.fromarray(np.full((2, 2, 3), 255, np.uint8)).save(folder / "trigger.png")
    images, labels = halved("test[5000:]")
    with torch.no_grad():
        given, led = (
            torch.cat([module(tensor(part)).argmax(1) for part in np.array_split(x, 20)]).numpy()
            for x in (images, stamped(images))
        )
    asr = (led[labels != TARGET] == TARGET).mean()
    print(f"ACC {(given == labels).mean():.4f} ASR of other labels {asr:.4f}")


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
