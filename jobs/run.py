r"""The ``sapf`` command on a cluster's head node: what ``ray job submit`` starts.

Example::

    ray job submit --address http://head:8265 \
        --runtime-env-json "$(python -m jobs.runtime_env)" -- \
        python -m jobs.run run --preset digits --out /shared/runs/digits

Any command of ``sapf`` goes here (run, tune, reproduce, plan ...), and ``benchmark`` starts
:mod:`jobs.benchmark`. The work goes to the cluster that the job was submitted to. The same
submission again continues what an earlier one left.
"""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path


def relative_out(arguments: list[str]) -> str | None:
    """The ``--out`` of a command line where it is not an absolute path."""
    for word, following in zip(arguments, [*arguments[1:], ""], strict=True):
        name, equals, value = word.partition("=")
        if name == "--out":
            path = value if equals else following
            return None if Path(path).expanduser().is_absolute() else path
    return None


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; returns its exit code, which becomes the job's."""
    arguments = sys.argv[1:] if arguments is None else arguments
    relative = relative_out(arguments)
    if relative is not None:
        sys.stderr.write(
            f"sapf: error: --out {relative}: must be an absolute path, on storage that all nodes "
            "mount; a job's own folder is deleted after it\n"
        )
        return 2
    os.environ.setdefault("RAY_ADDRESS", "auto")
    if arguments[:1] == ["benchmark"]:
        sys.argv = ["jobs.benchmark", *arguments[1:]]
        runpy.run_module("jobs.benchmark", run_name="__main__")
        return 0
    from sapf_ray.cli import main as sapf

    return sapf(arguments)


if __name__ == "__main__":
    sys.exit(main())
