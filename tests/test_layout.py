"""One direction of imports, read from the source."""

import ast
from pathlib import Path

import ibau_jax

PACKAGE = Path(ibau_jax.__file__).parent
ORDER = """errors parallel processes files progress data attacks convolution models resume fitting
training metrics microbatch solvers hypergradient config batches ibau bounds defenses checkpoint
report report_html attack_options poisoned pipeline reproduce cli""".split()


def imported(path: Path):
    """Names of our own modules that a file imports (first part after the package)."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("ibau_jax."):
            yield node.module.split(".")[1]
        elif isinstance(node, ast.ImportFrom) and node.module == "ibau_jax":
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.Import):
            for alias in node.names:
                assert not alias.name.startswith("ibau_jax."), "import names from our modules"


def modules():
    for path in PACKAGE.rglob("*.py"):
        name = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if name not in ("__init__", "__main__"):
            yield name, path


def test_every_module_has_its_place():
    assert {name for name, _ in modules()} == set(ORDER)


def test_imports_go_in_one_direction():
    for name, path in modules():
        for other in imported(path):
            assert ORDER.index(other) <= ORDER.index(name), f"{path.name} imports {other}"


def test_the_hypergradient_stands_alone():
    assert not list(imported(PACKAGE / "solvers.py"))
    assert set(imported(PACKAGE / "hypergradient.py")) == {"solvers"}


def test_jaxopt_is_imported_in_one_module():
    users = [path.name for _, path in modules() if "from jaxopt" in path.read_text()]
    assert users == ["hypergradient.py"]
