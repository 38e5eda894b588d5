"""SIGKILL of a worker in each stage: Ray does the work again, and what comes out is what an
unfaulted run makes.
"""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from jobs.chaos import ray_workers
from sapf_ray.config import (
    DataConfig,
    FinetuneConfig,
    ModelConfig,
    PrivacyConfig,
    RunConfig,
    SaliencyConfig,
)
from sapf_ray.data.base import open_source
from sapf_ray.errors import RunDirectoryError
from sapf_ray.finetune.adapter import WEIGHTS
from sapf_ray.finetune.checkpoints import STATE_FILE, check_paid, latest_state, repair_snapshot
from sapf_ray.finetune.launcher import finetune
from sapf_ray.finetune.loop import FinetuneJob, TrainState, train
from sapf_ray.latents import LatentCache, build_latent_cache
from sapf_ray.models.public_model import PublicModel
from sapf_ray.privacy.keyed_rng import NoiseKey
from sapf_ray.privacy.ledger import Ledger
from sapf_ray.privacy.planner import make_plan
from sapf_ray.privacy.release import Releaser
from sapf_ray.saliency.selection import select
from tests.faults.processes import once, train_ranks
from tests.finetune.test_loop import make_job
from tests.finetune.workers import run_ranks
from tests.tiny import save_latents

STEPS = 12


@pytest.fixture(scope="module")
def cache(tmp_path_factory, tiny_pipeline) -> LatentCache:
    return save_latents(tmp_path_factory.mktemp("latents"), tiny_pipeline, 24)


def kill(title: str) -> None:
    ray_workers(os.getpid(), title)[0].kill()


def session() -> Path:
    import ray

    return Path(ray._private.worker._global_node.get_session_dir_path())


@pytest.mark.long
def test_a_killed_encoding_task_is_done_again(ray_cluster, tiny_pipeline, tmp_path):
    source = open_source(DataConfig(source="digits"))

    def build(directory: Path) -> LatentCache:
        return build_latent_cache(
            directory,
            source,
            model=ModelConfig(path=str(tiny_pipeline)),
            shard_size=100,
        )

    whole = build(tmp_path / "whole")
    with once(
        "an encoding task",
        lambda: ray_workers(os.getpid(), "ray::encode"),
        lambda: kill("ray::encode"),
    ):
        faulted = build(tmp_path / "faulted")
    for name in ("moments.npy", "labels.npy"):
        assert np.array_equal(
            np.load(Path(whole.directory) / name), np.load(Path(faulted.directory) / name)
        )


def test_a_killed_selection_task_is_done_again_and_paid_once(
    ray_cluster, tiny_pipeline, cache, tmp_path
):
    config = RunConfig(
        privacy=PrivacyConfig(epsilon=8.0, accountant="rdp"),
        saliency=SaliencyConfig(shard_size=2),
        finetune=FinetuneConfig(steps=3, batch_size=8),
    )
    plan = make_plan(config, 24)

    def choose(name: str):
        ledger = Ledger.create(tmp_path / f"{name}.jsonl", plan)
        model = PublicModel.open(ModelConfig(path=str(tiny_pipeline)))
        releaser = Releaser(key=NoiseKey.create(1), ledger=ledger, plan=plan)
        return select(model, cache, config=config.saliency, releaser=releaser), ledger

    whole, _ = choose("whole")
    with once(
        "a selection task",
        lambda: ray_workers(os.getpid(), "ray::score"),
        lambda: kill("ray::score"),
    ):
        faulted, ledger = choose("faulted")
    assert faulted == whole
    assert [event.release for event in ledger.events()] == ["selection"]


@pytest.mark.parametrize(
    ("workers", "rank"),
    [
        (1, 0),
        pytest.param(2, 1, marks=pytest.mark.long),
        pytest.param(2, 0, marks=pytest.mark.long),
    ],
)
def test_a_train_worker_killed_in_mid_step_is_replaced_and_its_steps_are_replayed(
    ray_cluster, tiny_pipeline, cache, tmp_path, workers, rank
):
    settings = {
        "steps": STEPS,
        "checkpoint_every": 5,
        "num_workers": workers,
        "cpus_per_worker": 1.0,
    }
    whole = make_job(tiny_pipeline, cache, tmp_path / "whole", **settings)
    expected = run_ranks(workers, tmp_path / "ranks", train, whole)[0]  # without Ray
    job = make_job(tiny_pipeline, cache, tmp_path / "faulted", **settings)
    ledger = Ledger.open(job.ledger)
    storage = tmp_path / "checkpoints" if workers == 1 else f"file://{tmp_path}/checkpoints"

    def in_step_7() -> bool:
        return "finetune/step/7" in Path(job.ledger).read_text()

    def strike() -> None:
        os.kill(train_ranks(session())[rank], 9)

    with once("step 7", in_step_7, strike):
        finetune(job, storage, adapter_dir=tmp_path / "adapter")
    state = latest_state(f"{storage}/finetune")
    assert state is not None and state.step == STEPS
    for name, value in expected.average.items():
        assert torch.equal(state.average[name], value), name
    events = ledger.events()
    assert [e.release for e in events if not e.replay] == [
        f"finetune/step/{i}" for i in range(STEPS)
    ]
    assert {e.release for e in events if e.replay} >= {
        "finetune/step/5"
    }  # what came after the checkpoint at 5
    assert ledger.epsilon_spent() == Ledger.open(whole.ledger).epsilon_spent() <= job.plan.epsilon
    assert load_file(tmp_path / "adapter" / WEIGHTS)


def test_a_torn_checkpoint_is_passed_over_and_a_torn_snapshot_removed(
    tiny_pipeline, cache, tmp_path
):
    from tests.finetune.test_loop import run_and_keep

    job = make_job(tiny_pipeline, cache, tmp_path / "job")
    ((_, kept),) = run_ranks(1, tmp_path / "ranks", run_and_keep, job)
    run = tmp_path / "run"
    assert latest_state(str(run)) is None
    for name, state in zip(("checkpoint_2026-01-01", "checkpoint_2026-01-02"), kept, strict=True):
        (run / name).mkdir(parents=True)
        state.save(run / name / STATE_FILE)
    newest, snapshot = (
        run / "checkpoint_2026-01-02" / STATE_FILE,
        run / "checkpoint_manager_snapshot.json",
    )
    whole = newest.read_bytes()
    assert latest_state(str(run)).step == kept[1].step > kept[0].step
    torn = [whole[:-20], whole[: len(whole) // 2], b"", whole.replace(whole[2000:2064], bytes(64))]
    for content in torn:
        newest.write_bytes(content)
        assert latest_state(str(run)).step == kept[0].step
    newest.unlink()
    assert latest_state(str(run)).step == kept[0].step

    good = (
        '{"checkpoint_results": [{"checkpoint_dir_name": "checkpoint_2026-01-01", "metrics": {}}]}'
    )
    for content, stays in (
        (good, True),
        (good[:40], False),
        ("", False),
        (good.replace("01-01", "01-09"), False),
    ):
        snapshot.write_text(content)
        repair_snapshot(str(run))
        assert snapshot.exists() == stays

    ledger = Ledger.open(job.ledger)
    run_id = job.releaser().run_id
    check_paid(kept[1], ledger, run_id=run_id)
    foreign = replace(kept[1], noise_id=f"{run_id}-0123456789abcdef0123456789abcdef")
    with pytest.raises(RunDirectoryError, match=r"does not show finetune/step/3"):
        check_paid(foreign, ledger, run_id=run_id)
    other = Ledger.create(
        tmp_path / "fresh.jsonl", job.plan
    )  # a new ledger beside old checkpoints understates
    with pytest.raises(RunDirectoryError, match=r"does not show finetune/step/0"):
        check_paid(kept[0], other, run_id=run_id)
    with pytest.raises(RunDirectoryError, match=r"does not show"):
        check_paid(kept[0], ledger, run_id="another run")


def goes_on(job: FinetuneJob, folder: str, until: int) -> TrainState:
    """One rank's training from the checkpoint in ``folder``, read by each rank for itself, to step
    ``until``.
    """
    kept: list[TrainState] = []

    def checkpoint(state: TrainState) -> None:
        kept.append(state)
        if state.step >= until:
            raise InterruptedError

    with suppress(InterruptedError):
        train(job, latest_state(folder), checkpoint)
    return kept[-1]


def test_training_goes_on_with_another_number_of_workers(tiny_pipeline, cache, tmp_path):
    """One worker, then three, then two: the same adapter to the last bit, each step paid once."""
    settings = {"steps": 6, "checkpoint_every": 2}
    whole = make_job(tiny_pipeline, cache, tmp_path / "whole", **settings)
    (expected,) = run_ranks(1, tmp_path / "ranks", goes_on, whole, str(tmp_path / "none"), 6)
    job = make_job(tiny_pipeline, cache, tmp_path / "job", **settings)
    states = []
    for workers, until in ((1, 2), (3, 4), (2, 6)):
        ranks = run_ranks(
            workers, tmp_path / f"ranks{workers}", goes_on, job, str(tmp_path / "run"), until
        )
        states.append(ranks[0])
        folder = tmp_path / "run" / f"checkpoint_{until}"
        folder.mkdir(parents=True)
        ranks[0].save(folder / STATE_FILE)
    first, _, last = states
    assert (first.step, last.step) == (2, 6)
    for name, value in expected.factors.items():
        assert torch.equal(last.factors[name], value), name
    moved = [(last.factors[n] - first.factors[n]).abs().max() for n in first.factors]
    assert float(max(moved)) > 1.5e-2
    assert [(e.release, e.replay) for e in Ledger.open(job.ledger).events()] == [
        (f"finetune/step/{i}", False) for i in range(6)
    ]
