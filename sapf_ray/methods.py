"""Every method of the paper that is a setting of the same pipeline: one row of config overrides
each.

``sapf run --method NAME`` and ``sapf methods`` read this table. A row sets what makes the method;
model, data, budget, steps and learning rate stay the user's (each method wants its own learning
rate: design section 5).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table

from sapf_ray.errors import ConfigError


@dataclass(frozen=True)
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

METHODS: dict[str, Method] = {
    "dp-sapf": Method(
        "DP-SAPF, per-sample-norm score (ours)", "default", {"saliency.score": "per_sample_norm"}
    ),
    "dp-sapf-paper": Method("DP-SAPF, paper's score", "Table 5", _PAPER),
    "dp-lora": Method("DP-LoRA", "Tables 2, 5", _ALL),
    "dp-lora-no-middle": Method(
        "DP-LoRA w/o middle block", "Table 2", {"saliency.pool": "qkv_no_middle", **_ALL}
    ),
    "dp-ldm": Method(
        "DP-LDM: attention weights directly",
        "Table 5",
        {"saliency.pool": "qkvo", **_ALL, **_DIRECT},
    ),
    "dp-finetune": Method(
        "DP-Finetune: all U-Net weights", "Table 5", {**_ALL, "finetune.adapter": "full"}
    ),
    "dp-lora-cross-q": Method("DP-LoRA, cross-attention queries only", "Table 6", _CROSS_Q),
    "dp-ldm-cross-q": Method(
        "DP-LDM, cross-attention queries only", "Table 6", {**_CROSS_Q, **_DIRECT}
    ),
    "random": Method("Random selection", "Figure 4", {"saliency.score": "random"}),
    "noisy": Method("Noisy: unselected matrices random", "Figure 4", {"finetune.randomize": "qkv"}),
    "without-lora": Method("w/o LoRA: selected matrices directly", "Figure 4", _DIRECT),
    "layer-level": Method(
        "Layer-Level: whole attention layers", "Figure 4", {"saliency.granularity": "layer"}
    ),
    "all-param": Method(
        "All-Param: from every weight matrix", "Figure 4", {"saliency.pool": "all"}
    ),
    "snip": Method("SNIP: weight times gradient", "Table 15", {"saliency.score": "snip"}),
    "force": Method("FORCE: SNIP in five steps", "Table 15", {"saliency.score": "force"}),
    "synflow": Method("SynFlow: no data", "Table 15", {"saliency.score": "synflow"}),
    "exponential": Method(
        "Exponential mechanism", "Figure 6", {"saliency.mechanism": "exponential"}
    ),
    "ptr": Method("Propose-test-release", "Figure 6", _PTR),
    "pe": Method("PE: Private Evolution", "Table 5", _PE),
    "aug-pe": Method("Aug-PE: ranked parents survive", "Table 5", _AUG_PE),
    "public": Method("Public model without fine-tuning", "Table 11", {"finetune.steps": 0}),
    "lora-no-dp": Method(
        "LoRA without DP", "Table 2", {**_ALL, "privacy.non_private": True}, private=False
    ),
    "dp-sapf-no-dp": Method(
        "DP-SAPF without noise", "Table 8", {"privacy.non_private": True}, private=False
    ),
}


def find_method(name: str) -> Method:
    """The row of that name.

    Raises:
        ConfigError: No such row.
    """
    if name not in METHODS:
        raise ConfigError("--method", name, "must be one of " + ", ".join(METHODS))
    return METHODS[name]


def methods_json() -> list[dict[str, Any]]:
    """The table for machines."""
    return [{"name": name, **asdict(row)} for name, row in METHODS.items()]


def methods_table() -> Table:
    """The table for people, as printed by ``sapf methods``."""
    table = Table("method", "what", "in the paper")
    table.add_column("sets", overflow="fold")
    for name, row in METHODS.items():
        sets = "\n".join(f"{key}={value}" for key, value in row.overrides.items())
        table.add_row(name, row.title + ("" if row.private else " (NOT PRIVATE)"), row.source, sets)
    return table
