"""Which images of one data set are copied into another."""

from __future__ import annotations

import numpy as np
import pytest

from sapf_ray.privacy.verdict import PrivacyNote
from sapf_ray.synthesis.recipe import Recipe, adopt
from sapf_ray.synthesis.sampling_plan import SamplingPlan
from sapf_ray.synthesis.writer import is_complete, write_manifest, write_shard

NAMES, PROMPTS = ("ant", "bee", "cat"), ("an ant", "a bee", "a cat")


def recipe_of(**parts) -> Recipe:
    return Recipe(parts={"sampling": 1, **parts}, shard_size=8, batch_size=4)


def plan_of(n_images: int, seed: int = 5) -> SamplingPlan:
    return SamplingPlan(n_images=n_images, n_classes=3, shard_size=8, seed=seed)


@pytest.fixture
def donor(tmp_path):
    """22 images, the last six in a shard of their own."""

    def make(recipe: Recipe):
        plan = plan_of(22)
        (tmp_path / "donor").mkdir()
        images = np.random.default_rng(0).integers(0, 256, (22, 6, 6, 3), dtype=np.uint8)
        described = {"class_names": NAMES, "prompts": PROMPTS, "spec": recipe.spec(22)}
        for shard in plan.shards:
            rows = images[shard.start : shard.stop]
            write_shard(tmp_path / "donor", plan, shard=shard, images=rows, **described)
        write_manifest(tmp_path / "donor", plan, privacy_note=PrivacyNote(text=""), **described)
        return tmp_path / "donor"

    return make


@pytest.mark.parametrize(
    ("n_images", "copied"),
    [
        (40, [0, 1]),  # the third has six images there, eight here
        (22, [0, 1, 2]),
        (12, [0, 1]),  # four of eight: a whole batch
        (11, [0]),  # three of eight: another batch, other last bits
        (21, [0, 1]),
    ],
)
def test_shards_of_the_same_batches_are_copied(donor, tmp_path, n_images, copied):
    recipe, plan = recipe_of(), plan_of(n_images)
    left = adopt(tmp_path, plan, missing=plan.shards, donors=[donor(recipe)], recipe=recipe)
    made = [i for i, shard in enumerate(plan.shards) if shard not in left]
    assert made == copied
    for i in made:
        spec = recipe.spec(n_images)
        assert is_complete(tmp_path, plan, shard=plan.shards[i], spec=spec)


def test_nothing_is_copied_from_what_was_made_otherwise(donor, tmp_path):
    theirs = donor(recipe_of())
    for recipe, seed in ((recipe_of(sampling=2), 5), (recipe_of(), 6)):
        plan = plan_of(22, seed)
        left = adopt(tmp_path, plan, missing=plan.shards, donors=[theirs], recipe=recipe)
        assert left == plan.shards
    (theirs / "manifest.json").write_text("{")
    plan = plan_of(22)
    assert len(adopt(tmp_path, plan, missing=plan.shards, donors=[theirs], recipe=recipe_of())) == 3


def test_labels_that_a_head_gave_a_whole_shard_are_not_cut(donor, tmp_path):
    recipe, plan = recipe_of(labels=["head"]), plan_of(12)
    left = adopt(tmp_path, plan, missing=plan.shards, donors=[donor(recipe)], recipe=recipe)
    assert left == plan.shards[1:]
