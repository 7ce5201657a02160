"""One direction of imports, file by file, read from the source."""

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import ibau_jax

PACKAGE = Path(ibau_jax.__file__).parent
ROOMS = """errors files progress devices data attacks models training hypergradient unlearning
defenses results commands""".split()


def module_of(path: Path) -> str:
    """`data.gtsrb` of `ibau_jax/data/gtsrb.py`, `data` of `ibau_jax/data/__init__.py`."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {
    name: path
    for path in PACKAGE.rglob("*.py")
    if (name := module_of(path)) not in ("", "__main__")
}


def imported(path: Path) -> Iterator[str]:
    """Our own files that a file imports; a folder stands for its `__init__.py`."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            assert not any(a.name.startswith("ibau_jax.") for a in node.names), (
                "import names from our modules"
            )
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "import by the whole name"
            package, _, module = (node.module or "").partition(".")
            if package == "ibau_jax":
                for alias in node.names:
                    name = f"{module}.{alias.name}".lstrip(".")
                    yield name if name in FILES else module


def room(module: str) -> int:
    return ROOMS.index(module.partition(".")[0])


def test_every_file_has_its_room():
    assert {name.partition(".")[0] for name in FILES} == set(ROOMS)
    assert set(map(str, PACKAGE.glob("*.py"))) == {
        str(PACKAGE / f"{name}.py")
        for name in ("__init__", "__main__", "errors", "files", "progress")
    }


def test_imports_go_from_right_to_left():
    for name, path in FILES.items():
        for other in imported(path):
            assert other in FILES, f"{name} imports {other}"
            assert room(other) <= room(name), f"{name} imports {other}"


def test_there_is_no_circle_of_files():
    """Raises CycleError, which names them."""
    graph = {name: set(imported(path)) - {name} for name, path in FILES.items()}
    assert len(list(TopologicalSorter(graph).static_order())) == len(FILES)


def test_the_hypergradient_stands_alone():
    for name, path in FILES.items():
        if name.startswith("hypergradient"):
            assert all(other.startswith("hypergradient") for other in imported(path)), name


def test_jaxopt_is_imported_in_one_module():
    users = [name for name, path in FILES.items() if "from jaxopt" in path.read_text()]
    assert users == ["hypergradient.implicit"]
