"""Gauges as Prometheus reads them from a node's exporter."""

from __future__ import annotations

import re
import urllib.request

import pytest

from sapf_ray.runs.gauges import Meter
from tests.faults.processes import wait_for


@pytest.mark.long  # Ray exports every ten seconds
def test_steps_images_and_epsilon_are_exported_and_nothing_that_tells_more(ray_cluster):
    import ray

    (node,) = ray.nodes()
    meter = Meter("run7", 8.0)
    meter.spent(2.5)
    meter.progress("finetune", 3, total=12)
    meter.progress("synthesis", 10, total=60)
    meter.progress("selection", 3, total=4)
    found: dict[tuple[str, str], float] = {}

    def scraped() -> bool:
        address = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
        text = urllib.request.urlopen(address, timeout=5).read().decode()
        for name, labels, value in re.findall(
            r'^(ray_sapf_\w+)\{(.*run="run7".*)\} (\S+)$', text, re.MULTILINE
        ):
            kind = re.search(r'(?:count|kind)="(\w+)"', labels)
            assert kind is not None
            found[name, kind.group(1)] = float(value)
        return len(found) >= 6

    wait_for("the export", scraped)
    assert found == {
        ("ray_sapf_epsilon", "planned"): 8.0,
        ("ray_sapf_epsilon", "spent"): 2.5,
        ("ray_sapf_finetune_steps", "done"): 3.0,
        ("ray_sapf_finetune_steps", "planned"): 12.0,
        ("ray_sapf_synthetic_images", "done"): 10.0,
        ("ray_sapf_synthetic_images", "planned"): 60.0,
    }
