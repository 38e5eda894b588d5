"""The runtime environment of a submitted job, as JSON for ``ray job submit --runtime-env-json``.

It sends ``sapf_ray`` and ``jobs``, and nothing that lies beside them. ``--install`` is that of
``sapf submit``: see :func:`sapf_ray.submit.runtime_env`.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from sapf_ray import submit

ROOT = Path(__file__).resolve().parents[1]
# of the programs in jobs/ alone
EXTRA = ["jsonargparse[signatures]"]


def runtime_env(install: str = "pip") -> dict[str, Any]:
    """What Ray needs to run this working tree on a node; ``install`` is ``pip`` or ``image``."""
    return submit.runtime_env(install, modules=[ROOT / "jobs"], extra=EXTRA)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--install", choices=submit.INSTALLS, default="pip")
    json.dump(runtime_env(parser.parse_args().install), sys.stdout)
