"""The ``sapf`` command: its options are :mod:`sapf_ray.options`, what it does
:mod:`sapf_ray.commands`, where each is imported by name when it is called: ``sapf --help`` and the
listings load neither torch nor Ray.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Callable
from typing import NoReturn

from rich.console import Console

from sapf_ray import plain_text
from sapf_ray.commands import grids, looks, runs
from sapf_ray.errors import SapfError, is_environments, remedy
from sapf_ray.options import make_parser, parse

INTERRUPTED = 130  # exit code, as shells have it

_COMMANDS: dict[str, Callable[[argparse.Namespace, Console], int | None]] = {
    "init": looks.init,
    "doctor": looks.doctor,
    "run": runs.run,
    "plan": looks.plan,
    "synthesize": runs.synthesize,
    "evaluate": runs.evaluate,
    "ledger": looks.ledger,
    "audit": runs.audit,
    "verify": looks.verify,
    "tune": grids.tune,
    "reproduce": grids.reproduce,
    "submit": looks.submit,
    "datasets": looks.listing,
    "methods": looks.listing,
    "models": looks.listing,
}


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def main(arguments: list[str] | None = None) -> int:
    """Entry point.

    Returns:
        The exit code: 0 done, 1 ``doctor``, ``verify`` or ``audit`` found faults, 2 bad input, 130
            interrupted.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    plain_text.use()
    # else a thread that outlives ctrl-C starts Ray again
    os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")
    if not arguments:
        make_parser("").print_help()
        return 2
    try:
        namespace = parse(arguments)
        return _COMMANDS[namespace.command](namespace, Console()) or 0
    except SapfError as error:
        sys.stderr.write(f"sapf: error: {_one_line(error)}\n")
        return 2
    except KeyboardInterrupt:
        command_line = shlex.join(["sapf", *arguments])
        sys.stderr.write(
            f"\nsapf: interrupted; nothing is lost. The same command continues: {command_line}\n"
        )
        return INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        if not is_environments(error):
            raise
        sys.stderr.write(f"sapf: error: {_one_line(error)}; {remedy(error)}\n")
        return 2
    return 0


def entry() -> NoReturn:
    """The ``sapf`` command: :func:`main`, as a process of its own."""
    code = main()
    if code == INTERRUPTED:
        # A thread of an interrupted stage may still be inside Ray's native code, which can crash
        # while Python tears Ray down. What Ray started here ends with this process.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    entry()
