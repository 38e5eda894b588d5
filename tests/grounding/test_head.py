"""One record moves the head's sum by at most 1; its noise is as planned; a head knows itself."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from sapf_ray.data.base import SKIPPED
from sapf_ray.errors import BudgetError, DataError
from sapf_ray.grounding import head as head_module
from sapf_ray.grounding.head import Weights, exact_sum, from_noisy, group_sum, release_head
from sapf_ray.grounding.head_price import directions, head_noise, head_suits
from sapf_ray.models.class_head import ClassHead, Projection, Spread
from sapf_ray.privacy import noise as noise_module
from sapf_ray.privacy.calibration import Budget
from sapf_ray.privacy.facts import Facts
from sapf_ray.privacy.fixed_point import ExactSum
from sapf_ray.privacy.keyed_rng import NoiseKey
from sapf_ray.privacy.ledger import Ledger
from sapf_ray.privacy.planner import StagePlan
from sapf_ray.privacy.release import Releaser
from tests.evolution.toy import plan_of
from tests.mechanisms import check_drawn, half_the_noise, noisy_sum, without_noise

KEY = NoiseKey(bytes(range(32)))
CLASSES, DIMENSION, SIZE = 4, 12, 5
CENTRES = np.random.default_rng(9).normal(size=(CLASSES, DIMENSION)) * 3


def images(n, seed=0, centres=CENTRES):
    """Features of n images of four classes, and their labels."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, len(centres), n)
    rows = centres[labels] + rng.normal(size=(n, centres.shape[1]))
    return rows.astype(np.float32), labels


def projection() -> Projection:
    return Spread.of(*images(800, seed=5)).projection(SIZE, kind="test")


def sum_of(n, seed=0) -> ExactSum:
    return exact_sum([images(n, seed)], projection(), n_classes=CLASSES)


def released(n=400, noise=2.0, seed=0, record_seed=0) -> ClassHead:
    """The head of n records, with noise from a generator of the test's."""
    rows = projection()
    total = exact_sum([images(n, record_seed)], rows, n_classes=CLASSES)
    rng = np.random.default_rng(seed)
    noisy = [part.numpy() + noise * rng.normal(size=part.shape) for part in total.values()]
    return from_noisy(noisy, rows, noise_multiplier=noise, n_records=n)


# One record -------------------------------------------------------------------------------------


def norm_in_units(total: ExactSum, other: ExactSum) -> int:
    """Squared norm of the difference, in squared grid steps: no rounding."""
    parts = zip(total.units, other.units, strict=True)
    return sum(int(value) ** 2 for a, b in parts for value in (a - b).flatten())


def test_one_record_moves_the_sum_by_at_most_one_exactly():
    rows = projection()
    features, labels = images(60)
    features[0] = 1e8  # far outside
    features[1] = rows.centre  # at the centre
    features[2] = np.float32(3e38)
    total = exact_sum([(features, labels)], rows, n_classes=CLASSES)
    one = round(total.sensitivity / total.step)
    largest = 0
    for i in range(60):
        kept = (np.delete(features, i, 0), np.delete(labels, i))
        moved = norm_in_units(total, exact_sum([kept], rows, n_classes=CLASSES))
        assert 0 < moved <= one**2
        largest = max(largest, moved)
    assert largest > 0.999 * one**2  # the bound is used, else noise would be wasted


def test_the_sum_does_not_depend_on_blocks_or_order():
    rows = projection()
    features, labels = images(200)
    expected = exact_sum([(features, labels)], rows, n_classes=CLASSES).digest()
    blocks = [(features[i : i + 17], labels[i : i + 17]) for i in range(0, 200, 17)]
    assert exact_sum(blocks[::-1], rows, n_classes=CLASSES).digest() == expected


def test_what_could_not_be_read_counts_for_nothing():
    rows = projection()
    features, labels = images(50)
    expected = exact_sum([(features, labels)], rows, n_classes=CLASSES).digest()
    broken = np.concatenate([features, np.full((2, DIMENSION), np.nan, np.float32)])
    with_skipped = np.concatenate([labels, [SKIPPED, 1]])
    assert exact_sum([(broken, with_skipped)], rows, n_classes=CLASSES).digest() == expected
    with pytest.raises(DataError):
        exact_sum([(features, labels + 1)], rows, n_classes=CLASSES)


@pytest.mark.parametrize("size", [1, 5, 64, 1024])
def test_the_parts_of_a_contribution_have_norm_one_together(size):
    weights = Weights.of(size)
    parts = np.array(dataclasses.astuple(weights))
    assert (parts > 0).all() and np.isclose((parts**2).sum(), 1)
    error = size / weights.sums**2 + 1 / weights.count**2
    for change in (0.9, 1.1):  # the split is the best one
        count = weights.count * change
        sums = np.sqrt(weights.sums**2 + weights.count**2 - count**2)
        assert size / sums**2 + 1 / count**2 > error


# A group of images ------------------------------------------------------------------------------


def grouped(n, size, seed=0, block=7):
    """Blocks of n groups of about ``size`` images each, of any classes."""
    rng = np.random.default_rng(seed)
    owners = np.repeat(np.arange(n), rng.integers(1, 2 * size, n))
    features, labels = images(len(owners), seed)
    features[owners == 1] = 1e8  # far outside
    labels[owners == 2] = 3  # of one class
    blocks = []
    for first in range(0, n, block):
        own = (owners >= first) & (owners < first + block)
        blocks.append((features[own], labels[own], owners[own] - first))
    return blocks


def without_group(block, group):
    features, labels, owners = block
    kept = owners != group
    return features[kept], labels[kept], owners[kept]


def largest_move(n=12, size=5) -> float:
    """Largest move of the sum by one group, over the sensitivity squared; asserts that it is no
    more.
    """
    rows = projection()
    blocks = grouped(n, size, block=n)
    total = group_sum(blocks, rows, n_classes=CLASSES)
    one = round(total.sensitivity / total.step)
    moves = []
    for group in range(n):
        rest = group_sum([without_group(blocks[0], group)], rows, n_classes=CLASSES)
        moves.append(norm_in_units(total, rest))
    assert min(moves) > 0 and max(moves) <= one**2
    return max(moves) / one**2


def test_one_group_moves_the_sum_by_at_most_one_exactly():
    assert largest_move() > 0.999


def test_a_group_that_is_clipped_image_by_image_is_rejected(monkeypatch):
    loose = dataclasses.replace(head_module.CLIP, bound=5.0)
    monkeypatch.setattr(head_module, "CLIP", loose)
    with pytest.raises(AssertionError):
        largest_move()


def test_groups_do_not_depend_on_blocks_and_groups_of_one_are_records():
    rows = projection()
    expected = group_sum(grouped(20, 4, block=20), rows, n_classes=CLASSES).digest()
    assert group_sum(grouped(20, 4, block=3)[::-1], rows, n_classes=CLASSES).digest() == expected
    features, labels = images(50)
    alone = group_sum([(features, labels, np.arange(50))], rows, n_classes=CLASSES)
    assert alone.digest() == exact_sum([(features, labels)], rows, n_classes=CLASSES).digest()
    broken = np.concatenate([features, np.full((2, DIMENSION), np.nan, np.float32)])
    skipped = (broken, np.append(labels, [SKIPPED, 1]), np.append(np.arange(50), [3, 50]))
    assert group_sum([skipped], rows, n_classes=CLASSES).digest() == alone.digest()


def test_groups_of_any_classes_make_a_better_head_than_group_privacy_does():
    """Noise of 10 for groups of 8 against 80 for images: the same guarantee for whoever has 8."""
    rows, size, noise = projection(), 8, 10.0
    features, labels = images(50 * size)
    owners = np.repeat(np.arange(50), size)
    of_groups = group_sum([(features, labels, owners)], rows, n_classes=CLASSES)
    of_images = exact_sum([(features, labels)], rows, n_classes=CLASSES)
    found = []
    for total, std, n in ((of_groups, noise, 50), (of_images, size * noise, 50 * size)):
        rng = np.random.default_rng(1)
        heads = []
        for _ in range(12):
            noisy = [part.numpy() + std * rng.normal(size=part.shape) for part in total.values()]
            heads.append(
                from_noisy(noisy, rows, noise_multiplier=std, n_records=n, grouped=n == 50)
            )
        found.append(np.mean([accuracy(head, 400) for head in heads]))
    assert found[0] > found[1] + 0.1


# The release ------------------------------------------------------------------------------------


def releaser(tmp_path, noise=4.0, epsilon=1e3, n=400):
    stage = StagePlan(noise_multiplier=noise, sample_rate=1.0, count=1, share=1.0)
    plan = dataclasses.replace(plan_of(epsilon, n), head=stage)
    return Releaser(
        key=KEY, ledger=Ledger.create(tmp_path / "ledger.jsonl", plan_of(epsilon)), plan=plan
    )


def noise_on_the_sums_alone(total, multiplier, stream):
    return [noisy_sum(total, multiplier, stream)[0], *total.values()[1:]]


def noise_per_class(total, multiplier, stream):
    drawn = [noisy_sum(total, multiplier, stream) for _ in range(CLASSES)]
    exact = total.values()
    return [e + sum(d[i] - e for d in drawn) for i, e in enumerate(exact)]


def check_noise(tmp_path):
    """Asserts the variance of sums, counts and energy over many data sets (chi-square)."""
    rows = projection()
    found = releaser(tmp_path)
    noise = [[], [], []]
    for seed in range(30):
        total = exact_sum([images(40, seed)], rows, n_classes=CLASSES)
        noisy = found.gaussian("head", total, stage="head")
        for part, (value, exact) in enumerate(zip(noisy, total.values(), strict=True)):
            noise[part].append((value - exact).numpy().ravel() / 4.0)
    for part in noise:
        check_drawn(np.concatenate(part))


def test_noise_is_as_planned(tmp_path):
    check_noise(tmp_path)


@pytest.mark.parametrize(
    "mechanism", [without_noise, half_the_noise, noise_on_the_sums_alone, noise_per_class]
)
def test_broken_twins_are_rejected(tmp_path, monkeypatch, mechanism):
    monkeypatch.setattr(noise_module, "noisy_sum", mechanism)
    with pytest.raises(AssertionError):
        check_noise(tmp_path)


def test_the_event_is_on_disk_before_noise_exists(tmp_path, monkeypatch):
    door = releaser(tmp_path)

    def crash(*arguments):
        (event,) = Ledger.open(tmp_path / "ledger.jsonl").events()
        assert (event.release, event.stage) == ("head", "head")
        assert event.event == door.plan.head.event()
        raise KeyboardInterrupt

    monkeypatch.setattr(noise_module, "noisy_sum", crash)
    with pytest.raises(KeyboardInterrupt):
        release_head(sum_of(400), projection(), releaser=door)


def test_a_replay_is_free_and_other_records_are_refused_by_the_budget(tmp_path):
    door = releaser(tmp_path, noise=1.0, epsilon=5.5)
    first = release_head(sum_of(400), projection(), releaser=door)
    again = release_head(sum_of(400), projection(), releaser=door)
    assert [e.replay for e in door.ledger.events()] == [False, True]
    assert np.array_equal(first.means, again.means)
    with pytest.raises(BudgetError):
        release_head(sum_of(400, seed=1), projection(), releaser=door)


# What the head knows of itself --------------------------------------------------------------------


def accuracy(head: ClassHead, n=2000) -> float:
    features, labels = images(n, seed=77)
    return float((head.log_likelihoods(features).argmax(1) == labels).mean())


def test_a_head_of_many_records_labels_right_and_says_so():
    head = released(n=4000, noise=1.0)
    assert accuracy(head) > 0.97 and head.useful
    assert abs(head.reliability - accuracy(head)) < 0.03
    assert np.allclose(head.shares, 0.25, atol=0.03) and abs(head.variance - 1) < 0.3


def test_reliability_follows_accuracy_as_noise_grows():
    for noise in (5.0, 10.0, 20.0):
        heads = [released(n=400, noise=noise, seed=seed) for seed in range(12)]
        gap = np.mean([head.reliability - accuracy(head, 400) for head in heads])
        assert abs(gap) < 0.12


def test_a_head_of_noise_alone_knows_that_it_is_worth_nothing():
    useful = [released(n=400, noise=400.0, seed=seed).useful for seed in range(20)]
    assert sum(useful) <= 1
    rows = projection()
    empty = [np.zeros((CLASSES, SIZE)), np.zeros(CLASSES), np.zeros(1)]
    head = from_noisy(empty, rows, noise_multiplier=1e6, n_records=400)
    assert head.reliability == pytest.approx(1 / CLASSES) and not head.useful


def test_shrinkage_helps_where_means_are_noisy():
    rows = projection()
    true = rows(CENTRES.astype(np.float32))
    gains = []
    for seed in range(10):
        total = exact_sum([images(400)], rows, n_classes=CLASSES)
        rng = np.random.default_rng(seed)
        noisy = [part.numpy() + 15 * rng.normal(size=part.shape) for part in total.values()]
        head = from_noisy(noisy, rows, noise_multiplier=15.0, n_records=400)
        weights = Weights.of(SIZE)
        counts = noisy[1] / weights.count
        plain = noisy[0] * rows.radius / weights.sums / counts[:, None]
        gains.append(np.square(plain - true).sum() - np.square(head.means - true).sum())
    assert np.mean(gains) > 0 and sum(gain > 0 for gain in gains) >= 8


def test_a_saved_head_is_the_same_to_the_byte(tmp_path):
    head = released()
    head.save(tmp_path / "a.npz")
    found = ClassHead.load(tmp_path / "a.npz")
    found.save(tmp_path / "b.npz")
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    features, _ = images(30)
    assert np.array_equal(head.log_likelihoods(features), found.log_likelihoods(features))
    (tmp_path / "a.npz").write_bytes(b"PK\x03\x04")
    for name in ("a.npz", "none.npz"):
        with pytest.raises(DataError, match="not a private head"):
            ClassHead.load(tmp_path / name)


# The price --------------------------------------------------------------------------------------


def budget(epsilon: float, n: int) -> Budget:
    return Budget(epsilon=epsilon, delta=1 / (n * np.log(n)), accountant="rdp")


def test_a_head_is_chosen_where_records_and_budget_make_it_reliable():
    def suits(n, epsilon, n_classes=10):
        facts = Facts(n_records=n, n_classes=n_classes)
        return head_suits(facts, budget(epsilon, n))

    assert suits(1297, 10.0) and suits(50_000, 1.0)
    assert not suits(1297, 0.2) and not suits(200, 1.0) and not suits(1297, 1.0, n_classes=100)
    grid = [[suits(n, e) for e in (0.1, 0.3, 1.0, 3.0, 10.0)] for n in (100, 1000, 10_000)]
    assert all(sorted(row) == row for row in grid)  # never lost again as epsilon grows


def test_directions_fall_with_noise_and_end_with_the_features():
    assert directions(1e6, 1.0, dimension=96) == 32 and directions(1e6, 1.0, dimension=8) == 8
    assert directions(130, 0.0, dimension=96) == 32 and directions(1, 1e5, dimension=96) == 1
    facts = Facts(n_records=1297)
    assert head_noise(facts, budget(1.0, 1297)) > head_noise(facts, budget(10.0, 1297))


def test_projections_find_what_tells_public_groups_apart():
    # only two of twelve directions tell the groups apart
    centres = np.zeros((4, DIMENSION))
    centres[:, 3], centres[:, 7] = [5, -5, 0, 0], [0, 0, 5, -5]
    features, groups = images(2000, centres=centres)
    found = Spread.of(features, groups).projection(2, kind="test")
    used = np.abs(found.directions)
    assert used[[3, 7]].max(1).min() > 5 * np.delete(used, [3, 7], 0).max()
    assert (np.linalg.norm(found(features * 100), axis=1) <= found.radius * (1 + 1e-12)).all()
