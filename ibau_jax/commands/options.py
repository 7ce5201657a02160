"""Options that several commands have: their types, their help, and what is made of them.

What imports JAX is imported where it is used: `ibau --help` needs none of it.
"""

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import arg

from ibau_jax.commands.names import ARCHITECTURES, ATTACKS, DATASETS, DEFENSES
from ibau_jax.errors import InputError

DATASET_NAMES = ", ".join(DATASETS)
DEFENSE_NAMES = ", ".join(DEFENSES)
ATTACK_NAMES = ", ".join(ATTACKS)
ARCHITECTURE_NAMES = ", ".join(ARCHITECTURES)

DataDir = Annotated[
    Path | None,
    arg(help="folder of TensorFlow Datasets; default: TFDS_DATA_DIR, else TFDS's own"),
]
AsJson = Annotated[bool, arg(help="print one JSON object on stdout")]
Seed = Annotated[int, arg(help="seed of everything that is random")]
DataName = Annotated[str | None, arg(help=f"{DATASET_NAMES}; default: the model's own")]
OWN_IMAGES = "or a folder with a folder for each class, or an .npz file of images and labels"
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
TriggerFile = Annotated[
    Path | None, arg(help="picture of a trigger, as large as the images (32x32)")
]
TriggerRule = Annotated[
    str | None,
    arg(
        help="of --trigger, blend or smooth: add (default), clip(image + trigger), renormalise, "
        "image + trigger brought to [0, 1], or replace, image * (1 - mask) + trigger (blend: the "
        "convex mix; not of smooth)"
    ),
]
NumDevices = Annotated[int | None, arg(help="GPUs, TPU cores or CPUs to use; default: all")]
TriggerMask = Annotated[
    Path | None,
    arg(
        help="for the rule replace: an .npy file [32, 32], values from 0 to 1; default: where the "
        "picture is opaque"
    ),
]


@dataclass(frozen=True)
class OwnImages:
    """How images of your own are read."""

    classes: Annotated[
        Path | None,
        arg(
            help="text file with the name of each class, one a line, in the order of the labels; "
            "default: the sorted names of the folders"
        ),
    ] = None
    image_size: Annotated[
        int | None,
        arg(help="resize the shorter side of your own images to it, and crop the centre"),
    ] = None
    exif: Annotated[
        bool,
        arg(
            help="turn pictures in a folder as their EXIF data say; off, since PIL and "
            "torchvision, and so most trainings, leave them as they are stored"
        ),
    ] = False


AS_STORED = OwnImages()


@dataclass(frozen=True)
class Measured:
    """An attack to measure the ASR of; default: those in the model's file."""

    attack: Annotated[
        str | None,
        arg(
            help="by name; the label rule is the model's own (of a clean model: the paper's). Of a "
            "model of your own: badnets or blend with --target, or any name for --trigger"
        ),
    ] = None
    scenario: OwnScenario = None
    target: Target = None
    trigger: TriggerFile = None
    trigger_rule: TriggerRule = None
    trigger_mask: TriggerMask = None
    trigger_at: Annotated[
        str | None,
        arg(
            help="X,Y of the left upper corner of the picture in the images, where it is smaller; "
            "the rule is then replace by default (models of your own)"
        ),
    ] = None


IN_THE_FILE = Measured()
CODE = "package.module:Name or file.py:Name, called with --model-args"


@dataclass(frozen=True)
class OwnModel:
    """A model of your own: weights by --model, and its code, which is imported and run."""

    torch: Annotated[
        str | None,
        arg(
            help=f"a torch.nn.Module: {CODE}; or torchvision:NAME, timm:NAME, transformers:NAME "
            "(needs the extra 'torch')"
        ),
    ] = None
    linen: Annotated[str | None, arg(help=f"a flax.linen module: {CODE}")] = None
    nnx: Annotated[str | None, arg(help=f"a flax.nnx module: {CODE}")] = None
    equinox: Annotated[str | None, arg(help=f"an Equinox module: {CODE}")] = None
    model_args: Annotated[
        str | None, arg(help="keyword arguments as JSON, such as '{\"num_classes\": 10}'")
    ] = None
    mean: Annotated[
        str | None,
        arg(
            help="R,G,B of images in [0, 1], where the model wants normalised ones; perturbations "
            "lie in front of the normalisation"
        ),
    ] = None
    std: Annotated[str | None, arg(help="R,G,B, as --mean")] = None


OURS = OwnModel()


@dataclass(frozen=True)
class Machines:
    """Several machines, or processes, that compute together."""

    coordinator: Annotated[
        str | None,
        arg(help="HOST:PORT of process 0, or auto (SLURM, Open MPI, TPU pods)"),
    ] = None
    num_processes: Annotated[int | None, arg(help="how many processes")] = None
    process_id: Annotated[int | None, arg(help="which one this is, from 0")] = None


ALONE = Machines()


def join(machines: Machines) -> None:
    """Join the other processes, before anything computes."""
    if machines.coordinator is not None:
        from ibau_jax.devices import processes

        # Gloo, which connects CPUs, talks on stdout; that is for results alone.
        results = os.dup(1)
        os.dup2(2, 1)
        sys.stdout = open(results, "w")  # noqa: SIM115  (until the process ends)
        processes.start(machines.coordinator, machines.num_processes, machines.process_id)
    elif machines.num_processes is not None or machines.process_id is not None:
        raise InputError(
            "--num-processes or --process-id without --coordinator: give HOST:PORT of process 0"
        )
