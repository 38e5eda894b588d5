"""A group is the unit of privacy: sampled whole, clipped once, and one group moves each sum by at
most the bound. Each test is also put to a twin that treats images as units, and rejects it.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from scipy import stats

from sapf_ray.config import DataConfig, RunConfig, config_hash, from_dict
from sapf_ray.data.base import SKIPPED
from sapf_ray.data.units import Units
from sapf_ray.errors import ConfigError
from sapf_ray.evolution.histogram import count_votes
from sapf_ray.finetune.adapter import add_lora
from sapf_ray.finetune.objective import Objective
from sapf_ray.grad_sample.joint import JointGradients
from sapf_ray.grad_sample.lora import LoraGradients
from sapf_ray.grounding.proportions import release_counts
from sapf_ray.grounding.remedies import REMEDIES
from sapf_ray.grounding.space import Whitening
from sapf_ray.grounding.vote import vote_table
from sapf_ray.latents import LatentCache
from sapf_ray.models.class_tokens import ClassTokens
from sapf_ray.models.loading import load_pipeline
from sapf_ray.privacy.clipping import clip_factors
from sapf_ray.privacy.fixed_point import ONE_VOTE, grid_step
from sapf_ray.privacy.planner import PrivacyPlan, make_plan
from sapf_ray.reuse.finished import Finished
from sapf_ray.saliency.scores import SCORES
from sapf_ray.saliency.selection import Pass, score_records
from tests.data.test_units import N_WRITERS, writers_folder
from tests.finetune.test_loop import make_job
from tests.saliency.test_selection import setup, work_of
from tests.tiny import save_latents
from tests.whole_run import BARE, ONE_CORE, STEPS, command, finish, releases

N_IMAGES, EACH = 24, 4
GROUP = 2  # the one that is taken away


@pytest.fixture(scope="module")
def images(tmp_path_factory, tiny_pipeline) -> LatentCache:
    return save_latents(tmp_path_factory.mktemp("latents"), tiny_pipeline, N_IMAGES)


@pytest.fixture(scope="module")
def groups(images, tmp_path_factory) -> LatentCache:
    """The same images, in groups of 4."""
    path = tmp_path_factory.mktemp("units") / "units.npy"
    Units.of([f"{i % (N_IMAGES // EACH)}" for i in range(N_IMAGES)]).save(path)
    return replace(images, units=str(path))


def group_config(**sections) -> RunConfig:
    data = {"source": "image_folder", "groups": "folder:1"}
    return from_dict({"data": data, "privacy": {"accountant": "rdp"}, **sections})


def moved(whole: list[torch.Tensor], rest: list[torch.Tensor], bound: float) -> float:
    """L2 norm of the difference of two sums on the grid, in units of the bound."""
    gone = torch.cat([(a - b).flatten() for a, b in zip(whole, rest, strict=True)])
    return float(gone.double().norm()) * grid_step(bound) / bound


@pytest.mark.parametrize("score", sorted(name for name in SCORES if SCORES[name].contribution))
def test_a_group_moves_a_selections_sum_by_at_most_the_bound(
    score, images, groups, tiny_pipeline, tmp_path
):
    config, releaser = setup(tmp_path, score=score, draws_per_record=2, clipping="automatic")
    pipe = load_pipeline(str(tiny_pipeline))

    def gone(cache: LatentCache, units: np.ndarray, without: np.ndarray) -> float:
        work = work_of(tiny_pipeline, cache, config=config, key=releaser.key)
        whole = score_records(pipe, units, work)
        return moved(whole.units, score_records(pipe, without, work).units, config.clipping_norm)

    everyone = np.arange(N_IMAGES // EACH)
    assert 0.5 < gone(groups, everyone, np.delete(everyone, GROUP)) <= 1
    # the twin that clips each image: the same group moves its sum by up to 4 C
    members = Units.load(groups.units).members(GROUP)
    everyone = np.arange(N_IMAGES)
    assert gone(images, everyone, np.delete(everyone, members)) > 1


def lora_factors(job):
    objective = Objective.load(job)
    factors = add_lora(objective.denoiser, job.matrices, rank=2, seed=0)
    with torch.no_grad():
        for p in factors.values():  # B = 0 would hide the gradient of A
            p.add_(0.1)
    return objective, list(factors.values())


def lora_of(job):
    objective, factors = lora_factors(job)
    k = job.config.draws_per_record
    return objective, LoraGradients(objective.denoiser, factors, rows_per_record=k)


@pytest.mark.parametrize("k", [1, 6])
def test_a_groups_gradient_is_the_mean_over_its_draws_clipped_once(
    k, images, groups, tiny_pipeline, tmp_path
):
    job = make_job(tiny_pipeline, groups, tmp_path, draws_per_record=k)
    objective, gradients = lora_of(job)
    units = np.arange(N_IMAGES // EACH)
    rows = gradients.grad_sample(objective.losses(units, 5))
    plain, factors = lora_factors(job)
    for unit in units:  # autograd on the group's own loss
        loss = plain.losses(units[unit : unit + 1], 5).sum()
        expected = torch.cat([g.flatten() for g in torch.autograd.grad(loss, factors)])
        assert torch.allclose(rows[unit], expected, rtol=1e-3, atol=1e-6)

    grid = grid_step(1.0)

    def total(of: np.ndarray, engine=gradients, what=objective) -> list[torch.Tensor]:
        clip = lambda norms: clip_factors(norms, 1.0, mode="automatic", gamma=1e-3)  # noqa: E731
        return engine.clipped_units(what.losses(of, 5), clip, grid=grid)

    gone = moved(total(units), total(np.delete(units, GROUP)), 1.0)
    assert 0.5 < gone <= 1
    # the twin that clips each image
    image_level = replace(job, cache=images)
    objective, engine = lora_of(image_level)
    members = Units.load(groups.units).members(GROUP)
    everyone = np.arange(N_IMAGES)
    without = np.delete(everyone, members)
    assert moved(total(everyone, engine, objective), total(without, engine, objective), 1.0) > 1


def sampled_images(samples: list[np.ndarray], units: Units | None) -> np.ndarray:
    """(steps, images) bool: which images take part in each step."""
    seen = np.zeros((len(samples), N_IMAGES), bool)
    for row, sample in zip(seen, samples, strict=True):
        row[
            sample
            if units is None
            else np.concatenate([[], *map(units.members, sample)]).astype(int)
        ] = True
    return seen


def p_of_whole_groups(seen: np.ndarray, units: Units, rate: float) -> float:
    """p value of: groups come whole, each with the rate, independently."""
    of_groups = np.stack([seen[:, units.members(unit)] for unit in range(len(units))], 1)
    whole = of_groups.all(2)
    if (whole != of_groups.any(2)).any():
        return 0.0
    counts = np.bincount(whole.sum(1), minlength=len(units) + 1)
    expected = stats.binom.pmf(np.arange(len(units) + 1), len(units), rate) * len(seen)
    few = expected < 5
    counts = np.append(counts[~few], counts[few].sum())
    expected = np.append(expected[~few], expected[few].sum())
    return float(stats.chisquare(counts, expected).pvalue)


def test_groups_are_poisson_sampled_whole(groups, tmp_path):
    units = Units.load(groups.units)
    _, releaser = setup(tmp_path, sample_rate=0.3)
    names = [f"selection/{i}" for i in range(2000)]
    by_group = replace(releaser, plan=replace(releaser.plan, n_records=len(units)))
    by_image = replace(releaser, plan=replace(releaser.plan, n_records=N_IMAGES))
    of_groups = [by_group.sample(name, stage="selection") for name in names]
    of_images = [by_image.sample(name, stage="selection") for name in names]
    assert p_of_whole_groups(sampled_images(of_groups, units), units, 0.3) > 1e-4
    assert p_of_whole_groups(sampled_images(of_groups, units), units, 0.33) < 1e-4
    assert p_of_whole_groups(sampled_images(of_images, None), units, 0.3) < 1e-4


def test_the_plan_speaks_of_groups_and_an_image_level_plan_is_what_it_was():
    image_level = make_plan(from_dict({"privacy": {"accountant": "rdp"}}), 50_000)
    plan = make_plan(group_config(), 50_000)
    assert (image_level.unit, plan.unit) == ("image", "group")
    assert image_level.adjacency == "zero_out_one"
    assert replace(plan, adjacency=image_level.adjacency) == image_level
    assert PrivacyPlan.from_dict(plan.to_dict()) == plan
    assert config_hash(group_config()) != config_hash(
        from_dict({"data": {"source": "image_folder"}})
    )
    assert config_hash(RunConfig()) == config_hash(RunConfig(data=DataConfig(groups=None)))


def test_what_does_not_count_groups_is_refused():
    with pytest.raises(ConfigError, match=r"audit\.images") as caught:
        group_config(audit={"images": 5})
    assert len(str(caught.value).splitlines()) == 1
    foreign = replace(REMEDIES["proportions"], groups=False)
    with mock.patch.dict(REMEDIES._rows, {"proportions": foreign}):
        config = group_config(grounding={"remedies": "proportions"})
        with pytest.raises(ConfigError, match=r"grounding\.remedies"):
            make_plan(config, 50_000)


def test_a_batch_larger_than_the_number_of_groups_is_refused():
    with pytest.raises(ConfigError, match="number of training groups, 50"):
        make_plan(group_config(finetune={"batch_size": 60}), 50)


def test_a_pass_of_groups_does_not_depend_on_its_shards(groups, tiny_pipeline, tmp_path):
    config, releaser = setup(tmp_path, draws_per_record=3)
    pipe = load_pipeline(str(tiny_pipeline))
    work: Pass = work_of(tiny_pipeline, groups, config=config, key=releaser.key)
    units = np.arange(N_IMAGES // EACH)
    whole = score_records(pipe, units, work)
    parts = [score_records(pipe, part, work) for part in (units[:1], units[1:])]
    assert (parts[0] + parts[1]).digest() == whole.digest()


def blocks_of(n: int, size: int, seed: int = 0):
    """Features of images that all look alike, and labels, as the latent cache gives them."""
    generator = np.random.default_rng(seed)
    features = (1 + 0.1 * generator.standard_normal((n, size))).astype(np.float32)
    labels = generator.integers(0, 3, n)
    cuts = range(0, n, 7)
    return [(features[i : i + 7], labels[i : i + 7]) for i in cuts]


def without_members(blocks, members: np.ndarray):
    """The same records, the group's as if they could not be read."""
    first = 0
    for features, labels in blocks:
        gone = np.isin(np.arange(first, first + len(labels)), members)
        first += len(labels)
        yield np.where(gone[:, None], np.nan, features), np.where(gone, SKIPPED, labels)


def vote_sum(blocks, parts) -> list[torch.Tensor]:
    size = blocks[0][0].shape[1]
    whiten = Whitening.of(np.random.default_rng(1).standard_normal((4, 8, size)).astype(np.float32))
    table = vote_table(
        blocks, np.random.default_rng(2).standard_normal((4, size)), whiten=whiten, n_classes=3,
        parts=parts,
    )  # fmt: skip
    return [torch.from_numpy(table * (ONE_VOTE if parts is None else 1))]


def histogram_sum(blocks, parts) -> list[torch.Tensor]:
    embeddings = np.concatenate([features for features, _ in blocks])
    labels = np.concatenate([labels for _, labels in blocks])
    candidates = np.random.default_rng(3).standard_normal((12, embeddings.shape[1]))
    votes = count_votes(
        candidates.astype(np.float32), 3, embeddings=embeddings, labels=labels, parts=parts
    )
    return [torch.from_numpy(votes * (ONE_VOTE if parts is None else 1))]


def counts_sum(blocks, parts) -> list[torch.Tensor]:
    found = []
    releaser = SimpleNamespace(
        gaussian=lambda name, total, stage: found.extend(total.units) or [torch.zeros(3)]
    )
    labels = np.concatenate([labels for _, labels in blocks])
    release_counts(labels, 3, releaser=releaser, parts=parts)
    return found


@pytest.mark.parametrize("sum_of", [vote_sum, histogram_sum, counts_sum])
def test_a_group_has_one_vote_and_one_count(sum_of):
    """Also groups of a number of images that does not divide a vote; image by image it has many."""
    names = np.random.default_rng(4).permutation(np.repeat([*"abcdefgh"], [3] * 7 + [11]))
    units = Units.of(names.tolist())
    blocks = blocks_of(len(names), 5)
    parts = units.parts(ONE_VOTE)
    for unit in range(len(units)):
        members = units.members(unit)
        rest = list(without_members(blocks, members))
        gone = moved(sum_of(blocks, parts), sum_of(rest, parts), 1.0)
        assert 0.3 < gone <= 1
        assert moved(sum_of(blocks, None), sum_of(rest, None), 1.0) > 1.2


def test_image_level_sums_are_those_of_groups_of_one():
    blocks = blocks_of(30, 5)
    parts = Units.of([f"{i:02d}" for i in range(30)]).parts(ONE_VOTE)
    for sum_of in (vote_sum, histogram_sum, counts_sum):
        assert all(
            torch.equal(a, b)
            for a, b in zip(sum_of(blocks, parts), sum_of(blocks, None), strict=True)
        )


def test_features_come_group_by_group(images, groups):
    folder = Path(groups.directory)
    features = np.random.default_rng(0).standard_normal((N_IMAGES, 3)).astype(np.float32)
    np.save(folder / "features.npy", features)
    blocks = list(groups.group_features(block=4))
    units = Units.load(groups.units)
    assert len(blocks) == -(-len(units) // 4)
    for number, (rows, labels, owners) in enumerate(blocks):
        for group in range(owners.max() + 1):
            members = units.members(4 * number + group)
            assert np.array_equal(rows[owners == group], features[members])
            assert np.array_equal(labels[owners == group], groups.labels(members).numpy())
    (folder / "features.npy").unlink()


@pytest.mark.parametrize("k", [1, 4])
def test_class_tokens_of_a_group_are_clipped_with_its_factors(k, groups, tiny_pipeline, tmp_path):
    job = make_job(tiny_pipeline, groups, tmp_path, draws_per_record=k)

    def joint():
        objective, gradients = lora_of(job)
        objective.tokens = ClassTokens.add_to(objective.denoiser, job.cache.all_conditions())
        return objective, JointGradients(gradients, objective.tokens, rows_per_unit=k)

    objective, gradients = joint()
    units = np.arange(N_IMAGES // EACH)
    grid = grid_step(1.0)

    def clip(norms: torch.Tensor) -> torch.Tensor:
        return clip_factors(norms, 1.0, mode="automatic", gamma=1e-3)

    def total(of: np.ndarray) -> list[torch.Tensor]:
        return gradients.clipped_units(objective.losses(of, 5), clip, grid=grid)

    whole = total(units)
    assert 0.5 < moved(whole, total(np.delete(units, GROUP)), 1.0) <= 1
    # the tokens' part of one group, against autograd through the conditions of its draws
    alone = units[GROUP : GROUP + 1]
    losses = objective.losses(alone, 5)
    rows = objective.tokens._rows
    (expected,) = torch.autograd.grad(losses.sum(), rows, retain_graph=True)
    by_class = torch.zeros_like(objective.tokens.values)
    by_class.index_add_(0, objective.tokens.labels, expected)
    direction = total(alone)[-1].double().flatten()
    wanted = by_class.detach().double().flatten()
    cosine = direction @ wanted / (direction.norm() * wanted.norm())
    assert float(cosine) > 0.999
    bits = gradients.probe(objective.random_losses(3))
    assert bits == gradients.probe(objective.random_losses(3))


def test_a_later_score_on_other_images_asks_for_no_groups():
    own = group_config(synthesis={"n_images": 20})
    finished = Finished.__new__(Finished)
    object.__setattr__(finished, "config", own)
    assert finished.changed("evaluate", {"data.source": "digits"}).data.groups is None
    assert finished.changed("evaluate", {"evaluation.epochs": 3}).data.groups == "folder:1"
    with pytest.raises(ConfigError, match="cannot be changed when a run is over"):
        finished.changed("evaluate", {"data.groups": None})


EVOLUTION = {"enabled": "true", "iterations": "2", "population": "3", "lookahead": "1"}
EVOLVES = ("--finetune.steps=0", *(f"--evolution.{name}={v}" for name, v in EVOLUTION.items()))


@pytest.mark.long
@pytest.mark.parametrize("flags", [(), EVOLVES, ("--grounding.remedies", "tokens,proportions")])
def test_a_whole_run_over_groups(flags, tiny_pipeline, tmp_path):
    folder = tmp_path / "images"
    writers_folder(folder)
    run = command(folder, tiny_pipeline, tmp_path / "run", *BARE, *ONE_CORE)
    run += ["--data.groups", "pattern:^(w[0-9]+)_", "--data.max_images_per_group", "2"]
    run += ["--finetune.batch_size", "6", "--finetune.draws_per_record", "2", *flags]
    evolves = flags == EVOLVES
    finish(run)
    out = tmp_path / "run"
    plan = json.loads((out / "plan.json").read_text())
    assert plan["n_records"] == N_WRITERS and plan["adjacency"] == "zero_out_one_group"
    assert plan["delta"] == pytest.approx(1 / (N_WRITERS * np.log(N_WRITERS)))
    card = (out / "privacy_card.md").read_text()
    assert "each image, independently" not in card and "vote an image" not in card
    assert "one group, all its images and their labels, zeroed out" in card
    assert "zero out one group" in card
    n = len([name for name in releases(out / "ledger.jsonl") if name])
    assert n == 2 if evolves else n > STEPS
    assert not (out / "private").exists()
