"""The work of `ibau defend`."""

from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

from ibau_jax.attacks import described
from ibau_jax.commands.measured import measured_attacks
from ibau_jax.commands.options import AS_STORED, IN_THE_FILE, OURS, Measured, OwnImages, OwnModel
from ibau_jax.commands.own_file import add_to, save_own
from ibau_jax.commands.own_model import open_model
from ibau_jax.data import Dataset, check_accuracy, load_both, note_missing
from ibau_jax.defenses import find, with_rounds
from ibau_jax.defenses.run import Result
from ibau_jax.devices import mesh, processes
from ibau_jax.errors import InputError
from ibau_jax.files import make_folder
from ibau_jax.models.files import save_model
from ibau_jax.models.predict import predict
from ibau_jax.models.stored import StoredModel
from ibau_jax.results.metrics import Metrics, defense_effectiveness, evaluator
from ibau_jax.results.report import write_report
from ibau_jax.results.rows import (
    CLEANED,
    HTML,
    PARTIAL,
    ROWS,
    Pictures,
    versions,
    write_pictures,
    write_rows,
)
from ibau_jax.training.optimizers import shown
from ibau_jax.unlearning.batches import images_a_batch
from ibau_jax.unlearning.config import IBAUConfig

Json = dict[str, Any]
Note = Callable[[str], None]


def defend(
    model: str | Path,
    *,
    defense: str = "ibau",
    preset: str | None = None,
    dataset: str | None = None,
    clean: str | None = None,
    no_labels: bool = False,
    split: str | None = None,
    rounds: int | None = None,
    poison_ratio: float | None = None,
    images: OwnImages = AS_STORED,
    own: OwnModel = OURS,
    measured: Measured = IN_THE_FILE,
    seed: int = 0,
    out: str | Path | None = None,
    data_dir: str | Path | None = None,
    progress: bool = False,
    experiment: str = "defend",
    on_note: Note = lambda text: None,
    num_devices: int | None = None,
) -> Json:
    """Clean a model, measure it before, after and after each round, and write all of it to `out`.

    With many processes the first one writes, and each returns the same.

    Args:
      clean, split: a split of the data set, a folder or an .npz file each. Without `split`, half of
        the user's own clean images is held out to measure by.
      no_labels: the labels of the clean images are those that the model gives them.
      rounds: what a round is depends on the defense; mostly a pass over the clean set.
      poison_ratio: of the training set, for a defense that trains on it; None: as the model's
        file says.
      images: how a folder or a file of the user's own is read.
      measured: the attack to measure the ASR of; a defense does not see it.
      own: code of the user's own that `model` are the weights for.
      num_devices: how many to compute on; None: all.
      on_note: called with a line for the user, where something is worth knowing.

    Returns:
      The JSON of `ibau defend`; the folder holds `cleaned.safetensors`, `rows.jsonl`,
      `report.npz`, `report.html`, and where triggers were found their pictures.
    """
    stored, back = open_model(model, own, dataset, images.image_size)
    reader = stored.reader(
        dataset,
        **vars(images),
        data_dir=data_dir,
        progress=progress and processes.is_first(),
    )
    name = dataset or stored.dataset
    found, preset, config = find(defense, preset, name)
    if poison_ratio is not None and not (found.train_set and stored.attacks):
        raise InputError(
            f"a poison ratio for {defense} and {str(model)!r}: expected a defense that trains on "
            "the training set (dp-sgd) and a model with an attack in its file; leave it out",
            argument="poison_ratio",
        )
    attacks = measured_attacks(stored, name, measured)
    if rounds is not None:
        config = with_rounds(config, rounds)
    given, other = load_both(clean, split, reader, labelled=not no_labels, seed=seed)
    clean_set, held_out = given.data, other.data
    if back:
        attacks = measured_attacks(stored, name, measured, clean_set.images.shape[1:])
    if no_labels:
        clean_set = stored.relabelled(clean_set)
    devices, first = mesh.devices(num_devices), processes.is_first()
    notes: list[str | None] = [*given.notes, *other.notes]
    notes.append(note_missing(clean_set.labels, stored.num_classes))
    if given.own and not no_labels:
        acc, what = stored.accuracy(given.data), "the clean images"
        notes.append(check_accuracy(acc, stored.num_classes, what))
    elif other.own:
        acc, what = stored.accuracy(other.data), "the images to measure by"
        notes.append(check_accuracy(acc, stored.num_classes, what))
    out = Path(out or Path("runs") / f"{Path(model).stem}-{defense}-{preset}-seed{seed}")
    if first:
        make_folder(out, "out")
    weights = out / (CLEANED if back is None else f"cleaned{back.suffix}")
    notes += _about_batches(config, len(clean_set.labels), len(devices.all))
    if found.train_set and clean is not None:
        notes.append(
            f"{defense} trains on the training set: the images of --clean are checked only"
        )
    for note in filter(None, notes if first else ()):
        on_note(note)
    ratio = stored.info.get("poison_ratio") if poison_ratio is None else poison_ratio
    more = {}
    if found.train_set:
        more["train_set"] = stored.train_set(stored.data_info(dataset), ratio, data_dir)
        if more["train_set"] is None:
            raise InputError(
                f"{defense} trains on the poisoned training set, and {str(model)!r} does not say "
                "how much of it was poisoned: give a model file made by `ibau train`, or the ratio",
                argument="poison_ratio",
            )
    measure = evaluator(stored.classifier, held_out, attacks)
    about = described(attacks)
    names = given.classes or other.classes
    of_images = {"clean": given.name, "split": other.name} | ({"classes": names} if names else {})
    common: Json = {
        "experiment": experiment,
        "dataset": name,
        "attack": about["attack"],
        "scenario": about["scenario"],
        "defense": defense,
        "preset": preset,
        "seed": seed,
        "n_clean": len(clean_set.labels),
        "clean_labels": "predicted" if no_labels else "given",
        **of_images,
        "poison_ratio": ratio,
        "device": jax.devices()[0].device_kind,
        "num_devices": len(devices.all),
        "versions": versions(),
        "model_hash": stored.hash,
        "config": _settings(config),
        **({"own": stored.info["own"]} if back else {}),
    }
    run = found.method.run(
        stored.classifier,
        stored.variables,
        clean_set,
        config=config,
        key=jax.random.key(seed),
        progress=progress and first,
        devices=devices,
        **more,
    )
    metrics: list[Metrics] = []
    rows: list[Json] = []
    for record in run:
        metrics.append(measure(record.params))
        record.row.update(metrics[-1].row())
        der = defense_effectiveness(metrics[0], metrics[-1]) if rows else None
        rows.append({**common, **record.row, "der": der})
        if first:
            write_rows(out / PARTIAL, rows)
    result = run.result(evaluate=lambda params: measure(params).row())

    told = dict(result.diagnostics)
    if first and told.get("note") not in (None, *notes):
        on_note(told["note"])
    flagged = {name: told.pop(name) for name in ("flagged", "verdict", "reason") if name in told}
    for row in rows:
        row |= {"compile_seconds": result.compile_seconds, **flagged}
    if first:
        used = {"defense": defense, "preset": preset, "seed": seed}
        variables = jax.tree.map(np.asarray, result.params)
        if back is None:
            info = {**stored.info, "cleaned_by": used}
            save_model(weights, replace(stored, variables=variables, info=info))
        else:
            if differs := back.write(weights, variables):
                on_note(differs)
            own_of = {**stored.info["own"], "cleaned_by": used}
            if weights == out / CLEANED:
                add_to(weights, own_of)
            else:
                save_own(out / CLEANED, back.tensors(variables), own_of)
        write_pictures(out, _pictures(replace(stored, attacks=attacks), result, held_out))
        write_rows(out / ROWS, rows)
        (out / PARTIAL).unlink(missing_ok=True)
        write_report(out)
    keys = ("round", "acc", "asr", "asr_excl", "ra", "delta_norm", "seconds")
    return {
        "before": metrics[0].row(),
        "after": metrics[-1].row(),
        "der": rows[-1]["der"],
        "rounds": [{k: row.get(k) for k in keys} for row in rows[1:]],
        "seconds": result.seconds,
        "compile_seconds": result.compile_seconds,
        "model": str(out / CLEANED),
        **({"weights": str(weights)} if back else {}),
        "report": str(out / HTML),
        **flagged,
        "diagnostics": told,
        "defense": defense,
        "preset": preset,
        "dataset": name,
        **of_images,
        "seed": seed,
    }


def _about_batches(config: Any, count: int, num_devices: int) -> list[str]:
    """What to tell where a clean set is small for the batches or the devices."""
    if not isinstance(config, IBAUConfig):
        return []
    notes, batch = [], images_a_batch(config, count)
    if count < (config.batch_size or 10):
        notes.append(
            f"the clean set has {count} images, fewer than a batch of "
            f"{config.batch_size or 10}: it is used as one batch"
        )
    if num_devices > batch:
        notes.append(
            f"{num_devices} devices for batches of {batch} images: {num_devices - batch} "
            "of them have nothing to do"
        )
    return notes


def _settings(config: Any) -> Json:
    """Fields of a config for JSON (`dataclasses.asdict` would take the solver apart)."""
    values = {f.name: getattr(config, f.name) for f in fields(config)}
    return {k: _words(v) for k, v in values.items()}


def _words(value: Any) -> Any:
    if callable(value) or isinstance(value, optax.GradientTransformation):
        return shown(value)
    return repr(value) if is_dataclass(value) else value


def _pictures(model: StoredModel, result: Result, held_out: Dataset, count: int = 12) -> Pictures:
    """What the report shows: `count` images that the attacks have something to change in."""
    labels, images = np.asarray(held_out.labels), np.asarray(held_out.images)
    wanted = np.array([attack.wanted(labels) for attack in model.attacks])
    rows = np.flatnonzero((labels != wanted).all(0) if len(wanted) else labels >= 0)[:count]
    images, labels = images[rows], labels[rows]
    run = predict(model.classifier)
    triggered = np.array(
        [
            model.attacks[i % len(model.attacks)].trigger(image)
            for i, image in enumerate(images if model.attacks else ())
        ],
        np.float32,
    ).reshape(-1, *images.shape[1:])
    shown = triggered if model.attacks else images
    return Pictures(
        triggers=np.array([attack.trigger.scaled() for attack in model.attacks], np.float32),
        deltas=result.deltas,
        images=images,
        triggered=triggered,
        labels=labels,
        before=run(model.variables, shown),
        after=run(result.params, shown),
        found=np.array([*result.found.values()], np.float32),
        captions=np.array([*result.found]),
    )
