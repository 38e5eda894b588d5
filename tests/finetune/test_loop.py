"""The training loop against an oracle, across micro-batches and workers, and its resume."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from scipy import stats

from sapf_ray.config import FinetuneConfig, ModelConfig, PrivacyConfig, RunConfig, SaliencyConfig
from sapf_ray.finetune.adapter import add_adapter, add_lora, load_adapter, save_adapter
from sapf_ray.finetune.loop import FinetuneJob, TrainState, train, write_adapter
from sapf_ray.finetune.optimizer import ReleaseOptimizer
from sapf_ray.latents import LatentCache
from sapf_ray.models.class_tokens import CLASS_TOKENS, TOKENS
from sapf_ray.models.conditioning import denoiser_of
from sapf_ray.models.denoising import draw, per_record_loss
from sapf_ray.models.loading import load_pipeline
from sapf_ray.models.pool import candidate_pool
from sapf_ray.models.processes import forward_process
from sapf_ray.models.vae import LatentScale
from sapf_ray.privacy.clipping import clip_factors
from sapf_ray.privacy.fixed_point import ExactSum, grid_step
from sapf_ray.privacy.keyed_rng import NoiseKey
from sapf_ray.privacy.ledger import Ledger
from sapf_ray.privacy.planner import make_plan
from tests.finetune.workers import run_ranks
from tests.tiny import save_latents

N, STEPS = 24, 4


@pytest.fixture(scope="module")
def cache(tmp_path_factory, tiny_pipeline) -> LatentCache:
    return save_latents(tmp_path_factory.mktemp("latents"), tiny_pipeline, N)


def make_job(
    tiny_pipeline: Path,
    cache: LatentCache,
    directory: Path,
    class_tokens: bool = False,
    **finetune,
) -> FinetuneJob:
    config = RunConfig(
        privacy=PrivacyConfig(epsilon=8.0, accountant="rdp"),
        saliency=SaliencyConfig(noise_multiplier=30.0),
        finetune=FinetuneConfig(
            **{
                "steps": STEPS,
                "batch_size": 8,
                "micro_batch_size": 3,
                "learning_rate": 1e-2,
                "checkpoint_every": 2,
                **finetune,
            }
        ),
    )
    plan = make_plan(config, N)
    directory.mkdir(parents=True, exist_ok=True)
    ledger = directory / "ledger.jsonl"
    if not ledger.exists():
        Ledger.create(ledger, plan)
    matrices = list(candidate_pool(denoiser_of(load_pipeline(str(tiny_pipeline)))))[::4]
    return FinetuneJob(
        model=ModelConfig(path=str(tiny_pipeline)),
        matrices=matrices,
        cache=cache,
        plan=plan,
        config=config.finetune,
        key=NoiseKey.create(3).bind("run"),
        ledger=str(ledger),
        seed=0,
        class_names=("a", "b"),
        class_tokens=class_tokens,
    )


def run_and_keep(job: FinetuneJob, resume: TrainState | None = None, stop_after: int | None = None):
    kept: list[TrainState] = []

    def checkpoint(state: TrainState) -> None:
        kept.append(state)
        if stop_after is not None and state.step >= stop_after:
            raise InterruptedError

    try:
        return train(job, resume, checkpoint), kept
    except InterruptedError:
        return None, kept


def same(a: TrainState, b: TrainState) -> bool:
    """Whether both have the same factors and averages to the last bit."""
    return all(torch.equal(a.factors[n], b.factors[n]) for n in a.factors) and all(
        torch.equal(a.average[n], b.average[n]) for n in a.average
    )


def oracle_sum(job: FinetuneJob, pipe, records: np.ndarray) -> torch.Tensor:
    """Each record's own gradient by autograd through peft's forward, clipped, and added up."""
    config = job.config
    trained = list(add_lora(pipe.unet, job.matrices, rank=config.lora_rank, seed=0).values())
    offsets = torch.zeros(job.cache.all_conditions().states.shape, requires_grad=True)
    if job.class_tokens:
        trained.append(offsets)
    total = torch.zeros(sum(p.numel() for p in trained), dtype=torch.float64)
    for record in records:
        one = np.array([record])
        moments, conditions = job.cache.read(one)
        states = conditions.states + offsets[job.cache.labels(one)]
        draws = draw(
            job.key,
            "finetune/loss",
            0,
            one,
            k=config.draws_per_record,
            latent_shape=(4, 4, 4),
            process=forward_process(pipe),
            part=(0.2, 0.8),
        )
        loss = per_record_loss(
            pipe.unet,
            forward_process(pipe),
            moments=moments,
            scale=LatentScale.of(pipe.vae),
            conditions=dataclasses.replace(conditions, states=states),
            draws=draws,
        )
        grads = torch.autograd.grad(loss.sum(), trained)
        flat = torch.cat([g.flatten() for g in grads]).double()
        factor = clip_factors(
            flat.norm()[None], 0.05, mode=config.clipping, gamma=config.clipping_gamma
        )
        total += factor.double() * flat
    return total


@pytest.mark.parametrize(
    "clipping,draws,class_tokens",
    [
        ("automatic", 1, False),
        ("flat", 1, False),
        ("automatic", 2, True),
        ("flat", 2, False),
    ],
)
def test_first_step_is_the_oracles(tiny_pipeline, cache, tmp_path, clipping, draws, class_tokens):
    """Clip each record's own gradient, sum, add the keyed noise, divide by B, one AdamW step."""
    job = make_job(
        tiny_pipeline,
        cache,
        tmp_path / "job",
        steps=1,
        clipping=clipping,
        clipping_norm=0.05,
        draws_per_record=draws,
        timestep_start=0.2,
        timestep_end=0.8,
        class_tokens=class_tokens,
    )
    ((state, noisy),) = run_ranks(1, tmp_path / "r", train_and_keep_release, job)
    releaser = job.releaser()
    sampled = releaser.sample("finetune/step/0", stage="finetune")
    assert 0 < len(sampled) < N
    total = oracle_sum(job, load_pipeline(str(tiny_pipeline)), sampled)
    torch.testing.assert_close(noisy["sum"], total, rtol=1e-3, atol=1e-5)
    exact = ExactSum(units=[noisy["units"]], step=grid_step(0.05), sensitivity=0.05)
    (expected,) = releaser.gaussian("finetune/step/0", exact, stage="finetune")
    assert releaser.ledger.events()[-1].replay
    pipe = load_pipeline(str(tiny_pipeline))
    factors = add_lora(pipe.unet, job.matrices, rank=job.config.lora_rank, seed=0)
    if class_tokens:
        factors[TOKENS] = torch.nn.Parameter(torch.zeros(job.cache.all_conditions().states.shape))
    optimizer = torch.optim.AdamW(factors.values(), lr=1e-2, weight_decay=job.config.weight_decay)
    parts = expected.float().split([p.numel() for p in factors.values()])
    for p, value in zip(factors.values(), parts, strict=True):
        p.grad = value.view_as(p) / job.config.batch_size
    optimizer.step()
    for name, p in factors.items():
        torch.testing.assert_close(state.factors[name], p.detach(), rtol=1e-5, atol=1e-7)


def train_and_keep_release(job: FinetuneJob) -> tuple[TrainState, dict[str, torch.Tensor]]:
    """Trains one step, and what went through the door."""
    seen = {}

    class Watched(ReleaseOptimizer):
        def release(self, total: ExactSum) -> list[torch.Tensor]:
            seen["units"] = total.units[0].clone()
            seen["sum"] = total.values()[0]
            return super().release(total)

    with mock.patch("sapf_ray.finetune.loop.ReleaseOptimizer", Watched):
        return train(job), seen


@pytest.mark.parametrize("adapter", ["lora", "lora with class tokens", "direct"])
def test_any_number_of_workers_gives_the_same_adapter_to_the_last_bit(
    tiny_pipeline, cache, tmp_path, adapter
):
    kind = {"adapter": adapter.split()[0], "class_tokens": "tokens" in adapter}
    states = []
    for world in (1, 2, 3):
        job = make_job(tiny_pipeline, cache, tmp_path / f"job{world}", **kind)
        ranks = run_ranks(world, tmp_path / f"r{world}", train, job)
        assert all(same(ranks[0], other) for other in ranks[1:])
        states.append(ranks[0])
    assert same(states[0], states[1])
    assert same(states[0], states[2])


def test_another_number_of_workers_replays_every_step(tiny_pipeline, cache, tmp_path):
    """Training again from the start, by other workers: nothing is charged, nothing differs."""
    job = make_job(tiny_pipeline, cache, tmp_path / "job")
    (one,) = run_ranks(1, tmp_path / "one", train, job)
    three = run_ranks(3, tmp_path / "three", train, job)
    assert same(one, three[0])
    events = job.releaser().ledger.events()
    assert [event.replay for event in events] == [False] * STEPS + [True] * STEPS


def test_another_micro_batch_is_equal_or_seen_and_charged(tiny_pipeline, cache, tmp_path):
    """Kernels of another shape may round otherwise; then it is another release."""
    job = make_job(tiny_pipeline, cache, tmp_path / "job")
    (one,) = run_ranks(1, tmp_path / "one", train, job)
    other = dataclasses.replace(job, config=dataclasses.replace(job.config, micro_batch_size=64))
    try:
        (large,) = run_ranks(1, tmp_path / "large", train, other)
        assert same(one, large)
    except Exception as error:  # torch wraps what a rank raised
        assert "BudgetError" in str(error) and "finetune/step/0 was paid with another sum" in str(
            error
        )
    charged = [event for event in job.releaser().ledger.events() if not event.replay]
    assert len(charged) == STEPS


def test_steps_without_any_record_are_taken_by_every_rank(tiny_pipeline, cache, tmp_path):
    """Expected batch 1 of 24 on 3 ranks: most local batches are empty, many global ones too."""
    job = make_job(tiny_pipeline, cache, tmp_path / "job", batch_size=1, steps=6)
    ranks = run_ranks(3, tmp_path / "r", train, job)
    assert all(state.step == 6 for state in ranks)
    assert all(same(ranks[0], state) for state in ranks[1:])
    assert len(Ledger.open(job.ledger).events()) == 6


def test_resume_replays_the_same_releases_and_costs_nothing(tiny_pipeline, cache, tmp_path):
    job = make_job(tiny_pipeline, cache, tmp_path / "job", class_tokens=True)
    ((whole, _),) = run_ranks(1, tmp_path / "whole", run_and_keep, job)
    spent = Ledger.open(job.ledger).epsilon_spent()
    crashed = dataclasses.replace(job, ledger=str(tmp_path / "crashed" / "ledger.jsonl"))
    (tmp_path / "crashed").mkdir()
    Ledger.create(tmp_path / "crashed" / "ledger.jsonl", job.plan)
    ((_, kept),) = run_ranks(1, tmp_path / "part", run_and_keep, crashed, None, 2)
    # a crash between checkpoints: step 2 was released already, then the run starts again from step
    # 2's checkpoint
    paid = Ledger.open(job.ledger).events()[2]
    Ledger.open(crashed.ledger).record(paid.release, paid.event, paid.noise_id, paid.stage)
    ((resumed, _),) = run_ranks(1, tmp_path / "rest", run_and_keep, crashed, kept[-1])
    assert same(whole, resumed)
    assert whole.factors[TOKENS].abs().max() > 0
    events = Ledger.open(crashed.ledger).events()
    assert [e.release for e in events if e.replay] == ["finetune/step/2"]
    assert Ledger.open(crashed.ledger).epsilon_spent() == pytest.approx(spent)


def test_adapter_loads_in_a_stock_pipeline_and_changes_its_output(tiny_pipeline, cache, tmp_path):
    from diffusers import StableDiffusionPipeline

    job = make_job(tiny_pipeline, cache, tmp_path / "job")
    (state,) = run_ranks(1, tmp_path / "r", train, job)
    pipe = load_pipeline(str(tiny_pipeline))
    add_lora(pipe.unet, job.matrices, rank=job.config.lora_rank, seed=0)
    save_adapter(pipe.unet, tmp_path / "adapter", values=state.average)
    x, states = torch.randn(2, 4, 4, 4), torch.randn(2, 16, 16)
    stock = StableDiffusionPipeline.from_pretrained(tiny_pipeline, safety_checker=None)
    before = stock.unet(x, 5, encoder_hidden_states=states).sample
    stock.load_lora_weights(tmp_path / "adapter")
    after = stock.unet(x, 5, encoder_hidden_states=states).sample
    assert (after - before).abs().max() > 1e-4
    torch.testing.assert_close(after, pipe.unet(x, 5, encoder_hidden_states=states).sample)
    adapted = {n.split(".lora_A")[0] for n, _ in stock.unet.named_parameters() if "lora_A" in n}
    assert adapted == set(job.matrices)


class NoNoiseOnTokens(ReleaseOptimizer):
    """Broken twin: the class tokens' part of the sum is released as it is."""

    def release(self, total: ExactSum) -> list[torch.Tensor]:
        (noisy,) = super().release(total)
        n = 2 * 16 * 16
        return [torch.cat([noisy[:-n], total.values()[0][-n:]])]


class NoiseByClass(ReleaseOptimizer):
    """Broken twin: as if each class's tokens were a batch of their own."""

    def release(self, total: ExactSum) -> list[torch.Tensor]:
        (noisy,) = super().release(total)
        n = 2 * 16 * 16
        clean = total.values()[0]
        noisy[-n:] = clean[-n:] + (noisy[-n:] - clean[-n:]) / 2
        return [noisy]


def noise_on_tokens(job: FinetuneJob, kind: type[ReleaseOptimizer]) -> torch.Tensor:
    """Noise of one step on all class tokens, over the std that the plan says."""
    seen = {}

    class Watched(kind):
        def release(self, total: ExactSum) -> list[torch.Tensor]:
            released = super().release(total)
            seen["noise"] = released[0] - total.values()[0]
            return released

    with mock.patch("sapf_ray.finetune.loop.ReleaseOptimizer", Watched):
        train(job)
    sigma = job.plan.finetune.noise_multiplier * job.config.clipping_norm
    return seen["noise"][-2 * 16 * 16 :] / sigma


@pytest.mark.parametrize("kind", [ReleaseOptimizer, NoNoiseOnTokens, NoiseByClass])
def test_class_tokens_have_the_noise_of_the_plan(tiny_pipeline, cache, tmp_path, kind):
    job = make_job(tiny_pipeline, cache, tmp_path / "job", class_tokens=True, steps=1)
    (noise,) = run_ranks(1, tmp_path / "r", noise_on_tokens, job, kind)
    p = stats.chi2.cdf(float(noise.square().sum()), noise.numel())
    assert (5e-7 < p < 1 - 5e-7) == (kind is ReleaseOptimizer)


def test_adapter_with_class_tokens_is_written_and_the_factors_load_as_before(
    tiny_pipeline, cache, tmp_path
):
    from safetensors.torch import load_file

    job = make_job(tiny_pipeline, cache, tmp_path / "job", class_tokens=True, steps=1)
    (state,) = run_ranks(1, tmp_path / "r", train, job)
    denoiser = load_pipeline(str(tiny_pipeline)).unet
    add_adapter(denoiser, job.matrices, config=job.config, seed=job.seed)
    write_adapter(job, state, denoiser=denoiser, directory=tmp_path / "adapter")
    saved = load_file(tmp_path / "adapter" / CLASS_TOKENS)
    assert torch.equal(saved["offsets"], state.average[TOKENS])
    states = job.cache.all_conditions().states
    assert torch.equal(saved["prompt_embeds"], states + saved["offsets"])
    pipe = load_pipeline(str(tiny_pipeline))
    pipe.load_lora_weights(tmp_path / "adapter")  # stock diffusers: finds the factors beside them
    assert any("lora_A" in name for name, _ in pipe.unet.named_parameters())
    load_adapter(load_pipeline(str(tiny_pipeline)), tmp_path / "adapter")
