from __future__ import annotations

import io
import json

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from sapf_ray.errors import DataError
from sapf_ray.privacy.verdict import PrivacyNote
from sapf_ray.synthesis.sampling_plan import SamplingPlan
from sapf_ray.synthesis.writer import (
    is_complete,
    read_synthetic,
    remove_foreign,
    write_manifest,
    write_shard,
)

NAMES, PROMPTS = ("ant", "bee", "cat"), ("an ant", "a bee", "a cat")
PLAN = SamplingPlan(n_images=22, n_classes=3, shard_size=8, seed=5)
IMAGES = np.random.default_rng(0).integers(0, 256, (22, 6, 6, 3), dtype=np.uint8)


@pytest.fixture
def data_set(tmp_path):
    for shard in PLAN.shards:
        write_shard(
            tmp_path,
            PLAN,
            shard=shard,
            images=IMAGES[shard.start : shard.stop],
            class_names=NAMES,
            prompts=PROMPTS,
            spec="spec",
        )
    write_manifest(
        tmp_path,
        PLAN,
        class_names=NAMES,
        prompts=PROMPTS,
        spec="spec",
        privacy_note=PrivacyNote(text="epsilon = 1"),
    )
    return tmp_path


def test_what_is_written_is_read(data_set):
    images, labels = read_synthetic(data_set)
    assert images.dtype == np.uint8 and np.array_equal(images, IMAGES)
    assert labels.dtype == np.int64 and labels.tolist() == [i % 3 for i in range(22)]


def test_parquet_is_readable_and_described(data_set):
    table = pq.read_table(sorted(data_set.glob("*.parquet")))
    assert table.column_names == ["image", "label", "prompt", "seed"]
    features = json.loads(table.schema.metadata[b"huggingface"])["info"]["features"]
    assert features["image"] == {"_type": "Image"}
    assert features["label"] == {"_type": "ClassLabel", "names": list(NAMES)}
    rows = table.to_pylist()
    assert [row["image"]["path"] for row in rows] == [f"{i:08d}.png" for i in range(22)]
    assert all(row["prompt"] == PROMPTS[row["label"]] for row in rows)
    assert [row["seed"] for row in rows] == np.concatenate(
        [PLAN.seeds(s) for s in PLAN.shards]
    ).tolist()
    assert Image.open(io.BytesIO(rows[0]["image"]["bytes"])).format == "PNG"


def test_a_shard_is_complete_only_for_its_own_plan_and_spec(data_set):
    first = PLAN.shards[0]
    assert all(is_complete(data_set, PLAN, shard=shard, spec="spec") for shard in PLAN.shards)
    assert not is_complete(data_set, PLAN, shard=first, spec="other")
    other_seed = SamplingPlan(n_images=22, n_classes=3, shard_size=8, seed=6)
    assert not is_complete(data_set, other_seed, shard=other_seed.shards[0], spec="spec")
    fewer_rows = SamplingPlan(
        n_images=21, n_classes=3, shard_size=7, seed=5
    )  # as many shards, so the same file names
    assert not is_complete(data_set, fewer_rows, shard=fewer_rows.shards[0], spec="spec")


@pytest.mark.parametrize("keep", [0, 4, 0.5, -1])
def test_a_truncated_shard_is_not_complete(data_set, keep):
    shard = PLAN.shards[1]
    path = data_set / shard.file
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content)) if isinstance(keep, float) else keep])
    assert not is_complete(data_set, PLAN, shard=shard, spec="spec")
    with pytest.raises(DataError, match=shard.file) as caught:
        read_synthetic(data_set)
    assert "\n" not in str(caught.value)


def test_shards_of_another_layout_and_partial_files_go(data_set):
    (data_set / ".train-00000-of-00003.parquet.9f.partial").write_bytes(b"left behind")
    (data_set / "notes.txt").write_text("mine")
    remove_foreign(data_set, PLAN, spec="spec")
    assert {p.name for p in data_set.iterdir()} == {
        *(s.file for s in PLAN.shards),
        "manifest.json",
        "README.md",
        "notes.txt",
    }
    remove_foreign(
        data_set, SamplingPlan(n_images=22, n_classes=3, shard_size=11, seed=5), spec="another"
    )
    assert {p.name for p in data_set.iterdir()} == {"README.md", "notes.txt"}


def test_the_card_tells_privacy_prompts_and_counts(data_set):
    card = (data_set / "README.md").read_text()
    assert card.startswith("---\n") and "epsilon = 1" in card
    assert "| 1 | bee | a bee | 7 |" in card
    assert "license" not in card.lower()


def test_an_unfinished_data_set_is_not_read(data_set):
    (data_set / "manifest.json").unlink()
    with pytest.raises(DataError, match=r"manifest\.json: no such file"):
        read_synthetic(data_set)
