"""`sapf doctor`: each check, with the fault that it is there for."""

from __future__ import annotations

import contextlib
import json
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest

from sapf_ray import cluster, doctor, placement
from sapf_ray.config import from_dict, nest
from sapf_ray.doctor import CHECKS, Subject, examine
from sapf_ray.errors import DataError
from sapf_ray.estimate.machine import Gpu
from tests.commands import call
from tests.data.folders import some
from tests.data.test_units import writers_folder


@pytest.fixture(autouse=True)
def quiet_ray(monkeypatch):
    """A Ray that is there, without starting one."""
    monkeypatch.setattr(cluster, "session", lambda config, spills=None: contextlib.nullcontext())
    monkeypatch.setattr(placement, "cluster_gpus", lambda: placement.Gpus(count=0))
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 2.0})
    monkeypatch.setattr(cluster, "check", lambda config: None)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def subject(tmp_path: Path, **keys) -> Subject:
    return Subject(
        config=from_dict(nest(keys)), out=tmp_path / "runs", has_data="data.path" in keys
    )


def found(name: str, tmp_path: Path, **keys):
    return next(f for f in examine(subject(tmp_path, **keys)) if f.check == name)


def test_this_machine_is_well(capsys, tmp_path):
    code, out, err = call(capsys, "doctor", "--out", str(tmp_path / "runs"))
    assert (code, err) == (0, "")
    assert [line.split()[1] for line in out.splitlines()] == list(CHECKS)
    assert not (tmp_path / "runs").exists(), "leaves nothing behind"


def test_json_and_exit_code_of_a_fault(capsys, tmp_path):
    code, out, _ = call(capsys, "doctor", str(tmp_path / "gone"), "--json", "--out", str(tmp_path))
    findings = {row["check"]: row for row in json.loads(out)}
    assert code == 1 and list(findings) == list(CHECKS)
    assert findings["data"]["state"] == "FAULT" and "no such directory" in findings["data"]["text"]
    assert not findings["data"]["remedy"], "the text says it"
    assert findings["locks"]["state"] == "OK"


def test_data_of_a_folder(capsys, tmp_path):
    some(tmp_path / "photos", "cat", "dog", n=20)
    code, out, _ = call(capsys, "doctor", str(tmp_path / "photos"), "--out", str(tmp_path))
    assert code == 0 and "2 classes" in out


def test_images_that_cannot_be_read_are_found_before_the_run(tmp_path):
    some(tmp_path / "photos", "cat", "dog", n=20)
    broken = next((tmp_path / "photos" / "cat").iterdir())
    broken.write_bytes(broken.read_bytes()[:60])
    keys = {"data.source": "image_folder", "data.path": str(tmp_path / "photos")}
    with pytest.raises(DataError, match=broken.name):
        doctor.check_data(subject(tmp_path, **keys))
    skipped = doctor.check_data(subject(tmp_path, **keys, **{"data.on_error": "skip"}))
    assert "1 cannot be read and are skipped" in skipped


@pytest.mark.parametrize(
    ("writer_of", "words"),
    [
        (lambda row: row[-3:], "12 groups"),
        (lambda row: "" if row.startswith("train/a/w00_0") else row[-3:], "line 2: no writer"),
        (lambda row: row[-3:] if "_0" in row else "w00", "no group of more than half"),
    ],
)
def test_groups_that_do_not_fit_are_a_fault_in_one_line(writer_of, words, tmp_path):
    header, *rows = writers_folder(tmp_path / "photos")
    lines = [header.lower(), *(row[:-3] + writer_of(row) for row in rows)]
    (tmp_path / "photos" / "metadata.csv").write_text("\n".join(lines))
    keys = {"data.source": "image_folder", "data.path": str(tmp_path / "photos")}
    finding = found("data", tmp_path, **keys, **{"data.groups": "column:writer"})
    assert words in finding.text and len(finding.line().splitlines()) == 1
    assert finding.state == ("OK" if words == "12 groups" else "FAULT")


def test_old_and_missing_packages(tmp_path, monkeypatch):
    monkeypatch.setattr(
        metadata, "requires", lambda name: ["ray[train]>=99.1", "no-such-thing", 'x; extra == "a"']
    )
    finding = found("versions", tmp_path)
    assert finding.state == "FAULT" and "no-such-thing is missing" in finding.text
    assert "is older than 99.1" in finding.text and "pip install -U" in finding.remedy


@pytest.mark.parametrize(
    ("gpus", "device", "keys", "state"),
    [
        ((), False, {}, "OK"),
        ((), False, {"finetune.gpus_per_worker": 1.0}, "FAULT"),
        ((), True, {}, "WARNING"),
        ((), True, {"finetune.gpus_per_worker": 1.0}, "FAULT"),
        ((Gpu(name="A", memory_gb=40.0),), True, {"finetune.gpus_per_worker": 1.0}, "OK"),
    ],
)
def test_gpus(tmp_path, monkeypatch, gpus, device, keys, state):
    monkeypatch.setattr(doctor, "usable_gpus", lambda: gpus)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: "/bin/x" if device else None)
    finding = found("gpus", tmp_path, **keys)
    assert finding.state == state and bool(finding.remedy) == (state != "OK")


def test_little_memory_and_too_many_workers(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "usable_memory_gb", lambda: 3.0)
    assert found("machine", tmp_path).state == "WARNING"
    monkeypatch.setattr(doctor, "usable_memory_gb", lambda: 1.0)
    assert found("machine", tmp_path).state == "FAULT"
    monkeypatch.setattr(doctor, "usable_memory_gb", lambda: 64.0)
    assert (
        "--finetune.num_workers"
        in found("machine", tmp_path, **{"finetune.num_workers": 99}).remedy
    )


def test_full_disks(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda place: SimpleNamespace(free=1e8))
    disk, shm = found("disk", tmp_path), found("shm", tmp_path)
    assert disk.state == "FAULT" and "--out" in disk.remedy
    assert shm.state == "WARNING" and "--shm-size" in shm.remedy


def test_a_file_system_without_locks_and_one_that_cannot_be_written(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor.probes, "has_locks", lambda folder: False)
    finding = found("locks", tmp_path)
    assert finding.state == "WARNING" and "local disk" in finding.remedy
    monkeypatch.setattr(doctor.probes, "unwritable", lambda folder: "cannot be written (x)")
    finding = found("locks", tmp_path)
    assert finding.state == "FAULT" and "--out" in finding.remedy


def test_a_temporary_folder_that_ray_cannot_use(tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path / ("long" * 30)))
    finding = found("temp", tmp_path)
    assert finding.state == "FAULT" and "RAY_TMPDIR" in finding.text


def test_weights_of_a_hub_model(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    finding = found("weights", tmp_path, **{"model.path": "sd-v1-5"})
    assert finding.state == "WARNING"
    assert finding.remedy == "hf download stable-diffusion-v1-5/stable-diffusion-v1-5"
    assert found("weights", tmp_path, **{"model.path": "./gone"}).state == "FAULT"


def test_a_tracking_server_that_is_down(tmp_path):
    finding = found("mlflow", tmp_path, **{"tracking.uri": "http://127.0.0.1:9"})
    assert finding.state == "FAULT" and "does not answer" in finding.text
    assert found("mlflow", tmp_path, **{"tracking.enabled": False}).state == "OK"


def test_a_cluster_that_lacks_what_is_requested(tmp_path, monkeypatch):
    def refuse(config):
        raise cluster.ClusterError("finetune.gpus_per_worker: asks for 1 GPUs in all")

    monkeypatch.setattr(cluster, "check", refuse)
    assert found("ray", tmp_path).state == "FAULT"
