"""Machines as people have them: each case works, or is one line that names what mends it."""

from __future__ import annotations

import errno
import fcntl
import io
import json
import os
import shlex
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from sapf_ray import cli, files, locks, plain_text
from sapf_ray.cluster import session
from sapf_ray.config import ClusterConfig, from_dict
from sapf_ray.errors import ClusterError, ConfigError, DataError, RunDirectoryError
from sapf_ray.privacy.ledger import Ledger
from sapf_ray.privacy.planner import make_plan
from sapf_ray.report.terminal import _places
from sapf_ray.runs import probes
from sapf_ray.runs.directory import RunDirectory
from sapf_ray.runs.storage import Storage
from sapf_ray.tune.space import NAME_BYTES, cell_name
from tests.commands import call

SETTINGS = {"privacy": {"accountant": "rdp"}, "finetune": {"batch_size": 64, "steps": 2}}


def one_line(said: str) -> str:
    """What the command said, which is one error and no traceback."""
    assert said.startswith("sapf: error: ") and said.count("\n") == 1 and len(said) < 1000, said
    return said


# temporary folders ------------------------------------------------------------------------------


@pytest.mark.parametrize("setting", ["RAY_TMPDIR", "TMPDIR"])
@pytest.mark.parametrize("fault", ["no such folder", "is a file", "too long", "cannot be written"])
def test_a_temporary_folder_that_ray_cannot_use(setting, fault, tmp_path, monkeypatch):
    """Ray would end in a traceback; too long is what does not fit into a socket's name."""
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    folder = Path(f"/tmp/sapf-no-{os.getpid()}")
    if fault == "is a file":
        folder = Path("/etc/passwd")
    elif fault == "too long":
        folder = tmp_path / ("x" * 80)
        folder.mkdir()
    elif fault == "cannot be written":
        folder = Path("/proc")
    monkeypatch.setenv(setting, str(folder))
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(ClusterError, match=rf"{setting} = .*{fault}.*RAY_TMPDIR") as refused:
        with session(ClusterConfig()):
            pass
    assert "\n" not in str(refused.value)


def test_letters_of_two_bytes_count_twice(monkeypatch):
    monkeypatch.setenv("RAY_TMPDIR", "/" + "ä" * 20)
    with pytest.raises(ClusterError, match="41 bytes are too long"):
        probes.temporary_folder()


def test_a_home_that_cannot_be_written_has_its_token_in_the_environment(monkeypatch, tmp_path):
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    probes.ensure_token_place()
    assert "RAY_AUTH_TOKEN" not in os.environ
    monkeypatch.setenv("HOME", "/proc/no/home")
    probes.ensure_token_place()
    assert len(os.environ["RAY_AUTH_TOKEN"]) == 64


# locales ----------------------------------------------------------------------------------------

ENCODINGS = ["ascii", "latin-1", "cp1252", "cp437", "koi8-r", "utf-8"]


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("command", ["plan", "methods", "an error"])
def test_output_that_cannot_show_our_letters(encoding, command, monkeypatch):
    shown, said = (io.TextIOWrapper(io.BytesIO(), encoding=encoding) for _ in range(2))
    monkeypatch.setattr(sys, "stdout", shown)
    monkeypatch.setattr(sys, "stderr", said)
    words = {
        "plan": ["plan", "--data.n_records=1000", "--privacy.accountant=rdp"],
        "methods": ["methods"],
        "an error": ["plan", "--data.source=image_folder", "--data.path=/größe/日本/\udce9 ε"],
    }[command]
    if command == "plan":
        words += ["--finetune.batch_size=64", "--finetune.steps=2"]
    code = cli.main(words)
    shown.flush()
    said.flush()
    text = shown.buffer.getvalue().decode(encoding) + said.buffer.getvalue().decode(encoding)
    assert code == (2 if command == "an error" else 0)
    if command == "an error":
        assert "no such" in one_line(text)
    if command == "plan":
        assert ("eps" if encoding not in ("cp437", "utf-8") else "ε") in text


def test_letters_are_written_out_where_they_cannot_be_shown():
    assert plain_text.encode("ε ≤ 1 ± σ", "ascii") == "eps <= 1 +- sigma"
    assert plain_text.encode("┏━┓│└", "ascii") == "+-+|+"


def test_files_are_utf_8_whatever_the_locale(monkeypatch, tmp_path):
    monkeypatch.setattr("locale.getpreferredencoding", lambda do_setlocale=True: "ascii")
    monkeypatch.setattr("locale.getencoding", lambda: "ascii")
    config = from_dict({**SETTINGS, "data": {"class_names": ["größe", "日本"]}})
    run = RunDirectory(tmp_path / "run")
    run.claim(config)
    run.release()
    assert RunDirectory(tmp_path / "run").read_config() == config


# file systems -----------------------------------------------------------------------------------

LOCKLESS = [errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL]


@pytest.fixture(params=LOCKLESS, ids=errno.errorcode.get)
def no_locks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(file: object, operation: int) -> None:
        raise OSError(request.param, os.strerror(request.param))

    monkeypatch.setattr(fcntl, "flock", refuse)


def test_without_locks_a_run_directory_is_still_one_process(no_locks, tmp_path):
    config = from_dict(SETTINGS)
    one, two = RunDirectory(tmp_path / "run"), RunDirectory(tmp_path / "run")
    one.claim(config)
    with pytest.raises(RunDirectoryError, match=rf"held by process {os.getpid()} .*delete that"):
        two.claim(config)
    one.release()
    assert two.claim(config)
    two.release()
    assert not probes.has_locks(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"run"}


def test_without_locks_the_ledger_is_paid_line_by_line(no_locks, tmp_path):
    plan = make_plan(from_dict(SETTINGS), 1000)
    ledger = Ledger.create(tmp_path / "ledger.jsonl", plan)
    other = Ledger.open(tmp_path / "ledger.jsonl")
    event = plan.finetune.event()
    ledger.record("finetune/step/0", event, "a", "finetune")
    other.record("finetune/step/1", event, "b", "finetune")
    assert len(Ledger.open(tmp_path / "ledger.jsonl").events()) == 2
    assert not list(tmp_path.glob("*.held*"))


def test_a_lock_of_a_dead_process_is_taken_over_and_of_another_machine_told(tmp_path, monkeypatch):
    def refuse(file: object, operation: int) -> None:
        raise OSError(errno.ENOLCK, "")

    monkeypatch.setattr(fcntl, "flock", refuse)
    held = tmp_path / "x.held"
    with open(tmp_path / "x", "w") as file:
        with locks.locked(file):
            mine = json.loads(held.read_text())
        for change in ({"pid": 2**22 + 1}, {"boot": "earlier"}, {"began": "1"}):
            held.write_text(json.dumps(mine | change))
            with locks.locked(file):
                assert json.loads(held.read_text()) == mine
        for change in ({"host": "elsewhere"}, {}):
            held.write_text(json.dumps(mine | change))
            with pytest.raises(RunDirectoryError, match="is held by process"):
                with locks.locked(file, patience=0.01):
                    pass
        held.write_text("")  # its maker has not written it yet
        with pytest.raises(locks.Held, match="unknown machine"):
            locks.take(file, wait=False)


def test_without_locks_processes_still_take_turns(tmp_path, monkeypatch):
    """The broken twin, without any lock, loses counts."""

    def refuse(file: object, operation: int) -> None:
        raise OSError(errno.ENOLCK, "")

    monkeypatch.setattr(fcntl, "flock", refuse)
    monkeypatch.setattr(locks, "_LOOK_SECONDS", 0.0005)
    count = tmp_path / "count"
    count.write_text("0")
    children = []
    for _ in range(3):
        child = os.fork()
        if child == 0:
            with open(tmp_path / "lock", "w") as file:
                for _ in range(30):
                    with locks.locked(file):
                        count.write_text(str(int(count.read_text()) + 1))
            os._exit(0)
        children.append(child)
    for child in children:
        os.waitpid(child, 0)
    assert count.read_text() == "90"


@pytest.mark.parametrize("number", [errno.EPERM, errno.ENOTSUP])
def test_without_hard_links_a_file_is_still_begun_once(number, tmp_path, monkeypatch):
    def refuse(*arguments: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "link", refuse)
    files.write_atomic(tmp_path / "key", "one", replace=False)
    with pytest.raises(FileExistsError):
        files.write_atomic(tmp_path / "key", "two", replace=False)
    assert (tmp_path / "key").read_text() == "one" and len(list(tmp_path.iterdir())) == 1


def test_a_folder_that_cannot_be_synchronised_is_none_that_fails(tmp_path, monkeypatch):
    whole = os.fsync

    def fsync(descriptor: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.EINVAL, "Invalid argument")
        whole(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    files.write_atomic(tmp_path / "x", "x")
    assert (tmp_path / "x").read_text() == "x"


REFUSED = {
    errno.ENOSPC: "room",
    errno.EDQUOT: "room",
    errno.EACCES: "permissions",
    errno.EROFS: "read-only",
    errno.ENAMETOOLONG: "shorter name",
    errno.EIO: "fault",
    errno.ESTALE: "mount it again",
    errno.ENOTCONN: "mount it again",
    errno.EMFILE: "ulimit -n",
    errno.EAGAIN: "ulimit -u",
}


@pytest.mark.parametrize("number", REFUSED, ids=errno.errorcode.get)
def test_what_the_machine_refuses_is_one_line_with_the_remedy(number, capsys, monkeypatch):
    def refuse(*arguments: object) -> None:
        raise OSError(number, os.strerror(number), "/data/x")

    monkeypatch.setitem(cli._COMMANDS, "methods", refuse)
    code, _, said = call(capsys, "methods")
    assert code == 2 and REFUSED[number] in one_line(said) and "/data/x" in said


# names ------------------------------------------------------------------------------------------

NAMES = ["two words", "100 % of #3", "50%", "%41", "who?", "größe é", "日本", "a&b=c;d", "it's"]


@pytest.mark.parametrize("name", NAMES)
def test_names_in_out_and_in_storage(name, tmp_path):
    run = RunDirectory(tmp_path / name)
    run.claim(from_dict(SETTINGS))
    run.card.write_text("card", encoding="utf-8")
    storage = Storage((tmp_path / "to share").as_uri(), run)
    assert "privacy_card.md" in storage.publish()
    assert (tmp_path / "to share" / name / "privacy_card.md").read_text() == "card"
    run.release()


def test_a_storage_address_with_a_space_is_told(tmp_path):
    with pytest.raises(ConfigError, match=r"cluster\.storage.*%20"):
        Storage(f"file://{tmp_path}/to share", RunDirectory(tmp_path / "run"))


def test_a_name_that_is_too_long_is_told(capsys, tmp_path, tiny_pipeline):
    code, _, said = call(
        capsys,
        "run",
        f"--out={tmp_path / ('x' * 300)}",
        "--data.source=digits",
        f"--model.path={tiny_pipeline}",
        "--privacy.accountant=rdp",
        "--finetune.batch_size=64",
        "--finetune.steps=2",
        "--tracking.enabled=false",
    )
    assert code == 2 and "too long" in one_line(said)


def test_long_labels_make_names_that_fit_and_differ():
    long = {"row": "ü" * 300, "seed": 0}
    names = {cell_name(long | {"seed": seed}) for seed in range(3)}
    assert len(names) == 3 and all(len(name.encode()) <= NAME_BYTES for name in names)
    assert cell_name({"row": "short", "seed": 0}) == "short_seed0"


# models -----------------------------------------------------------------------------------------


def mistyped(folder: Path, change: str) -> Path:
    index = folder / "model_index.json"
    content = json.loads(index.read_text())
    if change == "no index":
        index.unlink()
    elif change == "index of another kind":
        index.write_text("[]")
    elif change == "index cut off":
        index.write_text(index.read_text()[:20])
    elif change == "another pipeline":
        index.write_text(json.dumps(content | {"_class_name": "FluxPipeline"}))
    elif change == "no unet":
        shutil.rmtree(folder / "unet")
    elif change == "empty config":
        (folder / "unet" / "config.json").write_text("{}")
    elif change == "config of another kind":
        (folder / "vae" / "config.json").write_text("[]")
    elif change == "a folder above":
        return folder.parent
    return folder


CHANGES = [
    "no index",
    "index of another kind",
    "index cut off",
    "another pipeline",
    "no unet",
    "empty config",
    "config of another kind",
    "a folder above",
]


@pytest.mark.parametrize("change", CHANGES)
def test_a_model_folder_that_is_none(change, tiny_pipeline, tmp_path):
    from sapf_ray.config import ModelConfig
    from sapf_ray.models.public_model import PublicModel

    folder = tmp_path / "models" / "mine"
    shutil.copytree(tiny_pipeline, folder)
    with pytest.raises(DataError) as refused:
        PublicModel.open(ModelConfig(path=str(mistyped(folder, change))))
    said = str(refused.value)
    assert "\n" not in said and str(folder.parent) in said


@pytest.mark.parametrize("path", ["models/mistyped", "stable-diffusion-v1-5/stable-diffusion-v1-5"])
def test_a_hub_that_is_not_reached(path, tmp_path, monkeypatch):
    from sapf_ray.config import ModelConfig
    from sapf_ray.models.public_model import PublicModel

    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"no such folder, and .* HF_HUB_OFFLINE .* hf download"):
        PublicModel.open(ModelConfig(path=path))


# absurd numbers ---------------------------------------------------------------------------------

ABSURD = [
    *(
        f"--privacy.epsilon={value}"
        for value in ("1e-9", "1e-4", "1e9", "1e300", "nan", "inf", "-1")
    ),
    *(f"--privacy.delta={value}" for value in ("0", "1", "nan", "inf", "1e-300", "0.999", "-1e-5")),
]


@pytest.mark.parametrize("option", ABSURD)
def test_absurd_budgets_are_answered_at_once(option, capsys):
    code, _, said = call(capsys, "plan", "--data.n_records=1000", option)
    key, _, _ = option.removeprefix("--").partition("=")
    assert code == 2 and f"{key} = " in one_line(said) and "must" in said


def test_the_command_that_shows_the_runs_can_be_pasted(tmp_path):
    uri = "sqlite:////two words/#1 it's/mlflow.db"
    result = SimpleNamespace(directory=RunDirectory(tmp_path), tracking_uri=uri)
    assert shlex.split(_places(result)["MLflow"])[-1] == uri
    result.tracking_uri = "https://me:secret@host:5000"
    assert _places(result)["MLflow"] == "https://me:***@host:5000"
