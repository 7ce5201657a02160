"""The work of `ibau inspect`."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from ibau_jax.commands.options import AS_STORED, OURS, OwnImages, OwnModel
from ibau_jax.commands.own_model import open_model
from ibau_jax.data import check_accuracy, load_given, note_missing
from ibau_jax.files import make_folder
from ibau_jax.results.inspection import write_inspection
from ibau_jax.results.rows import HTML
from ibau_jax.unlearning.batches import UNTARGETED
from ibau_jax.unlearning.evidence import LEVELS, rule
from ibau_jax.unlearning.look import inspect


def inspect_model(
    model: str | Path,
    *,
    dataset: str | None = None,
    clean: str | None = None,
    no_labels: bool = False,
    seed: int = 0,
    out: str | Path | None = None,
    images: OwnImages = AS_STORED,
    own: OwnModel = OURS,
    data_dir: str | Path | None = None,
    progress: bool = False,
    on_note: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Search a model for what stands out, and write a report; a dict for JSON.

    Args:
      clean: images without the trigger: a split of the data set, a folder or an .npz file.
      no_labels: the labels of the clean images are those that the model gives them.
      out: folder of `report.html`.
      images: how a folder or a file of the user's own is read.
      own: code of the user's own that `model` are the weights for.
      on_note: called with a line for the user, where something is worth knowing.
    """
    stored, _ = open_model(model, own, dataset, images.image_size)
    clean = clean or stored.data_info(dataset).clean
    reader = stored.reader(
        dataset,
        **vars(images),
        data_dir=data_dir,
        progress=progress,
    )
    given = load_given(clean, reader, labelled=not no_labels)
    data = given.data
    notes: list[str | None] = [*given.notes]
    if no_labels:
        data = stored.relabelled(data)
    elif given.own:
        notes.append(note_missing(data.labels, stored.num_classes))
        acc = stored.accuracy(data)
        notes.append(check_accuracy(acc, stored.num_classes, "the clean images"))
    out = Path(out or Path("runs") / f"{Path(model).stem}-inspect-seed{seed}")
    make_folder(out, "out")
    for note in filter(None, notes):
        on_note(note)
    started = time.perf_counter()
    evidence = inspect(
        stored.classifier, stored.variables, data, key=jax.random.key(seed), progress=progress
    )
    names = [geometry.name for geometry in LEVELS]
    found = {
        "verdict": evidence.verdict,
        "reason": evidence.reason,
        "target": evidence.target,
        "flagged": evidence.flagged,
        "all_to_all": UNTARGETED in evidence.suspects,
        "label_rule": evidence.rule.tolist() if UNTARGETED in evidence.suspects else None,
        "labels": [
            {
                "label": label,
                "strength": dict(zip(names, map(float, strength), strict=True)),
                "score": float(score),
            }
            for label, (strength, score) in enumerate(
                zip(evidence.strength.T, evidence.score, strict=True)
            )
        ],
        "misled": evidence.misled,
        "alike": evidence.alike,
        "levels": {geometry.name: level for geometry, level in LEVELS.items()},
        "rule": rule(),
        "seconds": time.perf_counter() - started,
        "dataset": dataset or stored.dataset,
        "clean": clean,
        **({"classes": given.classes} if given.classes else {}),
        "n_clean": len(data.labels),
        "clean_labels": "predicted" if no_labels else "given",
        "seed": seed,
        "model": str(model),
        "model_hash": stored.hash,
        "report": str(out / HTML),
    }
    write_inspection(out, found, evidence.pictures())
    return found
