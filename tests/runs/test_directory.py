"""A run directory belongs to one config and one process at a time."""

from __future__ import annotations

import dataclasses
import errno

import pytest

from sapf_ray.config import FinetuneConfig, PrivacyConfig, RunConfig
from sapf_ray.errors import RunDirectoryError
from sapf_ray.runs.directory import RunDirectory


def test_same_config_continues_and_workers_may_change(tmp_path):
    first = RunDirectory(tmp_path / "run")
    assert first.claim(RunConfig()) is False
    first.release()
    again = RunDirectory(tmp_path / "run")
    assert (
        again.claim(dataclasses.replace(RunConfig(), finetune=FinetuneConfig(num_workers=2)))
        is True
    )
    again.release()


def test_other_config_is_refused_with_the_key_that_differs(tmp_path):
    directory = RunDirectory(tmp_path / "run")
    directory.claim(RunConfig())
    directory.write_json(directory.plan, {})
    directory.release()
    with pytest.raises(RunDirectoryError, match=r"privacy\.epsilon = 10\.0, requested is 2\.0"):
        RunDirectory(tmp_path / "run").claim(RunConfig(privacy=PrivacyConfig(epsilon=2.0)))


def test_until_anything_is_planned_a_directory_may_become_another_run(tmp_path):
    directory = RunDirectory(tmp_path / "run")
    directory.claim(RunConfig())
    directory.mlflow.write_text("{}")  # of a run with the parameters of the first config
    directory.release()
    other = RunConfig(privacy=PrivacyConfig(epsilon=2.0))
    again = RunDirectory(tmp_path / "run")
    assert again.claim(other) is False
    assert again.read_config() == other and not again.mlflow.exists()
    again.release()


def test_second_process_file_and_foreign_folder_are_refused(tmp_path):
    directory = RunDirectory(tmp_path / "run")
    directory.claim(RunConfig())
    with pytest.raises(RunDirectoryError, match="another sapf process"):
        RunDirectory(tmp_path / "run").claim(RunConfig())
    directory.release()
    (tmp_path / "file").write_text("x")
    with pytest.raises(RunDirectoryError, match="is a file"):
        RunDirectory(tmp_path / "file").claim(RunConfig())
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.png").write_text("x")
    with pytest.raises(RunDirectoryError, match="not empty"):
        RunDirectory(tmp_path / "photos").claim(RunConfig())


def test_damaged_files_are_named(tmp_path):
    directory = RunDirectory(tmp_path / "run")
    directory.claim(RunConfig())
    directory.release()
    directory.config.write_text("{{{")
    with pytest.raises(RunDirectoryError, match=r"config\.yaml: damaged"):
        RunDirectory(tmp_path / "run").claim(RunConfig())
    directory.selection.write_text("{")
    with pytest.raises(RunDirectoryError, match=r"selection\.json: damaged"):
        directory.read_json(directory.selection)


def test_private_folder_is_for_its_owner_only(tmp_path):
    directory = RunDirectory(tmp_path / "run")
    directory.claim(RunConfig())
    directory.prepare_private()
    assert directory.private.stat().st_mode & 0o777 == 0o700
    directory.delete_private()
    assert not directory.private.exists()
    directory.release()


def test_a_key_that_cannot_be_deleted_is_an_error(tmp_path, monkeypatch):
    run = RunDirectory(tmp_path)
    run.prepare_private()
    run.noise_key.write_text("secret")

    def refuse(path, missing_ok):
        raise PermissionError(errno.EACCES, "Permission denied")

    with monkeypatch.context() as patched:
        patched.setattr(type(run.noise_key), "unlink", refuse)
        with pytest.raises(RunDirectoryError, match=r"noise_key: cannot be deleted \(Permission"):
            run.delete_key()
    run.delete_key()
    run.delete_key()
    assert not run.noise_key.exists() and run.private.exists()


def test_private_files_that_cannot_be_deleted_are_an_error(tmp_path, monkeypatch):
    run = RunDirectory(tmp_path)
    run.delete_private()
    run.prepare_private()
    latents = run.private / "latents"
    latents.mkdir()

    def busy(path, *args, **kwargs):
        raise OSError(errno.EBUSY, "Device or resource busy", str(latents))

    with monkeypatch.context() as patched:
        patched.setattr("sapf_ray.runs.directory.shutil.rmtree", busy)
        with pytest.raises(RunDirectoryError, match=r"latents: cannot be deleted .*sensitive"):
            run.delete_private()
    run.delete_private()
    assert not run.private.exists()
