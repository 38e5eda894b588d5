"""Table of accountants: what may turn a run's events into epsilon.

Importing this module loads no accounting library; looking up a row does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sapf_ray.registry import Registry

if TYPE_CHECKING:
    from dp_accounting.privacy_accountant import PrivacyAccountant


@dataclass(frozen=True, kw_only=True)
class Accountant:
    """One way of turning events into epsilon.

    Attributes:
        title: Short name for people, e.g. ``PLD``.
        make: Given a discretisation interval of the privacy loss, a fresh accountant under the
            add/remove-one-image relation. It reports events that it cannot price in dp-accounting's
            way: ``_maybe_compose`` returns ``CompositionErrorDetails``, so that ``supports`` is
            False. An accountant that does not discretise ignores the interval; for any other the
            epsilon must be an upper bound at every interval.
    """

    title: str
    make: Callable[[float], PrivacyAccountant]


ACCOUNTANTS: Registry[Accountant] = Registry(
    "privacy.accountant",
    {
        "pld": "sapf_ray.privacy.accountants:PLD",
        "rdp": "sapf_ray.privacy.accountants:RDP",
    },
)
"""Value of ``privacy.accountant`` to accountant."""
