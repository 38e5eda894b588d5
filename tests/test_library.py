"""The library as others import it: public names, what importing costs, declared dependencies."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

import sapf_ray

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.mark.parametrize("name", sapf_ray.__all__)
def test_public_names_are_there(name: str) -> None:
    value = getattr(sapf_ray, name)
    assert value is not None
    assert name in dir(sapf_ray)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        sapf_ray.no_such_name  # noqa: B018


def test_importing_the_package_imports_none_of_its_dependencies() -> None:
    code = "import sys, sapf_ray; sapf_ray.SapfError; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    heavy = {"torch", "ray", "numpy", "scipy", "dp_accounting", "diffusers", "rich", "pydantic"}
    assert not heavy & set(done.stdout.split())


def imported(folder: Path) -> set[str]:
    """Top-level names of all modules that the code below ``folder`` imports, wherever it does."""
    names: set[str] = set()
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
                names.add(node.module.split(".")[0])
    return names - sys.stdlib_module_names


def distribution(requirement: str) -> str:
    return re.split(r"[^A-Za-z0-9._-]", requirement)[0].lower().replace("_", "-")


def test_every_import_is_a_declared_dependency_and_the_other_way_round() -> None:
    declared = {distribution(line) for line in PROJECT["dependencies"]}
    extras = {distribution(line) for line in PROJECT["optional-dependencies"]["dicom"]}
    providers = metadata.packages_distributions()
    modules = imported(ROOT / "sapf_ray") - {"sapf_ray"}
    used: set[str] = set()
    for module in modules:
        names = {name.lower().replace("_", "-") for name in providers[module]}
        assert names & (declared | extras), f"{module} is imported; none of {names} is declared"
        used |= names
    assert declared <= used, "declared, and imported nowhere"


def test_one_python_version_everywhere() -> None:
    lowest = PROJECT["requires-python"].removeprefix(">=")
    assert f"Programming Language :: Python :: {lowest}" in PROJECT["classifiers"]
    makefile = (ROOT / "Makefile").read_text()
    assert f"python3 >= {lowest}" in makefile
    assert f"({lowest.replace('.', ', ')})" in makefile
