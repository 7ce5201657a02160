"""Options that several commands have: their types, their help, and what is made of them."""

import os
import sys
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import arg

from ibau_jax.attacks import ATTACKS
from ibau_jax.commands.attack_options import read_trigger
from ibau_jax.data import DATASETS
from ibau_jax.defenses import DEFENSES
from ibau_jax.devices import processes
from ibau_jax.errors import InputError

DATASET_NAMES = ", ".join(DATASETS)
DEFENSE_NAMES = ", ".join(DEFENSES)
ATTACK_NAMES = ", ".join(ATTACKS)
# Of `models.architectures`, which imports JAX.
ARCHITECTURE_NAMES = "vgg, preact-resnet18, preact-resnet18-16, vit-tiny, vit-mini"

DataDir = Annotated[
    Path | None,
    arg(help="folder of TensorFlow Datasets; default: TFDS_DATA_DIR, else TFDS's own"),
]
AsJson = Annotated[bool, arg(help="print one JSON object on stdout")]
Seed = Annotated[int, arg(help="seed of everything that is random")]
DataName = Annotated[str | None, arg(help=f"{DATASET_NAMES}; default: the model's own")]
OWN_IMAGES = "or a folder with a folder for each class, or an .npz file of images and labels"
Classes = Annotated[
    Path | None,
    arg(
        help="text file with the name of each class, one a line, in the order of the labels; "
        "default: the sorted names of the folders"
    ),
]
ImageSize = Annotated[
    int | None,
    arg(help="resize the shorter side of your own images to it, and crop the centre"),
]
Exif = Annotated[
    bool,
    arg(
        help="turn pictures in a folder as their EXIF data say; off, since PIL and torchvision, "
        "and so most trainings, leave them as they are stored"
    ),
]
NoLabels = Annotated[
    bool, arg(help="the clean images have no labels that count: take those that the model gives")
]
Target = Annotated[int | None, arg(help="label that triggered images shall get")]
OwnScenario = Annotated[
    str | None,
    arg(
        help="of --attack or --trigger: one-target or all-to-all (y becomes y + 1); default: the "
        "model's own, else one-target"
    ),
]
TriggerFile = Annotated[Path | None, arg(help="picture of a trigger, 32x32")]
TriggerRule = Annotated[
    str | None,
    arg(
        help="of --trigger, blend or smooth: add (default), clip(image + trigger), renormalise, "
        "image + trigger brought to [0, 1], or replace, image * (1 - mask) + trigger (blend: the "
        "convex mix; not of smooth)"
    ),
]
NumDevices = Annotated[int | None, arg(help="GPUs, TPU cores or CPUs to use; default: all")]
Coordinator = Annotated[
    str | None,
    arg(help="several machines: HOST:PORT of process 0, or auto (SLURM, Open MPI, TPU pods)"),
]
NumProcesses = Annotated[int | None, arg(help="several machines: how many processes")]
ProcessId = Annotated[int | None, arg(help="several machines: which one this is, from 0")]
TriggerMask = Annotated[
    Path | None,
    arg(
        help="for the rule replace: an .npy file [32, 32], values from 0 to 1; default: where the "
        "picture is opaque"
    ),
]


def join(coordinator: str | None, num_processes: int | None, process_id: int | None) -> None:
    if coordinator is not None:
        # Gloo, which connects CPUs, talks on stdout; that is for results alone.
        results = os.dup(1)
        os.dup2(2, 1)
        sys.stdout = open(results, "w")  # noqa: SIM115  (until the process ends)
        processes.start(coordinator, num_processes, process_id)
    elif num_processes is not None or process_id is not None:
        raise InputError(
            "--num-processes or --process-id without --coordinator: give HOST:PORT of process 0"
        )


def trigger_options(path: Path | None, rule: str | None, mask: Path | None) -> dict[str, Any]:
    """Arguments of `make_attacks` for the options of a trigger of one's own."""
    if path is not None:
        own = read_trigger(path, rule or "add", mask)
        return {"trigger": own, "rule": None, "trigger_name": path.stem}
    if mask is not None:
        raise InputError("a trigger mask without a trigger: give the picture by --trigger")
    return {"rule": rule}
