"""The privacy budget."""

from __future__ import annotations

from typing import Annotated

from sapf_ray.config.kinds import NameIn, OpenShare, Positive
from sapf_ray.config.section import section


@section("privacy")
class PrivacyConfig:
    """The budget. Adjacency is add/remove one image.

    Args:
        epsilon: Planned epsilon of the whole run (selection and fine-tuning composed).
        delta: Planned delta; by default 1 / (N ln N).
        accountant: pld (tight, default) or rdp (as the paper).
        non_private: No noise at all: the ceiling of research comparisons. Epsilon is then infinite
            and the card says so.
        reproducible_seed: Seeds privacy noise and Poisson draws so that a run can be repeated; NOT
            for release. By default they come from a secret key drawn from the operating system.
    """

    epsilon: Positive = 10.0
    delta: OpenShare | None = None
    accountant: Annotated[str, NameIn("privacy.accountant")] = "pld"
    non_private: bool = False
    reproducible_seed: int | None = None
