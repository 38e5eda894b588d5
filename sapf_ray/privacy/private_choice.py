"""What one trial of a private choice plans beside an ordinary run: who is held out, and a score.

The score is a noisy number of held-out records that a classifier gets right which learned from the
trial's synthetic images alone. It is charged on top of what the trial released (sequential, not
parallel composition). A record that is zeroed out touches one of the two. But as many records are
held out whatever N is, so where a record is added, either the other records keep their sides, or it
is held out in the place of one that is trained on instead: then the number changes by at most one,
for each counts at most one, and the rest by the one record. The split is drawn from a key and not
from the records, so this pairing of splits makes the guarantee one of their mixture, too.
"""

from __future__ import annotations

import dataclasses

from sapf_ray.config import RunConfig
from sapf_ray.config.section import require
from sapf_ray.errors import ConfigError
from sapf_ray.privacy.accountant_table import ACCOUNTANTS
from sapf_ray.privacy.accountants import supports
from sapf_ray.privacy.calibration import Budget, smallest_noise
from sapf_ray.privacy.events import gaussian_event
from sapf_ray.privacy.repeat import Repeat
from sapf_ray.privacy.stage_plan import StagePlan

LEAST_HELD_OUT = 10
"""With fewer records a score tells settings apart by luck."""


def planned_repeat(config: RunConfig, n_records: int) -> Repeat | None:
    """How trials are repeated, where the run is one of a private choice; else None.

    Args:
        config: The whole experiment.
        n_records: N, the number of all units of privacy.

    Raises:
        ConfigError: A private choice of such runs cannot be accounted for; names the field.
    """
    tuning = config.tuning
    if not tuning.private:
        return None
    repeat = Repeat(
        distribution=tuning.distribution,
        mean=tuning.mean_trials,
        shape=tuning.shape,
        held_out=round(tuning.held_out * n_records),
    )
    _check_trial(config)
    accountant = config.privacy.accountant
    event = repeat.event(((gaussian_event(1.0), 1),))
    able = [name for name in ACCOUNTANTS if supports(name, event)]
    require(
        accountant in able,
        "privacy.accountant",
        accountant,
        f"cannot price a private choice; {' or '.join(able)} can",
    )
    require(
        LEAST_HELD_OUT <= repeat.held_out <= n_records - LEAST_HELD_OUT,
        "tuning.held_out",
        tuning.held_out,
        f"makes {repeat.held_out} of {n_records}: must hold out at least {LEAST_HELD_OUT} and "
        "leave as many",
    )
    return repeat


def _check_trial(config: RunConfig) -> None:
    """Refuses runs whose trials would not be independent and alike in cost."""
    privacy, audit = config.privacy, config.audit
    refused = (
        ("privacy.non_private", privacy.non_private, False, "must be false: trials have noise"),
        (
            "privacy.reproducible_seed",
            privacy.reproducible_seed,
            None,
            "must be left out: each trial's noise is its own",
        ),
        ("audit.canaries", audit.canaries, 0, "must be 0: an audit is never released"),
        ("audit.images", audit.images, 0, "must be 0: an audit is never released"),
        ("evolution.enabled", config.evolution.enabled, False, "must be false: trials train"),
        ("data.n_records", config.data.n_records, None, "must be left out: N is counted"),
        ("data.groups", config.data.groups, None, "must be left out: images are held out"),
    )
    for key, value, unset, allowed in refused:
        require(value == unset, key, value, f"{allowed}, in a private choice")
    require(
        config.finetune.steps > 0,
        "finetune.steps",
        config.finetune.steps,
        "must be above 0 in a private choice: trials are fine-tuned",
    )
    require(
        config.saliency.mechanism != "propose_test_release",
        "saliency.mechanism",
        config.saliency.mechanism,
        "cannot be repeated in a private choice, whose price has no delta of a trial",
    )


def score_stage(budget: Budget, share: float) -> StagePlan:
    """The score's release: one Gaussian count, to which a record adds at most one.

    Args:
        budget: Of the whole choice.
        share: Of the budget's epsilon that the score alone may spend, in (0, 1).

    Raises:
        ConfigError: Repeated, the score alone would spend the whole budget.
    """
    stage = StagePlan(noise_multiplier=0.0, sample_rate=1.0, count=1, share=None)
    alone = dataclasses.replace(budget, epsilon=share * budget.epsilon, repeat=None)
    noise = smallest_noise(stage, alone)
    if noise is not None:
        stage = dataclasses.replace(stage, noise_multiplier=noise)
    if noise is None or budget.spent(stage.charges()) >= budget.epsilon:
        raise ConfigError(
            "tuning.score_share",
            share,
            f"is too much of epsilon = {budget.epsilon:g}: repeated, the score alone would spend "
            "it all",
        )
    return stage
