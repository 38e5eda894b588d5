"""The privacy budget."""

from __future__ import annotations

from typing import Annotated

from sapf_ray.config.kinds import NameIn, OpenShare, Positive
from sapf_ray.config.section import require, section

EPSILONS = (1e-3, 1e3)
DELTAS = (1e-15, 0.1)


@section("privacy")
class PrivacyConfig:
    """The budget; of what, say ``data.n_records`` and ``data.groups``, and docs/privacy.md.

    Args:
        epsilon: Planned epsilon of the whole run (selection and fine-tuning composed), in
            [0.001, 1000].
        delta: Planned delta, in [1e-15, 0.1]; by default 1 / (N ln N).
        allow_large_delta: Lets a delta of 1 / N and more pass, which protects nobody: publishing
            one image as it is satisfies it.
        accountant: pld (tight, default) or rdp (as the paper).
        non_private: No noise at all: the ceiling of research comparisons. Epsilon is then infinite
            and the card says so.
        reproducible_seed: Seeds privacy noise and Poisson draws so that a run can be repeated; NOT
            for release. By default they come from a secret key drawn from the operating system.
    """

    epsilon: Positive = 10.0
    delta: OpenShare | None = None
    allow_large_delta: bool = False
    accountant: Annotated[str, NameIn("privacy.accountant")] = "pld"
    non_private: bool = False
    reproducible_seed: int | None = None

    def __post_init__(self) -> None:
        low, high = EPSILONS
        require(
            low <= self.epsilon <= high,
            "privacy.epsilon",
            self.epsilon,
            f"must lie in [{low:g}, {high:g}]: below, noise hides everything; above, nothing "
            "(privacy.non_private measures without noise)",
        )
        low, high = DELTAS
        require(
            self.delta is None or low <= self.delta <= high,
            "privacy.delta",
            self.delta,
            f"must lie in [{low:g}, {high:g}]; accounting does not resolve smaller ones, and "
            "larger ones are no guarantee",
        )

    @property
    def is_seeded(self) -> bool:
        """Whether noise comes from a seed that is written down."""
        return self.reproducible_seed is not None
