"""The house: which room may import which, and that no import runs in a circle."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# A room may import itself and those before it.
ORDER = (
    *("errors", "files", "tokenizer", "config", "weights", "sharding", "cli", "modeling", "layouts", "checkpoint"),
    "media",
    *(
        "calibration",
        "decode",
        "drafters",
        "named",
        "loading",
        "text",
        "generation",
        "serving",
        "paths",
        "training",
        "planning",
        "evaluation",
        "ablation",
        "replication",
    ),
)
PACKAGES = ("mimo_jax", "pallas_kernels")


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_of(path): path for package in PACKAGES for path in (ROOT / package).rglob("*.py")}


def imports_of(module: str) -> set[str]:
    """Modules of both packages that a module imports, those inside functions and for annotations included."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found |= {name if name in MODULES else node.module for name in names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {name for name in found if name.split(".")[0] in PACKAGES and name != module}


IMPORTS = {module: imports_of(module) for module in MODULES}


def room_of(module: str) -> str:
    return module.split(".")[1]


@pytest.mark.parametrize("module", [name for name in MODULES if name.startswith("mimo_jax.")])
def test_imports_run_downward(module):
    """A reader who opens a room needs only rooms before it; kernels' internals stay in kernels."""
    for imported in IMPORTS[module]:
        if imported.startswith("pallas_kernels"):
            assert imported.count(".") <= 1, f"{module} imports {imported}, an op's internals"
        else:
            assert ORDER.index(room_of(imported)) <= ORDER.index(room_of(module)), f"{module} imports {imported}"


def test_kernels_know_no_model():
    """`pallas_kernels` is arrays in, arrays out."""
    for module, imported in IMPORTS.items():
        if module.startswith("pallas_kernels"):
            assert not [name for name in imported if name.startswith("mimo_jax")], module


def test_there_is_no_circle():
    """Modules can be read one after the other."""
    try:
        TopologicalSorter(IMPORTS).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_every_room_has_its_place():
    """A new room is added to the table above."""
    found = {room_of(module) for module in MODULES if module.startswith("mimo_jax.")}
    assert found == set(ORDER)
