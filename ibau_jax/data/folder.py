"""A folder of images with a folder for each class: what is in it, and which label it has."""

import errno
import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ibau_jax.data.classes import quoted, sort_names
from ibau_jax.errors import InputError, why

ENDINGS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
SPLITS = {"train", "training", "test", "testing", "val", "valid", "validation"}


class Listing(NamedTuple):
    """The images of a folder, before they are read.

    Attributes:
      paths: a file each, class by class and in sorted order.
      labels: int32 [N].
      classes: the label of each class by its name; None where labels do not count.
      ignored: files that are no images by their endings, or in no class's folder.
    """

    paths: list[Path]
    labels: np.ndarray
    classes: dict[str, int] | None
    ignored: list[Path]


def list_folder(
    folder: Path, num_classes: int, names: Sequence[str] | None = None, labelled: bool = True
) -> Listing:
    """Find the images of a folder, at any depth below the folders of the classes.

    What is hidden (a name with a leading dot) is skipped, links are followed.

    Args:
      num_classes: outputs of the model.
      names: of all classes in the order of the labels; some may have no folder. None: each has one,
        and their sorted names are the order (all numbers: as numbers).
      labelled: False: any images below `folder`, whose labels (0) do not count.

    Raises:
      InputError: folders that are not those of the classes, one without an image (where no names
        are given), no image at all, a circle of links, or a folder that cannot be read.
    """
    if not labelled:
        files = list(_files(folder))
        paths = [path for path in files if _is_image(path)]
        if not paths:
            raise _nothing(folder, files)
        return Listing(paths, np.zeros(len(paths), np.int32), None, _others(files))
    inside = _entries(folder)
    found = [path.name for path, is_folder in inside if is_folder]
    beside = [path for path, is_folder in inside if not is_folder]
    if not found:
        raise _nothing(folder, beside)
    named = names is not None
    if names is None:
        names = sort_names(found)
        _check_folders(folder, names, num_classes)
    elif unknown := sorted(set(found) - set(names)):
        raise InputError(
            f"{str(folder)!r} has folders that are no classes ({quoted(unknown)}): expected only "
            f"names of the {len(names)} in the list of classes",
            argument="classes",
        )
    classes = {name: label for label, name in enumerate(names)}
    files = {name: list(_files(folder / name)) for name in names if name in set(found)}
    paths = {name: [path for path in files[name] if _is_image(path)] for name in files}
    if not any(paths.values()):
        raise _nothing(folder, list(itertools.chain(*files.values())))
    if not named and (empty := [name for name in paths if not paths[name]]):
        raise InputError(
            f"{str(folder)!r} has folders of classes without an image ({quoted(empty)}): expected "
            f"files that end in {', '.join(ENDINGS)}; add images, or leave out these folders and "
            "name all classes in a file",
            argument="classes",
        )
    counts = [(classes[name], len(paths[name])) for name in paths]
    labels = np.repeat(*np.array(counts, np.int32).T)
    ignored = beside + _others(itertools.chain(*files.values()))
    return Listing(list(itertools.chain(*paths.values())), labels, classes, ignored)


def _check_folders(folder: Path, names: Sequence[str], num_classes: int) -> None:
    if SPLITS.issuperset(name.lower() for name in names):
        raise InputError(
            f"{str(folder)!r} has the folders {quoted(names)}, which look like splits: expected a "
            f"folder for each class; give one of them, for example {str(folder / names[0])!r}"
        )
    if len(names) != num_classes:
        raise InputError(
            f"{str(folder)!r} has {len(names)} folders ({quoted(names)}), and the model has "
            f"{num_classes} outputs: expected one for each class, since a missing one shifts the "
            "labels; or give a file with the names of all classes, one a line",
            argument="classes",
        )


def _entries(folder: Path) -> list[tuple[Path, bool]]:
    """What a folder holds and is not hidden, sorted, and whether it is a folder."""
    try:
        with os.scandir(folder) as entries:
            found = [(e.name, e.is_dir()) for e in entries if not e.name.startswith(".")]
        return [(folder / name, is_folder) for name, is_folder in sorted(found)]
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise InputError(
                f"symbolic links in {str(folder)!r} lead in a circle: expected links to files or "
                "folders; remove them"
            ) from error
        raise InputError(
            f"cannot read the folder {str(folder)!r}: {why(error)}; change its permissions"
        ) from error


def _files(folder: Path, above: tuple[str, ...] = ()) -> Iterator[Path]:
    """All files at any depth below a folder that are not hidden."""
    real = os.path.realpath(folder)
    if real in above:
        raise InputError(
            f"{str(folder)!r} is a symbolic link to a folder above it, a circle: expected links to "
            "files or other folders; remove it"
        )
    for path, is_folder in _entries(folder):
        if is_folder:
            yield from _files(path, (*above, real))
        else:
            yield path


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in ENDINGS


def _others(files: Iterable[Path]) -> list[Path]:
    return [path for path in files if not _is_image(path)]


def _nothing(folder: Path, files: Sequence[Path]) -> InputError:
    """The error for a folder without what was expected; `files`: what is there instead."""
    images = sum(map(_is_image, files))
    if images:
        what = f"{images} images and no folder"
    else:
        what = f"no image, but {quoted([file.name for file in files])}" if files else "no image"
    return InputError(
        f"{str(folder)!r} has {what}: expected a folder for each class with files that end in "
        f"{', '.join(ENDINGS)}"
    )
