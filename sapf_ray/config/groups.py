"""How the text of ``data.groups`` says whose an image is."""

from __future__ import annotations

import re
from dataclasses import dataclass

from sapf_ray.errors import ConfigError

KEY = "data.groups"
ALLOWED = (
    "must be column:NAME (a column of the image list or of the Parquet files), folder:LEVEL (1 is "
    "the folder an image lies in, 2 the one above), pattern:REGEX (of the file's name, with one "
    "group in parentheses) or published (CelebA's identities, Camelyon's patients)"
)


@dataclass(frozen=True, kw_only=True)
class Grouping:
    """Where the name of an image's group is found.

    Attributes:
        by: ``column``, ``folder``, ``pattern`` or ``published``.
        value: Name of the column, level, regular expression; empty for published lists.
    """

    by: str
    value: str = ""

    def __str__(self) -> str:
        return f"{self.by}:{self.value}" if self.value else self.by

    @property
    def level(self) -> int:
        """Of ``folder``: 1 is the folder an image lies in."""
        return int(self.value)


def grouping_of(text: str) -> Grouping:
    """Reads ``data.groups``.

    Raises:
        ConfigError: Another form, a level below 1, or a pattern without exactly one group.

    >>> grouping_of("folder:2").level
    2
    >>> str(grouping_of("pattern:^(p[0-9]+)_"))
    'pattern:^(p[0-9]+)_'
    """
    by, _, value = text.partition(":")
    if by == "published" and not value:
        return Grouping(by=by)
    if by == "column" and value.strip():
        return Grouping(by=by, value=value.strip())
    if by == "folder" and re.fullmatch("[1-9][0-9]?", value):
        return Grouping(by=by, value=value)
    if by == "pattern" and value:
        _check_pattern(text, value)
        return Grouping(by=by, value=value)
    raise ConfigError(KEY, text, ALLOWED)


def _check_pattern(text: str, pattern: str) -> None:
    try:
        groups = re.compile(pattern).groups
    except re.error as error:
        raise ConfigError(
            KEY, text, f"must hold a regular expression of Python's ({error})"
        ) from None
    if groups != 1:
        raise ConfigError(
            KEY, text, f"must have exactly one group in parentheses, has {groups}; (?:…) is none"
        )
