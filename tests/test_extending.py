"""Whatever can be added from outside the package is added here, by one file each, and used.

The files stand in ``tests/plugins``; CONTRIBUTING.md points at them as its recipes.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from sapf_ray import registry
from sapf_ray.config import (
    DataConfig,
    EvaluationConfig,
    RunConfig,
    from_dict,
    to_dict,
)
from sapf_ray.data import open_source
from sapf_ray.data.base import SOURCES
from sapf_ray.errors import ConfigError
from sapf_ray.evaluation.inputs import Inputs
from sapf_ray.evaluation.launcher import evaluate_on_cluster
from sapf_ray.evaluation.metrics import METRICS, from_real_images
from sapf_ray.evaluation.protocol import evaluate
from sapf_ray.finetune.adapter import add_adapter
from sapf_ray.methods import METHODS, find_method
from sapf_ray.models.loading import load_pipeline
from sapf_ray.models.pool import candidate_pool
from sapf_ray.privacy.accountant_table import ACCOUNTANTS
from sapf_ray.privacy.accountants import compose_epsilon
from sapf_ray.privacy.card import privacy_card
from sapf_ray.privacy.events import exponential_event
from sapf_ray.privacy.ledger import Ledger
from sapf_ray.privacy.planner import make_plan, plan_events
from sapf_ray.report.tables import ledger_table
from sapf_ray.tune.summary import score_columns
from tests.evaluation.test_protocol import write_digits

MOST_LINES = 30
PLUGINS = Path(__file__).parent / "plugins"
TABLES: tuple[Any, ...] = (ACCOUNTANTS, METHODS, METRICS, SOURCES)


@pytest.fixture
def plugin(request, monkeypatch) -> Iterator[str]:
    """Loads the plugin that the test's marker names, and takes its rows away afterwards."""
    name = f"tests.plugins.{request.param}"
    before = [list(table) for table in TABLES]
    monkeypatch.setenv(registry.PLUGINS, "")
    registry.load_plugins([name])
    yield name
    for table, rows in zip(TABLES, before, strict=True):
        for row in [row for row in table if row not in rows]:
            del table[row]
    registry._loaded.discard(name)
    sys.modules.pop(name, None)


def uses(name: str) -> Any:
    return pytest.mark.parametrize("plugin", [name], indirect=True)


@pytest.mark.parametrize("path", sorted(PLUGINS.glob("[!_]*.py")), ids=lambda path: path.stem)
def test_a_plugin_is_one_short_file(path):
    assert len(path.read_text().splitlines()) <= MOST_LINES


def test_without_plugins_nothing_is_there():
    assert not {"kid", "prv", "stripes", "ffa-lora"} & {name for t in TABLES for name in t}


@uses("metric")
def test_a_metric(plugin, tmp_path, ray_cluster):
    source = open_source(DataConfig())
    write_digits(tmp_path, source, source.class_names, 16)
    config = EvaluationConfig(epochs=1, batch_size=16)
    inputs = Inputs(
        synthetic_dir=str(tmp_path), source=source, resolution=16, config=config, seed=0
    )
    scores = evaluate(inputs)
    assert abs(scores["kid"]) < 0.1 * scores["fid_glyph"]
    spread = evaluate_on_cluster(
        tmp_path, source, resolution=16, config=config, seed=0, known={"accuracy_cnn": 0.5}
    )
    assert spread["kid"] == pytest.approx(scores["kid"], abs=1e-4) and spread["accuracy"] == 0.5
    assert "kid" in from_real_images(scores), "its row says that it reads real images"
    assert [c.header for c in score_columns([{"kid": 1.0}])] == ["accuracy %", "KID x1000"]


@uses("data_set")
def test_a_data_set(plugin):
    source = open_source(DataConfig(source="stripes"))
    images, labels = source.read("train", np.arange(4), resolution=8)
    assert images.shape == (4, 8, 8, 3) and images.dtype == np.uint8
    assert labels.tolist() == [0, 1, 0, 1]
    assert (images[0] == images[0][:1]).all() and (images[1] == images[1][:, :1]).all()
    assert (source.name, source.n_train) == ("stripes", len(source.labels("train")))
    assert "stripes" in registry.names("data.source")


@uses("method")
def test_a_method(plugin, tiny_pipeline):
    config = of_overrides(find_method("ffa-lora").overrides)
    assert make_plan(config, 1000).selection is None, "every matrix is kept"
    denoiser = load_pipeline(str(tiny_pipeline)).unet
    matrices = list(candidate_pool(denoiser))
    add_adapter(denoiser, matrices, config=config.finetune, seed=0)
    trained = [name for name, p in denoiser.named_parameters() if p.requires_grad]
    assert len(trained) == len(matrices) and all("lora_B" in name for name in trained)


def of_overrides(overrides: Mapping[str, Any]) -> RunConfig:
    nested = to_dict(RunConfig())
    for key, value in {"finetune.batch_size": 64, "finetune.steps": 5, **overrides}.items():
        section, _, field = key.rpartition(".")
        nested[section][field] = value
    return from_dict(nested)


@uses("accountant")
def test_an_accountant(plugin, tmp_path):
    config = of_overrides({"privacy.accountant": "prv", "privacy.epsilon": 2.0})
    plan = make_plan(config, 1000)
    assert (plan.accountant, plan.non_private) == ("prv", False)
    assert 1.9 < plan.composed_epsilon <= 2
    by_pld = compose_epsilon(
        [(event, n) for _, event, n in plan_events(plan)], plan.delta, accountant="pld"
    )
    assert plan.composed_epsilon == pytest.approx(by_pld, rel=0.02)
    ledger = Ledger.create(tmp_path / "ledger.jsonl", plan)
    ledger.record("selection", plan.selection.event(), "id", "selection")
    assert "ε (PRV)" in printed(ledger) and "n/a" not in printed(ledger)
    text = privacy_card(plan, ledger, config, model_name="m", data_name="d")
    assert "(PRV accountant)" in text and "by the PLD accountant" in text


@uses("accountant")
def test_an_accountant_that_does_not_know_a_mechanism(plugin, tmp_path):
    """It is refused as the plan's own, and does not disturb runs that chose another."""
    chosen = {"saliency.mechanism": "exponential", "privacy.epsilon": 2.0}
    with pytest.raises(ConfigError, match=r"cannot price exponential .*; pld or rdp can"):
        make_plan(of_overrides({**chosen, "privacy.accountant": "prv"}), 1000)
    plan = make_plan(of_overrides({**chosen, "privacy.accountant": "rdp"}), 1000)
    ledger = Ledger.create(tmp_path / "ledger.jsonl", plan)
    ledger.record("selection", plan.selection.event(), "id", "selection")
    assert plan.selection.event() == exponential_event(25.0)
    assert printed(ledger).count("n/a") == 2  # the stage, and all together


def printed(ledger: Ledger) -> str:
    console = Console(width=250, record=True, file=io.StringIO())
    console.print(ledger_table(ledger))
    return console.export_text()
