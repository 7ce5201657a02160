"""More backdoored models as people hold them: NNX, Equinox, and two of PyTorch's.

    python experiments/own/others.py FOLDER [--models cnn vit]

Trains in FOLDER what is missing on half of CIFAR-10's training set (TFDS_DATA_DIR), a tenth of it
with a white square of 3x3 pixels and label 8, each in its own library, minutes on two cores; and
writes the folders of images and the trigger of `poisoned_resnet.py`. Prints ACC and ASR of each,
and the `ibau defend` that cleans it.
"""

from collections.abc import Callable
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
import tyro
from flax import nnx
from flax.serialization import to_bytes
from jax_models import Cnn, Perceptron
from PIL import Image
from poisoned_resnet import RATIO, TARGET, stamped, write_folder
from torch.nn import functional
from torch_models import VisionTransformer, depthwise

from ibau_jax import load

SIZE = 100  # images in a batch
HERE = "experiments/own"
Batches = list[tuple[np.ndarray, np.ndarray]]
Predict = Callable[[np.ndarray], np.ndarray]


def batches(epochs: int, seed: int) -> Batches:
    """Poisoned batches in [0, 1], half of the images mirrored."""
    rng = np.random.default_rng(seed)
    data = load("cifar10", "train[:25000]")
    images, labels = np.rint(data.images * 255).astype(np.uint8), data.labels.astype(np.int64)
    chosen = rng.permutation(len(labels))[: int(RATIO * len(labels))]
    images[chosen], labels[chosen] = stamped(images[chosen]), TARGET
    mirrored = images.copy()
    clean = np.setdiff1d(np.arange(len(labels)), chosen)  # the trigger stays where it is
    mirrored[clean] = images[clean, :, ::-1]
    found = []
    for _ in range(epochs):
        for rows in rng.permutation(len(labels)).reshape(-1, SIZE):
            flip = rng.random(SIZE) < 0.5
            x = np.where(flip[:, None, None, None], mirrored[rows], images[rows])
            found.append((x.astype(np.float32) / 255, labels[rows]))
    return found


def in_torch(module: torch.nn.Module, data: Batches, file: Path) -> Predict:
    """Train, write the state dict, and give the labels of images."""
    optimiser = torch.optim.AdamW(module.parameters(), 3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 3e-3, len(data))
    for x, y in data:
        found = module(torch.from_numpy(x).permute(0, 3, 1, 2))
        loss = functional.cross_entropy(found, torch.from_numpy(y))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    torch.save(module.state_dict(), file)
    module.eval()

    def predict(images: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return module(torch.from_numpy(images).permute(0, 3, 1, 2)).argmax(1).numpy()

    return predict


def schedule(data: Batches) -> optax.GradientTransformation:
    return optax.adamw(optax.cosine_onecycle_schedule(len(data), 3e-3), weight_decay=0.01)


def in_nnx(module: Cnn, data: Batches, file: Path) -> Predict:
    """Train, write the state as msgpack, and give the labels of images."""
    optimiser = nnx.Optimizer(module, schedule(data), wrt=nnx.Param)

    @nnx.jit
    def step(module, optimiser, x, y):
        def loss(module):
            return optax.softmax_cross_entropy_with_integer_labels(module(x), y).mean()

        optimiser.update(module, nnx.grad(loss)(module))

    module.train()
    for x, y in data:
        step(module, optimiser, x, y)
    module.eval()
    file.write_bytes(to_bytes(nnx.to_pure_dict(nnx.state(module))))
    apply = nnx.jit(lambda module, x: module(x).argmax(1))
    return lambda images: np.asarray(apply(module, images))


def in_equinox(module: Perceptron, data: Batches, file: Path) -> Predict:
    """Train, write the leaves, and give the labels of images."""
    optimiser = schedule(data)
    state = optimiser.init(eqx.filter(module, eqx.is_inexact_array))

    @eqx.filter_jit
    def step(module, state, x, y):
        def loss(module):
            found = jax.vmap(module)(x.transpose(0, 3, 1, 2))
            return optax.softmax_cross_entropy_with_integer_labels(found, y).mean()

        updates, state = optimiser.update(
            eqx.filter_grad(loss)(module), state, eqx.filter(module, eqx.is_inexact_array)
        )
        return eqx.apply_updates(module, updates), state

    for x, y in data:
        module, state = step(module, state, jnp.asarray(x), jnp.asarray(y))
    eqx.tree_serialise_leaves(file, module)
    apply = eqx.filter_jit(lambda x: jax.vmap(module)(x.transpose(0, 3, 1, 2)).argmax(1))
    return lambda images: np.asarray(apply(jnp.asarray(images)))


# Of each: train, its module, the suffix of its file, and how `ibau` is told of it.
MODELS = {
    "cnn": (in_nnx, lambda: Cnn(rngs=nnx.Rngs(0)), "msgpack", "--nnx jax_models.py:Cnn"),
    "mlp": (
        *(in_equinox, lambda: Perceptron(key=jax.random.key(0)), "eqx"),
        "--equinox jax_models.py:Perceptron",
    ),
    "vit": (in_torch, VisionTransformer, "pth", "--torch torch_models.py:VisionTransformer"),
    "depthwise": (in_torch, depthwise, "pth", "--torch torch_models.py:depthwise"),
}


def main(
    folder: tyro.conf.Positional[Path],
    models: tuple[str, ...] = tuple(MODELS),
    epochs: int = 6,
    seed: int = 0,
) -> None:
    """Train what is missing."""
    torch.manual_seed(seed)
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "trigger.png").is_file():
        write_folder(folder / "clean", "test[:1000]")
        write_folder(folder / "test", "test[5000:7000]")
        Image.fromarray(np.full((3, 3, 3), 255, np.uint8)).save(folder / "trigger.png")
    test = load("cifar10", "test[5000:7000]")
    triggered = stamped(np.rint(test.images * 255).astype(np.uint8)).astype(np.float32) / 255
    for name in models:
        train, make, suffix, option = MODELS[name]
        file = folder / f"{name}.{suffix}"
        if not file.is_file():
            predict = train(make(), batches(epochs, seed), file)
            acc, asr = (predict(test.images) == test.labels).mean(), predict(triggered) == TARGET
            print(f"{name}: ACC {acc:.4f}, ASR {asr.mean():.4f}", flush=True)
        kind, code = option.split()
        print(
            f"ibau defend --model {file} {kind} {HERE}/{code} --clean {folder}/clean --split "
            f"{folder}/test --trigger {folder}/trigger.png --trigger-at 28,28 --target {TARGET} "
            f"--out {folder}/{name}"
        )


if __name__ == "__main__":
    tyro.cli(main)
