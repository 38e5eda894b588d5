"""Layouts of image folders: which images there are, of which class and in which split.

A folder per class, under one folder per split where the split is given; or a list (CSV or JSON
lines) with a column of files and one of labels, as Hugging Face's ``imagefolder`` has it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from sapf_ray.config import DataConfig
from sapf_ray.config.groups import KEY
from sapf_ray.data.base import SPLITS
from sapf_ray.data.classes import sorted_names
from sapf_ray.data.file_lists import Row, find_lists, read_list
from sapf_ray.data.files import split_of
from sapf_ray.data.formats import endings_text
from sapf_ray.data.walking import LeftOut, as_text, folders, images, shown
from sapf_ray.errors import ConfigError, DataError

ROLES = {  # what people call a split -> what it is
    "train": "train",
    "training": "train",
    "test": "test",
    "testing": "test",
    "val": "val",
    "valid": "val",
    "validation": "val",
}


@dataclass(frozen=True, kw_only=True)
class Listing:
    """All records.

    Attributes:
        class_names: One per label.
        paths: Per split, paths relative to the root.
        labels: Per split, labels in the same order.
        notes: One line for each kind of thing that was left out; names no file.
        named: Lines that name files.
    """

    class_names: tuple[str, ...]
    paths: dict[str, list[str]] = field(default_factory=lambda: {split: [] for split in SPLITS})
    labels: dict[str, list[int]] = field(default_factory=lambda: {split: [] for split in SPLITS})
    notes: list[str] = field(default_factory=list)
    named: list[str] = field(default_factory=list)

    def add(
        self,
        path: str,
        label: int,
        *,
        split: str,
    ) -> None:
        self.paths[split].append(path)
        self.labels[split].append(label)


@dataclass(frozen=True, kw_only=True)
class _Parents:
    """Where the class folders are; ``test`` is None where the split is not given."""

    train: Path
    test: Path | None
    notes: list[str]


def list_records(root: Path, config: DataConfig) -> Listing:
    """What ``data.path`` holds, by listing.

    Args:
        root: The folder, or a list of files.
        config: Split and classes.

    Raises:
        DataError: It is laid out otherwise, or a split has no image.
    """
    rows = [row for path in image_lists(root) for row in read_list(path)]
    listing = _from_rows(root, rows, config=config) if rows else _from_folders(root, config)
    for split, members in listing.paths.items():
        if not members:
            raise DataError(
                f"{shown(root)}: too few images, none falls into the {split} split at "
                f"data.test_fraction = {config.test_fraction}"
            )
    return listing


def image_lists(root: Path) -> list[Path]:
    """The lists that name the records; none where folders do.

    Args:
        root: The folder, or a list of files.
    """
    if not root.is_dir():
        return [root]
    return find_lists(root, [role for role in folders(root) if _role(role)])


def column_groups(root: Path, column: str) -> dict[str, str]:
    """Path of each listed image, as a :class:`Listing` has it, to its group.

    Args:
        root: The folder, or a list of files.
        column: Of the lists.

    Raises:
        ConfigError: No list, or no such column.
        DataError: An empty cell; names the line.
    """
    lists = image_lists(root)
    if not lists:
        raise ConfigError(
            KEY,
            f"column:{column}",
            "needs a list of the images (metadata.csv or .jsonl), and the folder has none",
        )
    home = root if root.is_dir() else root.parent
    return {
        _relative(row, home): row.group for path in lists for row in read_list(path, groups=column)
    }


def _from_folders(root: Path, config: DataConfig) -> Listing:
    parents = _parents(root)
    found = _classes(parents.train)
    if parents.test is not None:
        tested = _classes(parents.test)
        if not config.class_names:
            _check_same_classes(root, train=set(found), test=set(tested))
    classes = config.class_names or tuple(sorted(found))
    if len(classes) == 1:
        raise DataError(_one_class(parents.train, found))
    listing = Listing(class_names=classes, notes=parents.notes)
    left_out = LeftOut()
    numbers = {as_text(name): label for label, name in enumerate(classes)}
    unlisted = 0
    for split, parent in {"train": parents.train, "test": parents.test}.items():
        if parent is None:
            continue
        given = split if parents.test is not None else None
        for name, places in _classes(parent).items():
            members = [path for place in places for path in images(place, left_out)]
            if name not in numbers:
                unlisted += len(members)
                continue
            if not members and not config.class_names:
                raise DataError(
                    f"{shown(places[0])}: class without images (expected {endings_text()}); move "
                    "the folder elsewhere, or name all classes by --data.class_names a,b,c"
                )
            for path in members:
                relative = path.relative_to(root).as_posix()
                where = given or split_of(relative, config.test_fraction)
                listing.add(relative, numbers[name], split=where)
    if unlisted:
        listing.notes.append(f"{unlisted:,} images lie in folders that data.class_names lacks")
    listing.notes.extend(left_out.notes())
    listing.named.extend(left_out.named())
    return listing


def _parents(root: Path) -> _Parents:
    """The folders of the splits, called as people call them; or the root for both."""
    roles: dict[str, Path] = {}
    for folder in folders(root):
        role = _role(folder)
        if role is None:
            continue
        if role in roles:
            both = f"{roles[role].name}/ and {folder.name}/"
            raise DataError(f"{shown(root)}: {both} are both {role} sets; keep one")
        roles[role] = folder
    train = roles.get("train")
    if train is None or not folders(train):
        return _Parents(train=root, test=None, notes=[])
    labelled = [role for role in ("test", "val") if role in roles and folders(roles[role])]
    unused = [roles[role] for role in ("test", "val") if role in roles and role not in labelled[:1]]
    if not labelled and any(_role(folder) is None for folder in folders(root)):
        return _Parents(train=root, test=None, notes=[])  # one of the classes is called train
    notes = [
        f"{len(images(f, LeftOut())):,} images of {shown(f.name)}/ are not used" for f in unused
    ]
    if labelled[:1] == ["val"]:
        notes.append(f"{shown(roles['val'].name)}/ serves as the test set")
    return _Parents(train=train, test=roles[labelled[0]] if labelled else None, notes=notes)


def _role(folder: Path) -> str | None:
    return ROLES.get(folder.name.casefold())


def _classes(parent: Path) -> dict[str, list[Path]]:
    """Class folders by name; one name may be written in two ways (NFC and NFD).

    Raises:
        DataError: There is none.
    """
    found: dict[str, list[Path]] = {}
    for folder in folders(parent):
        found.setdefault(as_text(folder.name), []).append(folder)
    if not found:
        raise DataError(
            f"{shown(parent)}: no class sub-folders; expected one folder of images per class"
        )
    return found


def _one_class(parent: Path, found: dict[str, list[Path]]) -> str:
    [name] = found or ("",)
    text = f"{shown(parent)}: only one class ({name}); at least two sub-folders are needed"
    inner = found[name][0] if found else parent
    return f"{text}; is data.path {shown(inner)}?" if len(folders(inner)) > 1 else text


def _check_same_classes(root: Path, *, train: set[str], test: set[str]) -> None:
    differing = train ^ test
    if differing:
        names = ", ".join(sorted(differing))
        raise DataError(
            f"{shown(root)}: train/ and test/ must hold the same classes; only one has {names}; "
            "or name all classes by data.class_names"
        )


def _from_rows(root: Path, rows: list[Row], *, config: DataConfig) -> Listing:
    """Records of a list; its rows are the records, whatever lies in the folder beside them."""
    home = root if root.is_dir() else root.parent
    classes = config.class_names or sorted_names({row.label for row in rows})
    if len(classes) < 2:
        raise DataError(f"{shown(rows[0].where)}: only one class ({classes[0]}); two are needed")
    numbers = {as_text(name): label for label, name in enumerate(classes)}
    listing = Listing(class_names=classes)
    roles = [_row_role(row, home) for row in rows]
    test_role = "test" if "test" in roles else "val"
    given = None not in roles and "train" in roles and test_role in roles
    unlisted = 0
    unused = 0
    seen: dict[str, Row] = {}
    for row, role in zip(rows, roles, strict=True):
        relative = _relative(row, home)
        if relative in seen:
            raise DataError(
                f"{shown(row.where)}: {shown(relative)} is listed twice, also in "
                f"{shown(seen[relative].where)}; keep one"
            )
        seen[relative] = row
        if row.label not in numbers:
            unlisted += 1
        elif not given:
            split = split_of(relative, config.test_fraction)
            listing.add(relative, numbers[row.label], split=split)
        elif role in ("train", test_role):
            listing.add(relative, numbers[row.label], split="train" if role == "train" else "test")
        else:
            unused += 1
    left_out = LeftOut()
    present = set(images(home, left_out))
    beside = len(present - {home / relative for relative in seen})
    if unlisted:
        listing.notes.append(f"{unlisted:,} images have labels that data.class_names lacks")
    if unused:
        listing.notes.append(f"{unused:,} images of the validation set are not used")
    if beside:
        listing.notes.append(f"{beside:,} images are in no row of {shown(rows[0].list.name)}")
    return listing


def _relative(row: Row, home: Path) -> str:
    """The row's image as a listing has it: relative to the folder, where it lies in there."""
    if row.file.is_relative_to(home):
        return row.file.relative_to(home).as_posix()
    return str(row.file)


def _row_role(row: Row, home: Path) -> str | None:
    """What the row, or the folder of its list or file, says of the split."""
    inside = row.file.is_relative_to(home)
    folder = row.file.relative_to(home).parts[0] if inside else ""
    return ROLES.get((row.split or folder).casefold())
