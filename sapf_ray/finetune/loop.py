"""The worker's loop: Poisson batch -> per-sample gradients -> clip -> sum -> noise -> step.

``train`` runs in any process that has a torch process group; Ray Train is one caller, the
benchmark's bare process another. It reports nothing that depends on the data outside the mechanism:
no losses, no norms, no realised batch sizes (design rule 6).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sapf_ray.config import FinetuneConfig, ModelConfig
from sapf_ray.errors import SapfError, reason
from sapf_ray.finetune.adapter import (
    SampleGradients,
    add_adapter,
    load_factors,
    sample_gradients,
    save_weights,
)
from sapf_ray.finetune.micro_batch import (
    MICRO_BATCH_FILE,
    MicroBatches,
    arrange,
    find_micro_batch,
    fit_threads,
    keep,
    kept,
)
from sapf_ray.finetune.objective import Objective
from sapf_ray.finetune.optimizer import Clipping, ReleaseOptimizer, release_name
from sapf_ray.grad_sample.backprop_scale import backprop_scale
from sapf_ray.grad_sample.joint import JointGradients
from sapf_ray.grad_sample.lora import LoraGradients
from sapf_ray.latents import LatentCache
from sapf_ray.models.class_tokens import TOKENS, ClassTokens, save_class_tokens
from sapf_ray.models.device import conv_format, fix_rounding
from sapf_ray.privacy.canaries import Canaries
from sapf_ray.privacy.keyed_rng import NoiseKey
from sapf_ray.privacy.ledger import Ledger
from sapf_ray.privacy.planner import PrivacyPlan
from sapf_ray.privacy.release import Releaser
from sapf_ray.runs import runlog
from sapf_ray.stages import Stage

Gradients = SampleGradients | JointGradients


@dataclass(frozen=True, kw_only=True)
class FinetuneJob:
    """Everything a worker needs; sensitive values are reached through ``cache`` and ``key`` only.

    Attributes:
        model: The public model.
        matrices: Dotted names of the matrices to train.
        cache: Latents of the training images.
        plan: What may be released.
        config: Settings of the stage.
        key: The run's bound key.
        ledger: Path of the run's ledger; what is found about micro-batches is kept beside it.
        seed: Seed of the factors' first values.
        class_names: One per class, for the class tokens' file.
        class_tokens: Whether class tokens are trained with the factors.
        token_weight: w of the class tokens.
        token_learning_rate: Step size of their offsets; 0 takes the factors'.
        device: Torch device string.
        canaries: Join every sum, in a run that is audited.
        n_units: See :class:`sapf_ray.privacy.release.Releaser`.
    """

    model: ModelConfig
    matrices: list[str]
    cache: LatentCache
    plan: PrivacyPlan
    config: FinetuneConfig
    key: NoiseKey
    ledger: str
    seed: int
    class_names: tuple[str, ...] = ()
    class_tokens: bool = False
    token_weight: float = 1.0
    token_learning_rate: float = 0.0
    device: str = "cpu"
    canaries: Canaries | None = None
    n_units: int | None = None

    def releaser(self) -> Releaser:
        """The door to the run's releases."""
        return Releaser(
            key=self.key,
            ledger=Ledger.open(self.ledger),
            plan=self.plan,
            on_change=runlog.release_changed,
            canaries=self.canaries,
            n_units=self.n_units,
        )


@dataclass(frozen=True, kw_only=True)
class TrainState:
    """What a checkpoint holds; all of it is post-processing of noisy releases.

    Attributes:
        step: Number of steps taken.
        factors: Trained parameters by name.
        average: Their moving averages.
        optimizer: State of the wrapped optimizer.
        noise_id: Under which the ledger has the last step; rank 0 alone knows it.
    """

    step: int
    factors: dict[str, Tensor]
    average: dict[str, Tensor]
    optimizer: dict
    noise_id: str

    def save(self, path: Path) -> None:
        """Writes what :meth:`load` reads."""
        torch.save(vars(self), path)

    @classmethod
    def load(cls, content: IO[bytes], name: str) -> TrainState:
        """Reads what :meth:`save` wrote; ``name`` is for the error.

        Raises:
            SapfError: Damaged, or of another version.
        """
        try:
            return cls(**torch.load(content, map_location="cpu", weights_only=True))
        except Exception as error:
            raise SapfError(f"{name}: damaged checkpoint ({reason(error)})") from error


def ema_decay(decay: float, step: int) -> float:
    """Warm-up of the moving average: early iterates are forgotten fast."""
    return min(decay, (1 + step) / (10 + step))


def parameters_digest(factors: dict[str, nn.Parameter]) -> bytes:
    """SHA-256 over the factors' bytes: equal on every rank, or training is broken."""
    digest = hashlib.sha256()
    for value in factors.values():
        digest.update(value.detach().cpu().numpy().tobytes())
    return digest.digest()


def assert_ranks_agree(factors: dict[str, nn.Parameter]) -> None:
    """Raises if any rank's factors differ from rank 0's."""
    digests: list[bytes | None] = [None] * dist.get_world_size()
    dist.all_gather_object(digests, parameters_digest(factors))
    if len(set(digests)) != 1:
        raise RuntimeError(
            "ranks disagree on the adapter: the noisy gradient was not the same everywhere"
        )


def train(
    job: FinetuneJob,
    resume: TrainState | None = None,
    on_checkpoint: Callable[[TrainState], None] | None = None,
    *,
    objective: Objective | None = None,
) -> TrainState:
    """Runs the remaining steps and returns the final state (identical on every rank).

    Args:
        job: The work; ``job.plan.finetune`` fixes noise, rate and steps.
        resume: State of an earlier checkpoint.
        on_checkpoint: Called on every rank each ``checkpoint_every`` steps and after the last.
        objective: The model, which training changes; loaded here by default.

    Raises:
        BudgetError: On rank 0, before the step that would pass the planned epsilon.
    """
    config = job.config
    rank = dist.get_rank()
    fix_rounding()
    objective = objective or Objective.load(job)
    factors = add_adapter(objective.denoiser, job.matrices, config=config, seed=job.seed)
    if job.class_tokens:
        objective.tokens = ClassTokens.add_to(
            objective.denoiser, job.cache.all_conditions(), weight=job.token_weight
        )
    lie = conv_format(objective.denoiser, job.device)
    objective.denoiser.to(job.device, memory_format=lie)  # type: ignore[call-overload]
    gradients: Gradients = sample_gradients(
        objective.denoiser,
        factors,
        config=config,
        scale=backprop_scale(objective.denoiser.dtype, job.cache.latent_shape),  # type: ignore[arg-type]
    )
    if objective.tokens is not None:
        assert isinstance(gradients, LoraGradients), "class tokens are trained with LoRA factors"
        grouped = job.cache.groups is not None
        rows = config.draws_per_record if grouped else 1
        gradients = JointGradients(gradients, objective.tokens, rows_per_unit=rows)
        factors[TOKENS] = objective.tokens.values
    micro_batches = _micro_batches(objective, gradients, factors=factors)
    releaser = job.releaser()
    clipping = Clipping.of(config)
    grid = gradients.grid_step(clipping.norm)
    optimizer = ReleaseOptimizer(
        torch.optim.AdamW(
            _groups(job, factors), lr=config.learning_rate, weight_decay=config.weight_decay
        ),
        clipping=clipping,
        grid=grid,
        expected_batch_size=config.batch_size,
        releaser=releaser,
    )
    average = {name: p.detach().clone() for name, p in factors.items()}
    if resume is not None:
        load_factors(objective.denoiser, resume.factors)
        average = {name: value.to(job.device) for name, value in resume.average.items()}
        optimizer.optimizer.load_state_dict(resume.optimizer)
        optimizer.next_step = resume.step

    def state() -> TrainState:
        return TrainState(
            step=optimizer.next_step,
            factors={n: p.detach().cpu().clone() for n, p in factors.items()},
            average={n: a.cpu().clone() for n, a in average.items()},
            optimizer=optimizer.optimizer.state_dict(),
            noise_id=releaser.ledger.events()[-1].noise_id if rank == 0 else "",
        )

    for step in range(optimizer.next_step, config.steps):
        # every rank draws the same Poisson sample of the whole data set and takes its own part
        sampled = releaser.sample(release_name(step), stage=Stage.FINETUNE)
        for records, n in micro_batches.split(sampled, rank, world=dist.get_world_size()):
            losses = objective.losses(records, step)[:n]
            optimizer.accumulate(gradients.clipped_units(losses, clipping, grid=grid))
        optimizer.release_step()
        decay = ema_decay(config.ema_decay, step)
        with torch.no_grad():
            for name, p in factors.items():
                average[name].lerp_(p, 1 - decay)
        last = step + 1 == config.steps
        if on_checkpoint and (last or (step + 1) % config.checkpoint_every == 0):
            assert_ranks_agree(factors)
            on_checkpoint(state())
    return state()


def _groups(job: FinetuneJob, factors: dict[str, nn.Parameter]) -> list[dict[str, Any]]:
    """Parameters with their step sizes, in the order of ``factors``."""
    rate = (job.token_learning_rate or job.config.learning_rate) / job.token_weight
    of_tokens = [p for name, p in factors.items() if name == TOKENS]
    others = [p for name, p in factors.items() if name != TOKENS]
    return [{"params": others}, *({"params": [p], "lr": rate} for p in of_tokens)]


def _micro_batches(
    objective: Objective, gradients: Gradients, *, factors: dict[str, nn.Parameter]
) -> MicroBatches:
    """How this run's steps are dealt, found by the first start and kept in the run directory."""
    job = objective.job
    path = Path(job.ledger).with_name(MICRO_BATCH_FILE)
    first = dist.get_rank() == 0
    known = _from_rank_zero(kept(path, job.config.micro_batch_size) if first else None)
    size = None if known else job.config.micro_batch_size or _common_size(objective, gradients)

    def bits(n: int) -> bytes:
        return gradients.probe(objective.random_losses(n))

    with _random_values(factors):
        if size is not None:
            found = arrange(size, bits, per_record=gradients.per_record) if first else None
            known = _from_rank_zero(found)
        fit_threads(known, bits)
    if size is not None and first:
        keep(path, known)
    return known


def _from_rank_zero(value: Any) -> Any:
    """Rank 0's value, on every rank."""
    values = [value]
    dist.broadcast_object_list(values)
    return values[0]


def _common_size(objective: Objective, gradients: Gradients) -> int:
    """The smallest of the ranks' best micro-batch sizes."""
    job = objective.job
    clipping = Clipping.of(job.config)
    grid = gradients.grid_step(clipping.norm)
    best = find_micro_batch(
        lambda n: gradients.clipped_units(objective.random_losses(n), clipping, grid=grid),
        limit=min(1024, max(1, job.plan.batch_size // dist.get_world_size())),
        device=job.device,
    )
    size = torch.tensor(best, device=job.device)
    dist.all_reduce(size, op=dist.ReduceOp.MIN)
    return int(size)


@contextmanager
@torch.no_grad()
def _random_values(factors: dict[str, nn.Parameter]) -> Iterator[None]:
    """Factors away from their start, for LoRA's B = 0 hides the gradient of A."""
    before = [p.detach().clone() for p in factors.values()]
    generator = torch.Generator().manual_seed(0)
    for p in factors.values():
        p.add_(torch.randn(p.shape, generator=generator).to(p.device), alpha=0.01)
    try:
        with torch.enable_grad():
            yield
    finally:
        for p, value in zip(factors.values(), before, strict=True):
            p.copy_(value)


def write_adapter(
    job: FinetuneJob, state: TrainState, *, denoiser: nn.Module, directory: Path
) -> None:
    """Writes what the stage releases, out of its last state.

    Args:
        job: The work.
        state: From :func:`train`.
        denoiser: As it left it.
        directory: The adapter's; replaced as a whole.
    """
    values = dict(state.average)
    tokens = values.pop(TOKENS, None)

    def add(folder: Path) -> None:
        if tokens is not None:
            save_class_tokens(
                folder,
                job.token_weight * tokens,
                conditions=job.cache.all_conditions(),
                class_names=job.class_names,
            )

    save_weights(denoiser, directory, values=values, config=job.config, beside=add)
