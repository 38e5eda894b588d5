"""``sapf verify``: what holds together passes, and every single edit of a file is found."""

from __future__ import annotations

import ast
import hashlib
import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from sapf_ray.config import from_dict, nest, to_dict
from sapf_ray.errors import ConfigError, RunDirectoryError
from sapf_ray.files import file_digest, write_json
from sapf_ray.privacy.ledger import Ledger
from sapf_ray.privacy.ledger_lines import Header, LedgerEvent
from sapf_ray.privacy.planner import make_plan
from sapf_ray.privacy.verdict import judge
from sapf_ray.runs.directory import ResultDirectory, RunDirectory
from sapf_ray.runs.manifest import covered, write_manifest
from sapf_ray.runs.origin import code_version
from sapf_ray.verify import independent
from sapf_ray.verify.checks import CHECKS, FAIL, OPEN, PASS, holds, verify
from tests.commands import call

FLIPS = 100


def made_run(root: Path, **changes) -> RunDirectory:
    """The files of a finished run, without its images and weights."""
    settings = {
        "privacy.accountant": "rdp",
        "privacy.epsilon": 8.0,
        "finetune.batch_size": 64,
        "finetune.steps": 3,
        **{key.replace("__", "."): value for key, value in changes.items()},
    }
    config = from_dict(nest(settings))
    plan = make_plan(config, 1297)
    directory = RunDirectory(root)
    directory.claim(config)
    directory.release()
    origin = {"config": file_digest(directory.config), "code": "0 (git abc)", "images": None}
    ledger = Ledger.create(directory.ledger, plan, origin=origin)
    write_json(directory.plan, plan.to_dict())
    ledger.record("selection", plan.selection.event(), "run-selection", "selection")
    if plan.score is not None:
        ledger.record("score", plan.score.event(), "run-score", "score")
    for step in range(plan.steps):
        ledger.record(f"finetune/step/{step}", plan.finetune.event(), f"run-{step}", "finetune")
    tell(directory)
    (directory.synthetic / "part.parquet").write_bytes(bytes(range(256)))
    seal(directory)
    return directory


def tell(directory: RunDirectory) -> None:
    """The papers of the run say what its ledger says."""
    ledger = Ledger.open(directory.ledger)
    config = directory.read_config()
    seeded = config.privacy.reproducible_seed is not None
    verdict = judge(ledger.plan, ledger, reproducible=seeded)
    metrics = {
        "epsilon_spent": ledger.epsilon_spent(),
        "delta": ledger.plan.delta,
        "release": verdict.answer,
    }
    write_json(directory.metrics, metrics)
    directory.synthetic.mkdir(exist_ok=True)
    for paper in (directory.card, directory.synthetic / "README.md"):
        paper.write_text(f"> {verdict.markdown}\n", encoding="utf-8")


def seal(directory: RunDirectory) -> str:
    """A manifest of the files as they are: what a consistent editor would do as well."""
    return write_manifest(directory)


def states(directory: RunDirectory, **options) -> dict[str, str]:
    return {row.check: row.state for row in verify(directory.root, **options)}


def failed(directory: RunDirectory, **options) -> set[str]:
    return {check for check, state in states(directory, **options).items() if state == FAIL}


@pytest.fixture(scope="module", autouse=True)
def coarse():
    """Seconds less for each set of events; what is compared is as coarse on both sides."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(independent, "INTERVAL", 2e-3)
        independent._by_pld.cache_clear()
        yield
    independent._by_pld.cache_clear()


@pytest.fixture(scope="module")
def left(tmp_path_factory) -> Path:
    return made_run(tmp_path_factory.mktemp("left") / "run").root


@pytest.fixture
def run(left, tmp_path) -> RunDirectory:
    shutil.copytree(left, tmp_path / "run")
    return RunDirectory(tmp_path / "run")


def flip(path: Path, generator: random.Random) -> bytes:
    """Changes one bit of one byte; returns what was there."""
    before = path.read_bytes()
    place = generator.randrange(len(before))
    changed = bytearray(before)
    changed[place] ^= 1 << generator.randrange(8)
    path.write_bytes(changed)
    return before


# What holds, and edits -------------------------------------------------------------------------


def test_a_run_as_it_was_left_holds(run):
    findings = verify(run.root)
    assert [row.check for row in findings] == list(CHECKS)
    assert {row.check for row in findings if row.state != PASS} == {"manifest digest"}
    assert holds(findings)
    assert all(row.detail and "\n" not in row.detail for row in findings)


def test_every_flipped_byte_of_a_whole_run_is_found(plain_run, tmp_path):
    """Of each file at least one, then at random over all bytes."""
    out, _ = plain_run
    directory = RunDirectory(tmp_path / "run")
    shutil.copytree(out, directory.root)
    assert failed(directory) == {"verdict"}, "the run of the tests is seeded"
    digest = file_digest(directory.manifest)
    paths = [path for _, path in covered(directory) if path.stat().st_size]
    assert {"adapter", "synthetic", "plots"} <= {path.parent.name for path in paths}
    generator = random.Random(0)
    sizes = [path.stat().st_size for path in paths]
    drawn = generator.choices(paths, weights=sizes, k=FLIPS)
    for path in [*paths, directory.manifest, *drawn]:
        before = flip(path, generator)
        assert failed(directory, digest=digest) > {"verdict"}, path
        path.write_bytes(before)
    assert failed(directory, digest=digest) == {"verdict"}


def test_a_file_that_is_added_or_gone_is_found(run):
    (run.synthetic / "more.parquet").write_bytes(b"forged")
    assert failed(run) == {"files"}
    (run.synthetic / "more.parquet").unlink()
    (run.synthetic / "part.parquet").unlink()
    assert failed(run) == {"files"}


def test_who_renews_the_manifest_is_found_by_its_digest_alone(run):
    """As docs/verify.md says: without a signature, or the digest kept elsewhere, it is not seen."""
    kept = file_digest(run.manifest)
    (run.synthetic / "part.parquet").write_bytes(b"other images")
    seal(run)
    assert failed(run) == set()
    assert failed(run, digest=kept) == {"manifest digest"}
    assert states(run, digest=file_digest(run.manifest))["manifest digest"] == PASS


def cut(run):
    lines = run.ledger.read_bytes().splitlines(keepends=True)
    run.ledger.write_bytes(b"".join(lines[:-1]))


def edited(run):
    run.ledger.write_bytes(run.ledger.read_bytes().replace(b"finetune/step/0", b"finetune/step/9"))


def torn(run):
    run.ledger.write_bytes(run.ledger.read_bytes()[:-1])


def unknown_event(run):
    run.ledger.write_bytes(run.ledger.read_bytes().replace(b'"Gaussian"', b'"Laplacian"'))


def more_than_planned(run):
    """Two more steps on a chain that holds: whoever forges a ledger can do that."""
    append(run, lambda plan: plan.finetune.event(), count=200)


def hidden_charge(run):
    """A charge that calls itself a replay, on a chain that holds."""
    append(run, lambda plan: plan.finetune.event(), count=1, replay=True)


def append(run, event_of, *, count, replay=False):
    lines = run.ledger.read_bytes().splitlines()
    event = event_of(Header.parse(lines[0]).plan)
    for i in range(count):
        entry = LedgerEvent(
            release=f"more/{i}", stage="finetune", event=event, noise_id=f"m-{i}", replay=replay
        )
        lines.append(entry.line(lines[-1]))
    run.ledger.write_bytes(b"\n".join(lines) + b"\n")


def another_plan(run):
    plan = json.loads(run.plan.read_text())
    write_json(run.plan, plan | {"epsilon": 1.0})


def another_config(run):
    run.config.write_text(run.config.read_text() + "# a word\n")


def another_epsilon(run):
    metrics = json.loads(run.metrics.read_text())
    write_json(run.metrics, metrics | {"epsilon_spent": 0.5})


def another_card(run):
    run.card.write_text("Differentially private with ε = 0.1")


def kept_key(run):
    run.prepare_private()
    run.noise_key.write_bytes(b"secret")


def kept_cache(run):
    run.prepare_private()


@pytest.mark.parametrize(
    ("forge", "found"),
    [
        (cut, {"releases", "claims"}),
        (edited, {"ledger chain", "independent reading"}),
        (torn, {"ledger chain", "independent reading"}),
        (unknown_event, {"ledger chain", "independent reading", "budget", "verdict"}),
        (more_than_planned, {"budget", "claims", "verdict"}),
        (hidden_charge, {"independent reading"}),
        (another_plan, {"plan"}),
        (another_config, {"config"}),
        (another_epsilon, {"claims"}),
        (another_card, {"claims"}),
        (kept_key, {"secrets"}),
        (kept_cache, {"secrets"}),
    ],
)
def test_what_a_renewed_manifest_hides_other_checks_find(run, forge, found):
    forge(run)
    seal(run)
    assert found <= failed(run)
    assert not holds(verify(run.root))


def test_a_seeded_run_may_not_be_called_private(tmp_path):
    run = made_run(tmp_path / "run", privacy__reproducible_seed=1)
    assert failed(run) == {"verdict"}


def test_kept_private_files_are_told_where_the_config_wants_them(tmp_path):
    run = made_run(tmp_path / "run", cluster__keep_cache=True)
    run.prepare_private()
    (row,) = [row for row in verify(run.root) if row.check == "secrets"]
    assert row.state == PASS and "do not share" in row.detail


def test_an_earlier_version_s_run_is_read_and_does_not_hold(run):
    lines = [json.loads(line) for line in run.ledger.read_text().splitlines()]
    lines[0] = {"schema": 2, "plan": lines[0]["plan"]}
    for line in lines[1:]:
        del line["prev"]
    run.ledger.write_text("".join(json.dumps(line) + "\n" for line in lines))
    run.manifest.unlink()
    found = states(run)
    assert found["ledger chain"] == found["config"] == found["independent reading"] == OPEN
    assert found["files"] == FAIL and found["budget"] == found["verdict"] == PASS
    assert not holds(verify(run.root))


def test_later_results_have_manifests_of_their_own(run):
    later = ResultDirectory(run.root, "synthesis", name="more")
    later.home.mkdir(parents=True)
    later.card.write_text("card")
    assert failed(run) == {"later results"}, "it has none yet"
    seal(later)
    assert failed(run) == set()
    later.card.write_text("cart")
    assert failed(run) == {"later results"}


# The independent reading -----------------------------------------------------------------------


def test_it_imports_nothing_of_ours_and_is_short():
    source = Path(independent.__file__).read_text(encoding="utf-8")
    for node in ast.walk(ast.parse(source)):
        names = [alias.name for alias in getattr(node, "names", ())]
        names.append(getattr(node, "module", "") or "")
        assert not any("sapf" in name for name in names if isinstance(name, str))
    documented = [ast.Module, ast.ClassDef, ast.FunctionDef]
    words = 0
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, tuple(documented)) and ast.get_docstring(node):
            words += node.body[0].end_lineno - node.body[0].lineno + 1
    assert len([line for line in source.splitlines() if line.strip()]) - words <= 100


@pytest.mark.parametrize("mechanism", ["exponential", "propose_test_release"])
def test_it_finds_the_same_epsilon_of_every_mechanism(tmp_path, mechanism):
    noise = 2.0 if mechanism == "propose_test_release" else 25.0
    run = made_run(
        tmp_path / "run", saliency__mechanism=mechanism, saliency__noise_multiplier=noise
    )
    assert states(run)["independent reading"] == PASS
    reading = independent.read_ledger(run.ledger)
    assert 0 < reading.epsilon_pld < 8
    assert (reading.epsilon_rdp is None) == (mechanism == "propose_test_release")


@pytest.mark.parametrize("distribution", ["negative_binomial", "poisson"])
def test_it_finds_the_same_epsilon_of_the_winner_of_a_private_choice(tmp_path, distribution):
    run = made_run(
        tmp_path / "run", tuning__private=True, tuning__distribution=distribution, finetune__steps=2
    )
    assert failed(run) == set()
    reading = independent.read_ledger(run.ledger)
    assert reading.epsilon_pld is None
    spent = Ledger.open(run.ledger).epsilon_spent()
    assert reading.epsilon_rdp == pytest.approx(spent, rel=1e-6) and 0 < spent <= 8


def test_an_event_it_does_not_know_is_no_event_of_cost_nothing(run):
    lines = run.ledger.read_bytes().splitlines()
    last = json.loads(lines[-1])
    last["event"] = {"type": "Free"}
    last["prev"] = hashlib.sha256(lines[-2]).hexdigest()
    run.ledger.write_bytes(b"\n".join([*lines[:-1], json.dumps(last).encode()]) + b"\n")
    with pytest.raises(ValueError, match="unknown event 'Free'"):
        independent.read_ledger(run.ledger)


# The command -----------------------------------------------------------------------------------


def test_the_command_says_row_by_row_and_by_its_exit_code(run, capsys):
    code, out, _ = call(capsys, "verify", str(run.root))
    assert code == 0 and "everything holds" in out and "ledger chain" in out
    digest = file_digest(run.manifest)
    code, out, _ = call(capsys, "verify", str(run.root), "--json", "--manifest-digest", digest)
    report = json.loads(out)
    assert code == 0 and report["holds"] and [row["check"] for row in report["checks"]] == [*CHECKS]
    another_config(run)
    code, out, _ = call(capsys, "verify", str(run.root), "--json")
    assert code == 1 and not json.loads(out)["holds"]


@pytest.mark.parametrize("words", [["nowhere"], ["run", "--manifest-digest", "abc"]])
def test_bad_usage_is_one_line_and_exit_2(run, capsys, monkeypatch, words):
    monkeypatch.chdir(run.root.parent)
    code, out, errors = call(capsys, "verify", *words)
    assert code == 2 and out == "" and errors.count("\n") == 1


def test_a_later_result_is_verified_with_its_run(run):
    home = run.root / "evaluation" / "wrn"
    home.mkdir(parents=True)
    (home / "config.yaml").write_text("")
    with pytest.raises(RunDirectoryError, match="verify the run"):
        verify(home)
    with pytest.raises(ConfigError, match="64 hexadecimal digits"):
        verify(run.root, digest="g" * 64)


def test_it_loads_neither_torch_nor_ray_nor_what_the_run_names(run):
    """A config that names a plugin must not make whoever verifies it import that."""
    config = to_dict(run.read_config())
    assert config["plugins"] == []
    text = run.config.read_text().replace("plugins: []", "plugins: [evil_module]")
    assert "evil_module" in text
    run.config.write_text(text)
    code = (
        "import sys; from sapf_ray.cli import main; main(['verify', sys.argv[1]]); "
        "print([name for name in ('torch', 'ray', 'mlflow', 'evil_module') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(run.root)], capture_output=True, text=True, timeout=120
    )
    assert done.stdout.splitlines()[-1] == "[]", done.stdout + done.stderr


def test_the_code_s_version_is_in_the_header_of_a_checkout(run):
    assert code_version() and verify(run.root)[list(CHECKS).index("code")].state == PASS
