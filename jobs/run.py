r"""The ``sapf`` command, or a program of ``jobs/``, as what a submitted job starts.

Example::

    RAY_AUTH_MODE=token ray job submit --address http://head:8265 \
        --runtime-env-json "$(python -m jobs.runtime_env)" -- \
        python -m jobs.run benchmark --out /shared/runs/bench

``benchmark`` starts :mod:`jobs.benchmark`; anything else is a command of ``sapf`` (run, tune,
reproduce, plan ...), for which ``sapf submit`` is the shorter way.
"""

from __future__ import annotations

import os
import runpy
import sys

from sapf_ray.cli import main as sapf
from sapf_ray.errors import ConfigError
from sapf_ray.submit import check_out


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; returns its exit code, which becomes the job's."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        check_out(arguments)
    except ConfigError as error:
        sys.stderr.write(f"sapf: error: {error}\n")
        return 2
    # the work goes to the cluster that the job was submitted to
    os.environ.setdefault("RAY_ADDRESS", "auto")
    if arguments[:1] != ["benchmark"]:
        return sapf(arguments)
    sys.argv = ["jobs.benchmark", *arguments[1:]]
    runpy.run_module("jobs.benchmark", run_name="__main__")
    return 0


if __name__ == "__main__":
    sys.exit(main())
