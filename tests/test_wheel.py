"""What a user installs: the wheel holds what it needs, nothing else, and works in an empty folder.

The wheel's venv sees the dependencies of the one that runs the tests, but no checkout: a ``.pth``
line adds a folder of packages without reading that folder's own ``.pth`` files.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

import sapf_ray
from sapf_ray.privacy.ledger import Ledger

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("pyproject.toml", "README.md", "LICENSE", "sapf_ray", "tune_spaces")
TINY = {
    "data.source": "digits",
    "saliency.sample_rate": "0.05",
    "finetune.steps": "2",
    "finetune.batch_size": "8",
    "finetune.micro_batch_size": "8",
    "finetune.num_workers": "1",
    "synthesis.n_images": "10",
    "synthesis.steps": "2",
    "evaluation.enabled": "false",
    "tracking.enabled": "false",
    "synthesis.num_actors": "1",
    "cluster.num_cpus": "1",
}


def output(words: list[str], folder: Path) -> str:
    """Standard output of a command started in ``folder``, with no checkout in sight."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        words, capture_output=True, text=True, cwd=folder, env=environment, timeout=200
    )
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy: a build leaves folders behind."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in SOURCES:
        if (ROOT / name).is_dir():
            ignore = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=ignore)
        else:
            shutil.copy(ROOT / name, source / name)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--no-deps"]
    output([*pip, "--no-build-isolation", "--quiet", "-w", str(folder), str(source)], folder)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def sapf(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The ``sapf`` program of a venv in which the wheel is all of this project."""
    folder = tmp_path_factory.mktemp("installed")
    venv.create(folder / "venv", symlinks=True)
    python = folder / "venv" / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", str(python)]
    output([*pip, "install", "--quiet", "--no-deps", "--no-index", str(wheel)], folder)
    tag = f"python{sys.version_info.major}.{sys.version_info.minor}"
    packages = folder / "venv" / "lib" / tag / "site-packages"
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    home = output([str(python), "-c", "import sapf_ray; print(sapf_ray.__file__)"], folder)
    assert Path(home.strip()) == packages / "sapf_ray" / "__init__.py", "a checkout leaks in"
    return folder / "venv" / "bin" / "sapf"


def test_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    info = f"sapf_ray-{sapf_ray.__version__}.dist-info"
    assert {name.split("/")[0] for name in names} == {"sapf_ray", info}
    shipped = {name for name in names if not name.startswith(info)}
    ours = {
        str(path.relative_to(ROOT))
        for folder in ("sapf_ray", "sapf_ray/tune_spaces")  # a link, which rglob does not enter
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and path.suffix != ".md"
    }
    assert ours <= shipped
    assert "sapf_ray/tune_spaces/common/smoke.yaml" in ours
    assert "sapf_ray/py.typed" in ours


def test_the_installed_command_knows_its_version_and_its_grids(sapf: Path, tmp_path: Path) -> None:
    assert output([str(sapf), "--version"], tmp_path).split()[-1] == sapf_ray.__version__
    listed = output([str(sapf), "tune", "digits", "--dry-run"], tmp_path)
    assert "dp-sapf" in listed.lower()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.long  # the program is that of tests/test_pipeline.py
def test_a_tiny_run_of_the_installed_command(sapf: Path, tmp_path: Path) -> None:
    options = [f"--{name}={value}" for name, value in TINY.items()]
    output([str(sapf), "run", "--preset=digits", f"--out={tmp_path / 'run'}", *options], tmp_path)
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    spent = Ledger.open(tmp_path / "run" / "ledger.jsonl").epsilon_spent()
    assert 0 < spent <= metrics["epsilon_planned"]
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
