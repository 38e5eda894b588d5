"""A second reading of a ledger: own parser on plain dp-accounting, nothing of sapf_ray imported.

It takes nothing on trust that it can work out: which lines are replays, whether the lines are
chained, what each event costs. A fault in the product's own events, grouping or accountants shows
as a difference. This file is complete: copied elsewhere it works as it is.

Example::

    read_ledger("run/ledger.jsonl").epsilon_pld
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from dp_accounting import dp_event
from dp_accounting.pld import privacy_loss_distribution as pld
from dp_accounting.pld.common import DifferentialPrivacyParameters
from dp_accounting.rdp import RdpAccountant

INTERVAL = 1e-4  # of the discrete privacy loss: any gives an upper bound
_SMALL_ORDERS = (*(1 + x / 10 for x in range(1, 100)), *range(11, 64))
ORDERS = (*_SMALL_ORDERS, 80, 96, 128, 192, 256, 384, 512, 1024)
Charge = tuple[str, float, float]  # kind; noise multiplier, or epsilon; sample rate, or delta


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What a ledger says.

    Attributes:
        delta: Of the plan in its header.
        charges: Number of charged releases.
        epsilon_pld: Of all that was charged, by privacy loss distributions; None for the winner of
            a private choice, which has none that is known.
        epsilon_rdp: By Rényi divergences; None where one of the events has none.
    """

    delta: float
    charges: int
    epsilon_pld: float | None
    epsilon_rdp: float | None


def read_ledger(path: str | Path) -> Reading:
    """Reads a ledger of schema 3.

    Raises:
        ValueError: Not one, a broken chain, or an event that this parser does not know.
    """
    *lines, rest = Path(path).read_bytes().split(b"\n")
    if rest or not lines:
        raise ValueError("the last line has no end")
    header = json.loads(lines[0])
    paid: set[str] = set()
    charged: Counter[Charge] = Counter()
    for before, line in itertools.pairwise(lines):
        entry = json.loads(line)
        if entry["prev"] != hashlib.sha256(before).hexdigest():
            raise ValueError("a line does not follow the line before it")
        # the very same release of the very same sum costs nothing again
        identity = json.dumps([entry["release"], entry["noise_id"], entry["event"]], sort_keys=True)
        if identity not in paid:
            paid.add(identity)
            charged[_charge(entry["event"])] += 1
    delta = float(header["plan"]["delta"])
    repeat = header["plan"].get("repeat")  # the run is the best of a random number of trials
    trials = None
    if repeat is not None:
        shape = math.inf if repeat["distribution"] == "poisson" else float(repeat["shape"])
        trials = (float(repeat["mean"]), shape)
    charges = tuple(sorted(charged.items()))
    return Reading(
        delta=delta,
        charges=sum(charged.values()),
        epsilon_pld=_by_pld(charges, delta) if trials is None else None,
        epsilon_rdp=_by_rdp(charges, delta, trials),
    )


def _charge(event: dict[str, Any]) -> Charge:
    kind = event["type"]
    if kind == "NonPrivate":
        return ("infinite", 0.0, 1.0)
    if kind in ("Gaussian", "ExponentialTopK"):  # the latter costs what the former does
        return ("gaussian", float(event["noise_multiplier"]), 1.0)
    if kind == "PoissonSampled" and event["event"]["type"] == "Gaussian":
        rate = float(event["sampling_probability"])
        return ("gaussian", float(event["event"]["noise_multiplier"]), rate)
    if kind == "ApproximateDp":
        return ("approximate", float(event["epsilon"]), float(event["delta"]))
    raise ValueError(f"unknown event {kind!r}")


@lru_cache(maxsize=64)
def _by_pld(charges: tuple[tuple[Charge, int], ...], delta: float) -> float:
    total = pld.identity(INTERVAL)
    for (kind, size, rate), count in charges:
        if kind == "infinite" or size == 0:
            return math.inf
        if kind == "gaussian":
            loss = pld.from_gaussian_mechanism(
                size, sampling_prob=rate, value_discretization_interval=INTERVAL
            )
        else:
            parameters = DifferentialPrivacyParameters(size, rate)
            loss = pld.from_privacy_parameters(parameters, INTERVAL)
        total = total.compose(loss.self_compose(count))
    return float(total.get_epsilon_for_delta(delta)) if charges else 0.0


@lru_cache(maxsize=64)
def _by_rdp(
    charges: tuple[tuple[Charge, int], ...], delta: float, trials: tuple[float, float] | None
) -> float | None:
    events: list[dp_event.DpEvent] = []
    for (kind, size, rate), count in charges:
        if kind == "infinite" or size == 0:
            return math.inf
        if kind != "gaussian":
            return None
        each = dp_event.GaussianDpEvent(size)
        if rate != 1:
            each = dp_event.PoissonSampledDpEvent(rate, each)
        events.append(dp_event.SelfComposedDpEvent(each, count))
    if not events:
        return 0.0
    whole: dp_event.DpEvent = dp_event.ComposedDpEvent(events)
    if trials is not None:
        whole = dp_event.RepeatAndSelectDpEvent(whole, *trials)
    accountant = RdpAccountant(ORDERS)
    accountant.compose(whole)  # orders that do not converge are left out: epsilon can only rise
    return float(accountant.get_epsilon(delta))
