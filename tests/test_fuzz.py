"""Random input at every door: results or one `InputError`, never another exception."""

import contextlib
import copy
import io
import json
import random
import struct

import numpy as np
import pytest
from conftest import random_variables
from flax.traverse_util import flatten_dict
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from ibau_jax import InputError
from ibau_jax.attacks import Attack, Trigger, described
from ibau_jax.commands import output
from ibau_jax.errors import printable
from ibau_jax.files import to_json
from ibau_jax.models.files import FORMAT, load_model, save_model
from ibau_jax.models.stored import StoredModel
from ibau_jax.results import report
from ibau_jax.results.rows import ROWS, print_table, read_rows, write_rows

HEADER = {
    "architecture": "vgg",
    "num_classes": 10,
    "dataset": "digits",
    "info": {"seed": 0, "poison_ratio": 0.2, "copies": 2, "cleaned_by": {"seed": 1}},
    "attacks": [
        {"name": "mine", "target": 3, "rule": "add"},
        {"name": "badnets", "target": None, "rule": "replace"},
    ],
}
PATTERN = np.full((32, 32, 3), 0.1, np.float32)
TENSORS = {
    **{"/".join(k): v.astype(np.float16) for k, v in flatten_dict(random_variables()).items()},
    "trigger/0/pattern": PATTERN,
    "trigger/1/pattern": PATTERN,
    "trigger/1/mask": PATTERN,
}

# Values that are wrong in most places, and text that is markup, control codes or HTML somewhere.
TEXT = st.one_of(
    st.sampled_from(
        ["[/x]", "[bold]", "[link=a]b[/link]", ":smile:", "<script>", "'\"&<", "a\nb\r", "\x1b[2J"]
        + ["\x00", "\ud800", "\u202e", "ж🦢", "{0}", "{x", "%s", "a, b", "none", "$\\frac{", " "]
    ),
    st.text(st.characters(), min_size=1, max_size=20),
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT | st.just(10**40),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=4,
)


def places(tree, path=()):
    """Paths of all values in a JSON tree, the whole of it first."""
    yield path
    for key in (
        tree if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else ()
    ):
        yield from places(tree[key], (*path, key))


@st.composite
def mutated(draw, tree):
    """A JSON tree with one to three changes: a value replaced, left out, or added."""
    tree = copy.deepcopy(tree)
    for _ in range(draw(st.integers(1, 3))):
        *path, last = draw(st.sampled_from([p for p in places(tree) if p] or [("x",)]))
        parent = tree
        for key in path:
            parent = parent[key]
        change = draw(st.sampled_from(["replace", "replace", "remove", "add"]))
        if change == "remove" and last in (parent if isinstance(parent, dict) else range(99)):
            del parent[last]
        elif change == "replace":
            parent[last] = draw(VALUES)
        elif isinstance(parent, dict):
            parent[draw(TEXT)] = draw(VALUES)
        else:
            parent.append(draw(VALUES))
    return tree


def write(path, header: bytes, tensors=TENSORS):
    """A safetensors file with this text as the metadata of a model."""
    index, data = {}, []
    for name, value in tensors.items():
        begin = sum(map(len, data))
        data.append(value.tobytes())
        kind = "F16" if value.dtype == np.float16 else "F32"
        ends = [begin, begin + len(data[-1])]
        index[name] = {"dtype": kind, "shape": value.shape, "data_offsets": ends}
    metadata = {FORMAT: header.decode("utf-8", "replace")}
    text = json.dumps({"__metadata__": metadata, **index}).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(data))
    return path


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz") / "m.safetensors"


def opened(path):
    """A model or None where it was refused, in one line of bearable length."""
    try:
        found = load_model(path)
    except InputError as error:
        assert "Traceback" not in str(error) and len(str(error)) < 1000
        return None
    assert isinstance(found.info, dict) and 1 <= found.num_classes == 10
    for attack in found.attacks:
        assert attack.target is None or type(attack.target) is int and 0 <= attack.target < 10
        assert attack.trigger.pattern.shape == (32, 32, 3)
    return found


def test_the_file_that_is_changed_is_good(file):
    assert [a.target for a in opened(write(file, json.dumps(HEADER).encode())).attacks] == [3, None]


@settings(max_examples=60)
@given(header=mutated(HEADER))
def test_headers_of_model_files(file, header):
    model = opened(write(file, json.dumps(header).encode()))
    if model is not None:  # and what is read can be written and shown
        to_json(described(model.attacks))


@settings(max_examples=30)
@given(seed=st.integers(0, 2**32))
def test_bytes_of_headers(file, seed):
    """Text that is no JSON any more: bytes changed, cut out, repeated."""
    rng, text = random.Random(seed), bytearray(json.dumps(HEADER).encode())
    for _ in range(rng.randint(1, 4)):
        at, length = rng.randrange(len(text)), rng.randrange(1, 20)
        part = bytes(text[at : at + length])
        new = (b"", part * 2, bytes([rng.randrange(256)]), b"[" * 2000, b"NaN", b"-", b"1e999")
        text[at : at + length] = rng.choice(new)
        text = text or bytearray(b" ")
    opened(write(file, bytes(text)))


@settings(max_examples=30)
@given(seed=st.integers(0, 2**32))
def test_bytes_of_files(file, seed):
    """Any part of the file: its length, the index of tensors, the tensors."""
    rng = random.Random(seed)
    content = bytearray(write(file, json.dumps(HEADER).encode()).read_bytes())
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(rng.choice([8, 4000, len(content)]))
        content[at] = rng.randrange(256)
    if rng.random() < 0.3:
        del content[rng.randrange(len(content)) :]
    file.write_bytes(content)
    opened(file)


ROW = {
    "experiment": "test",
    "dataset": "digits",
    "attack": "mine",
    "defense": "ibau",
    "preset": "default",
    "round": 1,
    "acc": 0.9,
    "asr": 0.1,
    "by_attack": {"mine": 0.1},
    "flagged": [3],
    "config": {"radius": 2.0},
    "versions": {"jax": "0"},
}


@settings(max_examples=40)
@given(name=TEXT)
def test_names_of_attacks_at_every_door(file, name):
    """A name in a file reaches the terminal, the report, JSON and the error messages."""
    attack = Attack(name, Trigger("add", PATTERN), 3)
    try:
        path = save_model(file, StoredModel(random_variables(), "vgg", 10, "digits", (attack,)))
    except InputError as error:
        assert not name.strip(), error
        return
    (found,) = load_model(path).attacks
    assert found.name == name
    row = ROW | {"attack": name, "by_attack": {name: 0.1}, "config": {name: name}}
    json.loads(to_json({"rows": [row]}))
    console = Console(width=300, file=io.StringIO(), force_terminal=False)
    print_table([row, row], console)
    printed = console.file.getvalue()
    page = report.render([row, row], None)
    page.encode("utf-8")
    for text in (printed, page.partition("data:")[0]):
        assert "\x1b" not in text and "\x00" not in text and "\ud800" not in text
    assert "<script>" not in page
    if name.isprintable() and "  " not in name and name == name.strip():
        assert f"on digits, {name}" in printed
    with contextlib.redirect_stdout(io.StringIO()) as out:
        output.finish({"attack": name}, as_json=False)
    with contextlib.redirect_stderr(io.StringIO()) as err:
        output.fail(f"the attack {name} is wrong", 2)
    for text in (out.getvalue(), err.getvalue()):
        assert printable(name) in text and text.count("\n") == 1


@settings(max_examples=40)
@given(rows=st.lists(mutated(ROW), min_size=1, max_size=3))
def test_rows_of_reports(file, rows):
    folder = file.parent
    write_rows(folder / ROWS, rows)
    try:
        found = read_rows(folder)
    except InputError:
        return
    print_table(found, Console(width=80, file=io.StringIO()))
    report.render(found, None).encode("utf-8")
    json.loads(to_json(found))
