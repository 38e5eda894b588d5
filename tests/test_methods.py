"""Every row of the methods table plans, trains what it says, and spends what it planned."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from safetensors.torch import load_file

from sapf_ray import options
from sapf_ray.config import (
    EvaluationConfig,
    RunConfig,
    SynthesisConfig,
    TrackingConfig,
    from_dict,
    to_dict,
)
from sapf_ray.errors import ConfigError, DataError, SapfError
from sapf_ray.finetune.adapter import WHOLE_WEIGHTS, add_adapter, load_adapter, save_weights
from sapf_ray.finetune.loop import FinetuneJob, train
from sapf_ray.methods import METHODS, find_method, methods_json
from sapf_ray.models.loading import load_pipeline
from sapf_ray.models.pool import candidate_pool
from sapf_ray.models.public_model import PublicModel
from sapf_ray.pipeline import run
from sapf_ray.privacy.keyed_rng import NoiseKey
from sapf_ray.privacy.ledger import Ledger
from sapf_ray.privacy.planner import make_plan
from sapf_ray.privacy.release import Releaser
from sapf_ray.saliency.selection import select
from sapf_ray.synthesis.writer import read_synthetic
from tests.finetune.workers import run_ranks
from tests.tiny import save_latents

N = 24


def config_of(name: str, tiny_pipeline) -> RunConfig:
    base = to_dict(RunConfig())
    small = {
        "model.path": str(tiny_pipeline),
        "privacy.epsilon": 8.0,
        "privacy.accountant": "rdp",
        "saliency.shard_size": 9,
        "saliency.micro_batch_size": 5,
        "finetune.batch_size": 8,
        "finetune.steps": 3,
        "finetune.learning_rate": 1e-2,
        "finetune.checkpoint_every": 2,
        "finetune.micro_batch_size": 3,
    }
    for key, value in {**small, **METHODS[name].overrides}.items():
        section, _, field = key.rpartition(".")
        base[section][field] = value
    return from_dict(base)


@pytest.fixture(scope="module")
def cache(tmp_path_factory, tiny_pipeline):
    return save_latents(tmp_path_factory.mktemp("latents"), tiny_pipeline, N)


GROUNDED = [n for n, row in METHODS.items() if "grounding.remedies" in row.overrides]
TRAINED = [
    n
    for n, row in METHODS.items()
    if row.overrides.get("finetune.steps") != 0 and n not in GROUNDED
]
EVOLVED = [n for n, row in METHODS.items() if row.overrides.get("evolution.enabled")]


@pytest.mark.parametrize("name", TRAINED)
def test_ledger_composes_to_the_planned_epsilon(name, tiny_pipeline, cache, tmp_path, ray_cluster):
    config = config_of(name, tiny_pipeline)
    plan = make_plan(config, N)
    ledger = Ledger.create(tmp_path / "ledger.jsonl", plan)
    key = NoiseKey.create(1).bind("run")
    releaser = Releaser(key=key, ledger=ledger, plan=plan)
    model = PublicModel.open(config.model)
    selection = select(model, cache, config=config.saliency, releaser=releaser, seed=4)
    job = FinetuneJob(
        model=config.model,
        matrices=selection.matrices,
        cache=cache,
        plan=plan,
        config=config.finetune,
        key=key,
        ledger=str(tmp_path / "ledger.jsonl"),
        seed=0,
    )
    (state,) = run_ranks(1, tmp_path / "ranks", train, job)
    spent = Ledger.open(tmp_path / "ledger.jsonl").epsilon_spent()
    assert (
        (spent == plan.composed_epsilon == float("inf"))
        if not METHODS[name].private
        else (
            0.9 * config.privacy.epsilon < spent <= config.privacy.epsilon
            and spent == pytest.approx(plan.composed_epsilon, rel=1e-6)
        )
    )

    pipe = load_pipeline(str(tiny_pipeline))
    before = {n: p.clone() for n, p in pipe.unet.named_parameters()}
    trained = load_pipeline(str(tiny_pipeline)).unet
    add_adapter(trained, selection.matrices, config=config.finetune, seed=0)
    save_weights(trained, tmp_path / "adapter", values=state.average, config=config.finetune)
    load_adapter(pipe, tmp_path / "adapter")
    changed = {n for n, p in pipe.unet.named_parameters() if not torch.equal(p, before[n])}
    made = (
        selection.matrices if name != "noisy" else candidate_pool(trained)
    )  # the others became random
    expected = set(before) if config.finetune.adapter == "full" else {f"{m}.weight" for m in made}
    assert changed == expected
    if name == "layer-level":
        whole = {m.rpartition(".")[0] for m in selection.matrices}
        assert sorted(selection.matrices) == sorted(
            f"{layer}.{part}" for layer in whole for part in ("to_q", "to_k", "to_v")
        )
    if name == "all-param":
        assert selection.pool_size == 83 and any(
            p.dim() == 4 for n, p in before.items() if n in changed
        )
    releases = [
        e.release for e in Ledger.open(tmp_path / "ledger.jsonl").events() if e.stage == "selection"
    ]
    assert len(releases) == {"force": 5, "synflow": 0, "random": 0}.get(
        name, 0 if config.saliency.ratio == 1 else 1
    )
    if "cross_q" in config.saliency.pool:
        assert all(n.endswith("attn2.to_q.weight") for n in changed)
    if name == "dp-lora-no-middle":
        assert not any(n.startswith("mid_block") for n in changed)


@pytest.mark.parametrize("name", EVOLVED)
def test_evolution_spends_the_planned_epsilon_and_leaves_a_data_set(
    name, tiny_pipeline, tmp_path, ray_cluster
):
    config = config_of(name, tiny_pipeline)
    config = dataclasses.replace(
        config,
        evolution=dataclasses.replace(config.evolution, iterations=2, population=2),
        synthesis=SynthesisConfig(n_images=20, steps=2, shard_size=700),
        evaluation=EvaluationConfig(enabled=False),
        tracking=TrackingConfig(enabled=False),
    )
    result = run(config, str(tmp_path / "run"))
    ledger = Ledger.open(tmp_path / "run" / "ledger.jsonl")
    assert [e.release for e in ledger.events()] == [
        "evolution/histogram/0",
        "evolution/histogram/1",
    ]
    assert 0.9 * config.privacy.epsilon < result.metrics["epsilon_spent"] <= config.privacy.epsilon
    assert ledger.epsilon_spent() == pytest.approx(result.plan.composed_epsilon, rel=1e-6)
    images, labels = read_synthetic(tmp_path / "run" / "synthetic")
    assert images.shape == (20, 8, 8, 3) and labels.tolist() == [*range(10)] * 2
    left = {p.name for p in (tmp_path / "run").iterdir()}
    assert (
        not left & {"private", "evolution", "adapter", "checkpoints"}
        and {"plots", "privacy_card.md"} <= left
    )


def test_random_selection_reads_nothing_and_depends_on_the_seed_alone(tiny_pipeline):
    config = config_of("random", tiny_pipeline)
    plan = make_plan(config, N)
    assert plan.selection is None
    # no cache, no key, no ledger: it could not read a record if it tried
    nothing = Releaser(key=None, ledger=None, plan=plan)  # type: ignore[arg-type]
    model = PublicModel.open(config.model)
    chosen = [
        select(model, None, config=config.saliency, releaser=nothing, seed=s).matrices  # type: ignore[arg-type]
        for s in (1, 1, 2)
    ]
    assert chosen[0] == chosen[1] != chosen[2]
    pool = list(candidate_pool(load_pipeline(str(tiny_pipeline)).unet))
    assert chosen[0] == [n for n in pool if n in chosen[0]] and len(chosen[0]) == -(
        -3 * len(pool) // 10
    )


def test_broken_whole_weights_are_one_line(tiny_pipeline, tmp_path):
    pipe = load_pipeline(str(tiny_pipeline))
    config = dataclasses.replace(RunConfig().finetune, adapter="direct")
    name = next(iter(candidate_pool(pipe.unet)))
    values = {
        n: p.detach() for n, p in add_adapter(pipe.unet, [name], config=config, seed=0).items()
    }
    save_weights(pipe.unet, tmp_path / "a", values=values, config=config)
    assert set(load_file(tmp_path / "a" / WHOLE_WEIGHTS)) == {f"{name}.weight"}
    path = tmp_path / "a" / WHOLE_WEIGHTS
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(DataError, match="adapter of this model"):
        load_adapter(pipe, tmp_path / "a")


def test_rows_are_options_and_unknown_ones_are_refused():
    config = options.config_of(
        options.parse(["plan", "--method", "dp-ldm", "--saliency.ratio", "0.5"])
    )
    assert config.saliency.pool == "qkvo" and config.finetune.adapter == "direct"
    assert config.saliency.ratio == 0.5  # a flag overrides the row
    with pytest.raises(SapfError, match="must be one of dp-sapf"):
        find_method("dp-magic")
    with pytest.raises(ConfigError, match=r"must be 1 where finetune\.adapter is full"):
        from_dict({"finetune": {"adapter": "full"}})
    assert [row["name"] for row in methods_json()] == list(METHODS)
    for name in METHODS:
        base = to_dict(RunConfig())
        for key in METHODS[name].overrides:
            section, _, field = key.rpartition(".")
            assert field in base[section]
