"""The lines of a ledger: a header, then one line per event, each bound to the line before it.

From schema 3 on every line but the first carries ``prev``, the SHA-256 of the whole line before it,
header first. So a line that is edited, removed, added or moved breaks the chain at the next one.
Whoever writes all later lines anew, or cuts whole lines off the end, leaves a chain that holds:
against that stand the run's manifest and its digest (:mod:`sapf_ray.runs.manifest`).

Lines of schemas 1 and 2 have no chain and stay readable.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sapf_ray.privacy.events import DpEvent, event_from_json, event_to_json
from sapf_ray.privacy.planner import PrivacyPlan

SCHEMA = 3
CHAINED = 3
"""The first schema whose lines carry ``prev``."""
_READABLE = {1: "stream", 2: "noise_id", 3: "noise_id"}
"""Schema to its name of the noise's fingerprint."""
_FIELDS = {"release", "stage", "event", "noise_id", "replay"}


class UnknownSchema(ValueError):
    """The header is of a schema that this version does not read."""


class BrokenChain(ValueError):
    """The line does not follow the line before it."""


@dataclass(frozen=True, kw_only=True)
class Header:
    """The first line.

    Args:
        plan: What may be released.
        origin: What the run is bound to beside the plan: digest of its config, versions of code
            and libraries, keyed fingerprint of its images (:mod:`sapf_ray.runs.origin`); empty in
            schemas 1 and 2.
        schema: Version of the format.
    """

    plan: PrivacyPlan
    origin: Mapping[str, Any] = field(default_factory=dict)
    schema: int = SCHEMA

    def line(self) -> bytes:
        """The line without its end."""
        data = {"schema": self.schema, "plan": self.plan.to_dict(), **self.origin}
        return json.dumps(data, allow_nan=False).encode()

    @classmethod
    def parse(cls, line: bytes) -> Header:
        """Inverse of :meth:`line`.

        Raises:
            UnknownSchema: Written by a later version.
            ValueError: Not a header.
        """
        data = json.loads(line)
        if not isinstance(data, dict) or not {"schema", "plan"} <= set(data):
            raise ValueError("not a ledger header")
        schema = data.pop("schema")
        if schema not in _READABLE:
            raise UnknownSchema(f"schema {schema!r}, this version reads up to {SCHEMA}")
        plan = data.pop("plan")
        if not isinstance(plan, dict):
            raise ValueError("not a privacy plan")
        return cls(plan=PrivacyPlan.from_dict(plan), origin=data, schema=schema)


@dataclass(frozen=True, kw_only=True)
class LedgerEvent:
    """One line: ``event`` was paid for the release named ``release``.

    Args:
        release: Name of the release, e.g. ``finetune/step/17``.
        stage: The plan's stage that it belongs to.
        event: The privacy event that was charged.
        noise_id: Keyed fingerprint of run, release and exact sum.
        replay: Whether it repeats an earlier line and so costs nothing.
    """

    release: str
    stage: str
    event: DpEvent
    noise_id: str
    replay: bool

    @property
    def drawn_by(self) -> str:
        """Fingerprint of the bound key that drew it: the same for all releases of one run."""
        return self.noise_id.rpartition("-")[0] or self.noise_id

    def to_dict(self) -> dict[str, Any]:
        return {
            "release": self.release,
            "stage": self.stage,
            "event": event_to_json(self.event),
            "noise_id": self.noise_id,
            "replay": self.replay,
        }

    @classmethod
    def from_dict(cls, data: Any, schema: int = SCHEMA) -> LedgerEvent:
        """Inverse of :meth:`to_dict`; reads lines of older schemas as well.

        Raises:
            ValueError: Not a ledger's event.
        """
        if not isinstance(data, dict):
            raise ValueError("not a ledger event")
        old_name = _READABLE[schema]
        fields = {"noise_id" if name == old_name else name: value for name, value in data.items()}
        if old_name not in data or set(fields) != _FIELDS:
            raise ValueError("not a ledger event")
        if not isinstance(fields["replay"], bool) or any(
            not isinstance(fields[name], str) for name in ("release", "stage", "noise_id")
        ):
            raise ValueError("not a ledger event")
        return cls(**{**fields, "event": event_from_json(fields["event"])})

    def line(self, before: bytes) -> bytes:
        """The line without its end, behind the line ``before``."""
        data = {**self.to_dict(), "prev": digest(before)}
        return json.dumps(data, allow_nan=False).encode()

    @classmethod
    def parse(cls, line: bytes, *, before: bytes, schema: int) -> LedgerEvent:
        """Inverse of :meth:`line`.

        Raises:
            BrokenChain: The line is an event, but does not follow ``before``.
            ValueError: Not a ledger's event.
        """
        data = json.loads(line)
        if schema < CHAINED:
            return cls.from_dict(data, schema)
        if not isinstance(data, dict) or "prev" not in data:
            raise ValueError("not a ledger event")
        follows = data.pop("prev") == digest(before)
        entry = cls.from_dict(data, schema)
        if not follows:
            raise BrokenChain("does not follow the line before it")
        return entry


def digest(line: bytes) -> str:
    """SHA-256 of a line without its end, in hex."""
    return hashlib.sha256(line).hexdigest()
