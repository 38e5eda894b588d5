"""What one audit found: a row of the report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One audit of one claim.

    Attributes:
        audit: What was done, in a few words.
        quantity: What claim and finding are numbers of: ``ε``, ``σ``, ``C``, ``releases``.
        claim: What the run says, or what follows from its plan.
        shown: What the audit shows.
        falsified: Whether the claim does not hold.
        confidence: Probability with which a claim that holds is not falsified; None for an
            estimate, which falsifies nothing, and 1 for arithmetic.
        ceiling: The most that this audit could have shown; None where there is no such limit.
        power: Factor by which noise is divided to what the audit shows then.
        note: One sentence.
    """

    audit: str
    quantity: str
    claim: float
    shown: float
    falsified: bool
    confidence: float | None
    ceiling: float | None = None
    power: Mapping[int, float] = field(default_factory=dict)
    note: str = ""

    @property
    def can_falsify(self) -> bool:
        """Whether the audit could have shown more than is claimed."""
        return self.ceiling is None or self.ceiling > self.claim

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        values = asdict(self)
        return values | {"power": {str(factor): shown for factor, shown in self.power.items()}}
