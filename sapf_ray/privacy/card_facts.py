"""All that the privacy card says of a run, as one object: text, JSON and registry entry are made
from it, so they cannot disagree.

Example::

    facts = gather(plan, ledger, config, model_name="glyphs-tiny", data_name="digits")
    CardFacts.from_dict(json.loads(json.dumps(facts.to_dict()))) == facts
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import TypeAdapter, ValidationError

from sapf_ray.privacy.meaning import Meaning

SCHEMA = 1
MOST_VALUES = 10**9  # numbers in one release: more than any public model here has weights


@dataclass(frozen=True, kw_only=True)
class Software:
    """Versions of what computed the guarantee."""

    sapf_ray: str
    dp_accounting: str


@dataclass(frozen=True, kw_only=True)
class Claim:
    """What the run may be called.

    Attributes:
        kind: One word or a few.
        release: Whether its results may be given away under this claim.
        text: Sentences, Markdown.
    """

    kind: str
    release: bool
    text: str


@dataclass(frozen=True, kw_only=True)
class Protected:
    """Whom the guarantee is for.

    Attributes:
        unit: ``image``, or ``group`` of images.
        n_units: N.
        nominal: Whether N is given by ``data.n_records``, not counted from the images.
        adjacency: Name of the relation between neighbouring data sets.
        short: The relation for tables.
        neighbours: The relation in a sentence.
        groups: ``data.groups``: whose an image is; None where each image is a unit.
    """

    unit: str
    n_units: int
    nominal: bool
    adjacency: str
    short: str
    neighbours: str
    groups: str | None


@dataclass(frozen=True, kw_only=True)
class Priced:
    """Epsilon of what was released, by one accountant.

    Attributes:
        accountant: Its name for people.
        delta: At this delta.
        epsilon: None where the accountant does not know one of the mechanisms.
    """

    accountant: str
    delta: float
    epsilon: float | None


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What was planned and what was spent.

    Attributes:
        planned: Upper limit of epsilon.
        whole_plan: Epsilon of all that the plan allows.
        spent: By the plan's accountant, at the plan's delta.
        others: By the other accountants.
        strict: By the plan's accountant at 1 / N², the delta that NIST SP 800-226 asks for.
    """

    planned: float
    whole_plan: float
    spent: Priced
    others: tuple[Priced, ...]
    strict: Priced


@dataclass(frozen=True, kw_only=True)
class StageFacts:
    """One kind of release, as planned.

    Attributes:
        stage: Its name in plan and ledger.
        title: Its name for people.
        contribution: What bounds one unit's part in a sum.
        mechanism: ``gaussian``, ``exponential`` or ``propose_test_release``.
        noise_multiplier: Noise's standard deviation over ``bound``: sigma.
        bound: The most that one unit adds to a sum, in L2 norm: C.
        sample_rate: Poisson rate of one release: q.
        count: Number of releases: T.
        share: Part of the whole cost, in [0, 1]; None where there is no noise.
        grid: Width of the grid that sums and noise lie on.
        slack: Share by which ``bound`` may be passed, which the noise pays for.
    """

    stage: str
    title: str
    contribution: str
    mechanism: str
    noise_multiplier: float
    bound: float
    sample_rate: float
    count: int
    share: float | None
    grid: float
    slack: float


@dataclass(frozen=True, kw_only=True)
class Use:
    """Releases of one kind in the ledger."""

    stage: str
    mechanism: str
    charged: int
    replays: int


@dataclass(frozen=True, kw_only=True)
class Person:
    """What the guarantee promises someone with several images.

    Attributes:
        images: Number of their images.
        epsilon: Upper bound, at the run's delta.
    """

    images: int
    epsilon: float


@dataclass(frozen=True, kw_only=True)
class Unprotected:
    """What was computed from sensitive images outside the guarantee.

    Attributes:
        evaluation: Whether scores were measured on real images.
        scores: Their names.
        diagnostics: Further results.
        skipped: Records that could not be read, by split.
    """

    evaluation: bool
    scores: tuple[str, ...]
    diagnostics: tuple[str, ...]
    skipped: dict[str, int]


@dataclass(frozen=True, kw_only=True)
class CardFacts:
    """The facts of one run.

    Attributes:
        data: Name of the sensitive data set.
        model: The public model.
        claim: The verdict.
        private: Whether there is a guarantee.
        reads_images: Whether any sensitive image was read.
        trains: Whether the model was fine-tuned.
        protected: Whom the guarantee is for.
        budget: Planned and spent.
        batch_size: Expected number of units in a step; 0 without fine-tuning.
        steps: Of fine-tuning.
        meaning: What epsilon means; None where there is no guarantee or nothing was read.
        persons: What it means for someone with several images; empty where the unit is a group, or
            where it is not known.
        stages: What was planned.
        repeat: How the trials of a private choice were repeated; empty in any other run.
        uses: What the ledger holds.
        sampler_delta: What the noise's computation adds to delta, at most.
        remedies: How classes are told to the model.
        grounding: What the remedies released (``grounding.json``).
        embedding: Network that compares images; empty without an evolution.
        unprotected: What the guarantee does not cover.
        seeded: Whether noise came from a seed of the configuration.
        keeps_latents: Whether latents of the sensitive images are kept after the run.
        shared_selection: Whether other runs use this run's selection.
        software: Versions.
        schema: Of this object's JSON.
    """

    data: str
    model: str
    claim: Claim
    private: bool
    reads_images: bool
    trains: bool
    protected: Protected
    budget: Budget
    batch_size: int
    steps: int
    meaning: Meaning | None
    persons: tuple[Person, ...]
    stages: tuple[StageFacts, ...]
    repeat: dict[str, Any]
    uses: tuple[Use, ...]
    sampler_delta: float
    remedies: tuple[str, ...]
    grounding: dict[str, Any]
    embedding: str
    unprotected: Unprotected
    seeded: bool
    keeps_latents: bool
    shared_selection: bool
    software: Software
    schema: int = field(default=SCHEMA)

    @property
    def unit(self) -> str:
        """``image`` or ``group``."""
        return self.protected.unit

    @property
    def spent(self) -> float:
        """Epsilon of all releases, by the plan's accountant."""
        epsilon = self.budget.spent.epsilon
        return math.inf if epsilon is None else epsilon

    @property
    def delta(self) -> float:
        """Of the claim."""
        return self.budget.spent.delta

    def to_dict(self) -> dict[str, Any]:
        """Plain values; JSON has no infinity, which is the string ``"inf"``."""
        plain: dict[str, Any] = _without_infinity(dataclasses.asdict(self))
        return plain

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> CardFacts:
        """Inverse of :meth:`to_dict`; other keys are left out.

        Raises:
            ValueError: Missing or wrong values, or another schema.
        """
        names = {f.name for f in dataclasses.fields(cls)}
        try:
            facts = _adapter().validate_python({k: v for k, v in data.items() if k in names})
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise ValueError(f"not the facts of a privacy card: {where}: {first['msg']}") from None
        if facts.schema != SCHEMA:
            raise ValueError(f"schema {facts.schema}: this version reads {SCHEMA}")
        return facts


@functools.cache
def _adapter() -> TypeAdapter[CardFacts]:
    return TypeAdapter(CardFacts)


def _without_infinity(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_infinity(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_infinity(part) for part in value]
    if isinstance(value, float) and math.isinf(value):
        return "inf"
    return value
