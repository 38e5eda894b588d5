"""The privacy card's section on what separates the computation from the proof.

References:
    1. Mironov. On significance of the least significant bits for differential privacy. CCS 2012.
"""

from __future__ import annotations

from sapf_ray.config import RunConfig
from sapf_ray.privacy.fixed_point import grid_step
from sapf_ray.privacy.planner import PRIVATE_STAGES, PrivacyPlan, StagePlan
from sapf_ray.privacy.release import sampler_delta
from sapf_ray.stages import Stage

MOST_VALUES = 10**9  # numbers in one release: more than any public model here has weights


def arithmetic(plan: PrivacyPlan, config: RunConfig, *, spent: float) -> str:
    """What separates the proof, which is about real numbers, from the computation."""
    if not plan.reads_images:
        return ""
    items = [
        _sums(stage, getattr(plan, name), bound=bound)
        for name, (stage, bound) in _bounds(config, plan.unit).items()
        if getattr(plan, name) is not None
    ]
    if not plan.non_private:
        items.append(_sampler(plan, spent))
    return (
        "## How sums and noise are computed\n\n"
        f"Each {plan.unit}'s contribution is clipped, rounded towards zero onto a grid, and added "
        "as integers. So a sum depends on the images alone, not on their order or on how the work "
        f"is spread, and one {plan.unit} changes it by no more than the bound, to the last bit.\n\n"
        + "\n".join(items)
    )


def _bounds(config: RunConfig, unit: str) -> dict[str, tuple[str, float]]:
    """Stage of the plan to its name for people and to the bound on one unit's contribution."""
    each = f"{'an' if unit == 'image' else 'a'} {unit}"
    return {
        Stage.VOTE: (f"grounding, vote (one vote {each})", 1.0),
        Stage.HEAD: ("grounding, head (features clipped)", 1.0),
        Stage.PROPORTIONS: (f"grounding, class proportions (one count {each})", 1.0),
        Stage.SELECTION: (
            f"selection ({config.saliency.clipping} clipping)",
            config.saliency.clipping_norm,
        ),
        Stage.FINETUNE: (
            f"fine-tuning ({config.finetune.clipping} clipping)",
            config.finetune.clipping_norm,
        ),
        Stage.EVOLUTION: (f"evolution (one vote {each})", 1.0),
    }


def _sums(title: str, stage: StagePlan, *, bound: float) -> str:
    line = f"- {title}: bound C = {bound:g}, grid of {grid_step(bound):.3g}"
    if stage.slack == 0:
        return f"{line};"
    return (
        f"{line}; these sums are too large to be kept as integers and are added as floating-point "
        f"numbers, whose rounding can let one image count up to {1 + stage.slack:.6g} C; the noise "
        "is larger by the same factor, which pays for it;"
    )


def _sampler(plan: PrivacyPlan, spent: float) -> str:
    stages = [stage for name in PRIVATE_STAGES if (stage := getattr(plan, name)) is not None]
    releases = sum(stage.count for stage in stages)
    lost = sampler_delta(MOST_VALUES, releases, epsilon=spent)
    text = (
        "- noise: a Gaussian rounded to the grid, drawn and added in integers, so that the last "
        "bits of a released number reveal nothing about the sum (Mironov 2012). Its cut-off tails "
        f"and finite bits add at most {lost:.1g} to δ, for up to {MOST_VALUES:,} numbers a release"
    )
    if any(stage.mechanism != "gaussian" for stage in stages):
        text += (
            ". The selection's mechanism adds floating-point noise instead, of which only an order "
            "or a comparison is released; that differs from the exact mechanism's with a "
            "probability of about 10⁻¹¹"
        )
    return f"{text}."
