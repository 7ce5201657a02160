"""Images as a user names them: a split of a data set, a folder, or an .npz file."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from ibau_jax.data.arrays import read_npz
from ibau_jax.data.check import check_data
from ibau_jax.data.classes import quoted, read_names, told
from ibau_jax.data.datasets import DataInfo, Dataset, load
from ibau_jax.data.decode import read_images
from ibau_jax.data.folder import list_folder
from ibau_jax.data.splits import names_splits
from ibau_jax.errors import InputError
from ibau_jax.files import user_path

LARGEST = 4096  # of a side that images are resized to


@dataclass(frozen=True)
class Reader:
    """How images are read, for a model.

    Attributes:
      num_classes: its outputs.
      shape: height, width and channels of the images that it reads; None: any height or width.
      info: the data set whose splits may be named; None: none that is known here.
      classes: file with the names of all classes, one a line, in the order of the labels.
      image_size: resize the shorter side of the user's own images to it, and crop the centre.
      exif: turn pictures as their EXIF data say.
      data_dir: folder of TensorFlow Datasets.
      progress: show a bar while a folder is read.
    """

    num_classes: int
    shape: tuple[int | None, int | None, int]
    info: DataInfo | None = None
    classes: str | Path | None = None
    image_size: int | None = None
    exif: bool = False
    data_dir: str | Path | None = None
    progress: bool = False


class Given(NamedTuple):
    """Images that were read.

    Attributes:
      data: images float32 [N, H, W, C] in [0, 1], labels int32 [N].
      name: as the user or the data set names them.
      own: are they the user's own, and no split of a known data set?
      classes: the label of each class by its name, where the user's images tell it.
      notes: lines for the user.
    """

    data: Dataset
    name: str
    own: bool = False
    classes: dict[str, int] | None = None
    notes: tuple[str, ...] = ()


def load_given(name: str, reader: Reader, labelled: bool = True, what: str = "clean") -> Given:
    """The images that a user names.

    Args:
      name: a split (`"test[:5000]"`), a folder with a folder for each class, or an .npz file with
        `images` and `labels`. A split comes first; `./test` is the folder.
      labelled: False: the labels of the user's own images do not count, and may be missing.
      what: `clean` or `evaluation`, for messages.

    Raises:
      InputError: says what was expected, what was found and what to do.
    """
    kind = kind_of(name, reader)
    check_options(reader, [kind])
    return read_given(name, kind, reader, labelled, what)


def kind_of(name: str, reader: Reader) -> str:
    """What a name is: `split`, `folder` or `npz`.

    Raises:
      InputError: it is another file, or a path where nothing is.
    """
    path = user_path(name)
    if reader.info is not None and names_splits(name, reader.info.sizes):
        return "split"
    if name.strip() and path.is_dir():
        return "folder"
    if path.is_file() and path.suffix.lower() == ".npz":
        return "npz"
    if path.is_file():
        raise InputError(
            f"{name!r} is a file: expected a folder with a folder for each class, or an .npz file"
        )
    separators = [mark for mark in (os.sep, os.altsep) if mark]
    is_path = path.suffix.lower() == ".npz" or any(mark in name for mark in separators)
    if reader.info is None or is_path:
        raise InputError(
            f"there is no folder and no file {name!r}: expected a folder with a folder for each "
            "class, an .npz file, or a split of a data set that is known here"
        )
    return "split"  # whose reader says what is wrong with it


def check_options(reader: Reader, kinds: list[str]) -> None:
    """Raise `InputError` for an option that has no effect, or none that the model allows."""
    size, fixed = reader.image_size, reader.shape[:2]
    if size is not None and not 1 <= size <= LARGEST:
        raise InputError(f"the size is {size}: expected 1 to {LARGEST}", argument="image_size")
    if size is not None and not all(side in (None, size) for side in fixed):
        raise InputError(
            f"the size is {size}, and the model reads images of {fixed[0]}x{fixed[1]}: expected "
            f"{fixed[0]}",
            argument="image_size",
        )
    own = any(kind != "split" for kind in kinds)
    for argument, given, used in (
        ("image_size", size is not None, own),
        ("classes", reader.classes is not None, own),
        ("exif", reader.exif, "folder" in kinds),
    ):
        if given and not used:
            expected = "a folder of images" if argument == "exif" else "a folder or an .npz file"
            raise InputError(
                f"{argument.replace('_', ' ')} for {' and '.join(sorted(set(kinds)))}: expected "
                f"{expected}, since it changes nothing else; leave it out",
                argument=argument,
            )


def read_given(name: str, kind: str, reader: Reader, labelled: bool, what: str) -> Given:
    """`load_given` where the kind is known and the options are checked."""
    if kind == "split":
        assert reader.info is not None
        notes = ()
        if user_path(name).is_dir():
            split = f"{name!r} is the split of {reader.info.name}"
            notes = (f"{split}; for the folder of this name write {'./' + name!r}",)
        return Given(load(reader.info.name, name, reader.data_dir), name, notes=notes)
    found = _read_own(name, kind, reader, labelled)
    data = check_data(found.data, what)
    height, width, _ = reader.shape
    sizes = data.images.shape[1:3]
    if any(side not in (None, size) for side, size in zip((height, width), sizes, strict=True)):
        raise InputError(
            f"the images of {name!r} are {sizes[0]}x{sizes[1]} (height x width), and the model "
            f"reads {height}x{width}: expected this size; give it, and they are resized",
            argument="image_size",
        )
    return found._replace(data=data)


def _read_own(name: str, kind: str, reader: Reader, labelled: bool) -> Given:
    path = user_path(name)
    channels, size = reader.shape[2], reader.image_size
    names = None if reader.classes is None else read_names(user_path(reader.classes))
    if names is not None and len(names) != reader.num_classes:
        raise InputError(
            f"{str(reader.classes)!r} has {len(names)} names, and the model has "
            f"{reader.num_classes} outputs: expected one for each",
            argument="classes",
        )
    classes = None if names is None else dict(zip(names, range(len(names)), strict=True))
    if kind == "npz":
        images, labels, keys = read_npz(path, reader.num_classes, channels, size, labelled)
        notes = () if keys[0] == "images" else (f"{' and '.join(keys)} of {str(path)!r} are read",)
        return Given(Dataset(images, labels), name, True, classes, notes)
    listing = list_folder(path, reader.num_classes, names, labelled)
    notes = []
    if listing.classes is not None:
        notes.append(_mapping(path, listing.classes, reader.classes))
    if listing.ignored:
        left = quoted([str(file.relative_to(path)) for file in listing.ignored])
        notes.append(f"left out of {str(path)!r}, since they are no images of a class: {left}")
    images = read_images(listing.paths, path, channels, size, reader.exif, reader.progress)
    data = Dataset(images, listing.labels)
    return Given(data, name, True, classes or listing.classes, tuple(notes))


def _mapping(path: Path, classes: dict[str, int], file: str | Path | None) -> str:
    names = list(classes)
    order = f"by {str(file)!r}" if file is not None else "by the order of the folders' names"
    text = f"labels of {str(path)!r}, {order}: {told(classes)}"
    if file is None and names != sorted(names):
        first = ", ".join(sorted(names)[:3])
        text += (
            f" (numbers in their order; torchvision's ImageFolder has {first}, ...: for a model "
            "that was trained so give --classes)"
        )
    return text
