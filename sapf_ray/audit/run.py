"""``sapf audit``: a run with canaries, and what they tell of its claim.

What it reads (coins, observations, crafted images' coins) and what it writes lies in the run's
folder ``audit``, mode 0700. It spends no privacy: every release that it looks at was paid.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sapf_ray.audit.black_box import black_box_finding, distance_scores, loss_scores
from sapf_ray.audit.findings import Finding
from sapf_ray.audit.mechanisms import MECHANISMS, audit_mechanism, audit_sums
from sapf_ray.audit.report import Report
from sapf_ray.audit.scores import Observed
from sapf_ray.audit.white_box import Claim, white_box
from sapf_ray.config import RunConfig, flatten, from_dict, nest, to_dict
from sapf_ray.config.audit import AuditConfig
from sapf_ray.config.section import require
from sapf_ray.data.base import open_source
from sapf_ray.data.canary_images import CanaryImages
from sapf_ray.errors import ConfigError, RunDirectoryError
from sapf_ray.privacy.canaries import COINS
from sapf_ray.privacy.ledger import Ledger
from sapf_ray.runs.directory import RunDirectory, changed_keys

OF_AN_AUDIT: dict[str, Any] = {
    "audit.canaries": 8000,
    "audit.images": 100,
    "evaluation.enabled": False,
    "synthesis.n_images": 200,
}
"""What ``sapf audit`` sets where it makes the run, unless it is given."""


def config_of_audit(config: RunConfig, given: set[str]) -> RunConfig:
    """The config of a run that is made to be audited.

    Args:
        config: What the user asked for.
        given: Keys that the user set.

    Raises:
        ConfigError: The run would claim nothing.
    """
    require(
        not config.privacy.non_private,
        "privacy.non_private",
        config.privacy.non_private,
        "must be false in an audit: without noise nothing is claimed",
    )
    flat = flatten(to_dict(config))
    unset = {key: value for key, value in OF_AN_AUDIT.items() if key not in given}
    if config.data.groups is not None:
        unset.pop("audit.images", None)  # a crafted image has no group
    return from_dict(nest(flat | unset))


def audit_directory(
    path: str | Path,
    *,
    given: Mapping[str, Any] | None = None,
    on_audit: Callable[[str], None] = lambda name: None,
) -> Report:
    """Audits a finished run; writes ``audit/report.md`` and ``audit/report.json`` there.

    Args:
        path: Run directory.
        given: Keys of the command line; of a run that is there, ``audit.confidence`` and
            ``audit.mechanism_runs`` alone may be other than its own.
        on_audit: Called with the name of each audit before it begins.

    Raises:
        RunDirectoryError: No run, a run without canaries, or one that is not finished.
        ConfigError: A key that cannot be changed any more.
    """
    directory = RunDirectory(path)
    config = directory.read_config()
    check_audited(directory, config)
    settings = settings_of(config, given or {})
    ledger = Ledger.open(directory.ledger)
    claim = claim_of(ledger)
    findings: list[Finding] = []
    if config.audit.canaries:
        on_audit("canaries in the releases")
        observed, coins = observations(directory, ledger)
        findings += white_box(observed, coins, claim=claim, confidence=settings.confidence)
    if config.audit.images:
        on_audit("crafted images")
        findings += black_box(directory, config, claim=claim, confidence=settings.confidence)
    for name in MECHANISMS:
        on_audit(f"mechanism: {name}")
        findings.append(
            audit_mechanism(name, runs=settings.mechanism_runs, confidence=settings.confidence)
        )
    on_audit("sums")
    findings.append(audit_sums())
    report = Report(
        run=directory.name,
        epsilon=claim.epsilon,
        delta=claim.delta,
        confidence=settings.confidence,
        findings=findings,
    )
    report.write(directory.audit)
    return report


def check_audited(directory: RunDirectory, config: RunConfig) -> None:
    """A run with canaries, and finished.

    Raises:
        RunDirectoryError: It is not.
    """
    if config.audit.canaries + config.audit.images == 0:
        raise RunDirectoryError(
            f"{directory.root}: has no canaries, and its key is gone; `sapf audit --out NEW` with "
            "the same settings makes a run that can be audited"
        )
    if config.privacy.non_private:
        raise RunDirectoryError(f"{directory.root}: is not private and claims nothing to audit")
    if not (directory.card.exists() and directory.audit.exists()):
        raise RunDirectoryError(
            f"{directory.root}: is not finished; the same `sapf run` or `sapf audit --out` goes on"
        )


def settings_of(config: RunConfig, given: Mapping[str, Any]) -> AuditConfig:
    """The run's settings of its audit, as the command line changes them."""
    settings = from_dict(nest(flatten(to_dict(config)) | dict(given)))
    for key, (_, new) in changed_keys(config, settings).items():
        raise ConfigError(key, new, "is not this run's; audit it as it is, or make another one")
    return settings.audit


def claim_of(ledger: Ledger) -> Claim:
    """What a run says of itself: the events of its ledger, and their epsilon."""
    charged = Counter(line.event for line in ledger.events() if not line.replay)
    return Claim(
        epsilon=ledger.epsilon_spent(),
        delta=ledger.plan.delta,
        charges=list(charged.items()),
        paid=[line.release for line in ledger.events()],
    )


def observations(directory: RunDirectory, ledger: Ledger) -> tuple[list[Observed], np.ndarray]:
    """What the run's releases showed of its canaries, and the coins (m,).

    Only canaries with room in some release count: a small model has fewer coordinates than there
    are canaries.

    Raises:
        RunDirectoryError: Nothing was observed.
    """
    observed = []
    for path in sorted(directory.observations.glob("*.npy")):
        name = path.stem.replace("-", "/")
        stage = getattr(ledger.plan, name.partition("/")[0], None)
        if path.name == COINS or stage is None:
            continue
        shown = np.load(path)
        observed.append(Observed(name=name, stage=stage, seen=shown["seen"], drawn=shown["drawn"]))
    if not observed:
        raise RunDirectoryError(f"{directory.observations}: holds no release of the canaries")
    room = max(len(release.seen) for release in observed)
    return observed, np.load(directory.observations / COINS)[:room]


def black_box(
    directory: RunDirectory, config: RunConfig, *, claim: Claim, confidence: float
) -> list[Finding]:
    """Attacks with crafted images on what the run released."""
    images = CanaryImages(
        open_source(config.data), count=config.audit.images, coins=directory.canary_coins
    )
    coins = images.coins()
    attacks = {}
    if directory.adapter.exists():
        attacks["adapter: loss of crafted images"] = loss_scores(
            images, config.model, config.finetune, adapter=directory.adapter
        )
    attacks["synthetic images: nearest one"] = distance_scores(images, directory.synthetic)
    return [
        black_box_finding(name, scores, coins, claim=claim, confidence=confidence)
        for name, scores in attacks.items()
    ]
