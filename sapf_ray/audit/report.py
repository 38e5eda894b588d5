"""What an audit found, as a table for people, as Markdown and as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from sapf_ray.audit.findings import Finding
from sapf_ray.files import write_atomic, write_json

COLUMNS = ("audit", "claim", "shown", "confidence", "ceiling", "noise / 2, 5, 10", "verdict")


@dataclass(frozen=True, kw_only=True)
class Report:
    """All findings about one run.

    Attributes:
        run: Its name.
        epsilon: The claim, from the ledger.
        delta: Its delta.
        confidence: Of each bound.
        findings: One row each.
    """

    run: str
    epsilon: float
    delta: float
    confidence: float
    findings: Sequence[Finding]

    @property
    def falsified(self) -> list[str]:
        """Names of the audits that found the claim false."""
        return [finding.audit for finding in self.findings if finding.falsified]

    @property
    def verdict(self) -> str:
        """In one sentence."""
        if self.falsified:
            return f"The claim is FALSE: {', '.join(self.falsified)}."
        return (
            "No audit falsified the claim; that is no proof of it: a bound can only be as high as "
            "its ceiling, and no audit sees every fault (docs/audit.md)."
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return {
            "run": self.run,
            "epsilon": self.epsilon,
            "delta": self.delta,
            "confidence": self.confidence,
            "falsified": self.falsified,
            "findings": [finding.to_dict() for finding in self.findings],
        }

    def table(self) -> Table:
        """For a terminal."""
        table = Table(*COLUMNS, title=f"sapf audit {self.run}", box=box.SIMPLE)
        for finding in self.findings:
            table.add_row(*_cells(finding))
        return table

    def markdown(self) -> str:
        """For a file."""
        lines = [
            f"# Audit of {self.run}",
            "",
            f"Claim: ε = {self.epsilon:.4g} at δ = {self.delta:.3g}. {self.verdict}",
            "",
            "| " + " | ".join((*COLUMNS, "how")) + " |",
            "|---" * (len(COLUMNS) + 1) + "|",
        ]
        lines += [
            "| " + " | ".join((*_cells(finding), finding.note)) + " |" for finding in self.findings
        ]
        lines += [
            "",
            "A *bound* holds with the confidence beside it, each by itself; an *estimate* assumes "
            "normal scores. *No power*: not even guesses that are all right could falsify this "
            "claim; more canaries could. The *ceiling* is what the audit would show if every guess "
            "were right; the next column what it would show with 2, 5 or 10 times less noise.",
            "",
            "This run had canaries and is not for release. This folder holds the noise of its "
            "releases on the canaries' coordinates, without which they show exact sums of the "
            "images: it is as sensitive as these; delete it when it is no longer needed.",
        ]
        return "\n".join(lines) + "\n"

    def write(self, folder: Path) -> None:
        """``report.md`` and ``report.json``, for this user only."""
        write_atomic(folder / "report.md", self.markdown(), mode=0o600)
        write_json(folder / "report.json", self.to_dict(), mode=0o600)

    def to_json(self) -> str:
        """One line."""
        return json.dumps(self.to_dict())


def _cells(finding: Finding) -> tuple[str, ...]:
    confidence = "estimate" if finding.confidence is None else f"{finding.confidence:.6g}"
    return (
        finding.audit,
        f"{finding.quantity} {finding.claim:.4g}",
        f"{finding.shown:.4g}",
        confidence,
        "—" if finding.ceiling is None else f"{finding.ceiling:.3g}",
        ", ".join(f"{shown:.3g}" for shown in finding.power.values()) or "—",
        _verdict(finding),
    )


def _verdict(finding: Finding) -> str:
    """What one finding says of its claim."""
    if finding.falsified:
        return "FALSE"
    if finding.confidence is None:
        return "—"
    return "not falsified" if finding.can_falsify else "no power"
