"""MLflow stores as people have them: an error before anything is begun, a warning afterwards."""

from __future__ import annotations

import contextlib
import json
import shutil
import socket
import sqlite3
import ssl
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from sapf_ray.config import RunConfig, from_dict
from sapf_ray.errors import TrackingError
from sapf_ray.privacy.ledger import Ledger
from sapf_ray.privacy.planner import PrivacyPlan, make_plan
from sapf_ray.runs import stores
from sapf_ray.runs.directory import RunDirectory
from sapf_ray.runs.tracking import Tracker, tracking_uri

SETTINGS = {
    "privacy": {"accountant": "rdp"},
    "finetune": {"batch_size": 64, "steps": 2},
    "saliency": {"noise_multiplier": 5.0},
}


@pytest.fixture(scope="session")
def plan() -> PrivacyPlan:
    return make_plan(from_dict(SETTINGS), 1000)


@pytest.fixture(scope="session")
def fresh_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty store, made once: MLflow takes seconds for it."""
    from mlflow import MlflowClient

    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    MlflowClient(tracking_uri=f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stores, "PROBE_SECONDS", 0.3)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def config(uri: str | None, **tracking: object) -> RunConfig:
    return from_dict({**SETTINGS, "tracking": {"uri": uri, **tracking}})


def directory_of(root: Path, plan: PrivacyPlan | None = None) -> RunDirectory:
    """A run directory; with a plan, one whose budget is being spent."""
    root.mkdir(parents=True, exist_ok=True)
    run = RunDirectory(root)
    if plan is not None:
        Ledger.create(run.ledger, plan)
    return run


# stores that cannot be used ---------------------------------------------------------------------


class _Refusing(BaseHTTPRequestHandler):
    """A server behind a login: it answers, but not to us."""

    def do_GET(self) -> None:
        self.send_response(200 if self.path == "/health" else 401)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_POST = do_GET

    def log_message(self, *arguments: object) -> None:
        pass


@contextlib.contextmanager
def serving(server: ThreadingHTTPServer) -> Iterator[int]:
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        server.server_close()


def closed_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def certificate(folder: Path) -> Path:
    """A certificate that nobody signed, with its key."""
    import datetime

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    path = folder / "server.pem"
    path.write_bytes(
        made.public_bytes(pem)
        + key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return path


Make = Callable[[Path, Path, contextlib.ExitStack], str]


def no_folder(tmp: Path, store: Path, stack: contextlib.ExitStack) -> str:
    return f"sqlite:///{tmp}/mistyped/mlflow.db"


def folder_for_a_file(tmp: Path, store: Path, stack: contextlib.ExitStack) -> str:
    return f"sqlite:///{tmp}"


def text_file(tmp: Path, store: Path, stack: contextlib.ExitStack) -> str:
    (tmp / "notes.txt").write_text("no database at all, but a text of some length " * 50)
    return f"sqlite:///{tmp}/notes.txt"


def locked(tmp: Path, store: Path, stack: contextlib.ExitStack) -> str:
    path = shutil.copy(store, tmp / "locked.db")
    connection = stack.enter_context(contextlib.closing(sqlite3.connect(path)))
    connection.isolation_level = None
    connection.execute("BEGIN EXCLUSIVE")
    return f"sqlite:///{path}"


def newer_schema(tmp: Path, store: Path, stack: contextlib.ExitStack) -> str:
    path = shutil.copy(store, tmp / "newer.db")
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("UPDATE alembic_version SET version_num = 'ffffffffffff'")
        connection.commit()
    return f"sqlite:///{path}"


def without_a_table(tmp: Path, store: Path, stack: contextlib.ExitStack) -> str:
    path = shutil.copy(store, tmp / "damaged.db")
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("ALTER TABLE runs RENAME COLUMN status TO state")
        connection.commit()
    return f"sqlite:///{path}"


def nothing_listens(tmp: Path, store: Path, stack: contextlib.ExitStack) -> str:
    return f"http://127.0.0.1:{closed_port()}"


def hangs(tmp: Path, store: Path, stack: contextlib.ExitStack) -> str:
    listening = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
    return f"http://127.0.0.1:{listening.getsockname()[1]}"


def wants_a_login(tmp: Path, store: Path, stack: contextlib.ExitStack) -> str:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Refusing)
    return f"http://127.0.0.1:{stack.enter_context(serving(server))}"


def refuses_our_login(tmp: Path, store: Path, stack: contextlib.ExitStack) -> str:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Refusing)
    return f"http://me:secret@127.0.0.1:{stack.enter_context(serving(server))}"


def own_certificate(tmp: Path, store: Path, stack: contextlib.ExitStack) -> str:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Refusing)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate(tmp))
    server.socket = context.wrap_socket(server.socket, server_side=True)
    server.handle_error = lambda *arguments: None  # type: ignore[method-assign]
    return f"https://127.0.0.1:{stack.enter_context(serving(server))}"


def mistyped_scheme(tmp: Path, store: Path, stack: contextlib.ExitStack) -> str:
    return f"sqlit:///{tmp}/mlflow.db"


def port_that_is_none(tmp: Path, store: Path, stack: contextlib.ExitStack) -> str:
    return "http://localhost:mlflow"


def database_down(tmp: Path, store: Path, stack: contextlib.ExitStack) -> str:
    return f"postgresql://me:secret@127.0.0.1:{closed_port()}/mlflow"


UNUSABLE: dict[Make, str] = {
    no_folder: "no folder .*mistyped; make it",
    folder_for_a_file: "its folder must exist and be writable",
    text_file: "no sqlite database",
    locked: "locked, by another process or for want of locks",
    newer_schema: "another MLflow version.*mlflow db upgrade.*pip install -U mlflow",
    without_a_table: "state|status|column",
    nothing_listens: "does not answer.*refused.*start it",
    hangs: "does not answer.*timed out",
    wants_a_login: "MLFLOW_TRACKING_USERNAME",
    refuses_our_login: "MLFLOW_TRACKING_USERNAME",
    own_certificate: "MLFLOW_TRACKING_SERVER_CERT_PATH",
    mistyped_scheme: "must be sqlite:",
    port_that_is_none: "(?i)port",
    database_down: "refused",
}


@pytest.fixture(params=UNUSABLE, ids=lambda make: make.__name__)
def unusable(
    request: pytest.FixtureRequest, tmp_path: Path, fresh_store: Path
) -> Iterator[tuple[str, str]]:
    with contextlib.ExitStack() as stack:
        yield request.param(tmp_path, fresh_store, stack), UNUSABLE[request.param]


def test_at_the_start_it_is_one_error_and_once_begun_one_warning(unusable, plan, tmp_path, caplog):
    uri, words = unusable
    new = directory_of(tmp_path / "new")
    with pytest.raises(TrackingError, match=words) as refused:
        Tracker.open(config(uri), new)
    said = str(refused.value)
    assert said.startswith("tracking.uri = ")
    assert "--tracking.enabled false" in said or "make it" in said
    assert "\n" not in said and "secret" not in said
    assert not list(new.root.iterdir()), "nothing is left behind"

    begun = directory_of(tmp_path / "begun", plan)
    tracker = Tracker.open(config(uri), begun)
    tracker.log_plan(plan)
    tracker.log_spend(Ledger.open(begun.ledger))
    tracker.finish(begun, plan, metrics={"accuracy": 0.5}, grid=begun.sample_grid)
    tracker.fail("FAILED")
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 1 and lines[0].startswith("sapf: warning: MLflow at ")
    assert "the run goes on" in lines[0] and "\n" not in lines[0] and "secret" not in lines[0]


def test_a_cell_of_a_grid_whose_store_went_down_goes_on(plan, tmp_path, caplog):
    uri = f"http://127.0.0.1:{closed_port()}"
    cell = directory_of(tmp_path / "cell")
    Tracker.open(config(uri, parent_run_id="the grid"), cell).log_plan(plan)
    assert "the run goes on" in caplog.text


# stores in which something is gone --------------------------------------------------------------


@pytest.fixture
def store(fresh_store: Path, tmp_path: Path) -> str:
    return f"sqlite:///{shutil.copy(fresh_store, tmp_path / 'mlflow.db')}"


def opened(store: str, tmp_path: Path) -> Tracker:
    return Tracker.open(config(store), directory_of(tmp_path / "run"))


def delete_run(tracker: Tracker, store: str) -> None:
    tracker.client.delete_run(tracker.run_id)


def delete_experiment(tracker: Tracker, store: str) -> None:
    run = tracker.client.get_run(tracker.run_id)
    tracker.client.delete_experiment(run.info.experiment_id)


def remove_run(tracker: Tracker, store: str) -> None:
    """As after `mlflow gc`, or in a store that was begun anew."""
    with contextlib.closing(sqlite3.connect(stores.sqlite_path(store))) as connection:
        for table in ("params", "metrics", "latest_metrics", "tags", "runs"):
            connection.execute(f"DELETE FROM {table}")
        connection.commit()


GONE = {delete_run: "was deleted", delete_experiment: "was deleted", remove_run: "is not there"}


@pytest.mark.parametrize("gone", GONE, ids=lambda gone: gone.__name__)
@pytest.mark.parametrize("when", ["between two starts", "in mid-run"])
def test_a_new_mlflow_run_is_opened_in_place_of_one_that_is_gone(
    gone, when, store, plan, tmp_path, caplog
):
    tracker = opened(store, tmp_path)
    tracker.log_plan(plan)
    before = tracker.run_id
    gone(tracker, store)
    if when == "between two starts":
        tracker = opened(store, tmp_path)
        tracker.log_plan(plan)
    run = RunDirectory(tmp_path / "run")
    Ledger.create(run.ledger, plan)
    tracker.log_spend(Ledger.open(run.ledger))
    assert tracker.run_id != before and not tracker.lost
    assert json.loads(run.mlflow.read_text())["run_id"] == tracker.run_id
    logged = tracker.client.get_run(tracker.run_id)
    assert logged.data.metrics["privacy/epsilon_planned"] == plan.epsilon, "logged again"
    assert logged.data.params["finetune.steps"] == "2"
    experiment = tracker.client.get_experiment(logged.info.experiment_id)
    assert experiment.name == ("sapf-2" if gone is delete_experiment else "sapf")
    (line,) = [record.getMessage() for record in caplog.records]
    assert GONE[gone] in line and "a new one is opened" in line


def test_a_damaged_note_of_the_mlflow_run_opens_a_new_one(store, tmp_path, caplog):
    before = opened(store, tmp_path).run_id
    note = tmp_path / "run" / "mlflow_run.json"
    for damage in ("{", "[]", '{"uri": "x"}'):
        note.write_text(damage)
        assert opened(store, tmp_path).run_id != before
    assert caplog.text.count("a new one is opened") == 3


class Full:
    """A store whose disk is full."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        def call(*arguments: object, **options: object) -> None:
            raise sqlite3.OperationalError("database or disk is full")

        return call


def test_a_full_disk_in_mid_run_is_one_warning_and_the_rest_is_logged_later(
    store, plan, tmp_path, caplog, monkeypatch
):
    tracker = opened(store, tmp_path)
    with monkeypatch.context() as full:
        full.setattr("mlflow.MlflowClient", lambda **options: Full())
        tracker.client = Full()
        tracker.log_plan(plan)
        tracker.log_plan(plan)
        assert tracker.lost
    assert caplog.text.count("the disk is full; make room") == 1
    tracker.log_plan(plan)
    assert (
        not tracker.lost and "privacy/delta" in tracker.client.get_run(tracker.run_id).data.metrics
    )


# names ------------------------------------------------------------------------------------------

NAMES = ["two words", "50%", "100 % of #3", "größe é", "日本", "a&b=c;d", "it's", "[a]{b}"]


@pytest.mark.parametrize("name", NAMES)
def test_the_default_store_lies_in_a_folder_of_any_name(name, fresh_store, tmp_path):
    folder = tmp_path / name
    run = directory_of(folder / "run #1 50%")
    shutil.copy(fresh_store, folder / "mlflow.db")
    tracker = Tracker.open(config(None), run)
    run.card.write_text("card")
    tracker.client.log_artifact(tracker.run_id, str(run.card))
    assert [file.path for file in tracker.client.list_artifacts(tracker.run_id)] == [run.card.name]
    assert {path.name for path in folder.iterdir()} == {"mlflow.db", "mlartifacts", run.root.name}
    assert {path.name for path in tmp_path.iterdir()} == {name}, "nothing beside it"


@pytest.mark.parametrize("name", ["who?", "%41"])
def test_a_name_that_an_address_cannot_hold_is_one_line(name, tmp_path):
    with pytest.raises(TrackingError, match=r"--tracking\.uri or another --out"):
        tracking_uri(config(None), RunDirectory(tmp_path / name / "run"))


def test_a_dropped_tracker_lets_go_of_the_run_directory_at_once(store, tmp_path):
    """A process that lives on, as Ray's workers do, must not keep the lock of a lost run."""
    import gc
    import weakref

    run = directory_of(tmp_path / "run")
    dropped = weakref.ref(run)
    tracker = Tracker.open(config(store), run)
    gc.disable()
    try:
        del run, tracker
        assert dropped() is None
    finally:
        gc.enable()
