"""Declared is used: no dependency that nothing imports, none imported that is not declared, none locked in vain."""

import ast
import importlib.metadata
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
OURS = {"mimo_jax", "pallas_kernels", "tests", "generate", "serve"}  # the last two are scripts that tests import
MODULES = {
    "orbax-checkpoint": "orbax",
    "jax-triton": "jax_triton",
    "pillow": "PIL",
    "compressed-tensors": "compressed_tensors",
    "prometheus-client": "prometheus_client",
}
BY_HAND = {"dynamo", "PyQt6"}  # installed by who needs them, as the file that imports them says
COMMANDS = {"pyrefly", "pytest-xdist", "ruff"}  # run, not imported


def declared(requirements: list[str]) -> set[str]:
    """Modules of requirements; an extra of a package is that package."""
    names = {re.match(r"[\w.-]+", requirement)[0] for requirement in requirements} - COMMANDS
    return {MODULES.get(name, name) for name in names}


def imported(*folders: str) -> set[str]:
    found = set()
    for path in (path for folder in folders for path in (ROOT / folder).rglob("*.py")):
        text = path.read_text()
        found |= set(re.findall(r'importorskip\(\s*"(\w+)', text))
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom) and node.module and not node.level:
                found.add(node.module.partition(".")[0])
            elif isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
    return found - OURS - sys.stdlib_module_names


def test_the_package_imports_what_it_declares():
    """Every dependency is imported by the package, and everything imported is a dependency or part of an extra."""
    used, needed = imported("mimo_jax", "pallas_kernels", "scripts"), declared(PROJECT["dependencies"])
    optional = declared(
        [
            one
            for extra in ("triton", "plots", "serve", "video", "media", "replicas", "references")
            for one in EXTRAS[extra]
        ]
    )
    assert needed <= used
    assert used - needed - optional - BY_HAND <= {"triton", "jaxlib"}  # parts of jax-triton and of jax


def test_the_tests_import_what_they_declare():
    """The same of what tests need beside the package."""
    used = imported("tests")
    extra = declared(EXTRAS["dev"] + EXTRAS["references"])
    assert extra <= used | imported("mimo_jax")
    optional = declared([one for extra in ("serve", "triton", "video", "media", "replicas") for one in EXTRAS[extra]])
    towers = re.findall(r"^([a-z0-9-]+)==", (ROOT / ".ci" / "towers.lock").read_text(), re.MULTILINE)
    alone = {name.replace("-", "_") for name in towers}  # without what they declare, so in no extra
    assert used - BY_HAND <= extra | optional | alone | declared(PROJECT["dependencies"])


_IMPORTED = """
import runpy, sys
sys.argv = ["generate.py", "--prompt", "x", "--max-tokens", "2"]
runpy.run_path("scripts/generate.py", run_name="__main__")
print(*sorted({name.partition(".")[0] for name in sys.modules}))
"""


@pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="other versions of jax import other packages")
def test_generating_installs_what_it_imports(tmp_path):
    """The lock file of `make generate` lists the packages that generating text imports, and no others."""
    environment = {
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path),
        "PATH": "",
        "HOME": str(tmp_path),
    }
    command = [sys.executable, "-c", _IMPORTED]
    done = subprocess.run(command, cwd=ROOT, env=environment | {"PYTHONPATH": "."}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    owners = importlib.metadata.packages_distributions()
    modules = done.stdout.splitlines()[-1].split()
    used = {name.lower().replace("_", "-") for module in modules for name in owners.get(module, ())}
    locked = set(re.findall(r"^([a-z0-9-]+)==", (ROOT / ".ci" / "generate.lock").read_text(), re.MULTILINE))
    # jaxtyping needs wadler-lindig to print arrays; setuptools comes with a virtual environment; JAX imports
    # flatbuffers where it is installed, as it is for tests of exports.
    absent = {"mimo-ultraspeed-jax", "setuptools", "distutils-precedence", "flatbuffers"}
    assert locked - {"wadler-lindig"} == used - absent
