"""Labels by a head: the right ones where it is reliable, the prompt's where it is not."""

from __future__ import annotations

import dataclasses

import numpy as np

from sapf_ray.models.class_head import ClassHead
from sapf_ray.synthesis.labelling import RELABEL, certainties, choose, prompt_reliability
from tests.grounding.test_head import CENTRES, CLASSES, images, released


def wrong_prompts(labels, share, seed=0):
    """Classes of prompts that name the class shown in a share of images only."""
    rng = np.random.default_rng(seed)
    other = (labels + rng.integers(1, CLASSES, len(labels))) % CLASSES
    return np.where(rng.random(len(labels)) < share, labels, other)


def head() -> ClassHead:
    return released(n=4000, noise=1.0)


def test_balance_gives_every_class_its_planned_number_of_images_that_show_it():
    features, shown = images(300, seed=3)
    planned = np.arange(100) % CLASSES
    for share in (0.3, 0.9):
        requested = wrong_prompts(shown, share)
        chosen = choose(head(), features, requested=requested, planned=planned)
        assert np.array_equal(chosen.labels, planned)
        assert len(set(chosen.rows.tolist())) == 100
        assert (shown[chosen.rows] == planned).mean() > 0.98


def test_relabelled_images_keep_their_place():
    features, shown = images(100, seed=4)
    requested = wrong_prompts(shown, 0.5)
    chosen = choose(head(), features, requested=requested, planned=requested, rule=RELABEL)
    assert chosen.rows.tolist() == list(range(100))
    assert (chosen.labels == shown).mean() > 0.98


def test_a_noisy_head_yields_to_prompts_that_are_right():
    noisy = released(n=400, noise=400.0)
    features, shown = images(200, seed=5)
    chosen = choose(noisy, features, requested=shown, planned=shown[:60], rule=RELABEL)
    by_head_alone = noisy.log_likelihoods(features).argmax(1)
    assert (chosen.labels == shown[:60]).mean() > (by_head_alone == shown).mean()


def test_a_head_of_no_opinion_leaves_the_labels_of_the_prompts_and_keeps_what_is_typical():
    sharp = head()
    flat = dataclasses.replace(
        sharp, means=np.zeros((CLASSES, 5)), mean_variance=np.zeros((CLASSES, 5))
    )
    features, shown = images(120, seed=6)
    centre = sharp.projection.centre
    features = (centre + 0.1 * (features - centre)).astype(np.float32)  # none is far out
    planned = shown[:60]
    chosen = choose(flat, features, requested=shown, planned=planned)
    assert np.array_equal(shown[chosen.rows], planned)
    density = flat.log_likelihoods(features)[:, 0]
    for label in range(CLASSES):
        own = np.flatnonzero(shown == label)
        typical = own[np.argsort(-density[own])][: (planned == label).sum()]
        assert set(chosen.rows[planned == label]) == set(typical)


def test_the_reliability_of_prompts_is_found():
    features, shown = images(400, seed=7)
    for share in (0.3, 0.6, 0.95):
        requested = wrong_prompts(shown, share)
        likelihoods = head().log_likelihoods(features)
        heard = likelihoods - np.logaddexp.reduce(likelihoods, 1, keepdims=True)
        assert abs(prompt_reliability(heard, requested) - share) < 0.08
        assert np.allclose(np.exp(certainties(likelihoods, requested)).sum(1), 1)


def test_images_far_from_every_mean_are_less_certain():
    near = CENTRES.astype(np.float32)
    far = near.mean(0, keepdims=True) + 0.4 * (near - near.mean(0))
    both = np.concatenate([near, far])
    own = np.tile(np.arange(CLASSES), 2)
    certain = certainties(head().log_likelihoods(both), own)[np.arange(8), own]
    assert certain[:CLASSES].mean() > certain[CLASSES:].mean()
