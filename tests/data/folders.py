"""Odd folders as people have them; the odd images are in :mod:`tests.data.corpus`."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.data.corpus import picture, saved

PNG = saved(picture(), "PNG")


@dataclass(frozen=True, kw_only=True)
class FolderCase:
    """One odd folder.

    Attributes:
        name: What is odd.
        build: Fills an empty folder.
        sizes: Training and test records; one number where only their sum is determined.
        classes: Names of the classes.
        words: What the one line must hold, where it is refused.
        note: Part of a note that is expected; empty for no note at all.
        settings: Fields of the data config.
        inside: What ``data.path`` is, within the folder.
    """

    name: str
    build: Callable[[Path], None]
    sizes: tuple[int, ...] = ()
    classes: tuple[str, ...] = ("cat", "dog")
    words: tuple[str, ...] = ()
    note: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    inside: str = ""


def put(root: Path, *names: str, content: bytes = PNG) -> None:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def some(root: Path, *folders: str, n: int = 12) -> None:
    """Images in each of the folders; with 24, both splits by hash are not empty."""
    for folder in folders:
        put(root, *[f"{folder}/{i:02d}.png" for i in range(n)])


def _split(*names: str) -> Callable[[Path], None]:
    """Two classes with 3, 2 and 1 images in folders of these names."""

    def build(root: Path) -> None:
        for i, name in enumerate(names):
            some(root, f"{name}/cat", f"{name}/dog", n=3 - i)

    return build


def _beside(*names: str) -> Callable[[Path], None]:
    """Two ordinary classes, and files that are no records."""

    def build(root: Path) -> None:
        some(root, "cat", "dog")
        put(root, *names)

    return build


def _table(name: str, text: str | bytes, *folders: str) -> Callable[[Path], None]:
    """12 images in one folder each, and a list; ``ROWS`` in it becomes their rows."""

    def build(root: Path) -> None:
        for folder in folders or ("",):
            some(root, folder or ".", n=24)
        raw = text if isinstance(text, bytes) else text.encode()
        put(root, name, content=raw)

    return build


def _rows(separator: str = ",", labels: tuple[str, str] = ("cat", "dog"), n: int = 24) -> str:
    return "".join(f"{i:02d}.png{separator}{labels[i % 2]}\n" for i in range(n))


def _json_rows() -> str:
    rows = [{"file_name": f"{i:02d}.png", "label": i % 2} for i in range(24)]
    return "".join(json.dumps(row) + "\n" for row in rows)


def _split_rows() -> str:
    parts = ["train", "train", "val", "test"]
    return "".join(f"{i:02d}.png,{'cat' if i % 3 else 'dog'},{parts[i % 4]}\n" for i in range(24))


def _lists_in_splits(root: Path) -> None:
    for part, n in (("train", 6), ("validation", 4)):
        some(root, part, n=n)
        put(root, f"{part}/metadata.csv", content=("file_name,label\n" + _rows(n=n)).encode())


def _links(root: Path) -> None:
    some(root, "cat", "store/dogs")
    (root / "dog").symlink_to(root / "store" / "dogs")
    (root / "store").rename(root / ".store")
    (root / "dog").unlink()
    (root / "dog").symlink_to(root / ".store" / "dogs")


def _loop(root: Path) -> None:
    some(root, "cat", "dog")
    (root / "cat" / "again").symlink_to(root / "cat")
    (root / "dog" / "up").symlink_to("..")
    (root / "dog" / "self").symlink_to("self")


def _dangling(name: str) -> Callable[[Path], None]:
    def build(root: Path) -> None:
        some(root, "cat", "dog")
        (root / "cat" / name).symlink_to("/no/such/disk/x")

    return build


def _named(*names: bytes) -> Callable[[Path], None]:
    def build(root: Path) -> None:
        some(root, "cat", "dog")
        for name in names:
            put(root, "cat/" + os.fsdecode(name))

    return build


def _classes_named(*names: bytes) -> Callable[[Path], None]:
    return lambda root: some(root, *[os.fsdecode(name) for name in names])


def _composed(root: Path) -> None:
    """The training class is written composed, the test class decomposed (as macOS does)."""
    some(root, "train/caf\u00e9", "train/dog", n=3)
    some(root, "test/cafe\u0301", "test/dog", n=2)


def _empty_class(root: Path) -> None:
    some(root, "cat", "dog")
    (root / "emu").mkdir()


def _pipe(root: Path) -> None:
    some(root, "cat", "dog")
    os.mkfifo(root / "cat" / "pipe.png")


def _unlabelled_test(root: Path) -> None:
    some(root, "train/cat", "train/dog")
    put(root, "test/1.png", "test/2.png")


def _nested(root: Path) -> None:
    some(root, "cat/2019/may", "cat/2020", "dog/a b/c#d%20", n=8)


def _wrapped(root: Path) -> None:
    some(root, "photos/cat", "photos/dog")


def _captions(root: Path) -> None:
    """A list without labels beside class folders."""
    some(root, "cat", "dog")
    put(root, "metadata.csv", content=b"file_name,text\na.png,b\n")


THREE = ("cat", "dog", "emu")

FOLDER_CASES = (
    *(
        FolderCase(name="/".join(names), build=_split(*names), sizes=(6, 4))
        for names in (
            ("train", "test"),
            ("Train", "Test"),
            ("TRAIN", "TEST"),
            ("training", "testing"),
            ("Training", "test"),
        )
    ),
    *(
        FolderCase(
            name="/".join(names), build=_split(*names), sizes=(6, 4), note="serves as the test set"
        )
        for names in (("train", "val"), ("train", "valid"), ("Train", "Validation"))
    ),
    FolderCase(
        name="three splits",
        build=_split("train", "test", "val"),
        sizes=(6, 4),
        note="2 images of val/",
    ),
    FolderCase(
        name="two training sets", build=_split("train", "Train", "test"), words=("both train sets",)
    ),
    FolderCase(
        name="train only", build=lambda root: some(root, "train/cat", "train/dog"), sizes=(24,)
    ),
    FolderCase(
        name="unlabelled test", build=_unlabelled_test, sizes=(24,), note="2 images of test/"
    ),
    FolderCase(name="nested", build=_nested, sizes=(24,)),
    FolderCase(
        name="wrapped", build=_wrapped, words=("only one class (photos)", "is data.path", "photos?")
    ),
    *(
        FolderCase(name=f"junk {name}", build=_beside(name), sizes=(24,))
        for name in (
            ".git/x.png",
            ".ipynb_checkpoints/x.png",
            "cat/.ipynb_checkpoints/x.png",
            "cat/._01.png",
            "__MACOSX/cat/x.png",
            "cat/.DS_Store",
            "cat/Thumbs.db",
            "cat/@eaDir/x.png",
            "cat/.thumbnails/x.png",
            "dog/desktop.ini",
            "lost+found/x.png",
            "$RECYCLE.BIN/x.png",
            "System Volume Information/x.png",
            ".hidden.png",
        )
    ),
    *(
        FolderCase(name=f"beside {name}", build=_beside(name), sizes=(24,), note=note)
        for name, note in (
            ("cat/notes.txt", "1 .txt"),
            ("cat/scan.heic", "1 .heic"),
            ("cat/IMG0001", "without ending"),
            ("dog/film.mp4", "1 .mp4"),
            ("cat/page.pdf", "1 .pdf"),
            ("cat/draw.svg", "1 .svg"),
            ("cat/plot.eps", "1 .eps"),
            ("cat/a\nb.tx\nt", "files are no images"),
        )
    ),
    FolderCase(
        name="csv", build=_table("metadata.csv", "file_name,label\n" + _rows()), sizes=(24,)
    ),
    FolderCase(
        name="csv with BOM",
        build=_table("metadata.csv", "\ufefffile_name,label\n" + _rows()),
        sizes=(24,),
    ),
    FolderCase(
        name="csv of Windows",
        build=_table("metadata.csv", ("file_name,label\n" + _rows()).replace("\n", "\r\n")),
        sizes=(24,),
    ),
    FolderCase(
        name="semicolons",
        build=_table("metadata.csv", "file_name;label\n" + _rows(";")),
        sizes=(24,),
    ),
    FolderCase(
        name="tsv", build=_table("metadata.tsv", "file_name\tlabel\n" + _rows("\t")), sizes=(24,)
    ),
    FolderCase(
        name="jsonl", build=_table("metadata.jsonl", _json_rows()), sizes=(24,), classes=("0", "1")
    ),
    FolderCase(
        name="numbers",
        build=_table("metadata.csv", "file_name,label\n" + _rows(labels=("10", "9"))),
        sizes=(24,),
        classes=("9", "10"),
    ),
    FolderCase(
        name="own csv",
        build=_table("list.csv", "Image,Class\n" + _rows()),
        sizes=(24,),
        inside="list.csv",
    ),
    FolderCase(
        name="split column",
        build=_table("metadata.csv", "file_name,label,split\n" + _split_rows()),
        sizes=(12, 6),
        note="6 images of the validation set",
    ),
    FolderCase(name="list per split", build=_lists_in_splits, sizes=(6, 4)),
    FolderCase(
        name="unlisted",
        build=_table("metadata.csv", "file_name,label\n" + _rows(n=20)),
        sizes=(20,),
        note="4 images are in no row",
    ),
    FolderCase(name="csv without labels", build=_captions, sizes=(24,)),
    FolderCase(
        name="own csv without labels",
        build=_table("list.csv", "file,text\na.png,b\n"),
        inside="list.csv",
        words=("columns are file, text", "label"),
    ),
    FolderCase(
        name="own csv without files",
        build=_table("list.csv", "name,label\na.png,b\n"),
        inside="list.csv",
        words=("columns are name, label", "file_name"),
    ),
    FolderCase(
        name="empty csv",
        build=_table("list.csv", ""),
        inside="list.csv",
        words=("list.csv", "no rows"),
    ),
    FolderCase(
        name="empty label",
        build=_table("metadata.csv", "file_name,label\n00.png,cat\n01.png,\n"),
        words=("line 3", "no label"),
    ),
    FolderCase(
        name="listed twice",
        build=_table("metadata.csv", "file_name,label\n" + _rows() + "00.png,dog\n"),
        words=("line 26", "00.png", "listed twice"),
    ),
    FolderCase(
        name="broken json",
        build=_table("metadata.jsonl", '{"file_name": \n'),
        words=("metadata.jsonl", "not a list"),
    ),
    FolderCase(
        name="gone",
        build=_table("metadata.csv", "file_name,label\n" + _rows() + "99.png,dog\n"),
        words=("99.png", "No such file"),
    ),
    FolderCase(name="links", build=_links, sizes=(24,)),
    FolderCase(name="loops", build=_loop, sizes=(36,), note="links lead to nothing"),
    FolderCase(name="dangling image", build=_dangling("x.png"), words=("x.png", "No such file")),
    FolderCase(
        name="dangling folder",
        build=_dangling("more"),
        sizes=(24,),
        note="links lead to nothing",
    ),
    FolderCase(name="Latin-1 names", build=_named(b"caf\xe9.png"), sizes=(25,)),
    FolderCase(
        name="odd names",
        build=_named(
            b"a b#c%20.png", b"new\nline.png", "\u732b.png".encode(), b"-x.png", b"'\".png"
        ),
        sizes=(29,),
    ),
    FolderCase(name="long name", build=_named(b"x" * 240 + b".png"), sizes=(25,)),
    FolderCase(
        name="Latin-1 classes",
        build=_classes_named(b"caf\xe9", b"dog"),
        sizes=(24,),
        classes=("caf\u00e9", "dog"),
    ),
    FolderCase(
        name="decomposed classes",
        build=_classes_named("cafe\u0301".encode(), b"dog"),
        sizes=(24,),
        classes=("caf\u00e9", "dog"),
    ),
    FolderCase(
        name="composed and decomposed", build=_composed, sizes=(6, 4), classes=("caf\u00e9", "dog")
    ),
    FolderCase(
        name="empty class",
        build=_empty_class,
        words=("emu", "class without images", "data.class_names"),
    ),
    FolderCase(
        name="empty class named",
        build=_empty_class,
        sizes=(24,),
        classes=THREE,
        settings={"class_names": THREE},
    ),
    FolderCase(
        name="missing class named",
        build=_beside(),
        sizes=(24,),
        classes=THREE,
        settings={"class_names": THREE},
    ),
    FolderCase(
        name="other class",
        build=_beside("owl/1.png"),
        sizes=(24,),
        settings={"class_names": ("cat", "dog")},
        note="1 images lie in folders",
    ),
    FolderCase(name="pipe", build=_pipe, sizes=(24,), note="1 .png"),
)
