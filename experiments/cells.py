"""What the tables are made of: a defense with a preset and a seed on a poisoned model; plain data.

`experiments/measure.py` measures them. Each table, figure and page of `experiments/` names the
cells that it wants (`GRIDS`), and one row of a cell serves all of them.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from paper.published import COLUMNS, TABLES


@dataclass(frozen=True)
class Cell:
    """One run of `ibau defend`.

    Attributes:
      model: of `MODELS`, or one that `experiments/unseen.py` makes.
      method: of `METHODS`.
      images: of the clean set; None: as many as `ibau defend` takes of the data set (5000).
      rounds: None: those of the preset.
    """

    model: str
    method: str = "ibau"
    seed: int = 0
    images: int | None = None
    rounds: int | None = None


class Method(NamedTuple):
    """A defense of `ibau defend` with a preset; None: its own."""

    defense: str
    preset: str | None = None


SLOW = ("neural-cleanse", "deepinspect", "tabor", "dp-sgd", "nad", "fine-pruning", "naive", "anp")
OTHERS = ("finetune", "clp", "ft-sam", "sau", *SLOW)
METHODS = {
    "ibau": Method("ibau"),
    # What was the default before it searched, and the authors' procedure.
    "ibau-untargeted": Method("ibau", "untargeted"),
    "ibau-published": Method("ibau", "published"),
    "ibau-algorithm1": Method("ibau", "algorithm1"),
    **{name: Method(name) for name in OTHERS},
}

ATTACKS = ("badnets", "blend", "l0", "l2", "smooth", "trojan-square", "trojan-watermark")
ONE_TARGET = {data: tuple(f"{data}-{a}" for a in ATTACKS) for data in ("cifar10", "gtsrb")}
CLEAN = ("cifar10-clean", "gtsrb-clean")
ZOO = (
    *(f"{d}-{a}" for d in ONE_TARGET for a in (*ATTACKS, "all-to-all", "seven-target")),
    *("cifar10-trojan-watermark-0.05", "cifar10-trojan-watermark-0.005"),
    *CLEAN,
)
PUBLISHED = ("BadNets", "l2", "Trojan WM", "GTSRB BadNets", "GTSRB Trojan WM")
MODELS = (*ZOO, *PUBLISHED)
# Beside the published models, those on which all thirteen defenses are compared.
COMPARED = (
    *PUBLISHED,
    *("cifar10-l0", "cifar10-smooth", "cifar10-blend", "cifar10-all-to-all"),
    *("cifar10-seven-target", "gtsrb-all-to-all", "gtsrb-trojan-square"),
)
# Of `experiments/unseen.py`, those that no choice has seen.
UNSEEN = (
    *(f"digits-{i}" for i in range(10, 20)),
    *(f"digits-clean-{i}" for i in range(10, 13)),
    *("cifar10-sinusoid", "cifar10-coloured", "cifar10-shift", "cifar10-patch-0.01"),
)
SEEDS = (0, 1, 2)
MORE_SEEDS = ("ibau", "ibau-published", "ft-sam", "sau")  # methods that get all of them


def columns(name: str) -> tuple[str, ...]:
    """A table's own columns, the published procedure, and fine-tuning as the control."""
    return (*COLUMNS[name], "ibau-published", "finetune")


def seeds_of(method: str) -> tuple[int, ...]:
    return SEEDS if method in MORE_SEEDS else SEEDS[:1]


def of_table(name: str) -> Iterator[Cell]:
    """The cells of a table; `none` needs no run."""
    for case in TABLES[name]:
        model, images = split(case)
        for method in columns(name):
            if method != "none":
                yield from (Cell(model, method, seed, images) for seed in seeds_of(method))


def split(case: str) -> tuple[str, int | None]:
    """The model of a table's case, and how many clean images."""
    model, _, images = case.partition(":")
    return model, int(images) if images else None


def compared() -> Iterator[Cell]:
    for method in METHODS:
        if method not in ("ibau-published", "ibau-algorithm1"):
            for seed in seeds_of(method):
                yield from (Cell(model, method, seed=seed) for model in COMPARED)


def presets() -> Iterator[Cell]:
    """README's table of the published models."""
    for method in ("ibau", "ibau-untargeted", "ibau-published", "ibau-algorithm1"):
        # Algorithm 1 patches every image, so its seed changes nothing.
        for seed in SEEDS if method != "ibau-algorithm1" else SEEDS[:1]:
            yield from (Cell(model, method, seed=seed) for model in PUBLISHED)


FEW = tuple(
    Cell("Trojan WM", seed=seed, images=images) for images in (100, 500, 2500) for seed in range(5)
)
NAIVE = tuple(
    Cell("cifar10-badnets", method, seed=seed, rounds=3)
    for seed in range(20)
    for method in ("naive", "ibau", "ibau-published")
)
MANY_ROUNDS = {"cifar10-all-to-all": 10, "gtsrb-all-to-all": 10} | {
    "cifar10-seven-target": 20,
    "gtsrb-seven-target": 10,
}


def many_rounds(scenario: str) -> Iterator[Cell]:
    for method in ("ibau-published", "ibau"):
        for model, rounds in MANY_ROUNDS.items():
            if model.endswith(scenario):
                yield Cell(model, method, rounds=rounds if method == "ibau-published" else None)


GRIDS: dict[str, tuple[Cell, ...]] = {
    "compared": tuple(compared()),
    "presets": tuple(presets()),
    "holds": tuple(Cell(model, seed=seed) for seed in (0, 1) for model in MODELS),
    "unseen": tuple(Cell(model) for model in UNSEEN),
    "few": FEW,
    **{name: tuple(of_table(name)) for name in TABLES},
    "figure1": NAIVE,
    "figure4": tuple(many_rounds("all-to-all")),
    "figure5": tuple(many_rounds("seven-target")),
    "false-alarm": tuple(Cell(m, n) for n in METHODS for m in CLEAN if n != "ibau-algorithm1"),
}
