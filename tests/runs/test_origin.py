"""A ledger's header: the same images are known again, and cannot be guessed."""

from __future__ import annotations

import re
import shutil
import stat

import numpy as np
import pytest
from PIL import Image

from sapf_ray import __version__
from sapf_ray.config import RunConfig, from_dict
from sapf_ray.data.base import open_source
from sapf_ray.data.canary_images import CanaryImages
from sapf_ray.data.held_out import WithoutHeldOut, draw_split
from sapf_ray.data.identity import images_digest
from sapf_ray.errors import ConfigError
from sapf_ray.files import file_digest
from sapf_ray.privacy.keyed_rng import NoiseKey
from sapf_ray.runs import origin as module
from sapf_ray.runs.directory import RunDirectory
from sapf_ray.runs.origin import code_version, origin


@pytest.fixture
def photos(tmp_path):
    root = tmp_path / "photos"
    generator = np.random.default_rng(3)
    for name in ("cat", "dog"):
        (root / name).mkdir(parents=True)
        for i in range(3):
            pixels = generator.integers(0, 256, (32, 32, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(root / name / f"{i}.png")
    return root


def config_of(path, **cluster) -> RunConfig:
    data = {"source": "image_folder", "path": str(path)}
    return from_dict({"data": data, "cluster": cluster})


def images_of(tmp_path, photos, **cluster):
    """The header's part on the images, of a new run."""
    config = config_of(photos, **cluster)
    directory = RunDirectory(tmp_path / "run")
    directory.claim(config)
    directory.release()
    found = origin(config, directory, source=open_source(config.data))
    assert found["config"] == file_digest(directory.config)
    assert found["versions"]["torch"] and found["code"].startswith(__version__)
    return found["images"]


def test_the_same_images_are_known_again_whatever_their_path_names_and_labels(tmp_path, photos):
    before = images_of(tmp_path, photos)
    moved = tmp_path / "elsewhere"
    shutil.copytree(photos, moved)  # other times
    (moved / "cat" / "2.png").rename(moved / "dog" / "renamed.png")
    shutil.rmtree(tmp_path / "run")
    assert images_of(tmp_path, moved) == before
    pixels = np.array(Image.open(moved / "dog" / "0.png"))
    pixels[0, 0, 0] ^= 1
    Image.fromarray(pixels).save(moved / "dog" / "0.png")
    shutil.rmtree(tmp_path / "run")
    assert images_of(tmp_path, moved)["fingerprint"] != before["fingerprint"]


def test_without_the_secret_no_guess_of_the_images_can_be_tested(tmp_path, photos):
    """Another secret, another fingerprint: nothing that is made of the images alone gives it."""
    one = images_of(tmp_path, photos, images_secret=str(tmp_path / "one" / "secret"))
    shutil.rmtree(tmp_path / "run")
    other = images_of(tmp_path, photos, images_secret=str(tmp_path / "other" / "secret"))
    assert one["fingerprint"] != other["fingerprint"] and one["secret"] != other["secret"]
    digest = images_digest(open_source(config_of(photos).data))
    assert digest not in one.values()
    secret = tmp_path / "one" / "secret"
    assert stat.S_IMODE(secret.stat().st_mode) == 0o600
    assert stat.S_IMODE(secret.parent.stat().st_mode) == 0o700
    shutil.rmtree(tmp_path / "run")
    assert images_of(tmp_path, photos, images_secret=str(secret)) == one


def test_canaries_do_not_make_other_images(photos, tmp_path):
    source = open_source(config_of(photos).data)
    audited = CanaryImages(source, count=4, coins=tmp_path / "audit" / "coins.npy")
    assert images_digest(audited) == images_digest(source)


def test_images_held_out_for_a_private_choice_do_not_make_other_images(photos, tmp_path):
    source = open_source(config_of(photos).data)
    split = tmp_path / "split.npy"
    draw_split(split, source.n_train, 2, key=NoiseKey.create(0))
    trial = WithoutHeldOut(source, held_out=2, split=split)
    assert trial.n_train == source.n_train - 2
    assert images_digest(trial) == images_digest(source)


def test_of_many_images_some_are_looked_at(photos, monkeypatch):
    monkeypatch.setattr("sapf_ray.data.identity.LOOKED_AT", 2)
    source = open_source(config_of(photos).data)
    read = []
    inner = source.read
    source.read = lambda split, places, **rest: read.extend(places) or inner(split, places, **rest)
    assert images_digest(source) == images_digest(open_source(config_of(photos).data))
    assert len(read) == 2


@pytest.mark.parametrize("content", ["", "not hex", "abcd"])
def test_a_file_that_is_no_secret_is_refused_in_one_line(tmp_path, photos, content):
    (tmp_path / "secret").write_text(content)
    with pytest.raises(ConfigError, match=r"cluster\.images_secret = .*cannot be used") as error:
        images_of(tmp_path, photos, images_secret=str(tmp_path / "secret"))
    assert "\n" not in str(error.value)


def test_a_home_that_cannot_be_written_costs_a_warning(tmp_path, photos, monkeypatch, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(module.PLACE, str(tmp_path / "file" / "secret"))
    assert images_of(tmp_path, photos) is None
    assert "will not know this run's images again" in caplog.text


def test_a_run_that_reads_no_image_has_no_fingerprint(tmp_path):
    directory = RunDirectory(tmp_path / "run")
    directory.claim(RunConfig())
    directory.release()
    assert origin(RunConfig(), directory, source=None)["images"] is None


def test_code_version_names_the_commit_of_a_checkout_of_ours_alone(monkeypatch):
    pattern = rf"{re.escape(__version__)}( \(git [0-9a-f]{{40}}( \+changed)?\))?"
    assert re.fullmatch(pattern, code_version())
    monkeypatch.setattr(module, "_git", lambda folder, *words: "/somebody/elses")
    assert code_version() == __version__
