"""Every method of the paper that is a setting of the same pipeline: one row of config overrides each.

``sapf run --method NAME`` and ``sapf methods`` read this table. A row sets what makes the method; model, data,
budget, steps and learning rate stay the user's (each method wants its own learning rate: design section 5).
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

METHODS: dict[str, Method] = {
    "dp-sapf": Method("DP-SAPF, per-sample-norm score (ours)", "default", {"saliency.score": "per_sample_norm"}),
    "dp-sapf-paper": Method("DP-SAPF, paper's score", "Table 5", _PAPER),
    "dp-lora": Method("DP-LoRA", "Tables 2, 5", _ALL),
    "dp-lora-no-middle": Method("DP-LoRA w/o middle block", "Table 2", {"saliency.pool": "qkv_no_middle", **_ALL}),
    "dp-ldm": Method("DP-LDM: attention weights directly", "Table 5", {"saliency.pool": "qkvo", **_ALL, **_DIRECT}),
    "dp-finetune": Method("DP-Finetune: all U-Net weights", "Table 5", {**_ALL, "finetune.adapter": "full"}),
    "dp-lora-cross-q": Method("DP-LoRA, cross-attention queries only", "Table 6", _CROSS_Q),
    "dp-ldm-cross-q": Method("DP-LDM, cross-attention queries only", "Table 6", {**_CROSS_Q, **_DIRECT}),
    "random": Method("Random selection", "Figure 4", {"saliency.score": "random"}),
    "without-lora": Method("w/o LoRA: selected matrices directly", "Figure 4", _DIRECT),
    "public": Method("Public model without fine-tuning", "Table 11", {"finetune.steps": 0}),
    "lora-no-dp": Method("LoRA without DP", "Table 2", {**_ALL, "privacy.non_private": True}, private=False),
    "dp-sapf-no-dp": Method("DP-SAPF without noise", "Table 8", {"privacy.non_private": True}, private=False),
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
