"""Every method of the paper that is a setting of the same pipeline: one row of config overrides
each.

``sapf run --method NAME`` and ``sapf methods`` read this table. A row sets what makes the method;
model, data, budget, steps and learning rate stay the user's (each method wants its own learning
rate: design section 5).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from sapf_ray.registry import Registry


@dataclass(frozen=True, kw_only=True)
class Method:
    """One row.

    Attributes:
        title: As the paper calls it.
        source: Where the paper reports it.
        private: False where the result carries no privacy guarantee.
        overrides: Dotted config keys.
    """

    title: str
    source: str
    overrides: dict[str, Any]
    private: bool = True


_PAPER = {"saliency.score": "noisy_mean_gradient", "saliency.noise_multiplier": 5.0}
_ALL = {"saliency.ratio": 1.0}
_DIRECT = {"finetune.adapter": "direct"}
_CROSS_Q = {"saliency.pool": "cross_q", **_ALL}
_PTR = {"saliency.mechanism": "propose_test_release", "saliency.noise_multiplier": 5.0}
_PE = {
    "finetune.steps": 0,
    "evolution.enabled": True,
    "evolution.selection": "sample",
    "evolution.variations": 1,
    "evolution.keep_selected": False,
    "evolution.lookahead": 8,
}
_AUG_PE = {
    **_PE,
    "evolution.selection": "rank",
    "evolution.variations": 3,
    "evolution.keep_selected": True,
    "evolution.lookahead": 0,
}

METHODS: Registry[Method] = Registry(
    "--method",
    {
        "dp-sapf": Method(
            title="DP-SAPF, per-sample-norm score (ours)",
            source="default",
            overrides={"saliency.score": "per_sample_norm"},
        ),
        "dp-sapf-paper": Method(title="DP-SAPF, paper's score", source="Table 5", overrides=_PAPER),
        "dp-lora": Method(title="DP-LoRA", source="Tables 2, 5", overrides=_ALL),
        "dp-lora-no-middle": Method(
            title="DP-LoRA w/o middle block",
            source="Table 2",
            overrides={"saliency.pool": "qkv_no_middle", **_ALL},
        ),
        "dp-ldm": Method(
            title="DP-LDM: attention weights directly",
            source="Table 5",
            overrides={"saliency.pool": "qkvo", **_ALL, **_DIRECT},
        ),
        "dp-finetune": Method(
            title="DP-Finetune: all U-Net weights",
            source="Table 5",
            overrides={**_ALL, "finetune.adapter": "full"},
        ),
        "dp-lora-cross-q": Method(
            title="DP-LoRA, cross-attention queries only", source="Table 6", overrides=_CROSS_Q
        ),
        "dp-ldm-cross-q": Method(
            title="DP-LDM, cross-attention queries only",
            source="Table 6",
            overrides={**_CROSS_Q, **_DIRECT},
        ),
        "dp-sapf-vote": Method(
            title="DP-SAPF with prompts assigned by a private vote",
            source="sapf_ray/grounding",
            overrides={"grounding.remedies": "vote"},
        ),
        "dp-sapf-as-named": Method(
            title="DP-SAPF with the classes' words as they are",
            source="the paper",
            overrides={"grounding.remedies": "none"},
        ),
        "random": Method(
            title="Random selection", source="Figure 4", overrides={"saliency.score": "random"}
        ),
        "noisy": Method(
            title="Noisy: unselected matrices random",
            source="Figure 4",
            overrides={"finetune.randomize": "qkv"},
        ),
        "without-lora": Method(
            title="w/o LoRA: selected matrices directly", source="Figure 4", overrides=_DIRECT
        ),
        "layer-level": Method(
            title="Layer-Level: whole attention layers",
            source="Figure 4",
            overrides={"saliency.granularity": "layer"},
        ),
        "all-param": Method(
            title="All-Param: from every weight matrix",
            source="Figure 4",
            overrides={"saliency.pool": "all"},
        ),
        "snip": Method(
            title="SNIP: weight times gradient",
            source="Table 15",
            overrides={"saliency.score": "snip"},
        ),
        "force": Method(
            title="FORCE: SNIP in five steps",
            source="Table 15",
            overrides={"saliency.score": "force"},
        ),
        "synflow": Method(
            title="SynFlow: no data", source="Table 15", overrides={"saliency.score": "synflow"}
        ),
        "exponential": Method(
            title="Exponential mechanism",
            source="Figure 6",
            overrides={"saliency.mechanism": "exponential"},
        ),
        "ptr": Method(title="Propose-test-release", source="Figure 6", overrides=_PTR),
        "pe": Method(title="PE: Private Evolution", source="Table 5", overrides=_PE),
        "aug-pe": Method(
            title="Aug-PE: ranked parents survive", source="Table 5", overrides=_AUG_PE
        ),
        "public": Method(
            title="Public model without fine-tuning",
            source="Table 11",
            overrides={"finetune.steps": 0},
        ),
        "lora-no-dp": Method(
            title="LoRA without DP",
            source="Table 2",
            overrides={**_ALL, "privacy.non_private": True},
            private=False,
        ),
        "dp-sapf-no-dp": Method(
            title="DP-SAPF without noise",
            source="Table 8",
            overrides={"privacy.non_private": True},
            private=False,
        ),
    },
)
"""Value of ``--method`` to row."""


def find_method(name: str) -> Method:
    """The row of that name.

    Raises:
        ConfigError: No such row.
    """
    return METHODS[name]


def method_of(flat: Mapping[str, Any]) -> str:
    """Name of the row that a config is: the one that sets most of what holds there.

    Args:
        flat: Dotted config keys.

    >>> from sapf_ray.config import RunConfig, flatten, from_dict, to_dict
    >>> method_of(flatten(to_dict(RunConfig())))
    'dp-sapf'
    >>> method_of(flatten(to_dict(from_dict({"saliency": {"ratio": 1.0}}))))
    'dp-lora'
    """
    best = ""
    most = 0
    for name, row in METHODS.items():
        holds = all(flat.get(key) == value for key, value in row.overrides.items())
        if holds and len(row.overrides) >= most:
            best = name
            most = len(row.overrides)
    return best or "other"


def methods_json() -> list[dict[str, Any]]:
    """The table for machines."""
    return [{"name": name, **asdict(row)} for name, row in METHODS.items()]
