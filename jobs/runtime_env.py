"""The runtime environment of a submitted job, as JSON for ``ray job submit --runtime-env-json``.

It sends the code of ``sapf_ray`` and ``jobs``, and nothing that lies beside or in the midst of it.
``--install`` is that of ``sapf submit``: see :func:`sapf_ray.submit.runtime_env`. Ray packs the
code when the job is submitted, so what is sent is laid out, as links, in a folder that stays.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from sapf_ray import submit

ROOT = Path(__file__).resolve().parents[1]
# of the programs in jobs/ alone
EXTRA = ["jsonargparse[signatures]"]


def runtime_env(install: str = "pip", folder: Path | None = None) -> dict[str, Any]:
    """What Ray needs to run this working tree on a node.

    Args:
        install: ``pip`` or ``image``.
        folder: Where what is sent is laid out; a new temporary folder unless given.
    """
    place = Path(tempfile.mkdtemp(prefix="sapf-job-")) if folder is None else folder
    return submit.runtime_env(install, folder=place, modules=[ROOT / "jobs"], extra=EXTRA)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--install", choices=submit.INSTALLS, default="pip")
    json.dump(runtime_env(parser.parse_args().install), sys.stdout)
