"""YAML as this program reads it: ``1e-3`` is a number, as in YAML 1.2.

PyYAML follows YAML 1.1, where a number in exponent form needs a dot and a sign; a learning rate
written ``1e-3`` would be a word.

>>> parse_yaml("[1e-3, 2.5e4, 1e, 10]")
[0.001, 25000.0, '1e', 10]
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from sapf_ray.errors import SapfError, reason


class _Loader(yaml.SafeLoader):
    pass


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def parse_yaml(text: str) -> Any:
    """The value that the text stands for.

    Raises:
        yaml.YAMLError: Not valid YAML.
    """
    return yaml.load(text, _Loader)


def read_yaml(path: str | Path, *, option: str = "") -> dict[str, Any]:
    """A file's mapping of keys to values.

    Args:
        path: The file.
        option: Command-line option that names it, for the error.

    Raises:
        SapfError: No such file, not readable, not valid YAML, or no mapping; one line.
    """
    name = f"{option} {path}".lstrip()
    try:
        nested = parse_yaml(Path(path).expanduser().read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise SapfError(f"{name}: cannot be read: {reason(error)}") from error
    except yaml.YAMLError as error:
        raise SapfError(f"{name}: not valid YAML ({' '.join(str(error).split())})") from error
    if not isinstance(nested, dict):
        raise SapfError(f"{name}: must be a mapping of keys to values")
    return nested
