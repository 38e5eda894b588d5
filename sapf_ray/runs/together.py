"""What several runs on the same images cost together, from their ledgers alone.

Runs belong together where their headers have the same keyed fingerprint of the images
(:mod:`sapf_ray.runs.origin`), whatever their paths, and protect the same unit: an epsilon for one
image and one for one group speak of other neighbours and are never added. All their charged
releases compose, chosen adaptively or not. A release that several ledgers paid for, a shared
selection or one in a copied run directory, has one ``noise_id``; it is one release and counts once.

Ledgers without a fingerprint (earlier versions, a home that could not be written) are taken as of
the same images, which can only say too much. Fingerprints under different secrets cannot be
compared: such totals stand side by side, and :attr:`Together.comparable` says so.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from sapf_ray.errors import RunDirectoryError
from sapf_ray.privacy.accountants import compose_epsilon, supports
from sapf_ray.privacy.events import DpEvent
from sapf_ray.privacy.ledger import Ledger
from sapf_ray.runs.directory import RunDirectory

COVERED = (
    "Covered is every release in these ledgers, on images with the same fingerprint under whatever "
    "path. Not covered are runs whose ledgers are elsewhere or deleted, other uses of the images, "
    "data sets that differ in even one image (they count as other images), and scores measured on "
    "real images with whatever is chosen by them."
)
"""What a total says, and what it does not."""


@dataclass(frozen=True)
class PaidRun:
    """A run that has a ledger.

    Attributes:
        directory: Where it is.
        ledger: What it paid.
    """

    directory: RunDirectory
    ledger: Ledger

    @functools.cached_property
    def config(self) -> Mapping[str, Any]:
        """The config as plain sections; names in it are not looked up. Empty if unreadable."""
        try:
            content = yaml.safe_load(self.directory.config.read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError):
            return {}
        return content if isinstance(content, dict) else {}

    def setting(self, section: str, name: str) -> Any:
        """A value of the config; None where it is not given."""
        values = self.config.get(section)
        return values.get(name) if isinstance(values, dict) else None

    @property
    def images(self) -> str | None:
        """Fingerprint of the images it read, with the secret's name; None where it is not known."""
        found = self.ledger.header.origin.get("images")
        if not isinstance(found, dict):
            return None
        return f"{found.get('secret')}/{found.get('fingerprint')}"

    @property
    def unit(self) -> str:
        """Whom its epsilon is for: ``image``, or ``group`` with the rule that makes the groups."""
        unit = self.ledger.plan.unit
        return unit if unit == "image" else f"{unit} by {self.setting('data', 'groups')}"

    @property
    def seeded(self) -> bool:
        """Whether its noise can be repeated by whoever knows the seed."""
        return self.setting("privacy", "reproducible_seed") is not None


@dataclass(frozen=True, kw_only=True)
class Together:
    """What the runs on the same images cost together.

    Attributes:
        images: As :attr:`PaidRun.images`; None where that is not known.
        unit: Whom the epsilons are for.
        runs: The runs.
        releases: Number of different charged releases.
        repeated: Number of charges that repeat another ledger's release, counted once.
        epsilon: Composition at ``delta``; infinite where one of the runs has no noise.
        delta: The smallest of the runs' deltas.
        accountant: The tightest that can price all the releases: ``pld``, else ``rdp``.
        summed: Sum of the runs' epsilons (basic composition), at ``summed_delta``.
        summed_delta: Sum of their deltas.
        comparable: False where other runs' images may be the same ones: fingerprints are missing,
            or under another secret.
    """

    images: str | None
    unit: str
    runs: tuple[PaidRun, ...]
    releases: int
    repeated: int
    epsilon: float
    delta: float
    accountant: str
    summed: float
    summed_delta: float
    comparable: bool = True


def find_runs(paths: Iterable[str | Path]) -> list[PaidRun]:
    """Every run with a ledger at or below the paths; one that is found twice is there once.

    Raises:
        RunDirectoryError: Nothing is there, no ledger is below it, or a ledger is damaged.
    """
    found: dict[Path, PaidRun] = {}
    for path in paths:
        root = Path(path).expanduser()
        if not root.is_dir():
            raise RunDirectoryError(f"{path}: no such folder; give run directories, or folders of")
        ledgers = sorted(root.rglob("ledger.jsonl"))
        if not ledgers:
            raise RunDirectoryError(f"{path}: no ledger.jsonl there or below")
        for ledger in ledgers:
            place = ledger.resolve()
            if place not in found:
                found[place] = PaidRun(RunDirectory(ledger.parent), Ledger.open(ledger))
    return list(found.values())


def totals_of(runs: Sequence[PaidRun]) -> list[Together]:
    """One total per set of images and unit; runs that read no image are left out."""
    groups: dict[tuple[str, str | None], list[PaidRun]] = {}
    for run in runs:
        if run.ledger.plan.reads_images:
            groups.setdefault((run.unit, run.images), []).append(run)
    found = []
    for (unit, images), members in groups.items():
        others = [other for of, other in groups if of == unit and other != images]
        comparable = all(_can_be_told_apart(images, other) for other in others)
        found.append(_total(images, unit, members=members, comparable=comparable))
    return found


def _can_be_told_apart(images: str | None, other: str | None) -> bool:
    if images is None or other is None:
        return False
    return images.partition("/")[0] == other.partition("/")[0]


def charged_releases(ledgers: Iterable[Ledger]) -> tuple[Counter[DpEvent], int, int]:
    """What several ledgers charged, each release once.

    Returns:
        Events and how often each was released; number of charged releases; and of charges that
        repeat another ledger's release.
    """
    seen: set[tuple[str, str, DpEvent]] = set()
    whole: Counter[DpEvent] = Counter()
    repeated = 0
    for ledger in ledgers:
        own: Counter[DpEvent] = Counter()
        for line in ledger.events():
            identity = (line.release, line.noise_id, line.event)
            if line.replay:
                continue
            if identity in seen:
                repeated += 1
                continue
            seen.add(identity)
            own[line.event] += 1
        whole += ledger.whole(own)
    return whole, len(seen), repeated


def tightest(events: Counter[DpEvent]) -> str:
    """The tightest accountant that can price the events."""
    return "pld" if supports("pld", events.items()) else "rdp"


def _total(
    images: str | None, unit: str, *, members: Sequence[PaidRun], comparable: bool
) -> Together:
    events, releases, repeated = charged_releases(run.ledger for run in members)
    deltas = [run.ledger.plan.delta for run in members]
    accountant = tightest(events)
    return Together(
        images=images,
        unit=unit,
        runs=tuple(members),
        releases=releases,
        repeated=repeated,
        epsilon=compose_epsilon(events.items(), min(deltas), accountant=accountant),
        delta=min(deltas),
        accountant=accountant,
        summed=sum(run.ledger.epsilon_spent() for run in members),
        summed_delta=sum(deltas),
        comparable=comparable,
    )
