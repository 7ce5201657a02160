"""The work of `ibau evaluate`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ibau_jax.attacks import described
from ibau_jax.commands.measured import measured_attacks
from ibau_jax.commands.options import AS_STORED, IN_THE_FILE, OURS, Measured, OwnImages, OwnModel
from ibau_jax.commands.own_model import open_model
from ibau_jax.data import load_given, note_accuracy
from ibau_jax.results.metrics import evaluator


def evaluate_model(
    model: str | Path,
    *,
    dataset: str | None = None,
    split: str | None = None,
    images: OwnImages = AS_STORED,
    own: OwnModel = OURS,
    data_dir: str | Path | None = None,
    progress: bool = False,
    on_note: Callable[[str], None] = lambda text: None,
    measured: Measured = IN_THE_FILE,
) -> dict[str, Any]:
    """ACC, and ASR for the attacks in the model's file, or another one; a dict for JSON.

    Args:
      split: images to measure by: a split of the data set, a folder or an .npz file.
      images: how a folder or a file of the user's own is read.
      own: code of the user's own that `model` are the weights for.
      progress: show a bar on stderr while a folder is read.
      on_note: called with a line for the user, where something is worth knowing.
      measured: the attack to measure the ASR of.
    """
    loaded, _ = open_model(model, own, dataset, images.image_size)
    split = split or loaded.data_info(dataset).split
    name = dataset or loaded.dataset
    attacks = measured_attacks(loaded, name, measured)
    reader = loaded.reader(
        dataset,
        **vars(images),
        data_dir=data_dir,
        progress=progress,
    )
    given = load_given(split, reader, what="evaluation")
    if loaded.model is not None:
        attacks = measured_attacks(loaded, name, measured, given.data.images.shape[1:])
    measure = evaluator(loaded.classifier, given.data, attacks)
    found = measure(loaded.variables)
    doubt = note_accuracy(found.acc, "these images") if given.own else None
    for note in filter(None, (*given.notes, doubt)):
        on_note(note)
    return {
        **found.row(),
        "dataset": name,
        "split": split,
        **({"classes": given.classes} if given.classes else {}),
        **described(attacks),
        "model": str(model),
        "model_hash": loaded.hash,
    }
