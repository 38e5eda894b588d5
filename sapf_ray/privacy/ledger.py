"""The write-ahead ledger: what was paid, line by line, before it was released.

``ledger.jsonl`` starts with the plan and what the run is bound to; every further line is one
privacy event, chained to the line before it (:mod:`sapf_ray.privacy.ledger_lines`).
:meth:`Ledger.record` returns only after the line is on disk, and only then may the noisy value be
drawn. So a crash after the record costs budget, a crash before it costs nothing, and no order of
crashes spends budget that is not written down.

The line carries a ``noise_id``, the keyed fingerprint of run, release and exact sum (see
:mod:`sapf_ray.privacy.release`). The same release with the same ``noise_id`` is an exact replay,
which reveals nothing new and is free (written and flagged all the same); with another it is a
second release and is charged again.

Lines carry no time stamps: the time between two steps tells the size of the Poisson batch between
them.

A last line without its line end is what a crash inside a write leaves. If it parses it was written
whole and counts as charged, although its ``record`` never returned (conservative); if not, the
release that it would have paid for never happened, so it counts as nothing and the next ``record``
cuts it off. A damaged line anywhere else was not made by a crash of ours: the ledger is then
refused, for it may hide spent budget.

Example::

    ledger = Ledger.create("run/ledger.jsonl", plan)
    releaser = Releaser(key=key, ledger=ledger, plan=plan)
    noisy = releaser.gaussian("finetune/step/0", total, stage="finetune")   # pays, then draws
    ledger.epsilon_spent()

References:
    1. Rogers, Roth, Ullman, Vadhan. Privacy odometers and filters. NeurIPS 2016. (why a planned
       multiset of events needs no more than ordinary composition)
"""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from sapf_ray import locks
from sapf_ray.errors import BudgetError, RunDirectoryError
from sapf_ray.files import write_atomic
from sapf_ray.privacy.accountants import (
    PLD_INTERVAL,
    compose_epsilon,
)
from sapf_ray.privacy.events import DpEvent
from sapf_ray.privacy.ledger_lines import (
    CHAINED,
    SCHEMA,
    BrokenChain,
    Header,
    LedgerEvent,
    UnknownSchema,
)
from sapf_ray.privacy.planner import PrivacyPlan, plan_events
from sapf_ray.stages import Stage

__all__ = ["SCHEMA", "Ledger", "LedgerEvent"]

_TOLERANCE = 1e-6
_CURVE_INTERVAL = 10 * PLD_INTERVAL


class Ledger:
    """One ledger file. Any number of processes may hold one; each sees what the others wrote."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._offset = 0  # of the first byte not yet taken in
        self._lines = 0
        self._last = b""  # the last line taken in, which the next one must follow
        self._header: Header | None = None
        self._events: list[LedgerEvent] = []
        self._torn: LedgerEvent | None = None
        self._paid: set[tuple[str, str, DpEvent]] = set()
        self._noise_ids: dict[str, set[str]] = {}
        self._charged: Counter[DpEvent] = Counter()

    @classmethod
    def create(
        cls, path: str | Path, plan: PrivacyPlan, *, origin: Mapping[str, Any] | None = None
    ) -> Ledger:
        """Writes the header; the file appears whole or not at all.

        Args:
            path: Where.
            plan: What may be released.
            origin: What else the run is bound to, from :func:`sapf_ray.runs.origin.origin`.

        Raises:
            RunDirectoryError: There is a ledger already, or the place cannot be written.
        """
        path = Path(path)
        header = Header(plan=plan, origin=origin or {}).line() + b"\n"
        try:
            # not replaced: another process may have begun one
            write_atomic(path, header, mode=0o600, replace=False)
        except FileExistsError as error:
            raise RunDirectoryError(
                f"{path}: a ledger is there already; open it, never start it afresh"
            ) from error
        except OSError as error:
            raise RunDirectoryError(f"{path}: cannot be written ({error.strerror})") from error
        return cls.open(path)

    @classmethod
    def open(cls, path: str | Path) -> Ledger:
        """Reads an existing ledger.

        Raises:
            RunDirectoryError: Missing, of another schema, or damaged; names file and line.
        """
        ledger = cls(Path(path))
        ledger._refresh()
        return ledger

    @property
    def plan(self) -> PrivacyPlan:
        """The plan in the header."""
        return self.header.plan

    @property
    def header(self) -> Header:
        """The first line: the plan, and what the run is bound to."""
        assert self._header is not None
        return self._header

    @property
    def schema(self) -> int:
        """Version of the format."""
        return self.header.schema

    @property
    def chained(self) -> bool:
        """Whether its lines are chained; those of earlier versions are not."""
        return self.schema >= CHAINED

    @property
    def torn(self) -> bool:
        """Whether the last line has no end, which a crash inside a write leaves."""
        self._refresh()
        return self.path.stat().st_size > self._offset

    def check_continuable(self) -> None:
        """Raises where the ledger can be read, but not written on.

        Raises:
            RunDirectoryError: An earlier version of sapf wrote it.
        """
        if self.schema != SCHEMA:
            raise RunDirectoryError(
                f"{self.path}: was written by an earlier version of sapf, its results stay "
                "readable, "
                "it cannot be continued; start a new run in another directory"
            )

    def noise_ids(self, release: str) -> set[str]:
        """Fingerprints under which the release ``release`` was charged so far."""
        self._refresh()
        return set(self._noise_ids.get(release, ()))

    def record(self, release: str, event: DpEvent, noise_id: str, stage: str) -> dict[str, Any]:
        """Pays for one release; call it before the noisy value exists.

        Args:
            release: Name of the release, e.g. ``selection`` or ``finetune/step/17``.
            event: What is released.
            noise_id: Fingerprint of all that determines the released value.
            stage: The plan's stage: ``selection``, ``finetune`` or ``evolution``.

        Returns:
            The event as written.

        Raises:
            BudgetError: The release would pass the planned epsilon; nothing was written.
            RunDirectoryError: An earlier version of sapf wrote the ledger.
        """
        self.check_continuable()
        with self._locked("r+b", exclusive=True) as f:
            self._take_in(f)
            self._repair(f)
            replay = (release, noise_id, event) in self._paid
            entry = LedgerEvent(
                release=release, stage=stage, event=event, noise_id=noise_id, replay=replay
            )
            if not replay:
                self._check_budget(entry)
            f.seek(self._offset)
            f.write(entry.line(self._last) + b"\n")
            f.flush()
            os.fsync(f.fileno())
            self._take_in(f)
        return entry.to_dict()

    def events(self) -> list[LedgerEvent]:
        """All events so far, replays included, in the order of the file."""
        self._refresh()
        return [*self._events, *([self._torn] if self._torn else [])]

    def epsilon_spent(self, accountant: str | None = None, delta: float | None = None) -> float:
        """Epsilon of everything charged, by default with the plan's accountant and delta."""
        return self._epsilon(
            Counter(e.event for e in self.events() if not e.replay), accountant, delta
        )

    def epsilon_curve(
        self, n_points: int = 20, stage: str = Stage.FINETUNE
    ) -> list[tuple[int, float]]:
        """(charged releases of ``stage``, epsilon of everything charged up to there), for plots.

        All points but the last use a coarser discretisation: upper bounds too, a fraction of a
        percent above.
        """
        charged = [e for e in self.events() if not e.replay]
        ends = [i + 1 for i, e in enumerate(charged) if e.stage == stage]
        first = ends[0] - 1 if ends else len(charged)
        chosen = (
            {round(i * len(ends) / max(n_points - 1, 1)) for i in range(1, n_points)}
            if ends
            else set()
        )
        total = self._epsilon(Counter(e.event for e in charged), None, None)
        curve = []
        for step, end in [(0, first), *((k, ends[k - 1]) for k in sorted(chosen) if k > 0)]:
            epsilon = total
            if end < len(charged):
                prefix = Counter(e.event for e in charged[:end])
                epsilon = min(total, self._epsilon(prefix, None, None, _CURVE_INTERVAL))
            curve.append((step, epsilon))
        return curve

    def whole(self, charged: Counter[DpEvent]) -> Counter[DpEvent]:
        """What is paid where these events are: of a private choice's winner, all its trials."""
        repeat = self.plan.repeat
        return charged if repeat is None else repeat.whole(charged, self._planned())

    def _planned(self) -> Counter[DpEvent]:
        planned: Counter[DpEvent] = Counter()
        for _, event, count in plan_events(self.plan):
            planned[event] += count
        return planned

    def _epsilon(
        self,
        charged: Counter[DpEvent],
        accountant: str | None,
        delta: float | None,
        interval: float = PLD_INTERVAL,
    ) -> float:
        plan = self.plan
        return compose_epsilon(
            self.whole(charged).items(),
            delta or plan.delta,
            accountant=accountant or plan.accountant,
            pld_interval=interval,
        )

    def _check_budget(self, entry: LedgerEvent) -> None:
        if self.plan.non_private:
            return
        charged = self._charged + Counter([entry.event])
        if charged <= self._planned():
            return
        epsilon = self._epsilon(charged, None, None)
        if epsilon <= self.plan.epsilon * (1 + _TOLERANCE):
            return
        if entry.release in self._noise_ids:
            raise BudgetError(
                f"{self.path}: {entry.release} was paid with another sum: the weights, a library, "
                "the micro-batch or the machine changed since; drawing it again would raise "
                f"epsilon to {epsilon:.4f}, planned are {self.plan.epsilon:g}; start a new run in "
                "another directory"
            )
        raise BudgetError(
            f"{self.path}: {entry.release} would raise epsilon to {epsilon:.4f}, planned are "
            f"{self.plan.epsilon:g}; stopped before the release"
        )

    def _refresh(self) -> None:
        with self._locked("rb", exclusive=False) as f:
            self._take_in(f)

    @contextlib.contextmanager
    def _locked(self, mode: str, *, exclusive: bool) -> Iterator[IO[bytes]]:
        # Opened anew each time: a descriptor inherited by a forked child would share the lock with
        # it.
        try:
            f = open(self.path, mode)  # noqa: SIM115 closed below
        except OSError as error:
            raise RunDirectoryError(f"{self.path}: cannot be opened ({error.strerror})") from error
        with f, locks.locked(f, exclusive=exclusive, patience=locks.WAIT_SECONDS):
            yield f

    def _take_in(self, f: IO[bytes]) -> None:
        """Parses what was appended since the last time."""
        f.seek(0, os.SEEK_END)
        if f.tell() < self._offset:
            raise RunDirectoryError(
                f"{self.path}: shorter than before, after line {self._lines}; it was truncated"
            )
        f.seek(self._offset)
        *lines, rest = f.read().split(b"\n")
        for line in lines:
            if self._header is None:
                self._header = self._parse_header(line)
            else:
                self._take(self._parse(line))
            self._lines += 1
            self._last = line
            self._offset += len(line) + 1
        if self._header is None:
            raise RunDirectoryError(f"{self.path}, line 1: damaged (no plan in it)")
        self._torn = None
        if rest:
            with contextlib.suppress(ValueError):
                self._torn = self._parse_event(rest)

    def _repair(self, f: IO[bytes]) -> None:
        """Ends a torn last line that parses, cuts off one that does not."""
        if self._torn is not None:
            f.seek(0, os.SEEK_END)
            f.write(b"\n")
            f.flush()
            self._take_in(f)
        else:
            f.truncate(self._offset)

    def _take(self, entry: LedgerEvent) -> None:
        self._events.append(entry)
        if not entry.replay:
            self._charged[entry.event] += 1
            self._paid.add((entry.release, entry.noise_id, entry.event))
            self._noise_ids.setdefault(entry.release, set()).add(entry.noise_id)

    def _parse_header(self, line: bytes) -> Header:
        try:
            return Header.parse(line)
        except UnknownSchema as error:
            raise RunDirectoryError(f"{self.path}: {error}") from error
        except (ValueError, TypeError) as error:
            raise RunDirectoryError(f"{self.path}, line 1: damaged (no plan in it)") from error

    def _parse(self, line: bytes) -> LedgerEvent:
        try:
            return self._parse_event(line)
        except (ValueError, TypeError) as error:
            raise self._damaged("damaged") from error

    def _parse_event(self, line: bytes) -> LedgerEvent:
        """One event.

        Raises:
            RunDirectoryError: It is one, but not the one behind the lines before it: no crash of
                ours leaves that, even at the end of the file.
            ValueError: Not an event.
        """
        try:
            return LedgerEvent.parse(line, before=self._last, schema=self.schema)
        except BrokenChain as error:
            raise self._damaged("does not follow the line before it: one was changed") from error

    def _damaged(self, how: str) -> RunDirectoryError:
        return RunDirectoryError(
            f"{self.path}, line {self._lines + 1}: {how}; spent budget may be hidden, restore the "
            "file"
        )
