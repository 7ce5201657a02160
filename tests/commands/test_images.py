"""Folders of images and .npz files through the real commands."""

import shutil
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from command_line import printed as run
from command_line import refused
from PIL import Image

from ibau_jax.data import Dataset, load
from ibau_jax.models.files import load_model, save_model
from ibau_jax.results.rows import HTML, read_rows
from ibau_jax.unlearning import look
from ibau_jax.unlearning.search import Search


def write(folder, data, names="0123456789"):
    """Digits as PNGs in a folder for each class."""
    for row, (image, label) in enumerate(zip(data.images, data.labels, strict=True)):
        path = folder / names[label] / f"{row}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.rint(image * 255).astype(np.uint8)).save(path)
    return folder


@pytest.fixture
def own(digits_model, tmp_path, monkeypatch):
    """A folder to work in, with `clean` and `test`, labelled as the model of random weights does.

    (So that it is right on all of them; a class it never names has one image.)
    """
    monkeypatch.chdir(tmp_path)
    stored = load_model(digits_model)
    for name, split in (("clean", "test[:30]"), ("test", "test[700:730]")):
        data = load("digits", split)
        labels = np.array(stored.relabelled(data).labels)
        missing = np.setdiff1d(np.arange(10), labels)
        kept = np.unique(labels, return_index=True)[1]
        labels[np.setdiff1d(np.arange(30), kept)[: len(missing)]] = missing
        write(tmp_path / name, Dataset(data.images, labels))
    return tmp_path


CLASSES = {str(label): label for label in range(10)}


def test_evaluate_a_folder_and_an_npz(capsys, digits_model, own):
    command = ["evaluate", "--model", digits_model, "--json", "--split"]
    found, err = run(capsys, *command, "test")  # a split comes first
    assert found["n"] == 800 and "write './test'" in err and "classes" not in found
    found, err = run(capsys, *command, "./test")
    assert found["n"] == 30 and 0.5 < found["acc"] < 1 and found["asr"] is not None
    assert found["classes"] == CLASSES and found["split"] == "./test"
    assert "labels of 'test', by the order of the folders' names: 0 = '0', 1 = '1'" in err
    assert "their labels: are the classes in the order" not in err
    data = load("digits", "test[700:730]")
    np.savez(own / "d.npz", images=np.rint(data.images * 255).astype(np.uint8), labels=data.labels)
    same, err = run(capsys, *command, "d.npz")
    direct, _ = run(capsys, *command, "test[700:730]")
    assert {k: same[k] for k in ("acc", "asr", "ra", "n")} == {
        k: direct[k] for k in ("acc", "asr", "ra", "n")
    }
    assert same["acc"] < 0.5 and "their labels: are the classes in the order" in err


def test_evaluate_with_names_and_a_size(capsys, digits_model, own):
    (own / "names").write_text("\n".join("abcdefghij"))
    write(own / "letters", load("digits", "test[:20]"), "abcdefghij")
    large = own / "letters" / "a" / "large.png"
    Image.fromarray(np.zeros((70, 50), np.uint8)).save(large)
    command = ["evaluate", "--model", digits_model, "--json", "--split", "letters"]
    assert "(--image-size)" in refused(capsys, *command, "--classes", "names")
    options = ["--classes", "names", "--image-size", 32, "--exif"]
    found, err = run(capsys, *command, *options)
    assert found["classes"] == {name: i for i, name in enumerate("abcdefghij")} and found["n"] == 21
    assert "labels of 'letters', by 'names': 0 = 'a'" in err


def test_inspect_a_folder(capsys, digits_model, own, monkeypatch):
    monkeypatch.setattr(look, "Search", partial(Search, starts=4, steps=1, batch=5, few=2))
    command = ["inspect", "--model", digits_model, "--out", "out", "--json"]
    found, err = run(capsys, *command, "--clean", "clean")
    assert found["n_clean"] == 30 and found["classes"] == CLASSES and found["clean"] == "clean"
    assert "labels of 'clean'" in err
    assert "30 clean images (digits: clean)" in (own / "out" / HTML).read_text()
    flat = own / "flat"
    flat.mkdir()
    for path in (own / "clean").rglob("*.png"):
        path.rename(flat / path.name)
    found, err = run(capsys, *command, "--clean", "flat", "--no-labels")
    assert (
        found["n_clean"] == 30 and found["clean_labels"] == "predicted" and "classes" not in found
    )
    assert "30 images and no folder" in refused(capsys, *command, "--clean", "flat")


DEFEND = ["defend", "--defense", "clp", "--out", "out", "--json", "--model"]


def test_defend_with_two_folders(capsys, digits_model, own):
    found, err = run(capsys, *DEFEND, digits_model, "--clean", "clean", "--split", "./test")
    assert found["before"]["n"] == 30 and found["classes"] == CLASSES
    assert found["clean"] == "clean" and found["split"] == "./test"
    assert "labels of 'clean'" in err and "labels of 'test'" in err
    rows, page = read_rows(own / "out"), (own / "out" / HTML).read_text()
    assert rows[0]["classes"] == CLASSES and rows[0]["n_clean"] == 30
    assert "Clean images: clean; measured on: ./test. Classes: 0 = 0, 1 = 1, 2 = 2" in page


def test_defend_names_the_classes_of_the_folder(capsys, digits_model, own):
    for name in ("clean", "test"):
        for label in range(10):
            (own / name / str(label)).rename(own / name / f"<b>{label}")
    run(capsys, *DEFEND, digits_model, "--clean", "clean", "--split", "./test")
    page = (own / "out" / HTML).read_text()
    assert "true: &lt;b&gt;" in page and "0 = &lt;b&gt;0, 1 = &lt;b&gt;1" in page


def test_defend_holds_half_of_a_folder_out(capsys, digits_model, own):
    found, err = run(capsys, *DEFEND, digits_model, "--clean", "clean", "--seed", 1)
    assert "half of the images of each class in 'clean' is held out to measure by (seed 1)" in err
    assert found["split"] == "the other half of clean"
    assert found["before"]["n"] + read_rows(own / "out")[0]["n_clean"] == 30


def test_defend_leaves_out_what_is_in_both(capsys, digits_model, own):
    found, err = run(capsys, *DEFEND, digits_model, "--clean", "clean", "--split", "test[20:40]")
    assert found["before"]["n"] == 10
    assert "10 of the 20 images to measure by are among the clean ones, and are left out" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--clean", "./none"], "no folder and no file './none'"),
        (["--clean", "none"], "unknown split 'none'"),
        (["--clean", "clean", "--split", "clean"], "half of the images is held out (--split)"),
        (["--clean", "clean", "--split", "test[3:9]"], "all 6 images to measure by are among"),
        (["--clean", "clean", "--image-size", "16"], "reads images of 32x32: expected 32"),
        (["--image-size", "32"], "image size for split"),
        (["--exif"], "exif for split: expected a folder of images"),
        (["--clean", "clean", "--classes", "none"], "No such file or directory"),
        (["--clean", "clean/1"], "images and no folder"),
        (["--clean", "nine"], "9 folders ('0', '1', '2', '3', '4', '5', '6', '7', '8'), and"),
        (["--clean", "damaged"], "1 of the 10 images in 'damaged' cannot be used ('9/0.png': "),
        (["--clean", "mixed"], "32x32 (9 images), 2x2 (1 images)"),
        (["--clean", "loop"], "is a symbolic link to a folder above it"),
        (["--clean", "bad.npz"], "holds 'pixels'"),
        (["--clean", "dark.npz"], "divide pixels by 255 only once"),
        (["--clean", "shifted"], "of the clean images their labels, hardly more than guessing"),
        (
            ["--clean", "clean", "--no-labels", "--split", "shifted"],
            "of the images to measure by their labels, hardly",
        ),
    ],
)
def test_defend_refuses_in_one_line_and_writes_nothing(
    capsys, digits_model, own, arguments, message
):
    images = load("digits", "test[:9]").images
    for name in ("nine", "damaged", "mixed", "loop"):
        write(own / name, Dataset(images, np.arange(9)))
        if name != "nine":
            (own / name / "9").mkdir()
    for label in range(10):
        shutil.copytree(own / "test" / str(label), own / "shifted" / str((label + 1) % 10))
    (own / "damaged" / "9" / "0.png").write_bytes(b"\x89PNG")
    Image.fromarray(np.zeros((2, 2), np.uint8)).save(own / "mixed" / "9" / "0.png")
    (own / "loop" / "9" / "up").symlink_to(own / "loop")
    np.savez(own / "bad.npz", pixels=images)
    np.savez(own / "dark.npz", images=images / 255, labels=np.arange(9))
    assert message in refused(capsys, *DEFEND, digits_model, *arguments)
    assert not (own / "out").exists()


def test_a_model_of_a_data_set_that_is_not_known(capsys, digits_model, own):
    save_model("m.safetensors", replace(load_model(digits_model), dataset="mine"))
    found, _ = run(capsys, *DEFEND, "m.safetensors", "--clean", "clean", "--split", "./test")
    assert found["dataset"] == "mine" and found["before"]["n"] == 30
    found, _ = run(capsys, "evaluate", "--model", "m.safetensors", "--split", "test", "--json")
    assert found["n"] == 30  # no split of this name is known
    assert "not known here" in refused(capsys, *DEFEND, "m.safetensors", "--split", "test")
    assert "or give images of your own" in refused(capsys, "evaluate", "--model", "m.safetensors")
