"""Private choice of settings: ``sapf tune SPACE --private``."""

from __future__ import annotations

from typing import Annotated, Literal

from annotated_types import Interval

from sapf_ray.config.kinds import NotNegative, OpenShare
from sapf_ray.config.section import section


@section("tuning")
class TuningConfig:
    """A private choice among a grid's cells, whose winner alone is released.

    Args:
        private: Set by `sapf tune --private`: this run is one of a secret number of trials.
        mean_trials: Mean of the number of trials, at least 1; the number itself is drawn and secret
            (Papernot and Steinke, ICLR 2022).
        distribution: negative_binomial (truncated: one trial at least) or poisson (of which none at
            all may be drawn, with probability exp(-mean_trials)).
        shape: Of the negative binomial distribution, the paper's eta: 1 is geometric, 0 is
            logarithmic, which costs less and draws one trial more often.
        held_out: Share of the sensitive training images that trials are scored on and never train
            on.
        score_share: Share of privacy.epsilon that the score's own release may spend; beside the
            trial's other releases its square counts, about.
        split: File that says which images are held out, of `sapf tune`; secret.
    """

    private: bool = False
    mean_trials: Annotated[float, Interval(ge=1)] = 10.0
    distribution: Literal["negative_binomial", "poisson"] = "negative_binomial"
    shape: NotNegative = 1.0
    held_out: OpenShare = 0.1
    score_share: OpenShare = 0.1
    split: str | None = None
