"""What a run's results may be called: one verdict, made here and carried by everything that
speaks of the run: its card, the data set's README and tags, terminal, MLflow, tables, and what is
published.

Example::

    verdict = judge(plan, ledger, reproducible=False)
    verdict.release        # may the results be given away as differentially private?
    verdict.answer         # "yes", or "no: a seeded run"
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sapf_ray.config import ClusterConfig
from sapf_ray.errors import BudgetError
from sapf_ray.privacy.accountant_table import ACCOUNTANTS

if TYPE_CHECKING:
    from sapf_ray.privacy.ledger import Ledger
    from sapf_ray.privacy.planner import PrivacyPlan

TAG = "differential-privacy"
TOLERANCE = 1e-6
"""Relative: by how much the spent epsilon may pass the planned one, for rounding alone."""


class Kind(enum.StrEnum):
    """What a run is, to whoever decides on its release."""

    PRIVATE = "private"
    PUBLIC = "no sensitive image was read"
    NON_PRIVATE = "a run without noise"
    AUDITED = "an audit, in which canaries took part"
    SEEDED = "a seeded run"
    LARGE_DELTA = "δ is 1/N or more"
    OVER_BUDGET = "more was spent than planned"
    UNVERIFIABLE = "its ledger cannot be relied upon"


@dataclass(frozen=True, kw_only=True)
class PrivacyNote:
    """What the README of a data set says of its privacy.

    Attributes:
        text: Markdown.
        tags: For the front matter.
    """

    text: str
    tags: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What the results of a run may be called.

    Attributes:
        kind: What it is.
        headline: One word or two, Markdown.
        reason: Sentences, plain.
    """

    kind: Kind
    headline: str
    reason: str

    @property
    def release(self) -> bool:
        """Whether the results may be given away under the run's claim."""
        return self.kind in (Kind.PRIVATE, Kind.PUBLIC)

    @property
    def answer(self) -> str:
        """For tags and tables: yes, or no and why."""
        return "yes" if self.release else f"no: {self.kind}"

    @property
    def markdown(self) -> str:
        """Headline and reason."""
        return f"**{self.headline}** {self.reason}"

    @property
    def plain(self) -> str:
        """As :attr:`markdown`, for the terminal."""
        return f"{self.headline} {self.reason}"

    @property
    def note(self) -> PrivacyNote:
        """For a data set; only what is differentially private is tagged so."""
        if self.kind is Kind.PUBLIC:
            return PrivacyNote(text=self.markdown)
        more = "The run's `privacy_card.md` lists every use of the sensitive images."
        text = f"{self.markdown} {more}"
        return PrivacyNote(text=text, tags=(TAG,) if self.kind is Kind.PRIVATE else ())


def judge(
    plan: PrivacyPlan, ledger: Ledger, *, reproducible: bool, spent: float | None = None
) -> Verdict:
    """The verdict on a run.

    Args:
        plan: What was planned.
        ledger: What was spent.
        reproducible: Whether noise came from a seed of the configuration.
        spent: Epsilon of the ledger, where it is known already.
    """
    known = foreseen(plan, reproducible=reproducible)
    if known is not None:
        return known
    if ledger.plan != plan:
        return unverifiable("The ledger was written for another plan than the run's.")
    if spent is None:
        spent = ledger.epsilon_spent()
    if spent > plan.epsilon * (1 + TOLERANCE):
        return Verdict(
            kind=Kind.OVER_BUDGET,
            headline="NOT FOR RELEASE.",
            reason=f"ε = {spent:.4g} was spent, which is more than the {plan.epsilon:g} planned.",
        )
    return _private(plan, spent)


def foreseen(plan: PrivacyPlan, *, reproducible: bool) -> Verdict | None:
    """The verdict where the settings alone decide it, before anything is read; else None.

    Args:
        plan: What is planned.
        reproducible: Whether noise comes from a seed of the configuration.
    """
    if plan.non_private and plan.reads_images:
        return Verdict(
            kind=Kind.NON_PRIVATE,
            headline="NOT PRIVATE.",
            reason="This run added no noise. What it made may reveal training images. It is a "
            "ceiling for research comparisons and must not be released.",
        )
    if plan.canaries:
        return Verdict(
            kind=Kind.AUDITED,
            headline="NOT FOR RELEASE.",
            reason=f"This run was an audit: {plan.canaries:,} canaries took part, and what they "
            "tell is kept beside it. Repeat it without audit.canaries and audit.images.",
        )
    if not plan.reads_images:
        return Verdict(
            kind=Kind.PUBLIC,
            headline="No sensitive image was used:",
            reason="the images come from the public model alone.",
        )
    if reproducible:
        return Verdict(
            kind=Kind.SEEDED,
            headline="NOT FOR RELEASE.",
            reason="Noise and sampling came from a seed written in the configuration. Whoever "
            "knows the seed can remove the noise. The numbers that are given hold only against "
            "those who do not.",
        )
    if plan.delta >= 1 / plan.n_records:
        return Verdict(
            kind=Kind.LARGE_DELTA,
            headline="NOT FOR RELEASE.",
            reason=f"δ = {plan.delta:.3g} is not below 1/N: to publish one {plan.unit} as it is "
            "would satisfy such a claim.",
        )
    return None


def unverifiable(why: str) -> Verdict:
    """The verdict on a run whose files do not hold together.

    Args:
        why: A sentence.
    """
    return Verdict(kind=Kind.UNVERIFIABLE, headline="NOT FOR RELEASE.", reason=why)


def check_release(verdict: Verdict | None, config: ClusterConfig) -> None:
    """Results that are not for release are published only where the user says that it is meant.

    Args:
        verdict: Of the run; None where it is not known yet.
        config: Says where results are published, and whether all may be.

    Raises:
        BudgetError: They would be.
    """
    if verdict is None or verdict.release or config.publish_not_private:
        return
    raise BudgetError(
        f"cluster.storage = {config.storage!r}: results are published there, and these are not for "
        f"release ({verdict.kind}); leave it out, or say that it is meant with --not_private"
    )


def _private(plan: PrivacyPlan, spent: float) -> Verdict:
    return Verdict(
        kind=Kind.PRIVATE,
        headline="Differentially private:",
        reason=f"ε = {spent:.4g} at δ = {plan.delta:.3g}, for {plan.neighbours.doing} one of "
        f"{plan.n_records:,} training {plan.unit}s ({ACCOUNTANTS[plan.accountant].title} "
        "accountant).",
    )
