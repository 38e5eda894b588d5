"""Classes whose words the public model does not know."""

from __future__ import annotations

from typing import Annotated, Literal

from annotated_types import Interval

from sapf_ray.config.kinds import Count, NotNegative, Positive
from sapf_ray.config.section import require, section
from sapf_ray.registry import names

AUTO = "auto"
NONE = "none"


@section("grounding")
class GroundingConfig:
    """What is done where the public model does not know the classes' words, or could know more.

    Args:
        remedies: auto (chosen from public facts: whether the words are known, N, classes), none, or
            names separated by commas: vote (each class gets a prompt that the model knows, by a
            noisy vote of the records), tokens (learned class tokens), head (labels by a private
            classifier), proportions (as many synthetic images of each class as a noisy count of the
            records says; never chosen by auto).
        candidates: File of candidate prompts for the vote, one a line, public; by default the
            vocabulary of a bundled model, or a public list of nouns and textures with the class
            words themselves.
        features: Public features in which images are compared: auto (glyphs for a bundled model,
            else latents), glyphs, latents, or the path or hub id of a network.
        candidate_images: Images of the public model that show each candidate.
        candidate_steps: DPM-Solver++ steps of such an image; more hardly change a vote.
        candidate_guidance: Guidance scale of such an image; by default 1 with a bundled model, and
            4 with others, whose unguided images are vague.
        vote_noise_multiplier: Noise std over sensitivity of the vote's table; by default 0.07
            records a class (N / classes), or what a twentieth of the budget buys where that is
            more noise.
        token_weight: Scales the gradient of class tokens against that of the adapter's factors,
            with which they share one clip: above 1 more of a record's contribution is theirs.
        token_learning_rate: AdamW step size of what class tokens add to a class's condition; 0
            takes finetune.learning_rate.
        head_noise_multiplier: Noise std over sensitivity of the head's class means; by default what
            makes them stand 5 times above their noise, or what a tenth of the budget buys where
            that is more noise.
        proportions_noise_multiplier: Noise std over sensitivity of the counts; by default 0.02
            records a class (N / classes), or what a hundredth of the budget buys where that is more
            noise.
        labels: What a head does: balance (more images are sampled, and every class keeps those that
            most certainly show it) or relabel (each image gets its most likely label).
        oversample: Images sampled for each one that balance keeps; by default 2 with a bundled
            model, and 1.25 with others, whose images cost more.
        cache_dir: Where features of candidates' images are kept for further runs, public; by
            default sapf-ray in the user's cache folder.
    """

    remedies: str = AUTO
    candidates: str | None = None
    features: str = AUTO
    candidate_images: Count = 32
    candidate_steps: Count = 8
    candidate_guidance: Annotated[float, Interval(ge=1)] | None = None
    vote_noise_multiplier: Positive | None = None
    token_weight: Positive = 1.0
    token_learning_rate: NotNegative = 0.0
    head_noise_multiplier: Positive | None = None
    proportions_noise_multiplier: Positive | None = None
    labels: Literal["balance", "relabel"] = "balance"
    oversample: Annotated[float, Interval(ge=1)] | None = None
    cache_dir: str | None = None

    def __post_init__(self) -> None:
        known = names("grounding.remedies")
        named = self.named
        require(
            self.remedies in (AUTO, NONE)
            or (set(named) <= set(known) and len(set(named)) == len(named)),
            "grounding.remedies",
            self.remedies,
            f"must be {AUTO}, {NONE}, or different ones of {', '.join(known)} separated by commas",
        )

    @property
    def named(self) -> tuple[str, ...]:
        """Remedies named one by one; empty where they are chosen by facts, or none."""
        if self.remedies in (AUTO, NONE):
            return ()
        return tuple(name.strip() for name in self.remedies.split(","))
