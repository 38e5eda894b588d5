"""One vote a record, one noise draw a histogram, the ledger first."""

from __future__ import annotations

import dataclasses
import math
import stat

import numpy as np
import pytest

from sapf_ray.config import EvolutionConfig
from sapf_ray.errors import BudgetError, DataError
from sapf_ray.evolution import histogram
from sapf_ray.evolution.histogram import RecordEmbeddings, all_votes, count_votes, release_histogram
from sapf_ray.privacy import noise as noise_module
from sapf_ray.privacy.fixed_point import ExactSum
from sapf_ray.privacy.keyed_rng import NoiseKey
from sapf_ray.privacy.ledger import Ledger
from sapf_ray.privacy.planner import evolution_stage
from sapf_ray.privacy.release import Releaser
from tests.evolution.toy import DELTA, PointEmbedding, PointSource, plan_of
from tests.mechanisms import check_drawn, half_the_noise, noisy_sum, releaser_of, without_noise

KEY = NoiseKey(bytes(range(32)))
CLASSES = 3


def case(n=200, m=33, d=5, seed=0):
    rng = np.random.default_rng(seed)
    candidates = rng.normal(size=(m, d)).astype(np.float32)
    candidates[9], candidates[30], candidates[4] = (
        candidates[3],
        candidates[3],
        candidates[3],
    )  # 4 is of another class
    return candidates, rng.normal(size=(n, d)).astype(np.float32) + 5, rng.integers(0, CLASSES, n)


def by_brute_force(candidates, embeddings, labels):
    votes = [0] * len(candidates)
    for x, label in zip(embeddings.astype(float), labels, strict=True):
        mine = [i for i in range(len(candidates)) if i % CLASSES == label]
        votes[
            min(mine, key=lambda i: (float(((x - candidates[i].astype(float)) ** 2).sum()), i))
        ] += 1
    return votes


@pytest.mark.parametrize("chunk", [1, 40, 1 << 22])
def test_votes_are_those_of_brute_force(monkeypatch, chunk):
    monkeypatch.setattr(histogram, "_DISTANCES_PER_CHUNK", chunk)
    candidates, embeddings, labels = case()
    votes = count_votes(candidates, CLASSES, embeddings=embeddings, labels=labels)
    assert votes.tolist() == by_brute_force(*case()) and votes.sum() == 200
    assert votes[9] == votes[30] == 0 and votes.dtype == np.int64


def test_one_record_moves_one_count_by_one():
    candidates, embeddings, labels = case(n=40)
    votes = count_votes(candidates, CLASSES, embeddings=embeddings, labels=labels)
    for i in range(40):
        without = count_votes(
            candidates, CLASSES, embeddings=np.delete(embeddings, i, 0), labels=np.delete(labels, i)
        )
        assert np.linalg.norm(votes - without) == 1 and (votes - without).sum() == 1


def test_a_record_of_no_number_has_one_vote_too_and_a_class_without_records_none():
    candidates, embeddings, labels = case(n=3)
    embeddings[1] = np.nan
    assert (
        count_votes(candidates, CLASSES, embeddings=embeddings, labels=np.array([0, 1, 1])).sum()
        == 3
    )
    assert count_votes(candidates, CLASSES, embeddings=embeddings[:0], labels=labels[:0]).sum() == 0
    with pytest.raises(DataError):
        count_votes(candidates, CLASSES, embeddings=embeddings, labels=np.array([0, 1, 3]))


def noise_per_shard(total, multiplier, stream):
    (votes,) = total.values()
    drawn = [noisy_sum(total, multiplier, stream)[0] - votes for _ in range(3)]
    return [votes + sum(drawn)]


def one_draw_for_all_candidates(total, multiplier, stream):
    (votes,) = total.values()
    one = noisy_sum(ExactSum.zeros([(1,)], 1.0), multiplier, stream)[0]
    return [votes + one]


def check_noise(tmp_path):
    """Asserts variance (chi-square), independence of counts and of iterations."""
    releaser = releaser_of("evolution", tmp_path, count=100)
    votes = np.random.default_rng(0).integers(0, 30, 400)
    drawn = [release_histogram(votes, t, releaser) - votes for t in range(25)]
    check_drawn(np.stack(drawn) / 4.0)


def test_noise_is_as_planned(tmp_path):
    check_noise(tmp_path)


@pytest.mark.parametrize(
    "mechanism", [without_noise, half_the_noise, noise_per_shard, one_draw_for_all_candidates]
)
def test_broken_twins_are_rejected(tmp_path, monkeypatch, mechanism):
    monkeypatch.setattr(noise_module, "noisy_sum", mechanism)
    with pytest.raises(AssertionError):
        check_noise(tmp_path)


def test_the_patched_check_passes_the_right_mechanism(tmp_path, monkeypatch):
    monkeypatch.setattr(noise_module, "noisy_sum", lambda *arguments: noisy_sum(*arguments))
    check_noise(tmp_path)


def test_the_event_is_on_disk_before_noise_exists(tmp_path, monkeypatch):
    releaser = releaser_of("evolution", tmp_path, count=100)

    def crash(*arguments):
        (event,) = Ledger.open(tmp_path / "ledger.jsonl").events()
        assert (event.release, event.stage, event.event) == (
            "evolution/histogram/2",
            "evolution",
            releaser.plan.evolution.event(),
        )
        raise KeyboardInterrupt

    monkeypatch.setattr(noise_module, "noisy_sum", crash)
    with pytest.raises(KeyboardInterrupt):
        release_histogram(np.arange(5), 2, releaser)


def test_same_votes_replay_and_other_votes_are_a_second_release(tmp_path):
    votes = np.arange(50)
    stage = evolution_stage(2.0, DELTA, iterations=2, accountant="rdp")
    ledger = Ledger.create(tmp_path / "ledger.jsonl", plan_of(2.0))
    plan = dataclasses.replace(plan_of(2.0), evolution=stage)
    releaser = Releaser(key=KEY, ledger=ledger, plan=plan)
    first = release_histogram(votes, 0, releaser)
    assert np.array_equal(release_histogram(votes, 0, releaser), first)
    assert [e.replay for e in ledger.events()] == [False, True]
    other = votes.copy()
    other[3] += 1  # budget is left for it here; it must not reuse the noise
    second = release_histogram(other, 0, releaser)
    assert not ledger.events()[-1].replay
    assert np.abs((second - other) - (first - votes)).min() > 1e-3
    with pytest.raises(BudgetError):
        release_histogram(votes, 1, releaser)


def test_exact_votes_are_not_written(tmp_path):
    releaser = releaser_of("evolution", tmp_path, count=100)
    votes = np.full(3, 987_654)
    noisy = release_histogram(votes, 0, releaser)
    assert "98765" not in releaser.ledger.path.read_text() and not (noisy == votes).any()
    seen = [e.noise_id for e in releaser.ledger.events()]
    # another key: nobody can look votes up by it
    release_histogram(votes, 0, dataclasses.replace(releaser, key=NoiseKey.create()))
    assert releaser.ledger.events()[-1].noise_id not in seen


def test_votes_do_not_depend_on_the_number_of_tasks(ray_cluster, tmp_path):
    source, config = PointSource(300), EvolutionConfig(iterations=1)
    rng = np.random.default_rng(2)
    candidates = rng.normal(size=(30, 2)).astype(np.float32) * 4
    embeddings, labels = _records(source)
    expected = count_votes(candidates, CLASSES, embeddings=embeddings, labels=labels)
    for shard_size in (37, 300):
        records = RecordEmbeddings(
            directory=str(tmp_path / f"{shard_size}"), n_records=300, shard_size=shard_size
        )
        assert (
            len(
                list(records.build(source, resolution=8, embedding=PointEmbedding(), config=config))
            )
            == len(records.shards)
            == math.ceil(300 / shard_size)
        )
        assert np.array_equal(
            all_votes(candidates, CLASSES, records=records, config=config), expected
        )


def _records(source):
    points, labels = source.read("train", np.arange(source.n_train), resolution=8)
    return points.astype(np.float32), labels


def test_record_embeddings_are_for_the_owner_only_and_made_once(ray_cluster, tmp_path):
    records = RecordEmbeddings(directory=str(tmp_path / "private"), n_records=300, shard_size=100)
    list(
        records.build(
            PointSource(300), resolution=8, embedding=PointEmbedding(), config=EvolutionConfig()
        )
    )
    assert stat.S_IMODE((tmp_path / "private").stat().st_mode) == 0o700
    files = list((tmp_path / "private").iterdir())
    assert len(files) == 3 and all(stat.S_IMODE(f.stat().st_mode) == 0o600 for f in files)
    records.file(1).unlink()
    kept = records.file(0).stat().st_mtime_ns
    list(
        records.build(
            PointSource(300), resolution=8, embedding=PointEmbedding(), config=EvolutionConfig()
        )
    )
    assert records.file(0).stat().st_mtime_ns == kept
    assert np.allclose(records.read(1)[0], _records(PointSource(300))[0][100:200])
