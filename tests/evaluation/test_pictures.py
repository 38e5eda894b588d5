"""Images that are read a part at a time: what comes out, where it lies, what memory it takes."""

from __future__ import annotations

import os
import threading
import tracemalloc

import numpy as np
import pytest

from sapf_ray.config import EvaluationConfig
from sapf_ray.data.base import SKIPPED, ImageSource
from sapf_ray.errors import DataError
from sapf_ray.evaluation.downstream import accuracy_on_test
from sapf_ray.evaluation.features import FeatureSpace
from sapf_ray.evaluation.fidelity import features_of
from sapf_ray.evaluation.inputs import TEST, Inputs
from sapf_ray.evaluation.launcher import _folder
from sapf_ray.evaluation.pictures import InMemory, OnDisk, ahead, part_size, source_parts, store
from sapf_ray.evaluation.protocols import Recipe

MB = 2**20


class Stripes(ImageSource):
    """Images made from their position; every seventh cannot be read."""

    name, class_names, prompts = "stripes", ("a", "b"), ("A", "B")

    def __init__(self, n, skips=False):
        self.n_train = self.n_test = n
        self.skips = skips

    def read(self, split, indices, *, resolution):
        images = np.empty((len(indices), resolution, resolution, 3), np.uint8)
        images[:] = (indices % 251)[:, None, None, None]
        labels = indices % 2
        return images, np.where(self.skips & (indices % 7 == 0), SKIPPED, labels)

    def labels(self, split):
        return np.arange(self.n_test) % 2

    def fingerprint(self):
        return "stripes"

    def verify(self, splits=("train", "test")):
        pass


def stored(folder, source, side=8, **options):
    return store(folder, lambda: source_parts(source, "test", side=side, **options), side=side)


def test_what_is_stored_is_what_the_source_has(tmp_path):
    pictures = stored(tmp_path / "set", Stripes(2500))
    rows = np.array([2499, 3, 3, 0])
    assert np.array_equal(pictures.read(rows)[:, 4, 4, 1], rows % 251)
    assert (len(pictures), pictures.side) == (2500, 8)
    assert np.array_equal(
        np.concatenate(list(pictures.batches(700))), pictures.read(np.arange(2500))
    )
    assert pictures.read(np.array([], int)).shape == (0, 8, 8, 3)
    some = stored(tmp_path / "some", Stripes(50, skips=True), rows=np.arange(0, 50, 2))
    kept = [row for row in range(0, 50, 2) if row % 7]
    assert some.read(np.arange(len(some)))[:, 0, 0, 0].tolist() == kept
    assert some.labels.tolist() == [0] * len(kept)


def test_it_is_written_once_for_its_owner_alone(tmp_path):
    first = stored(tmp_path / "work" / "set", Stripes(20))
    again = store(tmp_path / "work" / "set", lambda: pytest.fail("decoded again"), side=8)
    assert np.array_equal(again.labels, first.labels) and isinstance(again, OnDisk)
    modes = {path.name: path.stat().st_mode & 0o777 for path in first.path.parent.iterdir()}
    assert modes["pixels.bin"] == modes["labels.npy"] == 0o600
    assert first.path.parent.stat().st_mode & 0o777 == 0o700


def test_what_a_killed_writer_left_is_no_set(tmp_path):
    def cut_off():
        yield np.zeros((4, 8, 8, 3), np.uint8), np.zeros(4, np.int64)
        raise DataError("image 5 cannot be read")

    with pytest.raises(DataError, match="image 5"):
        store(tmp_path / "set", cut_off, side=8)
    assert len(stored(tmp_path / "set", Stripes(30))) == 30


def test_the_folder_of_a_run_is_gone_afterwards_whatever_happens(tmp_path):
    work = tmp_path / "private" / "evaluation"
    inputs = Inputs(
        synthetic_dir="",
        source=Stripes(9),
        resolution=8,
        config=EvaluationConfig(),
        seed=0,
        work=str(work),
    )
    work.mkdir(parents=True)
    (work / "stale").touch()
    with pytest.raises(KeyboardInterrupt), _folder(work):
        assert not (work / "stale").exists() and work.stat().st_mode & 0o777 == 0o700
        assert len(inputs.restricted_to([TEST]).test) == 9 and (work / "test").is_dir()
        raise KeyboardInterrupt
    assert not (tmp_path / "private").exists()
    (tmp_path / "private").mkdir()
    (tmp_path / "private" / "latents").touch()
    with _folder(work):
        pass
    assert os.listdir(tmp_path / "private") == ["latents"]


def test_without_a_folder_there_is_one_as_long_as_the_pictures_live():
    inputs = Inputs(
        synthetic_dir="", source=Stripes(9), resolution=8, config=EvaluationConfig(), seed=0
    )
    pictures = inputs.test
    folder = pictures.path.parent.parent
    del inputs
    assert pictures.read(np.array([5]))[0, 0, 0, 0] == 5 and folder.stat().st_mode & 0o77 == 0
    del pictures
    assert not folder.exists()


def test_one_ahead_and_no_more():
    made, wanted = [], []

    def items():
        for number in range(50):
            made.append(number)
            yield number

    for number in ahead(items()):
        wanted.append(number)
        assert len(made) - len(wanted) <= 2
    assert wanted == list(range(50))
    before = threading.active_count()
    for _ in ahead(items()):
        break
    assert threading.active_count() == before, "who stops early leaves no thread"
    with pytest.raises(ZeroDivisionError):
        list(ahead(1 // n for n in (1, 0)))


def test_parts_are_bounded_whatever_the_side():
    assert all(3 * side**2 * part_size(side) <= 64 * MB for side in (8, 32, 256, 512, 4096))


# Memory -------------------------------------------------------------------------------------------


def tiny_network(n_classes, side):
    from torch import nn

    features = 2 * (side // 8) ** 2
    return nn.Sequential(nn.Conv2d(3, 2, 8, 8), nn.Flatten(), nn.Linear(features, n_classes))


def features_and_training(pictures):
    """A pass of feature extraction, and one epoch of a classifier with its test."""
    space = FeatureSpace(layer="96", options=lambda config: {"feature_extractor": "sapf-mean"})
    features_of(pictures, ["96"], space=space, config=EvaluationConfig())
    recipe = Recipe(build=tiny_network, epochs=1, batch_size=256, learning_rate=1e-3)
    accuracy_on_test(recipe, pictures, pictures, n_classes=2, seed=0)


@pytest.fixture
def mean_extractor():
    """A network that takes no time."""
    import torch_fidelity
    from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY

    from sapf_ray.evaluation.extractors import GlyphExtractor

    class Mean(GlyphExtractor):
        def forward(self, input):
            return (input.double().mean((2, 3)).repeat(1, 32),)

    torch_fidelity.register_feature_extractor("sapf-mean", Mean)
    yield
    del FEATURE_EXTRACTORS_REGISTRY["sapf-mean"]


def peak(work):
    """Bytes that numpy and Python hold at most, beyond what there was."""
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("n", [6000, pytest.param(60_000, marks=pytest.mark.long)])
def test_memory_is_that_of_a_few_parts_whatever_the_number(n, tmp_path, mean_extractor):
    """Beside it a twin that holds all pixels, as evaluation once did: the bound rejects it."""
    source = Stripes(n)

    def streamed():
        features_and_training(stored(tmp_path / "set", source, side=64))

    def held():
        images, labels = source.read_whole("test", resolution=64)
        features_and_training(InMemory(pixels=images, labels=labels))

    bound = 50 * MB
    assert peak(streamed) < bound < min(peak(held), n * 3 * 64**2)
