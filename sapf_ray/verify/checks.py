"""The checks of ``sapf verify``, one row each.

Each looks at a :class:`Subject` and returns what it found, or raises what it could not read: both
end as a row of the table. None of them loads an image, a weight, or a plugin that the run names.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from sapf_ray import __version__
from sapf_ray.errors import ConfigError, RunDirectoryError, SapfError, reason
from sapf_ray.files import file_digest
from sapf_ray.privacy.accountant_table import ACCOUNTANTS
from sapf_ray.privacy.accountants import compose_epsilon, supports, without_notice
from sapf_ray.privacy.events import DpEvent
from sapf_ray.privacy.ledger import Ledger
from sapf_ray.privacy.planner import PrivacyPlan, plan_events
from sapf_ray.privacy.verdict import TOLERANCE, Verdict, judge
from sapf_ray.runs.directory import EVALUATION, SYNTHESIS, ResultDirectory, RunDirectory
from sapf_ray.runs.manifest import faults
from sapf_ray.verify import independent

PASS, FAIL, OPEN = "PASS", "FAIL", "not checked"
_SAME = 1e-6  # relative difference of two epsilons that are the same
_SHOWN = 3  # files that are named, of those that are not as they should be


class Fault(Exception):
    """What a check found wrong, in a few words."""


class NotChecked(Exception):
    """Why a check could not be made, without anything being wrong."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One row.

    Attributes:
        check: Name of the check.
        state: ``PASS``, ``FAIL`` or ``not checked``.
        detail: What was found, one line.
    """

    check: str
    state: str
    detail: str


class Subject:
    """A run directory as it lies there; each part is read when a check first asks for it.

    Args:
        path: Run directory.
        digest: SHA-256 that its manifest should have, in hex; None where that is not known.

    Raises:
        RunDirectoryError: Not a run directory.
        ConfigError: ``digest`` is none.
    """

    def __init__(self, path: str | Path, digest: str | None = None) -> None:
        self.directory = RunDirectory(path)
        self.digest = None if digest is None else _digest(digest)
        root = self.directory.root.resolve()
        if root.parent.name in (SYNTHESIS, EVALUATION) and not self.directory.ledger.exists():
            raise RunDirectoryError(
                f"{path}: is a later result of a run; verify the run, {root.parent.parent}, which "
                "covers its results"
            )
        if not (self.directory.config.exists() or self.directory.ledger.exists()):
            raise RunDirectoryError(
                f"{path}: no config.yaml and no ledger.jsonl there; is it a run directory of sapf?"
            )

    @functools.cached_property
    def ledger(self) -> Ledger:
        """Raises RunDirectoryError: missing, or damaged in its middle."""
        return Ledger.open(self.directory.ledger)

    @property
    def plan(self) -> PrivacyPlan:
        """The plan of the ledger's header."""
        return self.ledger.plan

    @functools.cached_property
    def config(self) -> Mapping[str, Any]:
        """The config as plain sections: names in it are not looked up, so no plugin is imported.

        Raises:
            Fault: No YAML of a config.
        """
        try:
            content = yaml.safe_load(self.directory.config.read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise Fault(f"config.yaml cannot be read ({reason(error)})") from error
        if not isinstance(content, dict):
            raise Fault("config.yaml is no configuration")
        return content

    def setting(self, section: str, name: str) -> Any:
        """A value of the config; None where it is not given."""
        values = self.config.get(section)
        return values.get(name) if isinstance(values, dict) else None

    @functools.cached_property
    def metrics(self) -> Mapping[str, Any]:
        """Content of ``metrics.json``."""
        return self.directory.read_json(self.directory.metrics)

    @functools.cached_property
    def reading(self) -> independent.Reading:
        """The independent reading of the ledger."""
        if not self.ledger.chained:
            raise NotChecked(f"the ledger is of schema {self.ledger.schema}")
        with without_notice():
            return independent.read_ledger(self.directory.ledger)

    @functools.cached_property
    def paid(self) -> Counter[DpEvent]:
        """How often each event was paid for."""
        return Counter(line.event for line in self.ledger.events() if not line.replay)

    def epsilon(self, accountant: str) -> float | None:
        """Epsilon of all that was charged; None where the accountant cannot price one of them."""
        events = self.ledger.whole(self.paid).items()
        if not supports(accountant, events):
            return None
        return compose_epsilon(
            events,
            self.plan.delta,
            accountant=accountant,
            pld_interval=independent.INTERVAL,  # so that the two can be compared
        )

    @functools.cached_property
    def spent(self) -> float:
        """Epsilon of all that was charged, by the plan's accountant."""
        return self.ledger.epsilon_spent()

    @functools.cached_property
    def verdict(self) -> Verdict:
        """What the results may be called, by plan, ledger and config."""
        seeded = self.setting("privacy", "reproducible_seed") is not None
        return judge(self.plan, self.ledger, reproducible=seeded, spent=self.spent)

    def results(self) -> Iterator[ResultDirectory]:
        """Folders of what was made from the run later."""
        for kind in (SYNTHESIS, EVALUATION):
            for home in sorted(self.directory.root.glob(f"{kind}/*")):
                if home.is_dir():
                    yield ResultDirectory(self.directory.root, kind, name=home.name)


def verify(path: str | Path, digest: str | None = None) -> list[Finding]:
    """All checks of a run directory; reads no image and writes nothing.

    Args:
        path: Run directory.
        digest: What the run printed as its manifest's SHA-256, where it was kept.

    Raises:
        RunDirectoryError: Not a run directory.
        ConfigError: ``digest`` is no SHA-256.
    """
    subject = Subject(path, digest)
    return [_finding(name, check, subject) for name, check in CHECKS.items()]


def holds(findings: Sequence[Finding]) -> bool:
    """Whether everything holds: what may be left out is the comparison of the manifest's digest
    and of the code alone.
    """
    return all(
        row.state == PASS or (row.state == OPEN and row.check in OPTIONAL) for row in findings
    )


def to_json(findings: list[Finding]) -> dict[str, Any]:
    """The object of ``sapf verify --json``."""
    return {"holds": holds(findings), "checks": [asdict(row) for row in findings]}


def _finding(name: str, check: Callable[[Subject], str], subject: Subject) -> Finding:
    try:
        return Finding(check=name, state=PASS, detail=check(subject))
    except NotChecked as why:
        return Finding(check=name, state=OPEN, detail=str(why))
    except Fault as fault:
        return Finding(check=name, state=FAIL, detail=str(fault))
    except (SapfError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return Finding(check=name, state=FAIL, detail=reason(error))


def _digest(text: str) -> str:
    if len(text) != 64 or set(text.lower()) - set("0123456789abcdef"):
        raise ConfigError("--manifest-digest", text, "must be a SHA-256: 64 hexadecimal digits")
    return text.lower()


def _files(subject: Subject) -> str:
    found = faults(subject.directory)
    if found:
        raise Fault(_listed(found))
    return "every file is as manifest.json says, and no other is there"


def _manifest(subject: Subject) -> str:
    if subject.digest is None:
        raise NotChecked("no digest was given; an edit that renews manifest.json is not seen")
    found = file_digest(subject.directory.manifest)
    if found != subject.digest:
        raise Fault(f"manifest.json has SHA-256 {found}")
    return "manifest.json has the digest that was given"


def _later(subject: Subject) -> str:
    results = list(subject.results())
    found = [f"{each.name}: {fault}" for each in results for fault in faults(each)]
    if found:
        raise Fault(_listed(found))
    return f"{len(results)}, each as its own manifest says" if results else "there is none"


def _listed(found: list[str]) -> str:
    more = f", and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    return ", ".join(found[:_SHOWN]) + more


def _chain(subject: Subject) -> str:
    ledger = subject.ledger
    if not ledger.chained:
        raise NotChecked(f"schema {ledger.schema} of an earlier version has no chain")
    if ledger.torn:
        raise Fault("the last line has no end")
    return f"{len(ledger.events()) + 1} lines, each bound to the one before"


def _plan(subject: Subject) -> str:
    written = PrivacyPlan.from_dict(subject.directory.read_json(subject.directory.plan))
    if written != subject.plan:
        raise Fault("plan.json is not the plan that the ledger was begun with")
    return "plan.json is the plan of the ledger's first line"


def _config(subject: Subject) -> str:
    bound = subject.ledger.header.origin.get("config")
    if bound is None:
        raise NotChecked("the ledger's first line does not say which config it was begun with")
    if bound != file_digest(subject.directory.config):
        raise Fault("config.yaml is not the one that the ledger was begun with")
    return "config.yaml is the one that the ledger was begun with"


def _releases(subject: Subject) -> str:
    """Cutting whole lines off a ledger's end leaves a chain that holds, but fewer releases."""
    charged = Counter(
        (line.stage, line.event) for line in subject.ledger.events() if not line.replay
    )
    for stage, event, count in plan_events(subject.plan):
        if charged[stage, event] < count:
            raise Fault(f"{stage}: {count} releases are planned, {charged[stage, event]} are paid")
    return f"{charged.total():,} releases are paid, all that were planned among them"


def _budget(subject: Subject) -> str:
    plan = subject.plan
    if not plan.reads_images:
        return "no sensitive image is read"
    if not subject.spent <= plan.epsilon * (1 + TOLERANCE):
        raise Fault(f"ε = {subject.spent:.6g} was spent, planned are {plan.epsilon:g}")
    title = ACCOUNTANTS[plan.accountant].title
    return f"ε = {subject.spent:.6g} of {plan.epsilon:g} at δ = {plan.delta:.3g} ({title})"


def _accountants(subject: Subject) -> str:
    """Both bound the same epsilon from above, the PLD's more tightly."""
    pld, rdp = subject.epsilon("pld"), subject.epsilon("rdp")
    if pld is None or rdp is None:
        raise NotChecked("one of them cannot price these events")
    words = f"PLD {pld:.6g}, RDP {rdp:.6g}"
    if not pld <= rdp * 1.01 + 0.01:  # the PLD's discretisation counts where epsilon is tiny
        raise Fault(f"they contradict each other: {words}")
    return words


def _independent(subject: Subject) -> str:
    reading = subject.reading
    if reading.delta != subject.plan.delta:
        raise Fault(f"reads δ = {reading.delta:g}")
    if reading.charges != subject.paid.total():
        raise Fault(f"counts {reading.charges} charged releases, not {subject.paid.total()}")
    for name, theirs in (("pld", reading.epsilon_pld), ("rdp", reading.epsilon_rdp)):
        ours = subject.epsilon(name)
        if ours is not None and theirs is not None and not _same(ours, theirs):
            raise Fault(f"finds ε = {theirs:.6g} by {name.upper()}, not {ours:.6g}")
    found = {"PLD": reading.epsilon_pld, "RDP": reading.epsilon_rdp}
    words = " and ".join(
        f"{value:.6g} ({name})" for name, value in found.items() if value is not None
    )
    return f"a second parser on plain dp-accounting finds ε = {words}"


def _same(one: float, other: float) -> bool:
    return one == other or math.isclose(one, other, rel_tol=_SAME)


def _claims(subject: Subject) -> str:
    """What the run's own papers say is what its ledger says."""
    directory, verdict = subject.directory, subject.verdict
    said = float(subject.metrics["epsilon_spent"])
    if not _same(said, subject.spent):
        raise Fault(f"metrics.json says ε = {said:.6g} was spent")
    if subject.metrics["delta"] != subject.plan.delta:
        raise Fault(f"metrics.json says δ = {subject.metrics['delta']:.6g}")
    if subject.metrics["release"] != verdict.answer:
        raise Fault(f"metrics.json says release: {subject.metrics['release']}")
    for paper in (directory.card, directory.synthetic / "README.md"):
        if verdict.reason not in " ".join(paper.read_text(encoding="utf-8").split()):
            raise Fault(f"{paper.name} does not carry the verdict")
    if directory.card_json.exists():  # there since cards have one
        card = directory.read_json(directory.card_json)
        if card["claim"]["text"] != verdict.markdown:
            raise Fault(f"{directory.card_json.name} does not carry the verdict")
        told = float(card["budget"]["spent"]["epsilon"])
        if not _same(told, subject.spent):
            raise Fault(f"{directory.card_json.name} says ε = {told:.6g} was spent")
    return "ε, δ and verdict in metrics, card and data set are those of the ledger"


def _secrets(subject: Subject) -> str:
    directory = subject.directory
    if directory.noise_key.exists():
        raise Fault("the noise key is there; whoever reads it can take the noise off: delete it")
    left = [path for path in (directory.private, directory.spilled) if path.exists()]
    if left and not subject.setting("cluster", "keep_cache"):
        raise Fault(f"{left[0].name}/ is there, and may hold sensitive images: delete it")
    if left:
        return (
            "the noise key is gone; private files are kept (cluster.keep_cache): do not share them"
        )
    return "the noise key and all private files are gone"


def _code(subject: Subject) -> str:
    made_by = subject.ledger.header.origin.get("code")
    if made_by is None:
        raise NotChecked("the ledger's first line does not say which code wrote it")
    if "+changed" in made_by:
        raise NotChecked(f"made by {made_by}: by files that no commit has")
    return f"made by {made_by}, verified by {__version__}"


def _verdict(subject: Subject) -> str:
    if not subject.verdict.release:
        raise Fault(subject.verdict.plain)
    return subject.verdict.plain


CHECKS: Mapping[str, Callable[[Subject], str]] = {
    "files": _files,
    "manifest digest": _manifest,
    "later results": _later,
    "ledger chain": _chain,
    "plan": _plan,
    "config": _config,
    "releases": _releases,
    "budget": _budget,
    "two accountants": _accountants,
    "independent reading": _independent,
    "claims": _claims,
    "secrets": _secrets,
    "code": _code,
    "verdict": _verdict,
}
"""Name of a check to the function that makes it."""
OPTIONAL = frozenset({"manifest digest", "two accountants", "code"})
"""Checks that may be left out where everything else holds."""
