"""Privacy events: what was released, how noisily, on which sample; never just an epsilon.

Any accountant can price the same events at any time (:mod:`sapf_ray.privacy.accountants`). Most are
those of ``dp-accounting``; this module adds two, names the ones that the product makes, and writes
them as JSON.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias

import attr
from dp_accounting import dp_event
from dp_accounting.dp_event import DpEvent

Events: TypeAlias = DpEvent | Iterable[tuple[DpEvent, int]]


@attr.s(frozen=True, slots=True, auto_attribs=True)
class ExponentialTopKDpEvent(DpEvent):
    """Draws of the exponential mechanism that together cost what one Gaussian release with this
    noise multiplier costs.

    That is how every accountant prices it; :mod:`sapf_ray.saliency.mechanisms` has the proof.
    """

    noise_multiplier: float


@attr.s(frozen=True, slots=True, auto_attribs=True)
class ApproximateDpEvent(DpEvent):
    """A mechanism of which only (epsilon, delta)-DP is known.

    Its dominating pair (Kairouz, Oh, Viswanath, ICML 2015, section 3): with probability delta
    everything is revealed, else it is randomised response with epsilon.
    """

    epsilon: float
    delta: float


_EVENT_TYPES: dict[str, type[DpEvent]] = {
    "Gaussian": dp_event.GaussianDpEvent,
    "PoissonSampled": dp_event.PoissonSampledDpEvent,
    "SelfComposed": dp_event.SelfComposedDpEvent,
    "Composed": dp_event.ComposedDpEvent,
    "ExponentialTopK": ExponentialTopKDpEvent,
    "ApproximateDp": ApproximateDpEvent,
    "NonPrivate": dp_event.NonPrivateDpEvent,
    "NoOp": dp_event.NoOpDpEvent,
    "RepeatAndSelect": dp_event.RepeatAndSelectDpEvent,
}
_EVENT_NAMES = {cls: name for name, cls in _EVENT_TYPES.items()}
_POISSON = "poisson"  # shape of RepeatAndSelect that dp-accounting calls infinite; JSON has no such


def gaussian_event(noise_multiplier: float, sample_rate: float = 1.0) -> DpEvent:
    """The event of one Gaussian release on a Poisson sample (on all records when ``sample_rate`` is
    1).
    """
    if noise_multiplier == 0:
        return dp_event.NonPrivateDpEvent()
    event = dp_event.GaussianDpEvent(noise_multiplier)
    if sample_rate == 1:
        return event
    return dp_event.PoissonSampledDpEvent(sample_rate, event)


def exponential_event(noise_multiplier: float) -> DpEvent:
    """The event of a whole top-k selection by the exponential mechanism
    (:class:`ExponentialTopKDpEvent`).
    """
    if noise_multiplier == 0:
        return dp_event.NonPrivateDpEvent()
    return ExponentialTopKDpEvent(noise_multiplier)


def approximate_event(epsilon: float, delta: float) -> DpEvent:
    """The event of a mechanism that is (epsilon, delta)-DP; ``inf`` is no privacy."""
    if math.isinf(epsilon):
        return dp_event.NonPrivateDpEvent()
    return ApproximateDpEvent(epsilon, delta)


def group_events(events: Events) -> dict[DpEvent, int]:
    """Counts equal events, looking through compositions; the order of first appearance is kept."""
    counts: dict[DpEvent, int] = {}

    def add(event: DpEvent, count: int) -> None:
        if isinstance(event, dp_event.SelfComposedDpEvent):
            add(event.event, event.count * count)
        elif isinstance(event, dp_event.ComposedDpEvent):
            for part in event.events:
                add(part, count)
        elif count > 0 and not isinstance(event, dp_event.NoOpDpEvent):
            counts[event] = counts.get(event, 0) + count

    for event, count in [(events, 1)] if isinstance(events, DpEvent) else events:
        add(event, count)
    return counts


def event_to_json(event: DpEvent) -> dict[str, Any]:
    """A plain dict, e.g. ``{"type": "Gaussian", "noise_multiplier": 5.0}``.

    dp-accounting's own ``to_named_tuple`` names a module to import when read back; a file must not
    decide that.
    """
    if type(event) not in _EVENT_NAMES:
        raise ValueError(f"no JSON form for {event!r}")
    fields = {}
    for name in (f.name for f in attr.fields(type(event))):
        value = getattr(event, name)
        if isinstance(value, DpEvent):
            value = event_to_json(value)
        elif isinstance(value, (list, tuple)):
            value = [event_to_json(part) for part in value]
        fields[name] = _POISSON if name == "shape" and value == math.inf else value
    return {"type": _EVENT_NAMES[type(event)], **fields}


def event_from_json(data: Any) -> DpEvent:
    """Inverse of :func:`event_to_json`.

    Raises:
        ValueError: Unknown type, wrong fields, or numbers that no mechanism has.
    """
    cls = _EVENT_TYPES.get(str(data.get("type"))) if isinstance(data, Mapping) else None
    if cls is None:
        raise ValueError(f"not a privacy event: {data!r}")
    kind = data["type"]
    names = {f.name for f in attr.fields(cls)}
    found = set(data) - {"type"}
    if found != names:
        raise ValueError(f"{kind} has the fields {sorted(names)}, found {sorted(found)}")
    return cls(**{name: _field(kind, name, data[name]) for name in names})


def _field(kind: str, name: str, value: Any) -> Any:
    if name == "event":
        return event_from_json(value)
    if name == "events":
        return tuple(event_from_json(part) for part in value)  # hashable
    if name == "shape" and value == _POISSON:
        return math.inf
    where = f"{kind}.{name} = {value!r}"
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not 0 <= value < math.inf:
        raise ValueError(f"{where}: must be a finite number of at least 0")
    if name in ("sampling_probability", "delta") and value > 1:
        raise ValueError(f"{where}: must be at most 1")
    if name == "count" and not isinstance(value, int):
        raise ValueError(f"{where}: must be an integer")
    if name == "mean" and value < 1:
        raise ValueError(f"{where}: must be at least 1")
    return value


def describe_event(event: DpEvent) -> str:
    """One event in words.

    >>> describe_event(gaussian_event(1.796, 0.09102))
    'Gaussian, noise 1.796, Poisson sample 0.09102'
    """
    data = event_to_json(event)
    kind = data["type"]
    if kind == "NonPrivate":
        return "no noise: not private"
    if kind == "PoissonSampled":
        return f"{describe_event(event.event)}, Poisson sample {data['sampling_probability']:.6g}"
    if kind == "Gaussian":
        return f"Gaussian, noise {data['noise_multiplier']:g}"
    if kind == "ExponentialTopK":
        return (
            "exponential mechanism, all draws together as private as Gaussian, "
            f"noise {data['noise_multiplier']:g}"
        )
    if kind == "ApproximateDp":
        return f"propose-test-release, ε = {data['epsilon']:g}, δ = {data['delta']:.4g}"
    if kind == "RepeatAndSelect":
        drawn = "Poisson" if data["shape"] == _POISSON else f"shape {data['shape']:g}"
        trial = "; ".join(
            f"{count:,} x {describe_event(part)}"
            for part, count in group_events(event.event).items()
        )
        return f"the best of a random number of trials, mean {data['mean']:g}, {drawn}: {trial}"
    return json.dumps(data)
