"""The command line, called in this process."""

from __future__ import annotations

from sapf_ray.cli import main


def call(capsys, *arguments: str) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of ``sapf ARGUMENTS``."""
    try:
        code = main(list(arguments))
    except SystemExit as exit_:
        code = exit_.code
    captured = capsys.readouterr()
    return code, captured.out, captured.err
