"""What a run's randomness is bound to: all that can change a released value.

A secret key alone is not enough: two runs from one seed, or a copied run directory with an edited
config, would draw the same noise for different sums, and the difference of their releases would be
free of noise. So the key is bound (:meth:`sapf_ray.privacy.keyed_rng.NoiseKey.bind`) to the run's
fingerprint, and a run in which any part of it differs has other noise and other samples.
"""

from __future__ import annotations

from dataclasses import fields
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from sapf_ray.config import AFTERWARDS, RunConfig, config_hash
from sapf_ray.privacy.planner import PrivacyPlan

PACKAGES = ("sapf-ray", "torch", "diffusers", "transformers", "peft", "dp-accounting")
"""Whose versions may change what is summed or how it is paid."""


def run_fingerprint(
    config: RunConfig, plan: PrivacyPlan, *, data: str, weights: str
) -> dict[str, Any]:
    """The public parts that a run's key is bound to, as JSON.

    Args:
        config: The whole experiment; what only says where and how it runs is left out, and so is
            what follows from the releases: the same releases serve any sampling and evaluation.
        plan: The privacy plan.
        data: Fingerprint of the sensitive images.
        weights: Hash over the content of the public model's files.
    """
    return {
        "data": data,
        "plan": plan.to_dict(),
        "config": config_hash(config, *_releasing_sections(plan)),
        "weights": weights,
        "dtype": config.model.dtype,
        "versions": library_versions(),
    }


def library_versions() -> dict[str, str]:
    """Package to version of all that may change what is summed or how it is paid."""
    return {name: _version(name) for name in PACKAGES}


def _releasing_sections(plan: PrivacyPlan) -> list[str]:
    """Sections of the config that what is summed depends on.

    So a run with another number of images has, from the same secret, the same releases, and the
    very images that :func:`sapf_ray.reuse.commands.synthesize` adds to the first.
    """
    after = {"tracking", *AFTERWARDS}
    if plan.evolution is not None:
        after.remove("synthesis")
    return [section.name for section in fields(RunConfig) if section.name not in after]


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # a checkout that is not installed
        return "not installed"
