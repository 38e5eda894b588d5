"""The documents hold together: citations, links and names lead to something that is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import sapf_ray

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(
    [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), ROOT / "jobs" / "README.md"],
)
CODE = [
    path
    for folder in ("sapf_ray", "jobs", "tests")
    for path in sorted((ROOT / folder).rglob("*.py"))
    if path != Path(__file__).resolve()
]
CITATION = re.compile(
    r"(?:\bdesign|design\.md,)\s+(section|rule)s?\s+(\d+)(?:(?:,|\s+and)\s+(\d+))?"
)


def anchors(page: Path) -> set[str]:
    """What ``#...`` can name on a page: explicit anchors and GitHub's names of headings."""
    text = page.read_text()
    names = set(re.findall(r'<a id="([^"]+)">', text))
    for heading in re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE):
        plain = re.sub(r"[^\w\- ]", "", heading.lower())
        names.add(plain.strip().replace(" ", "-"))
    return names


def citations() -> set[tuple[str, str]]:
    """(file, anchor) of each place in the code that cites docs/design.md."""
    cited = set()
    for path in CODE:
        text = re.sub(
            r"\s*\n\s*#?\s*", " ", path.read_text()
        )  # a citation may break over two lines
        for kind, *numbers in CITATION.findall(text):
            cited |= {(str(path.relative_to(ROOT)), f"{kind}-{n}") for n in numbers if n}
    return cited


def test_every_citation_of_the_design_leads_somewhere() -> None:
    known = anchors(ROOT / "docs" / "design.md")
    cited = citations()
    assert len(cited) >= 14, "citations are no longer found"
    assert {(path, name) for path, name in cited if name not in known} == set()


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_link_to_a_file_leads_somewhere(page: Path) -> None:
    dead = []
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if "://" in link or link.startswith("mailto:"):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            dead.append(link)
    assert dead == []


@pytest.mark.parametrize("page", ["docs/architecture.md", "README.md"])
def test_every_package_is_on_the_map(page: str) -> None:
    (drawing,) = [
        block
        for block in re.findall(r"^```\w*\n(.*?)^```$", (ROOT / page).read_text(), re.S | re.M)
        if "grad_sample/" in block
    ]
    packages = {path.parent.name for path in (ROOT / "sapf_ray").glob("*/__init__.py")}
    assert packages - set(re.findall(r"(\w+)/", drawing)) == set()


def test_one_version_everywhere() -> None:
    citation = (ROOT / "CITATION.cff").read_text()
    assert f"\nversion: {sapf_ray.__version__}\n" in citation
    assert f"[Unreleased] {sapf_ray.__version__}" in (ROOT / "CHANGELOG.md").read_text() or (
        f"[{sapf_ray.__version__}]" in (ROOT / "CHANGELOG.md").read_text()
    )
