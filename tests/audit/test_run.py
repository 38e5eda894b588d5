"""``sapf audit`` of run directories: what it reads, writes, refuses, and what it exits with."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from jobs.audit_faults import less_noise
from sapf_ray.audit.run import audit_directory, config_of_audit, settings_of
from sapf_ray.cli import main
from sapf_ray.config import DataConfig, FinetuneConfig, PrivacyConfig, RunConfig, to_dict
from sapf_ray.config.audit import AuditConfig
from sapf_ray.errors import ConfigError, RunDirectoryError
from sapf_ray.privacy.canaries import Canaries
from sapf_ray.privacy.fixed_point import ExactSum
from sapf_ray.privacy.keyed_rng import NoiseKey
from sapf_ray.privacy.ledger import Ledger
from sapf_ray.privacy.planner import make_plan
from sapf_ray.privacy.release import Releaser
from sapf_ray.runs.directory import RunDirectory

M = 600
SETTINGS = RunConfig(
    privacy=PrivacyConfig(epsilon=8.0),
    finetune=FinetuneConfig(steps=4, batch_size=400),
    audit=AuditConfig(canaries=M, mechanism_runs=100),
)


def finished(folder: Path, config: RunConfig = SETTINGS, coordinates: int = 500) -> RunDirectory:
    """A run directory as a run with canaries leaves it; its sums are of no record."""
    directory = RunDirectory(folder)
    directory.claim(config)
    directory.release()
    plan = make_plan(config, 1000)
    canaries = None
    key = NoiseKey.create(2)
    if config.audit.canaries:
        canaries = Canaries(
            count=config.audit.canaries,
            n_records=1000,
            key=key,
            folder=str(directory.observations),
        )
        canaries.prepare()
    ledger = Ledger.create(directory.ledger, plan)
    releaser = Releaser(key=key, ledger=ledger, plan=plan, canaries=canaries)
    releaser.gaussian("selection", ExactSum.zeros([(24,)], 1.0), stage="selection")
    for step in range(config.finetune.steps):
        total = ExactSum.of([torch.full((coordinates,), 7 * step)], 1.0)
        releaser.gaussian(f"finetune/step/{step}", total, stage="finetune")
    directory.card.write_text("card")
    return directory


def test_a_run_with_canaries_is_audited_from_what_it_left(tmp_path):
    directory = finished(tmp_path / "run")
    report = audit_directory(tmp_path / "run")
    shown = {finding.audit: finding for finding in report.findings}
    assert report.falsified == []
    assert report.epsilon == pytest.approx(Ledger.open(directory.ledger).epsilon_spent())
    assert "500 canaries" in shown["one run, f-DP"].note, "those without room are left out"
    assert shown["noise of the releases"].shown == pytest.approx(1.0, abs=0.1)
    assert shown["releases without a ledger line"].note == "5 releases seen"
    written = json.loads((directory.audit / "report.json").read_text())
    assert written == json.loads(report.to_json())
    text = (directory.audit / "report.md").read_text()
    assert all(finding.audit in text for finding in report.findings)
    for name in ("report.md", "report.json"):
        assert oct((directory.audit / name).stat().st_mode)[-3:] == "600"


def test_a_run_with_too_little_noise_exits_with_1(tmp_path, capsys):
    with less_noise(3)():
        directory = finished(tmp_path / "run")
    extra = np.load(directory.observations / "finetune-step-0.npy")
    np.save(directory.observations / "finetune-step-9.npy", extra)
    assert main(["audit", str(tmp_path / "run"), "--json"]) == 1
    printed = json.loads(capsys.readouterr().out)
    assert "noise of the releases" in printed["falsified"]
    assert "releases without a ledger line" in printed["falsified"]
    assert "mechanism: gaussian" not in printed["falsified"], "today's code is another matter"


def refused(capsys, *arguments: str) -> str:
    assert main(["audit", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


def test_what_cannot_be_audited_is_refused_in_one_line(tmp_path, capsys):
    assert "no config.yaml" in refused(capsys, str(tmp_path / "nothing"))
    assert "--out" in refused(capsys)
    without = RunConfig(finetune=SETTINGS.finetune, privacy=SETTINGS.privacy)
    directory = finished(tmp_path / "plain", without)
    error = refused(capsys, str(directory.root))
    assert "has no canaries" in error and "key is gone" in error
    assert "privacy.non_private = True" in refused(
        capsys, "--out", str(tmp_path / "new"), "--privacy.non_private", "true"
    )
    assert not (tmp_path / "new").exists()
    directory = finished(tmp_path / "run")
    error = refused(capsys, str(directory.root), "--privacy.epsilon", "3")
    assert "privacy.epsilon = 3" in error
    directory.card.unlink()
    assert "not finished" in refused(capsys, str(directory.root))


def test_an_audit_changes_what_it_must_and_nothing_that_was_given():
    config = config_of_audit(RunConfig(), set())
    assert config.audit.canaries == 8000 and config.audit.images == 100
    assert not config.evaluation.enabled and config.synthesis.n_images == 200
    given = config_of_audit(RunConfig(), {"audit.canaries", "synthesis.n_images"})
    assert given.audit.canaries == 0
    assert given.synthesis.n_images == RunConfig().synthesis.n_images
    people = RunConfig(data=DataConfig(source="image_folder", path="x", groups="folder:1"))
    assert config_of_audit(people, set()).audit.images == 0
    with pytest.raises(ConfigError, match=r"audit\.images = 5"):
        config_of_audit(dataclasses.replace(people, audit=AuditConfig(images=5)), {"audit.images"})


def test_settings_of_a_run_of_before_are_those_without_an_audit(tmp_path):
    old = to_dict(RunConfig())
    del old["audit"]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(old))
    with pytest.raises(RunDirectoryError, match="has no canaries"):
        audit_directory(tmp_path)


def test_an_audits_confidence_may_be_another_and_the_run_may_not():
    assert settings_of(SETTINGS, {"audit.confidence": 0.8}).confidence == 0.8
    with pytest.raises(ConfigError, match=r"finetune\.steps"):
        settings_of(SETTINGS, {"finetune.steps": 5})
