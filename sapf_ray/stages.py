"""The names of a run's stages, as logs, metrics, ledger and progress show them.

Grounding is one stage; what its remedies release has their names in plan and ledger.
"""

from __future__ import annotations

from enum import StrEnum


class Stage(StrEnum):
    """One stage of a run; its value is what users see.

    >>> f"{Stage.FINETUNE}"
    'finetune'
    """

    PLAN = "plan"
    LATENTS = "latents"
    GROUNDING = "grounding"
    VOTE = "vote"
    HEAD = "head"
    PROPORTIONS = "proportions"
    SELECTION = "selection"
    FINETUNE = "finetune"
    EVOLUTION = "evolution"
    SYNTHESIS = "synthesis"
    SCORE = "score"
    PICTURES = "pictures"
    EVALUATION = "evaluation"
