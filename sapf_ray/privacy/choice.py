"""Which remedies of :mod:`sapf_ray.grounding` a run uses, from public facts alone.

>>> from sapf_ray.config import GroundingConfig, RunConfig
>>> from sapf_ray.privacy.calibration import Budget
>>> budget = Budget(epsilon=10.0, delta=1e-5, accountant="rdp")
>>> config = RunConfig(grounding=GroundingConfig(remedies="tokens,vote"))
>>> choose(config, None, budget=budget)
('vote', 'tokens')
>>> choose(RunConfig(), Facts(n_records=1297, words_known=False), budget=budget)[0]
'vote'
"""

from __future__ import annotations

from sapf_ray.config import RunConfig
from sapf_ray.config.grounding import AUTO
from sapf_ray.config.section import require
from sapf_ray.privacy.calibration import Budget
from sapf_ray.privacy.facts import Facts
from sapf_ray.privacy.stage_plan import StagePlan
from sapf_ray.registry import names, row
from sapf_ray.stages import Stage

TABLE = "grounding.remedies"


def choose(config: RunConfig, facts: Facts | None, *, budget: Budget) -> tuple[str, ...]:
    """Names of the remedies, in the order of the table.

    Those that the user named, or those whose rows suit the facts. ``auto`` chooses none for a run
    that trains nothing, and none where the facts are not known.

    Args:
        config: The whole experiment.
        facts: What is public of the data.
        budget: What the whole run may spend.

    Raises:
        ConfigError: The user named one that does not count groups, and data.groups is given.
    """
    settings = config.grounding
    if settings.named:
        able = [name for name in names(TABLE) if _counts_units(name, config)]
        require(
            set(settings.named) <= set(able),
            TABLE,
            settings.remedies,
            f"must be among {', '.join([*able, 'none'])} where data.groups is given: another "
            "counts images, not groups",
        )
        return tuple(name for name in names(TABLE) if name in settings.named)
    if settings.remedies != AUTO or facts is None or config.finetune.steps == 0:
        return ()
    return tuple(
        name
        for name in names(TABLE)
        if _counts_units(name, config) and row(TABLE, name).suits(config, facts, budget)
    )


def _counts_units(name: str, config: RunConfig) -> bool:
    return config.data.groups is None or row(TABLE, name).groups


def grounding_stages(
    config: RunConfig, facts: Facts, *, remedies: tuple[str, ...], budget: Budget
) -> dict[str, StagePlan]:
    """What the remedies release: each once, over all records.

    Args:
        config: The whole experiment.
        facts: What is public of the data.
        remedies: From :func:`choose`.
        budget: What the whole run may spend.
    """
    stages: dict[str, StagePlan] = {}
    for name in remedies:
        remedy = row(TABLE, name)
        if remedy.noise is None or remedy.told_by in remedies:
            continue
        noise = getattr(config.grounding, f"{name}_noise_multiplier")
        if config.privacy.non_private:
            noise = 0.0
        elif noise is None:
            noise = remedy.noise(facts, budget)
        stages[Stage(name)] = StagePlan(
            noise_multiplier=noise, sample_rate=1.0, count=1, share=None
        )
    return stages
