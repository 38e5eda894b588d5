"""Prompts that a public model knows: candidates for classes whose own words it does not know.

>>> known_prompts("glyphs-tiny")[3]
'An image of the digit three'
>>> known_prompts("sd-v1-5", template="A photo of {name}")[0]
'A photo of airplane'
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from sapf_ray.config import GroundingConfig, RunConfig
from sapf_ray.errors import ConfigError, reason

CHARACTERS = "characters"
NOUNS = "nouns"
BUNDLED = ("glyphs-tiny", "letters-tiny", "glyphs-dit-tiny")
FEWEST = 2  # candidates
_SHOWN_BY = (
    "candidates",
    "features",
    "candidate_images",
    "candidate_steps",
    "candidate_guidance",
)
OTHERS_GUIDANCE = 4.0  # of models whose unguided images are vague


def known_prompts(model: str, *, template: str = "An image of {name}") -> tuple[str, ...]:
    """Public prompts that the model knows: all that a bundled one was trained on, or a list of
    nouns and textures.

    Args:
        model: ``model.path``.
        template: Prompt of one noun, ``{name}``.
    """
    if model in BUNDLED:
        return _shipped(CHARACTERS)
    return tuple(template.replace("{name}", word) for word in _shipped(NOUNS))


def guidance_of(config: RunConfig) -> float:
    """Guidance scale of the images that show candidates."""
    given = config.grounding.candidate_guidance
    if given is not None:
        return given
    return 1.0 if config.model.path in BUNDLED else OTHERS_GUIDANCE


def ships_candidates(config: RunConfig) -> bool:
    """Whether features of the images that show a vote's candidates are shipped: those of the
    bundled models are, for the default settings.
    """
    given, usual = config.grounding, GroundingConfig()
    as_usual = all(getattr(given, key) == getattr(usual, key) for key in _SHOWN_BY)
    return config.model.path in BUNDLED and config.model.resolution is None and as_usual


def read_candidates(path: str) -> tuple[str, ...]:
    """The candidate prompts of a user's file: one a line, empty lines and ``#`` lines left out.

    Raises:
        ConfigError: The file cannot be read, or has fewer than two different lines.
    """
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            "grounding.candidates", path, f"must be a text file in UTF-8 ({reason(error)})"
        ) from error
    found = _lines(text)
    if len(found) < FEWEST:
        raise ConfigError(
            "grounding.candidates", path, "must hold two or more different prompts, one a line"
        )
    return found


def _shipped(name: str) -> tuple[str, ...]:
    folder = resources.files("sapf_ray.models") / "vocabularies"
    return _lines((folder / f"{name}.txt").read_text(encoding="utf-8"))


def _lines(text: str) -> tuple[str, ...]:
    lines = (line.strip() for line in text.splitlines())
    return tuple(dict.fromkeys(line for line in lines if line and not line.startswith("#")))
