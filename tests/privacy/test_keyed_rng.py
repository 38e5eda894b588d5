from __future__ import annotations

import json
import stat
import subprocess
import sys

import numpy as np
import pytest
from scipy.stats import kstest

from sapf_ray.errors import RunDirectoryError
from sapf_ray.privacy.keyed_rng import NoiseKey, NoiseStream

KEY = NoiseKey(bytes(range(32)))
USES = [("noise", 0), ("noise", 1), ("noise", 0, 1), ("sample", 0), ("noise",), ("noise", 10)]


def draw(stream: NoiseStream) -> np.ndarray:
    return stream.uniform(4000).numpy()


def test_streams_of_different_uses_are_uncorrelated_and_repeat():
    drawn = np.stack([draw(KEY.stream(*use)) for use in USES])
    correlation = np.corrcoef(drawn) - np.eye(len(USES))
    assert np.abs(correlation).max() < 5 / np.sqrt(4000)
    assert all((draw(KEY.stream(*use)) == row).all() for use, row in zip(USES, drawn, strict=True))


def test_streams_are_uniform():
    drawn = np.concatenate([draw(KEY.stream("uniform", i)) for i in range(10)])
    assert kstest(drawn, "uniform").pvalue > 1e-4


def test_bound_keys_share_no_stream_and_repeat():
    keys = [KEY, KEY.bind("a"), KEY.bind("b"), KEY.bind("a").bind("b"), KEY.bind({"a": 1.5})]
    assert len({key.stream_id("x") for key in keys}) == len(keys)
    assert KEY.bind("a").stream_id("x") == KEY.bind("a").stream_id("x")
    assert not (draw(keys[1].stream("noise")) == draw(keys[2].stream("noise"))).any()
    assert NoiseKey.create(3).bind("a").reproducible and not KEY.bind("a").reproducible


def test_another_key_gives_another_stream():
    other = NoiseKey(bytes(32))
    assert not (draw(KEY.stream("noise", 0)) == draw(other.stream("noise", 0))).any()
    assert KEY.stream_id("a") != other.stream_id("a")


def test_the_same_in_another_process():
    code = (
        "from sapf_ray.privacy.keyed_rng import NoiseKey; k = NoiseKey(bytes(range(32)));"
        "print(k.stream('noise', 3).words(2).tolist(),"
        "k.seeds('s', 1, __import__('numpy').arange(3)).tolist(), k.stream_id('plan', 1))"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split("\n")[0]
    here = (
        f"{KEY.stream('noise', 3).words(2).tolist()} "
        f"{KEY.seeds('s', 1, np.arange(3)).tolist()} {KEY.stream_id('plan', 1)}"
    )
    assert out == here


def test_calls_of_one_stream_are_distinct():
    stream = KEY.stream("noise")
    assert not (stream.words(8) == stream.words(8)).any()


def test_seeds_are_distinct_and_depend_on_their_record_alone():
    records = np.arange(50_000)
    seeds = KEY.seeds("finetune/loss", 3, records)
    assert seeds.dtype == np.uint64 and len(np.unique(seeds)) == len(records)
    part = records[[7, 49_999, 123]]
    assert (KEY.seeds("finetune/loss", 3, part) == seeds[part]).all()
    for other in (KEY.seeds("finetune/loss", 4, records), KEY.seeds("selection/loss", 3, records)):
        assert not np.isin(other, seeds).any()
    bits = ((seeds[:, None] >> np.arange(64, dtype=np.uint64)) & np.uint64(1)).mean(0)
    assert np.abs(bits - 0.5).max() < 5 * 0.5 / np.sqrt(len(records))


def test_numpy_integers_name_the_same_stream():
    assert (KEY.stream("noise", np.int64(3)).words(2) == KEY.stream("noise", 3).words(2)).all()
    assert KEY.stream_id("3") != KEY.stream_id(3)
    with pytest.raises(TypeError):
        KEY.stream_id(object())


def test_key_is_saved_once_with_mode_0600(tmp_path):
    path = tmp_path / "noise_key"
    key = NoiseKey.load_or_create(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert NoiseKey.load_or_create(path).stream_id() == key.stream_id()
    assert not key.reproducible and list(tmp_path.iterdir()) == [path]
    assert NoiseKey.load_or_create(tmp_path / "other").stream_id() != key.stream_id()


def test_reproducible_seed(tmp_path):
    a, b = NoiseKey.load_or_create(tmp_path / "a", 7), NoiseKey.load_or_create(tmp_path / "b", 7)
    assert a.reproducible and a.stream_id() == b.stream_id() != NoiseKey.create(8).stream_id()
    for seed in (8, None):
        with pytest.raises(RunDirectoryError, match="reproducible_seed"):
            NoiseKey.load_or_create(tmp_path / "a", seed)


def test_the_loser_of_a_race_takes_the_winners_key(tmp_path, monkeypatch):
    path = tmp_path / "noise_key"
    winner = NoiseKey.create()
    save = NoiseKey._save

    def late(self, target):
        save(winner, target)
        save(self, target)

    monkeypatch.setattr(NoiseKey, "_save", late)
    assert NoiseKey.load_or_create(path).stream_id() == winner.stream_id()


@pytest.mark.parametrize(
    "text", ["", "{", '{"key": "00", "reproducible": false}', "[]", '{"key": 1}']
)
def test_damaged_key(tmp_path, text):
    path = tmp_path / "noise_key"
    path.write_text(text)
    with pytest.raises(RunDirectoryError, match="noise_key"):
        NoiseKey.load_or_create(path)


def test_missing_folder(tmp_path):
    with pytest.raises(RunDirectoryError):
        NoiseKey.load_or_create(tmp_path / "no" / "noise_key")


def test_key_is_never_shown():
    shown = f"{KEY!r} {KEY} {KEY.stream('noise')!r} {KEY.stream_id('plan')} {KEY.stream('noise')}"
    assert bytes(range(32)).hex() not in shown and "\\x01\\x02" not in shown
    assert json.dumps(KEY.stream_id({"plan": 1.5}, "data"))
