"""Contenders of one optimizer step: LoRA factors of selected matrices, or every weight of the
U-Net.

Clipping at norm 1, noise multiplier 1, AdamW; a step is one logical batch, in micro-batches.
"""

from __future__ import annotations

import atexit
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from opacus import GradSampleModule
from opacus.grad_sample import GradSampleModuleFastGradientClipping
from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping
from opacus.utils.fast_gradient_clipping_utils import DPTensorFastGradientClipping
from torch import Tensor, nn

from jobs.bench.models import Case, Workload
from jobs.bench.selection import Step, vmap_gradients
from sapf_ray.finetune.adapter import add_lora, save_adapter
from sapf_ray.finetune.optimizer import Clipping, ReleaseOptimizer
from sapf_ray.grad_sample.ghost import GhostGradients
from sapf_ray.grad_sample.lora import LoraGradients
from sapf_ray.privacy.ledger import Ledger
from sapf_ray.privacy.planner import PrivacyPlan, StagePlan
from sapf_ray.privacy.release import Releaser

LEARNING_RATE = 1e-4
Prepare = Callable[[Workload], dict[str, nn.Parameter]]


class _Gradients(Protocol):
    def grid_step(self, clipping_norm: float) -> float: ...

    def clipped_units(
        self, losses: Tensor, clip: Callable[[Tensor], Tensor], *, grid: float
    ) -> list[Tensor]: ...


def lora_factors(work: Workload) -> dict[str, nn.Parameter]:
    """Factors on as many evenly spread matrices as a selection keeps."""
    factors = add_lora(work.unet, work.selected(), rank=work.case.rank, seed=0)
    work.unet.to(work.case.device)
    return factors


def all_weights(work: Workload) -> dict[str, nn.Parameter]:
    work.unet.requires_grad_(True)
    return dict(work.unet.named_parameters())


def _adamw(parameters: dict[str, nn.Parameter]) -> torch.optim.AdamW:
    return torch.optim.AdamW(parameters.values(), lr=LEARNING_RATE)


def nonprivate(prepare: Prepare) -> Callable[[Case], Step]:
    """The floor: peft's or diffusers' own forward, mean loss, AdamW."""

    def setup(case: Case) -> Step:
        work = Workload(case)
        optimizer = _adamw(prepare(work))

        def step() -> None:
            for records in work.micro_batches():
                (work.losses(records).sum() / case.n).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            work.step += 1

        return step

    return setup


def _join_process_group() -> None:
    if not dist.is_initialized():
        directory = tempfile.TemporaryDirectory()
        atexit.register(directory.cleanup)
        dist.init_process_group(
            "gloo", init_method=f"file://{directory.name}/rendezvous", rank=0, world_size=1
        )


CLIPPING = Clipping(norm=1.0, mode="automatic", gamma=1e-3)


def _releaser(work: Workload) -> Releaser:
    """Pays its steps in a ledger that goes with the process."""
    stage = StagePlan(noise_multiplier=1.0, sample_rate=1.0, count=10**6, share=1.0)
    plan = PrivacyPlan(
        epsilon=1e9,
        delta=1e-6,
        accountant="rdp",
        n_records=work.case.n,
        batch_size=work.case.n,
        sample_rate=1.0,
        steps=stage.count,
        selection=None,
        finetune=stage,
        composed_epsilon=1e9,
    )
    directory = tempfile.TemporaryDirectory()
    atexit.register(directory.cleanup)
    ledger = Ledger.create(Path(directory.name) / "ledger.jsonl", plan)
    return Releaser(key=work.key.bind("benchmark"), ledger=ledger, plan=plan)


def ours(
    prepare: Prepare, gradients: Callable[[nn.Module, dict[str, nn.Parameter]], _Gradients]
) -> Callable[[Case], Step]:
    """The body of ``finetune.loop.train``'s step, the ledger's line included."""

    def setup(case: Case) -> Step:
        work = Workload(case)
        parameters = prepare(work)
        source = gradients(work.unet, parameters)
        grid = source.grid_step(CLIPPING.norm)
        _join_process_group()
        optimizer = ReleaseOptimizer(
            _adamw(parameters),
            clipping=CLIPPING,
            grid=grid,
            expected_batch_size=case.n,
            releaser=_releaser(work),
        )

        def step() -> None:
            for records in work.micro_batches():
                optimizer.accumulate(
                    source.clipped_units(work.losses(records), CLIPPING, grid=grid)
                )
            optimizer.release_step()
            work.step += 1

        return step

    return setup


def lora_gradients(model: nn.Module, parameters: dict[str, nn.Parameter]) -> _Gradients:
    return LoraGradients(model, parameters.values())


def ghost_gradients(model: nn.Module, parameters: dict[str, nn.Parameter]) -> _Gradients:
    return GhostGradients(model, parameters)


def _dp_step(work: Workload, optimizer: Any, *, backward: Callable[[np.ndarray], None]) -> Step:
    """Opacus's way to spread a logical batch over micro-batches."""

    def step() -> None:
        batches = list(work.micro_batches())
        for i, records in enumerate(batches):
            backward(records)
            optimizer.signal_skip_step(i + 1 < len(batches))
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        work.step += 1

    return step


def _opacus_options(work: Workload) -> dict[str, Any]:
    return {
        "noise_multiplier": 1.0,
        "max_grad_norm": 1.0,
        "expected_batch_size": work.case.n,
        "loss_reduction": "mean",
    }


def opacus_hooks(prepare: Prepare) -> Callable[[Case], Step]:
    """``GradSampleModule`` and ``DPOptimizer`` as shipped."""

    def setup(case: Case) -> Step:
        work = Workload(case)
        parameters = prepare(work)
        module = GradSampleModule(work.unet.train(), strict=False)  # hooks sleep in eval mode
        optimizer = DPOptimizer(_adamw(parameters), **_opacus_options(work))
        return _dp_step(
            work, optimizer, backward=lambda records: work.losses(records, module).mean().backward()
        )

    return setup


def opacus_ghost(prepare: Prepare) -> Callable[[Case], Step]:
    """Opacus's fast gradient clipping with ghost norms: two backward passes."""

    def setup(case: Case) -> Step:
        work = Workload(case)
        parameters = prepare(work)
        module = GradSampleModuleFastGradientClipping(
            work.unet.train(), strict=False, max_grad_norm=1.0, use_ghost_clipping=True
        )
        optimizer = DPOptimizerFastGradientClipping(_adamw(parameters), **_opacus_options(work))

        def backward(records: np.ndarray) -> None:
            DPTensorFastGradientClipping(
                module, optimizer, work.losses(records, module), "mean"
            ).backward()

        return _dp_step(work, optimizer, backward=backward)

    return setup


def functorch(prepare: Prepare) -> Callable[[Case], Step]:
    """``vmap(grad)``, then Opacus's optimizer."""

    def setup(case: Case) -> Step:
        work = Workload(case)
        parameters = prepare(work)
        optimizer = DPOptimizer(_adamw(parameters), **_opacus_options(work))

        def backward(records: np.ndarray) -> None:
            gradients = vmap_gradients(
                work, {name: p.detach() for name, p in parameters.items()}, records=records
            )
            for name, p in parameters.items():
                p.grad_sample = gradients[name]  # type: ignore[attr-defined]

        return _dp_step(work, optimizer, backward=backward)

    return setup


def microbatch1(prepare: Prepare) -> Callable[[Case], Step]:
    """One record after another, then Opacus's optimizer; one gradient at a time in memory."""

    def setup(case: Case) -> Step:
        work = Workload(case)
        parameters = prepare(work)
        optimizer = DPOptimizer(_adamw(parameters), **_opacus_options(work))

        def step() -> None:
            for record in range(case.n):
                gradients = torch.autograd.grad(
                    work.losses(np.array([record])).sum(), list(parameters.values())
                )
                for p, gradient in zip(parameters.values(), gradients, strict=True):
                    p.grad_sample = gradient[None]  # type: ignore[attr-defined]
                optimizer.signal_skip_step(record + 1 < case.n)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            work.step += 1

        return step

    return setup


def save_random_adapter(case: Case, directory: Path) -> str:
    """An adapter whose update is not zero, for synthesis."""
    work = Workload(case)
    factors = lora_factors(work)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in factors.items():
            if "lora_B" in name:
                p.copy_(0.02 * torch.randn(p.shape, generator=generator))
    save_adapter(work.unet, directory)
    return str(directory)
