"""Contenders of the selection pass: per-sample gradient norms of the pool, clipped and summed.

All but ``plain`` return the same (K,) vector, so that a run also shows that they compute the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from opacus import GradSampleModule
from opacus.grad_sample import GradSampleModuleFastGradientClipping
from torch import Tensor

from jobs.bench.models import Case, Workload
from sapf_ray.config import SaliencyConfig
from sapf_ray.grad_sample.capture import PoolCapture
from sapf_ray.models.conditions import Conditions
from sapf_ray.models.denoising import Draws, per_record_loss
from sapf_ray.privacy.fixed_point import ExactSum
from sapf_ray.saliency.scores import SCORES
from sapf_ray.saliency.selection import clip_of

Step = Callable[[], Any]
CONFIG = SaliencyConfig()


def ours(case: Case) -> Step:
    """The body of ``saliency.selection.score_records``."""
    work = Workload(case)
    pool = work.pool()
    score = SCORES[CONFIG.score]

    def step() -> np.ndarray:
        total = ExactSum.zeros(score.shapes(pool), CONFIG.clipping_norm)
        for records in work.micro_batches():
            with PoolCapture(pool, keep=score.keep_gradients) as capture:
                work.losses(records).sum().backward()
            assert score.contribution is not None
            total = total + score.contribution(capture, clip_of(CONFIG))
        return total.values()[0].numpy()

    return step


def plain(case: Case) -> Step:
    """Non-private forward and backward pass with the pool's weights as leaves."""
    work = Workload(case)
    weights = _pool_weights(work)

    def step() -> None:
        for records in work.micro_batches():
            work.losses(records).mean().backward()
            for weight in weights.values():
                weight.grad = None

    return step


def _pool_weights(work: Workload) -> dict[str, Tensor]:
    weights: dict[str, Tensor] = {
        f"{name}.weight": layer.weight for name, layer in work.pool().items()
    }
    for weight in weights.values():
        weight.requires_grad_(True)
    return weights


def _by_norms(work: Workload, norms: Callable[[np.ndarray], Tensor]) -> Step:
    """A step out of a function from records to (n, K) norms."""

    def step() -> np.ndarray:
        total = torch.zeros(len(work.pool()))
        for records in work.micro_batches():
            v = norms(records).float()
            total += clip_of(CONFIG).factors(v.norm(dim=1)) @ v
        return total.numpy()

    return step


def microbatch1(case: Case) -> Step:
    """One record after another, gradients by autograd."""
    work = Workload(case)
    weights = _pool_weights(work)

    def norms(records: np.ndarray) -> Tensor:
        rows = []
        for record in records:
            gradients = torch.autograd.grad(
                work.losses(np.array([record])).sum(), list(weights.values())
            )
            rows.append(torch.stack([g.norm() for g in gradients]))
        return torch.stack(rows)

    return _by_norms(work, norms)


def opacus_hooks(case: Case) -> Step:
    """``GradSampleModule`` materialises every record's gradients; norms are taken of them."""
    work = Workload(case)
    weights = _pool_weights(work)
    module = GradSampleModule(
        work.unet.train(), loss_reduction="sum", strict=False
    )  # hooks sleep in eval mode

    def norms(records: np.ndarray) -> Tensor:
        work.losses(records, module).sum().backward()
        rows = [weight.grad_sample.flatten(1).norm(dim=1) for weight in weights.values()]  # type: ignore[attr-defined]
        module.zero_grad(set_to_none=True)
        return torch.stack(rows, dim=1)

    return _by_norms(work, norms)


def opacus_ghost(case: Case) -> Step:
    """Opacus's ghost norms; its hooks leave them on the parameters."""
    work = Workload(case)
    weights = _pool_weights(work)
    module = GradSampleModuleFastGradientClipping(
        work.unet.train(),
        loss_reduction="sum",
        strict=False,
        use_ghost_clipping=True,
    )

    def norms(records: np.ndarray) -> Tensor:
        work.losses(records, module).sum().backward()
        rows = [weight._norm_sample.flatten() for weight in weights.values()]  # type: ignore[attr-defined]
        module.zero_grad(set_to_none=True)
        return torch.stack(rows, dim=1)

    return _by_norms(work, norms)


def functorch(case: Case) -> Step:
    """``vmap(grad)`` over a functional call of the denoiser."""
    work = Workload(case)
    weights = {name: weight.detach() for name, weight in _pool_weights(work).items()}
    work.unet.requires_grad_(False)

    def norms(records: np.ndarray) -> Tensor:
        gradients = vmap_gradients(work, weights, records=records)
        return torch.stack([gradients[name].flatten(1).norm(dim=1) for name in weights], dim=1)

    return _by_norms(work, norms)


def vmap_gradients(
    work: Workload,
    weights: dict[str, Tensor],
    *,
    records: np.ndarray,
) -> dict[str, Tensor]:
    """Name to (n, *shape) per-sample gradients of the named parameters."""
    moments, conditions, draws = work.inputs(records)
    assert conditions.states is not None
    # moves the scheduler's table to the device
    nothing = torch.zeros(1, 1)
    work.process.noisy(nothing, nothing, draws.timesteps[:1, 0])

    def loss(weights: dict[str, Tensor], record: tuple[Tensor, ...]) -> Tensor:
        def denoiser(*inputs: Any, **options: Any) -> Any:
            return torch.func.functional_call(work.unet, weights, inputs, options)

        moments, states, posterior, noise, timesteps = (x[None] for x in record)
        return per_record_loss(
            denoiser,  # type: ignore[arg-type]
            work.process,
            moments=moments,
            scale=work.scale,
            conditions=Conditions(states=states),
            draws=Draws(
                posterior=posterior,
                noise=noise,
                timesteps=timesteps,
            ),
        ).sum()

    inputs = (moments, conditions.states, draws.posterior, draws.noise, draws.timesteps)
    on_device = tuple(x.to(work.case.device) for x in inputs)
    per_record = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0), randomness="different")
    return per_record(weights, on_device)
