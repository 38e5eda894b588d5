"""Groups of images that their paths name: a folder, or a part of the file's name."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import PurePosixPath

from sapf_ray.config.groups import KEY, Grouping
from sapf_ray.data.base import no_such_groups
from sapf_ray.data.walking import as_text, shown
from sapf_ray.errors import DataError


def path_groups(paths: Sequence[str], grouping: Grouping, *, source: str, able: str) -> list[str]:
    """The group of each path.

    A folder's name alone is the group's: two folders of one name, in different classes, are one
    group.

    Args:
        paths: Relative to the data set's root, with forward slashes.
        grouping: By folder or by pattern.
        source: Name of the source, for messages.
        able: The ways in which it finds groups, for messages.

    Raises:
        ConfigError: Another way of grouping.
        DataError: A path has too few folders, or the pattern does not match its file's name.

    >>> from sapf_ray.config.groups import grouping_of
    >>> path_groups(["cat/p1_a.png"], grouping_of("pattern:^(p[0-9]+)_"), source="", able="")
    ['p1']
    """
    if grouping.by == "folder":
        return [_folder(path, grouping.level) for path in paths]
    if grouping.by == "pattern":
        pattern = re.compile(grouping.value)
        return [_match(path, pattern) for path in paths]
    raise no_such_groups(grouping, source, able=able)


def _folder(path: str, level: int) -> str:
    folders = PurePosixPath(path).parts[:-1]
    if len(folders) < level:
        raise DataError(f"{shown(path)}: lies in {len(folders)} folders, {KEY} = folder:{level}")
    return as_text(folders[-level])


def _match(path: str, pattern: re.Pattern[str]) -> str:
    found = pattern.search(as_text(PurePosixPath(path).name))
    if found is None or not found[1]:
        raise DataError(f"{shown(path)}: {KEY} = pattern:{pattern.pattern} finds no group in it")
    return found[1]
