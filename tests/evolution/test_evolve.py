"""The loop: it finds the records' places, spends what was planned, and goes on after a crash
anywhere.
"""

from __future__ import annotations

import dataclasses
import shutil

import numpy as np
import pytest

from sapf_ray.config import EvolutionConfig, SynthesisConfig
from sapf_ray.errors import BudgetError, ConfigError, RunDirectoryError, SapfError
from sapf_ray.evolution import evolve as evolve_module
from sapf_ray.evolution.population import threshold_votes
from sapf_ray.privacy.keyed_rng import NoiseKey
from tests.evolution.toy import (
    AUG_PE,
    PE,
    PointApi,
    Toy,
    UnreadableSource,
    all_samples,
    distance_to_centres,
)

CONFIG = EvolutionConfig(
    iterations=3,
    population=20,
    lookahead=2,
    strength_start=0.5,
    strength_end=0.1,
    threshold=1.0,
)


@pytest.fixture(scope="module")
def undisturbed(ray_cluster, tmp_path_factory):
    toy = Toy(tmp_path_factory.mktemp("undisturbed"), CONFIG)
    progress: list[tuple[int, int]] = []
    final = toy.run(on_progress=lambda *step: progress.append(step))
    return toy, final, progress


@pytest.mark.parametrize("row", [PE, AUG_PE], ids=["pe", "aug_pe"])
def test_populations_move_to_the_records(ray_cluster, tmp_path, row):
    config = dataclasses.replace(
        CONFIG, iterations=5, **{**row, "lookahead": min(row["lookahead"], 2)}
    )
    sampling = SynthesisConfig(n_images=90, shard_size=45)
    fresh = PointApi().random(np.arange(90) % 3, np.arange(90))
    evolved = all_samples(Toy(tmp_path / "evolved", config, sampling=sampling).run())
    noisy = all_samples(Toy(tmp_path / "noisy", config, epsilon=0.01, sampling=sampling).run())
    assert distance_to_centres(fresh) > 4.5  # where a point falls at random
    assert distance_to_centres(evolved) < 1.0
    assert distance_to_centres(noisy) > 3.0  # the votes did it, and noise takes it away


def test_labels_shape_and_progress(undisturbed):
    _, final, progress = undisturbed
    assert all_samples(final).shape == (61, 2)
    assert np.bincount(final.labels(np.arange(61))).tolist() == [21, 20, 20]
    assert [done for done, _ in progress] == sorted(done for done, _ in progress)
    assert len({total for _, total in progress}) == 1 and progress[-1][0] == progress[-1][1]


def test_the_ledger_composes_to_the_planned_epsilon(undisturbed):
    toy, _, _ = undisturbed
    events = toy.ledger.events()
    assert [e.release for e in events] == [f"evolution/histogram/{t}" for t in range(3)]
    assert {e.event for e in events} == {toy.stage.event()} and not any(e.replay for e in events)
    assert 0.998 * toy.epsilon < toy.ledger.epsilon_spent() <= toy.epsilon


def test_only_the_last_generation_and_no_votes_stay(undisturbed):
    toy, _, _ = undisturbed
    names = sorted(
        p.relative_to(toy.root / "evolution").as_posix()
        for p in (toy.root / "evolution").rglob("*")
    )
    assert names == [
        "generation-003",
        "generation-003/parents.npy",
        "generation-003/samples-00000.npy",
        "generation-003/samples-00001.npy",
        "settings.json",
    ]


def test_a_finished_run_reads_nothing_and_pays_nothing_again(undisturbed):
    toy, final, _ = undisturbed
    again = Toy(toy.root, CONFIG, source=UnreadableSource()).run()
    assert again == final and len(toy.ledger.events()) == 3


def test_the_number_of_tasks_changes_nothing(undisturbed, tmp_path):
    for shard_size in (13, 1000):
        other = Toy(
            tmp_path / str(shard_size),
            CONFIG,
            sampling=SynthesisConfig(n_images=61, shard_size=shard_size),
        ).run()
        assert np.array_equal(all_samples(other), all_samples(undisturbed[1]))


def test_seed_and_key_both_matter(ray_cluster, tmp_path):
    base, *others = (
        all_samples(
            Toy(tmp_path / f"{key}-{seed}", CONFIG, epsilon=1.0, key=NoiseKey.create(key)).run(seed)
        )
        for key, seed in ((7, 3), (8, 3), (7, 4))
    )
    assert not any(np.array_equal(base, other) for other in others)


class Crash(BaseException):
    pass


def crash_on_call(monkeypatch, module, name, number, after=False):
    """The ``number``-th call of a function of ``module`` does not return: killed before or after
    its work.
    """
    real, calls = getattr(module, name), []

    def function(*arguments, **options):
        calls.append(1)
        if len(calls) == number and not after:
            raise Crash
        result = real(*arguments, **options)
        if len(calls) == number:
            raise Crash
        return result

    monkeypatch.setattr(module, name, function)


@pytest.mark.parametrize(
    ("name", "number", "after", "replays"),
    [
        ("embed_candidates", 2, False, 0),
        ("all_votes", 1, False, 0),
        ("all_votes", 3, True, 0),
        ("release_histogram", 1, True, 1),  # paid for, and the noisy value lost
        ("release_histogram", 3, True, 1),
        ("next_parents", 2, True, 1),
        ("write_array", 2, True, 0),  # parents are on disk: not released again
        ("make_samples", 1, False, 0),
        ("make_samples", 3, False, 0),
        ("make_samples", 4, False, 0),
    ],
)
def test_an_interrupted_run_ends_as_if_undisturbed(
    undisturbed, tmp_path, monkeypatch, name, number, after, replays
):
    with monkeypatch.context() as patched:
        crash_on_call(patched, evolve_module, name, number, after)
        with pytest.raises(Crash):
            Toy(tmp_path, CONFIG).run()
    toy = Toy(tmp_path, CONFIG)
    assert np.array_equal(all_samples(toy.run()), all_samples(undisturbed[1]))
    assert toy.ledger.epsilon_spent() == undisturbed[0].ledger.epsilon_spent()
    assert [e.replay for e in toy.ledger.events()].count(True) == replays


def test_half_a_generation_is_completed_not_made_again(undisturbed, tmp_path, monkeypatch):
    real = evolve_module.make_samples

    def stop_after_one_shard(work, generation, previous):
        for _ in real(work, generation, previous):
            yield
            if generation.index == 2:
                raise Crash

    with monkeypatch.context() as patched:
        patched.setattr(evolve_module, "make_samples", stop_after_one_shard)
        with pytest.raises(Crash):
            Toy(tmp_path, CONFIG).run()
    (first, *_) = sorted((tmp_path / "evolution" / "generation-002").glob("samples-*.npy"))
    inode = first.stat().st_ino

    def no_more_than(work, generation, previous):
        if generation.index == 2:
            assert first.stat().st_ino == inode
        yield from real(work, generation, previous)
        if generation.index == 2:
            assert first.stat().st_ino == inode

    monkeypatch.setattr(evolve_module, "make_samples", no_more_than)
    assert np.array_equal(all_samples(Toy(tmp_path, CONFIG).run()), all_samples(undisturbed[1]))


def test_other_records_after_a_crash_are_not_released_under_the_same_noise(
    undisturbed, tmp_path, monkeypatch
):
    with monkeypatch.context() as patched:
        crash_on_call(patched, evolve_module, "release_histogram", 1, after=True)
        with pytest.raises(Crash):
            Toy(tmp_path, CONFIG).run()
    for path in (tmp_path / "private" / "records").iterdir():
        table = np.load(path)
        table["label"] = (table["label"] + 1) % 3
        np.save(path, table)
    with pytest.raises(
        BudgetError
    ):  # charged as a further release, for which the plan has no budget
        Toy(tmp_path, CONFIG).run()


def test_records_deleted_after_a_crash_are_embedded_again(undisturbed, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        crash_on_call(patched, evolve_module, "release_histogram", 2, after=True)
        with pytest.raises(Crash):
            Toy(tmp_path, CONFIG).run()
    shutil.rmtree(tmp_path / "private")
    toy = Toy(tmp_path, CONFIG)
    assert np.array_equal(all_samples(toy.run()), all_samples(undisturbed[1]))
    assert toy.ledger.epsilon_spent() == undisturbed[0].ledger.epsilon_spent()


def test_the_threshold_is_in_units_of_the_noise(ray_cluster, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        evolve_module,
        "threshold_votes",
        lambda noisy, threshold: seen.append(threshold) or threshold_votes(noisy, threshold),
    )
    toy = Toy(tmp_path, dataclasses.replace(CONFIG, iterations=1, lookahead=0, threshold=2.5))
    toy.run()
    assert seen == [2.5 * toy.stage.noise_multiplier]


def test_other_settings_in_the_same_directory_are_refused(undisturbed):
    toy, _, _ = undisturbed
    with pytest.raises(RunDirectoryError, match=r"evolution\.threshold = 1\.0, requested is 1\.5"):
        Toy(toy.root, dataclasses.replace(CONFIG, threshold=1.5)).run()
    with pytest.raises(RunDirectoryError, match="seed = 3"):
        toy.run(seed=4)
    assert (
        Toy(toy.root, dataclasses.replace(CONFIG, cpus_per_task=0.5)).run().complete
    )  # only spreads the work


def test_fewer_images_than_classes_and_a_plan_for_other_iterations_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"synthesis\.n_images"):
        Toy(
            tmp_path / "a", CONFIG, sampling=SynthesisConfig(n_images=2), source=UnreadableSource()
        ).run()
    toy = Toy(tmp_path / "b", CONFIG, source=UnreadableSource())
    toy.config = dataclasses.replace(CONFIG, iterations=4)
    with pytest.raises(ConfigError, match="3 full passes"):
        toy.run()


def test_an_error_in_a_task_comes_back_as_itself(ray_cluster, tmp_path, monkeypatch):
    monkeypatch.setattr("tests.evolution.toy.PointApi", BrokenApi)
    with pytest.raises(SapfError, match="generation 0: the embedding"):
        Toy(tmp_path, CONFIG).run()


class BrokenApi(PointApi):
    def random(self, labels, seeds):
        return np.full((len(seeds), 2), np.nan)
