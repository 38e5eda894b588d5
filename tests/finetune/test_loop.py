"""The training loop against an oracle, across micro-batches and workers, and its resume."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from sapf_ray.config import FinetuneConfig, ModelConfig, PrivacyConfig, RunConfig, SaliencyConfig
from sapf_ray.finetune.adapter import add_lora, save_adapter
from sapf_ray.finetune.loop import FinetuneJob, TrainState, train
from sapf_ray.latents import LatentCache
from sapf_ray.models.denoising import draw, per_record_loss, training_scheduler
from sapf_ray.models.loading import load_pipeline
from sapf_ray.models.pool import candidate_pool
from sapf_ray.privacy.keyed_rng import NoiseKey
from sapf_ray.privacy.ledger import Ledger
from sapf_ray.privacy.noise import add_gaussian_noise, clip_factors
from sapf_ray.privacy.planner import make_plan
from sapf_ray.privacy.sampling import poisson_sample
from tests.finetune.workers import run_ranks
from tests.tiny import save_latents

N, STEPS = 24, 4


@pytest.fixture(scope="module")
def cache(tmp_path_factory, tiny_pipeline) -> LatentCache:
    return save_latents(tmp_path_factory.mktemp("latents"), tiny_pipeline, N)


def make_job(tiny_pipeline: Path, cache: LatentCache, directory: Path, **finetune) -> FinetuneJob:
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
    matrices = list(candidate_pool(load_pipeline(str(tiny_pipeline)).unet))[::4]
    return FinetuneJob(
        model=ModelConfig(path=str(tiny_pipeline)),
        matrices=matrices,
        cache=cache,
        plan=plan,
        config=config.finetune,
        key=NoiseKey.create(3),
        stream="stream",
        ledger=str(ledger),
        seed=0,
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


def same(a: TrainState, b: TrainState, atol: float) -> None:
    for name in a.factors:
        torch.testing.assert_close(a.factors[name], b.factors[name], rtol=0, atol=atol)


@pytest.mark.parametrize("clipping", ["automatic", "flat"])
@pytest.mark.parametrize("draws", [1, 2])
def test_first_step_is_the_oracles(tiny_pipeline, cache, tmp_path, clipping, draws):
    """clip each record's own gradient, sum, add the keyed noise, divide by B, one AdamW step."""
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
    )
    ((state,),) = [[s for s in run_ranks(1, tmp_path / "r", train, job)]]
    pipe = load_pipeline(str(tiny_pipeline))
    factors = add_lora(pipe.unet, job.matrices, rank=job.config.lora_rank, seed=0)
    scheduler = training_scheduler(pipe)
    total = {name: torch.zeros_like(p) for name, p in factors.items()}
    sampled = poisson_sample(
        N, job.plan.sample_rate, generator=job.key.stream("finetune/sample", 0)
    )
    assert 0 < len(sampled) < N
    for record in sampled:
        moments, embeddings = cache.read(np.array([record]))
        draws_ = draw(
            job.key, "finetune/loss", 0, np.array([record]), draws, (4, 4, 4), 1000, (0.2, 0.8)
        )
        loss = per_record_loss(
            pipe.unet,
            scheduler,
            moments=moments,
            scaling_factor=pipe.vae.config.scaling_factor,
            conditions=embeddings,
            draws=draws_,
        )
        grads = torch.autograd.grad(loss.sum(), list(factors.values()))
        norm = torch.cat([g.flatten() for g in grads]).norm()
        factor = clip_factors(norm[None], 0.05, mode=clipping, gamma=job.config.clipping_gamma)[0]
        for name, g in zip(factors, grads, strict=True):
            total[name] += factor * g
    noisy = add_gaussian_noise(
        list(total.values()),
        job.plan.finetune.noise_multiplier,
        0.05,
        job.key.stream("finetune/noise", 0),
    )
    optimizer = torch.optim.AdamW(factors.values(), lr=1e-2, weight_decay=job.config.weight_decay)
    for p, value in zip(factors.values(), noisy, strict=True):
        p.grad = value / job.config.batch_size
    optimizer.step()
    for name, p in factors.items():
        torch.testing.assert_close(state.factors[name], p.detach(), rtol=1e-4, atol=1e-5)


def test_micro_batch_size_and_world_size_do_not_change_the_mechanism(
    tiny_pipeline, cache, tmp_path
):
    (one,) = run_ranks(1, tmp_path / "one", train, make_job(tiny_pipeline, cache, tmp_path / "a"))
    (large,) = run_ranks(
        1,
        tmp_path / "large",
        train,
        make_job(tiny_pipeline, cache, tmp_path / "b", micro_batch_size=64),
    )
    ranks = run_ranks(3, tmp_path / "three", train, make_job(tiny_pipeline, cache, tmp_path / "c"))
    for state in ranks[1:]:
        same(ranks[0], state, atol=0)
    same(one, large, atol=2e-4)
    same(one, ranks[0], atol=2e-4)
    moved = max(float((one.factors[n] - ranks[0].factors[n]).abs().max()) for n in one.factors)
    assert moved < 1e-2 * STEPS / 10  # far below what another noise draw would give


def test_steps_without_any_record_are_taken_by_every_rank(tiny_pipeline, cache, tmp_path):
    """Expected batch 1 of 24 on 3 ranks: most local batches are empty, many global ones too."""
    job = make_job(tiny_pipeline, cache, tmp_path / "job", batch_size=1, steps=6)
    ranks = run_ranks(3, tmp_path / "r", train, job)
    assert all(state.step == 6 for state in ranks)
    for state in ranks[1:]:
        same(ranks[0], state, atol=0)
    assert len(Ledger.open(job.ledger).events()) == 6


def test_resume_replays_the_same_releases_and_costs_nothing(tiny_pipeline, cache, tmp_path):
    job = make_job(tiny_pipeline, cache, tmp_path / "job")
    ((whole, _),) = run_ranks(1, tmp_path / "whole", run_and_keep, job)
    spent = Ledger.open(job.ledger).epsilon_spent()
    crashed = dataclasses.replace(job, ledger=str(tmp_path / "crashed" / "ledger.jsonl"))
    (tmp_path / "crashed").mkdir()
    Ledger.create(tmp_path / "crashed" / "ledger.jsonl", job.plan)
    ((_, kept),) = run_ranks(1, tmp_path / "part", run_and_keep, crashed, None, 2)
    # a crash between checkpoints: step 2 was released already, then the run starts again from step
    # 2's checkpoint
    Ledger.open(crashed.ledger).record(
        "finetune/step/2", Ledger.open(job.ledger).events()[-1].event, "stream", "finetune"
    )
    ((resumed, _),) = run_ranks(1, tmp_path / "rest", run_and_keep, crashed, kept[-1])
    same(whole, resumed, atol=1e-6)
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
