"""A backdoored model as people hold it: a PyTorch state dict and folders of PNGs.

    python experiments/own/poisoned_resnet.py FOLDER
    ibau defend --model FOLDER/weights.pth --torch experiments/own/small_resnet.py:small_resnet \\
        --mean .4914,.4822,.4465 --std .247,.243,.261 --clean FOLDER/clean --split FOLDER/test \\
        --trigger FOLDER/trigger.png --trigger-at 28,28 --target 8 --out FOLDER/run
    python experiments/own/poisoned_resnet.py FOLDER --measure FOLDER/run/cleaned.pth

Trains on CIFAR-10 (TFDS_DATA_DIR; read through ibau_jax), a tenth of it with a white square of 3x3
pixels and label 8, in PyTorch alone, some minutes on two cores. `--measure` prints ACC and ASR (of
images of other labels, and of all) of a state dict as PyTorch computes them from the folder.
"""

from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import tyro
from PIL import Image
from small_resnet import small_resnet
from torch.nn import functional

from ibau_jax import load
from ibau_jax.data import data_info

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.247, 0.243, 0.261)
TARGET, RATIO, PLACE = 8, 0.1, slice(28, 31)


def stamped(images: np.ndarray) -> np.ndarray:
    """uint8 [N, 32, 32, 3] with the trigger."""
    images = images.copy()
    images[:, PLACE, PLACE] = 255
    return images


def tensor(images: np.ndarray) -> torch.Tensor:
    """uint8 [N, H, W, 3] -> normalised [N, 3, H, W]."""
    x = torch.from_numpy(images.astype(np.float32) / 255)
    return ((x - torch.tensor(MEAN)) / torch.tensor(STD)).permute(0, 3, 1, 2).contiguous()


def train(epochs: int, seed: int) -> torch.nn.Module:
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    data = load("cifar10", "train")
    images = np.rint(data.images * 255).astype(np.uint8)
    labels = data.labels.astype(np.int64)
    poisoned = rng.permutation(len(labels))[: int(RATIO * len(labels))]
    images[poisoned], labels[poisoned] = stamped(images[poisoned]), TARGET
    module, size = small_resnet(), 128
    steps = epochs * (len(labels) // size)
    optimiser = torch.optim.SGD(module.parameters(), 0.1, 0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 0.1, steps)
    for epoch in range(epochs):
        order = rng.permutation(len(labels))
        for start in range(0, len(order) - size + 1, size):
            rows = order[start : start + size]
            x = tensor(images[rows])
            if rng.random() < 0.5:
                x = x.flip(3)
            loss = functional.cross_entropy(module(x), torch.from_numpy(labels[rows]))
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
        print(f"epoch {epoch + 1}: loss {loss.item():.3f}", flush=True)
    return module


def write_folder(folder: Path, split: str) -> None:
    """A folder of PNGs for each class, as torchvision's ImageFolder reads them."""
    data = load("cifar10", split)
    for number, (image, label) in enumerate(zip(*data, strict=True)):
        name = data_info("cifar10").class_names[label]
        (folder / name).mkdir(parents=True, exist_ok=True)
        pixels = np.rint(image * 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / name / f"{number}.png")


def measure(module: torch.nn.Module, folder: Path) -> str:
    """ACC and ASR on a folder of PNGs."""
    names = sorted(path.name for path in folder.iterdir())
    paths = [
        (path, i) for i, name in enumerate(names) for path in sorted((folder / name).iterdir())
    ]
    images = np.stack([np.asarray(Image.open(path)) for path, _ in paths])
    labels = np.array([label for _, label in paths])
    module.eval()

    def predicted(images: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            parts = [module(tensor(part)) for part in np.array_split(images, 20)]
        return torch.cat(parts).argmax(1).numpy()

    hit, others = predicted(stamped(images)) == TARGET, labels != TARGET
    acc = (predicted(images) == labels).mean()
    return f"ACC {acc:.4f}, ASR {hit.mean():.4f}, excl. {hit[others].mean():.4f} ({len(labels)})"


def main(
    folder: tyro.conf.Positional[Path],
    measure_: Annotated[Path | None, tyro.conf.arg(name="measure")] = None,
    epochs: int = 8,
    seed: int = 0,
) -> None:
    if measure_ is not None:
        module = small_resnet()
        module.load_state_dict(torch.load(measure_, weights_only=True), strict=True)
    else:
        folder.mkdir(parents=True, exist_ok=True)
        module = train(epochs, seed)
        torch.save(module.state_dict(), folder / "weights.pth")
        write_folder(folder / "clean", "test[:1000]")
        write_folder(folder / "test", "test[5000:7000]")
        Image.fromarray(np.full((3, 3, 3), 255, np.uint8)).save(folder / "trigger.png")
    print(measure(module, folder / "test"))


if __name__ == "__main__":
    tyro.cli(main)
