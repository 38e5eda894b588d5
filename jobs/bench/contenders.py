"""The table of contenders: group/name to a function that gets it ready and returns its step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from jobs.bench import selection, synthesis, training
from jobs.bench.models import Case
from jobs.bench.training import all_weights, ghost_gradients, lora_factors, lora_gradients

Setup = Callable[[Case], Callable[[], Any]]


def _gemm(case: Case) -> Callable[[], Any]:
    """Matrix products of the machine's favourite kind: the roof of everything else's rate."""
    side = 8192 if case.device == "cuda" else 1536
    a = torch.randn(side, side, device=case.device, dtype=getattr(torch, case.dtype))
    return lambda: a @ a


CONTENDERS: dict[str, Setup] = {
    "gemm": _gemm,
    "selection/ours": selection.ours,
    "selection/plain": selection.plain,
    "selection/opacus_hooks": selection.opacus_hooks,
    "selection/opacus_ghost": selection.opacus_ghost,
    "selection/functorch": selection.functorch,
    "selection/microbatch1": selection.microbatch1,
    "lora/ours": training.ours(lora_factors, lora_gradients),
    "full/ours": training.ours(all_weights, ghost_gradients),
    **{
        f"{group}/{name}": make(prepare)
        for group, prepare in (("lora", lora_factors), ("full", all_weights))
        for name, make in (
            ("nonprivate", training.nonprivate),
            ("opacus_hooks", training.opacus_hooks),
            ("opacus_ghost", training.opacus_ghost),
            ("functorch", training.functorch),
            ("microbatch1", training.microbatch1),
        )
    },
    "synthesis/ours": synthesis.ours,
    "synthesis/pipeline": synthesis.pipeline,
}
