"""The work behind the commands: each function takes plain values and returns a dict for JSON."""

from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ibau_jax.attacks import Attack, poison_all, scenario_of
from ibau_jax.commands.attack_options import describe, make_attacks
from ibau_jax.commands.train import train_model
from ibau_jax.data import DATASETS, DataInfo, Dataset, check_disjoint, data_info, load, note_missing
from ibau_jax.defenses import find as find_defense
from ibau_jax.defenses import with_rounds
from ibau_jax.devices import mesh, processes
from ibau_jax.errors import InputError
from ibau_jax.files import make_folder
from ibau_jax.models.files import Model, load_model, model_hash, save_model
from ibau_jax.models.model import Classifier, Logits, evaluation_logits
from ibau_jax.models.predict import predict
from ibau_jax.models.torch_import import convert_pth
from ibau_jax.models.vgg import build
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
from ibau_jax.unlearning.ascent import make_ascent
from ibau_jax.unlearning.batches import images_a_batch, make_batches, resolve, shuffled
from ibau_jax.unlearning.bounds import vgg_bound
from ibau_jax.unlearning.config import IBAUConfig

Json = dict[str, Any]


def evaluate_model(
    model: str | Path,
    dataset: str | None = None,
    split: str | None = None,
    attacks: tuple[Attack, ...] | None = None,
    data_dir: str | Path | None = None,
) -> Json:
    """ACC, and ASR for the attacks in the model's file (None) or those given."""
    loaded = load_model(model)
    info = info_for(loaded, dataset, model)
    data = load(info.name, split or info.split, data_dir)
    chosen = loaded.attacks if attacks is None else attacks
    found = evaluator(_logits(loaded), data, chosen)(loaded.variables["params"])
    return {
        **found.row(),
        "dataset": info.name,
        "split": split or info.split,
        **_attack_fields(chosen),
        "model": str(model),
        "model_hash": model_hash(loaded),
    }


def convert(
    source: str | Path,
    destination: str | Path,
    dataset: str = "cifar10",
    attacks: tuple[Attack, ...] = (),
) -> Json:
    """Import a published PyTorch checkpoint, with its trigger, as a model file of this project."""
    info = data_info(dataset)
    variables, classes, extra = convert_pth(source)
    if classes != info.num_classes:
        raise InputError(
            f"{str(source)!r} has {classes} classes, the data set {dataset!r} has "
            f"{info.num_classes}; give the data set that it was trained on by --dataset"
        )
    origin = {"source": Path(source).name, **extra}
    model = Model(variables, "vgg", classes, dataset, attacks, origin)
    save_model(destination, model)
    return {
        "model": str(destination),
        "model_hash": model_hash(model),
        "dataset": dataset,
        "num_classes": classes,
        **_attack_fields(attacks),
        **extra,
    }


def defend(
    model: str | Path,
    defense: str = "ibau",
    preset: str | None = None,
    dataset: str | None = None,
    clean: str | None = None,
    split: str | None = None,
    rounds: int | None = None,
    poison_ratio: float | None = None,
    seed: int = 0,
    out: str | Path | None = None,
    data_dir: str | Path | None = None,
    progress: bool = False,
    experiment: str = "defend",
    on_note: Callable[[str], None] = lambda text: None,
    num_devices: int | None = None,
) -> Json:
    """Clean a model, measure it before, after and after each round, and write all of it to `out`.

    With many processes the first one writes, and each returns the same.

    Args:
      rounds: what a round is depends on the defense; mostly a pass over the clean set.
      poison_ratio: of the training set, for a defense that trains on it; None: as the model's
        file says.
      num_devices: how many to compute on; None: all.
      on_note: called with a line for the user, where something is worth knowing.

    Returns:
      The JSON of `ibau defend`; the folder holds `cleaned.safetensors`, `rows.jsonl`,
      `report.npz`, `report.html`, and where triggers were found their pictures.
    """
    loaded = load_model(model)
    info = info_for(loaded, dataset, model)
    entry, preset, config = find_defense(defense, preset, info.name)
    if poison_ratio is not None and not (entry.train_set and loaded.attacks):
        raise InputError(
            f"--poison-ratio for {defense} and {str(model)!r}: expected a defense that trains on "
            "the training set (dp-sgd) and a model with an attack in its file; leave it out"
        )
    if entry.train_set and clean is not None:
        on_note(f"{defense} trains on the training set: the images of --clean are checked only")
    if rounds is not None:
        config = with_rounds(config, rounds)
    clean, split = clean or info.clean, split or info.split
    check_disjoint(clean, split, info.sizes)
    clean_set, held_out = load(info.name, clean, data_dir), load(info.name, split, data_dir)
    devices, first = mesh.devices(num_devices), processes.is_first()
    name = f"{Path(model).stem}-{defense}-{preset}-seed{seed}"
    out = Path(out or Path("runs") / name)
    if first:
        make_folder(out)
    lacking = note_missing(clean_set.labels, info.num_classes)
    if first and lacking:
        on_note(lacking)
    if isinstance(config, IBAUConfig):
        _note_batches(config, len(clean_set.labels), len(devices.all), on_note)
    network = Classifier(build(loaded.architecture, loaded.num_classes))
    ratio = loaded.info.get("poison_ratio") if poison_ratio is None else poison_ratio
    more = {}
    if entry.train_set:
        more["train_set"] = _train_set(loaded, info, ratio, data_dir)
    measure = evaluator(network, held_out, loaded.attacks)
    described: Json = {
        "experiment": experiment,
        "dataset": info.name,
        "attack": describe(loaded.attacks),
        "scenario": scenario_of(loaded.attacks),
        "defense": defense,
        "preset": preset,
        "seed": seed,
        "n_clean": len(clean_set.labels),
        "poison_ratio": ratio,
        "device": jax.devices()[0].device_kind,
        "num_devices": len(devices.all),
        "versions": versions(),
        "model_hash": model_hash(loaded),
        "config": _settings(config),
    }
    measured: list[Metrics] = []
    rows: list[Json] = []

    def evaluate(values) -> Json:
        measured.append(measure(values))
        return measured[-1].row()

    def on_round(record: Json) -> None:
        der = defense_effectiveness(measured[0], measured[-1]) if record["round"] else None
        rows.append({**described, **record, "der": der})
        if first:
            write_rows(out / PARTIAL, rows)

    result = entry.run(
        network,
        loaded.variables,
        clean_set,
        config=config,
        key=jax.random.key(seed),
        evaluate=evaluate,
        on_round=on_round,
        progress=progress and first,
        devices=devices,
        **more,
    )
    told = dict(result.diagnostics)
    if first and told.get("note", lacking) != lacking:
        on_note(told["note"])
    flagged = {"flagged": told.pop("flagged")} if "flagged" in told else {}
    for row in rows:
        row |= {"compile_seconds": result.compile_seconds, **flagged}

    if first:
        used = {"defense": defense, "preset": preset, "seed": seed}
        variables = jax.tree.map(np.asarray, result.params)
        cleaned = replace(loaded, variables=variables, info={**loaded.info, "cleaned_by": used})
        save_model(out / CLEANED, cleaned)
        write_pictures(out, _pictures(loaded, network, result, held_out))
        write_rows(out / ROWS, rows)
        (out / PARTIAL).unlink(missing_ok=True)
        write_report(out)
    keys = ("round", "acc", "asr", "asr_excl", "ra", "delta_norm", "seconds")
    return {
        "before": measured[0].row(),
        "after": measured[-1].row(),
        "der": rows[-1]["der"],
        "rounds": [{k: row.get(k) for k in keys} for row in rows[1:]],
        "seconds": result.seconds,
        "compile_seconds": result.compile_seconds,
        "model": str(out / CLEANED),
        "report": str(out / HTML),
        **flagged,
        "diagnostics": told,
        "defense": defense,
        "preset": preset,
        "dataset": info.name,
        "seed": seed,
    }


def _note_batches(
    config: IBAUConfig, count: int, num_devices: int, on_note: Callable[[str], None]
) -> None:
    """Tell the user where a clean set is small for the batches or the devices."""
    batch = images_a_batch(config, count)
    if count < (config.batch_size or 10):
        on_note(
            f"the clean set has {count} images, fewer than a batch of "
            f"{config.batch_size or 10}: it is used as one batch"
        )
    if num_devices > batch:
        on_note(
            f"{num_devices} devices for batches of {batch} images: {num_devices - batch} "
            "of them have nothing to do"
        )


def _train_set(
    model: Model, info: DataInfo, ratio: float | None, data_dir: str | Path | None
) -> Dataset | None:
    """The training set as it was poisoned; None where it is not known how much of it was."""
    if model.attacks and ratio is None:
        return None
    data = load(info.name, "train", data_dir)
    attacks = tuple(model.attacks) * model.info.get("copies", 1)
    return poison_all(data, attacks, ratio or 0.0, model.info.get("seed", 0))[0]


def bound(
    model: str | Path,
    dataset: str | None = None,
    clean: str | None = None,
    radius: float = 10.0,
    margin: float = 1.0,
    xi: float = 0.05,
    data_dir: str | Path | None = None,
) -> Json:
    """Theorem 3 on a model: every term, at the perturbation that the default's ascent finds."""
    loaded = load_model(model)
    info = info_for(loaded, dataset, model)
    data = load(info.name, clean or info.clean, data_dir)
    logits, params = _logits(loaded), loaded.variables["params"]
    config = resolve(replace(IBAUConfig(), radius=radius), logits, params, data.images)
    batches, _ = make_batches(shuffled(data, jax.random.key(0)), config)
    delta, _ = jax.jit(make_ascent(logits, config))(params, batches, 0)
    found = vgg_bound(
        loaded.variables, logits, data, np.asarray(delta), radius=radius, margin=margin, xi=xi
    )
    return {
        "total": found.total,
        "vacuous": found.vacuous,
        "empirical_risk": found.empirical_risk,
        "complexity": found.complexity,
        "confidence": found.confidence,
        **found.details,
        **{"radius": radius, "margin": margin, "xi": xi, "n": len(data.labels)},
        **{"delta_norm": float(config.ball.size(delta)), "model": str(model)},
    }


def demo(out: str | Path, seed: int = 0, progress: bool = False) -> Json:
    """Train a backdoored model on the embedded digits and clean it: everything in two minutes."""
    out = make_folder(out)
    poisoned = out / "poisoned.safetensors"
    attacks = make_attacks("digits", "badnets")
    trained = train_model(
        poisoned, "digits", attacks, seed=seed, keep_states=False, progress=progress
    )
    found = defend(poisoned, seed=seed, out=out, progress=progress, experiment="demo")
    return {**found, "train_seconds": trained["seconds"]}


def _attack_fields(attacks: tuple[Attack, ...]) -> Json:
    targets = [attack.target for attack in attacks]
    return {
        "attack": describe(attacks),
        "scenario": scenario_of(attacks),
        "target": targets[0] if len(targets) == 1 else (targets or None),
    }


def _settings(config: Any) -> Json:
    """Fields of a config for JSON (`dataclasses.asdict` would take the solver apart)."""
    values = {f.name: getattr(config, f.name) for f in fields(config)}
    return {k: repr(v) if is_dataclass(v) else v for k, v in values.items()}


def _logits(model: Model) -> Logits:
    return evaluation_logits(build(model.architecture, model.num_classes), model.variables)


def info_for(model: Model, dataset: str | None, path: str | Path) -> DataInfo:
    """The data set that a model is measured on: its own, or another one of as many classes."""
    if dataset is None and model.dataset not in DATASETS:
        raise InputError(
            f"{str(path)!r} was trained on {model.dataset!r}, which is not known here; give one of "
            f"{', '.join(DATASETS)} by --dataset"
        )
    info = data_info(dataset or model.dataset)
    if info.num_classes != model.num_classes:
        raise InputError(
            f"{str(path)!r} has {model.num_classes} classes, the data set {info.name!r} has "
            f"{info.num_classes}; choose the data set that it was trained on by --dataset"
        )
    return info


def _pictures(model: Model, network, result, held_out, count: int = 12) -> Pictures:
    labels, images = np.asarray(held_out.labels), np.asarray(held_out.images)
    wanted = np.array([attack.wanted(labels) for attack in model.attacks])
    rows = np.flatnonzero((labels != wanted).all(0) if len(wanted) else labels >= 0)[:count]
    images, labels = images[rows], labels[rows]
    run = predict(network)
    triggered = np.array(
        [
            model.attacks[i % len(model.attacks)].trigger(image)
            for i, image in enumerate(images if model.attacks else ())
        ],
        np.float32,
    )
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
