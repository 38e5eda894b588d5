"""Every odd file and folder is read right, or answered by one line; nothing is silent."""

from __future__ import annotations

import pickle

import numpy as np
import pytest

from sapf_ray.config import DataConfig
from sapf_ray.data import open_source
from sapf_ray.errors import SapfError
from tests.data import corpus
from tests.data.folders import FOLDER_CASES


def one_line(error: BaseException) -> str:
    message = str(error)
    assert message.strip() and len(message.splitlines()) == 1, message
    message.encode()  # can be shown on any terminal of UTF-8
    return message


@pytest.mark.parametrize("case", corpus.IMAGE_CASES, ids=lambda case: case.name)
def test_an_odd_image(case, tmp_path, capfd):
    path = corpus.image_folder(tmp_path, case)
    config = DataConfig(source="image_folder", path=str(tmp_path), **case.settings)
    source = open_source(config)
    assert source.n_train == 3
    position = np.flatnonzero([name.endswith(path.name) for name in source._paths["train"]])
    if case.words:
        for attempt in (source.verify, lambda: source.read("train", position, resolution=12)):
            with pytest.raises(SapfError) as caught:
                attempt()
            message = one_line(caught.value)
            assert all(word in message for word in case.words), message
    else:
        source.verify()
        image = source.read("train", position, resolution=12)[0][0].astype(float)
        assert image.shape == (12, 12, 3)
        assert image[:, :4].mean() < 45 and image[:, -4:].mean() > 160, image[6, :, 0]
    shown = capfd.readouterr()
    assert "Traceback" not in shown.err + shown.out


@pytest.mark.parametrize("case", FOLDER_CASES, ids=lambda case: case.name)
def test_an_odd_folder(case, tmp_path):
    root = tmp_path / "photos"
    root.mkdir()
    case.build(root)
    path = str(root / case.inside)
    config = DataConfig(source="image_folder", path=path, **case.settings)
    if case.words:
        with pytest.raises(SapfError) as caught:
            open_source(config).verify()
        message = one_line(caught.value)
        assert all(word in message for word in case.words), message
        return
    source = open_source(config)
    source.verify()
    assert source.class_names == case.classes
    sizes = (source.n_train, source.n_test)
    assert (sizes if len(case.sizes) == 2 else (sum(sizes),)) == case.sizes
    notes = "; ".join(source.notes())
    assert case.note in notes and bool(notes) == bool(case.note), notes
    notes.encode()
    copy = pickle.loads(pickle.dumps(source))
    assert copy.fingerprint() == source.fingerprint()
    images, labels = copy.read("train", np.arange(source.n_train), resolution=6)
    assert images[:, :, :2].mean() < 45 and images[:, :, -2:].mean() > 160
    assert set(labels.tolist()) <= set(range(len(case.classes)))


def test_the_corpus_is_large():
    assert len(corpus.IMAGE_CASES) >= 150
    assert len({case.name for case in corpus.IMAGE_CASES}) == len(corpus.IMAGE_CASES)
