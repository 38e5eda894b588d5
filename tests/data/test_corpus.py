"""Every odd file and folder is read right, or answered by one line; nothing is silent."""

from __future__ import annotations

import numpy as np
import pytest

from sapf_ray.config import DataConfig
from sapf_ray.data import open_source
from sapf_ray.errors import SapfError
from tests.data import corpus


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


def test_the_corpus_is_large():
    assert len(corpus.IMAGE_CASES) >= 150
    assert len({case.name for case in corpus.IMAGE_CASES}) == len(corpus.IMAGE_CASES)
