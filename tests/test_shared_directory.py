"""A run directory counts as shared where every node sees it and its locks keep nodes apart."""

from __future__ import annotations

import subprocess
import sys

import pytest

from sapf_ray import locks
from sapf_ray.errors import ClusterError
from sapf_ray.shared_directory import check_seen, look

ELSEWHERE = "from sapf_ray.shared_directory import look; import sys; print(look(sys.argv[1]))"


def on_a_node(path) -> str:
    """What another process finds, as a node's would."""
    words = [sys.executable, "-c", ELSEWHERE, str(path)]
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()


def test_a_lock_that_the_driver_holds_keeps_a_node_out(tmp_path):
    path = tmp_path / "probe"
    path.write_text("token")
    with open(path, "r+") as file, locks.locked(file):
        assert on_a_node(path) == "('token', False)"
    assert look(str(path)) == ("token", True), "free again, as where locks are a node's own"
    assert look(str(tmp_path / "nowhere")) == (None, False)


@pytest.mark.parametrize(
    ("text", "could_lock", "words"),
    [
        (None, False, "/run: node b of the cluster does not see it"),
        ("another", False, "does not see it"),
        ("token", True, "/run: node b of the cluster is not kept out by the driver's lock"),
    ],
)
def test_a_node_of_its_own_is_refused(text, could_lock, words):
    with pytest.raises(ClusterError, match=words):
        check_seen(text, could_lock, token="token", where="/run: node b")


def test_a_node_that_sees_and_is_kept_out_is_not():
    check_seen("token", False, token="token", where="/run: node b")
