"""The runtime environment of a submitted job, as JSON for ``ray job submit --runtime-env-json``.

``pip`` (the default): every node installs the dependencies that ``pyproject.toml`` names, in the
versions installed here; minutes at the first job, cached on the node afterwards. Ray itself is left
out: its version is the cluster's. ``image``: the nodes' container image has them
    (``jobs/cluster/Dockerfile``), only the code is sent.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
# Ray sends at most 500 MiB, and nothing of these is needed there
EXCLUDES = [
    ".git",
    ".venv",
    "runs",
    "mlruns",
    "build",
    "dist",
    "docs",
    "tests",
    "*.db",
    "*.egg-info",
    ".*_cache",
    ".hypothesis",
]


def requirements() -> list[str]:
    """``name[extras]==version`` of each runtime dependency but Ray, as installed here."""
    pinned = []
    for line in metadata.requires("sapf-ray") or []:
        if "extra ==" in line:
            continue
        match = re.match(r"([A-Za-z0-9._-]+)(\[[^\]]*\])?", line)
        assert match is not None
        name = match.group(1)
        extras = match.group(2) or ""
        if name != "ray":
            # a local label (torch 2.14.1+cu126) names an index that the node may not know
            pinned.append(f"{name}{extras}=={metadata.version(name).split('+')[0]}")
    return pinned


def runtime_env(install: str = "pip") -> dict[str, Any]:
    """What Ray needs to run this working tree on a node.

    Args:
        install: ``pip`` or ``image``.
    """
    env: dict[str, Any] = {
        "working_dir": str(ROOT),
        "excludes": EXCLUDES,
        "env_vars": {"RAY_USAGE_STATS_ENABLED": "0", "PYTHONUNBUFFERED": "1"},
    }
    if install == "pip":
        env["pip"] = {"packages": requirements(), "pip_check": False}
    return env


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--install", choices=("pip", "image"), default="pip")
    json.dump(runtime_env(parser.parse_args().install), sys.stdout)
