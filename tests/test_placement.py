"""What `auto` becomes on faked clusters: a GPU for every stage where there are any."""

from __future__ import annotations

import socket

import pytest
import ray

from sapf_ray import cluster
from sapf_ray.config import RunConfig, from_dict, nest, to_dict
from sapf_ray.errors import ConfigError
from sapf_ray.placement import Gpus, cluster_gpus, idle_gpus, placed, words


def config(**changes) -> RunConfig:
    return from_dict(nest(changes))


def fake_cluster(monkeypatch, gpus: float, *, hosts=("a", "b")) -> None:
    each = {"CPU": 8.0} | ({"GPU": gpus / len(hosts)} if gpus else {})
    nodes = [{"Alive": True, "NodeManagerHostname": host, "Resources": each} for host in hosts]
    total = {kind: len(hosts) * number for kind, number in each.items()}
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    monkeypatch.setattr(ray, "cluster_resources", lambda: total)


def test_every_stage_takes_gpus_where_there_are_any_and_all_of_it_fits(monkeypatch):
    fake_cluster(monkeypatch, 4)
    found = placed(config(), cluster_gpus(), model_gb=5.0)
    assert [want.gpus for want in cluster.wants(found)] == [1.0] * 4
    assert found.finetune.workers == 4
    cluster.check(found)
    evolution = {"evolution.enabled": True, "finetune.steps": 0}
    evolving = placed(config(**evolution), cluster_gpus(), model_gb=5.0)
    assert evolving.evolution.gpus == 1.0
    assert idle_gpus(found, cluster_gpus()) is None


def test_a_cluster_without_gpus_runs_on_cpus(monkeypatch):
    fake_cluster(monkeypatch, 0)
    found = placed(config(), cluster_gpus(), model_gb=5.0)
    assert not any(want.gpus for want in cluster.wants(found))
    assert found.finetune.workers == 1 and found.saliency.gpus_per_task == 0.0
    assert "GPU" not in words(found)


def test_what_the_user_set_stays_and_gpus_that_lie_idle_are_told(monkeypatch):
    fake_cluster(monkeypatch, 4)
    given = {"finetune.gpus_per_worker": 2.0, "synthesis.gpus_per_actor": 0.0}
    found = placed(config(**given), cluster_gpus(), model_gb=5.0)
    assert found.finetune.workers == 2 and found.finetune.gpus == 2.0
    assert found.synthesis.gpus == 0.0
    warning = idle_gpus(found, cluster_gpus())
    assert warning is not None and "synthesis.gpus_per_actor is 0" in warning
    assert placed(found, Gpus(count=0), model_gb=5.0) == found, "numbers are not placed again"


@pytest.mark.parametrize(("memory", "share"), [(None, 1.0), (10.0, 1.0), (16.0, 0.5)])
def test_two_actors_share_a_gpu_that_holds_two_models(memory, share):
    found = placed(config(), Gpus(count=2, memory_gb=memory), model_gb=6.0)
    assert found.synthesis.gpus == share


def test_memory_is_asked_for_on_one_machine_alone(monkeypatch):
    from sapf_ray import placement

    monkeypatch.setattr(placement, "_least_memory_gb", lambda: 80.0)
    fake_cluster(monkeypatch, 2, hosts=(socket.gethostname(),))
    assert cluster_gpus() == Gpus(count=2, memory_gb=80.0)
    fake_cluster(monkeypatch, 2)
    assert cluster_gpus() == Gpus(count=2)


def test_auto_is_a_word_for_no_number():
    auto = {"finetune.gpus_per_worker": "auto", "finetune.num_workers": "auto"}
    assert config(**auto) == config()
    assert from_dict(to_dict(config(**auto))) == config()
    with pytest.raises(ConfigError, match=r"finetune.num_workers = 0: .* at least 1, or auto"):
        config(**{"finetune.num_workers": 0})
    with pytest.raises(ConfigError, match=r"saliency.gpus_per_task = 'all': .*, or auto"):
        config(**{"saliency.gpus_per_task": "all"})
