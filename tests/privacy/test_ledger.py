from __future__ import annotations

import hashlib
import io
import itertools
import json
import math
import multiprocessing
import os
from pathlib import Path

import pytest
from rich.console import Console

from sapf_ray.errors import BudgetError, RunDirectoryError
from sapf_ray.privacy import ledger as ledger_module
from sapf_ray.privacy.accountants import compose_epsilon
from sapf_ray.privacy.events import gaussian_event
from sapf_ray.privacy.ledger import Ledger
from sapf_ray.privacy.planner import PrivacyPlan, StagePlan, make_plan
from sapf_ray.report.tables import ledger_table

from .test_planner import DIGITS, small

STEPS = 5


@pytest.fixture(scope="module")
def plan() -> PrivacyPlan:
    return make_plan(small(steps=STEPS, epsilon=2.0), DIGITS)


@pytest.fixture
def ledger(tmp_path, plan) -> Ledger:
    return Ledger.create(tmp_path / "ledger.jsonl", plan)


def spend_all(ledger: Ledger, stream: str = "s") -> None:
    ledger.record("selection", ledger.plan.selection.event(), stream, "selection")
    for step in range(ledger.plan.steps):
        ledger.record(f"finetune/step/{step}", ledger.plan.finetune.event(), stream, "finetune")


def test_header_carries_the_plan(ledger, plan):
    header = json.loads(ledger.path.read_text())
    assert header["schema"] == 3 and header["plan"] == json.loads(json.dumps(plan.to_dict()))
    assert Ledger.open(ledger.path).plan == plan
    assert [p.name for p in ledger.path.parent.iterdir()] == ["ledger.jsonl"]


def test_a_ledger_is_never_started_afresh(ledger, plan):
    ledger.record("selection", plan.selection.event(), "s", "selection")
    with pytest.raises(RunDirectoryError, match="already"):
        Ledger.create(ledger.path, plan)
    assert len(Ledger.open(ledger.path).events()) == 1


def test_missing_ledger(tmp_path, plan):
    with pytest.raises(RunDirectoryError, match=r"ledger\.jsonl"):
        Ledger.open(tmp_path / "ledger.jsonl")
    with pytest.raises(RunDirectoryError, match=r"ledger\.jsonl"):
        Ledger.create(tmp_path / "no" / "ledger.jsonl", plan)


def test_the_planned_events_spend_what_was_planned(ledger, plan):
    assert ledger.epsilon_spent() == 0
    spend_all(ledger)
    assert ledger.epsilon_spent() == plan.composed_epsilon <= plan.epsilon
    assert ledger.epsilon_spent("pld") < ledger.epsilon_spent("rdp")
    assert ledger.epsilon_spent(delta=1e-9) > ledger.epsilon_spent()
    assert Ledger.open(ledger.path).epsilon_spent() == plan.composed_epsilon


def test_the_line_is_on_disk_before_record_returns(ledger, plan, monkeypatch):
    order = []
    fsync = os.fsync

    def watched(descriptor):
        lines = ledger.path.read_text().splitlines()
        order.append(json.loads(lines[-1])["release"])
        fsync(descriptor)

    monkeypatch.setattr(ledger_module.os, "fsync", watched)
    returned = ledger.record("finetune/step/0", plan.finetune.event(), "s", "finetune")
    assert order == ["finetune/step/0"]
    written = json.loads(ledger.path.read_text().splitlines()[-1])
    assert returned == {key: value for key, value in written.items() if key != "prev"}


def test_a_failed_write_is_not_a_record(ledger, plan, monkeypatch):
    def fail(descriptor):
        raise OSError("disk full")

    monkeypatch.setattr(ledger_module.os, "fsync", fail)
    with pytest.raises(OSError):
        ledger.record("selection", plan.selection.event(), "s", "selection")


def test_exact_replay_is_free_and_flagged(ledger, plan):
    spend_all(ledger)
    spent = ledger.epsilon_spent()
    for _ in range(3):
        assert ledger.record("finetune/step/2", plan.finetune.event(), "s", "finetune")["replay"]
    assert ledger.epsilon_spent() == spent
    assert [e.replay for e in ledger.events()].count(True) == 3


@pytest.mark.parametrize("change", ["noise_id", "event", "release"])
def test_anything_else_is_charged_again(ledger, plan, change):
    ledger.record("finetune/step/2", plan.finetune.event(), "s", "finetune")
    spent = ledger.epsilon_spent()
    release = "finetune/step/3" if change == "release" else "finetune/step/2"
    event = gaussian_event(50.0, 0.01) if change == "event" else plan.finetune.event()
    assert not ledger.record(release, event, "t" if change == "noise_id" else "s", "finetune")[
        "replay"
    ]
    assert ledger.epsilon_spent() > spent


def test_the_budget_stops_before_anything_is_written(ledger, plan):
    spend_all(ledger)
    before = ledger.path.read_bytes()
    with pytest.raises(BudgetError, match="finetune/step/9 would raise epsilon to") as error:
        ledger.record("finetune/step/9", plan.finetune.event(), "s", "finetune")
    assert "\n" not in str(error.value)
    with pytest.raises(BudgetError, match=r"finetune/step/0 was paid with another sum: .*new run"):
        ledger.record("finetune/step/0", plan.finetune.event(), "another sum", "finetune")
    assert "\n" not in str(error.value)
    assert ledger.path.read_bytes() == before


def test_events_outside_the_plan_pass_while_they_fit_the_budget(ledger, plan):
    ledger.record("query", gaussian_event(30.0), "s", "selection")
    assert ledger.epsilon_spent() < plan.epsilon
    with pytest.raises(BudgetError):
        ledger.record("query", gaussian_event(0.5), "t", "selection")
    with pytest.raises(BudgetError):
        ledger.record("query", gaussian_event(0.0), "t", "selection")


def test_a_repeated_charge_counts_against_the_last_planned_one(ledger, plan):
    ledger.record("finetune/step/0", plan.finetune.event(), "lost", "finetune")
    with pytest.raises(BudgetError):
        spend_all(ledger)
    assert ledger.epsilon_spent() <= plan.epsilon * (1 + 1e-6)


def test_epsilon_is_never_understated_after_a_crash_at_any_byte(ledger, plan):
    """Whatever prefix of the file a crash leaves, every record that had returned by then is paid
    for.
    """
    paid = [(ledger.path.stat().st_size, 0.0)]
    events = []
    for release, event in [
        ("selection", plan.selection.event()),
        ("finetune/step/0", plan.finetune.event()),
    ]:
        ledger.record(release, event, "s", "finetune")
        events.append((event, 1))
        paid.append(
            (
                ledger.path.stat().st_size,
                compose_epsilon(events, plan.delta, accountant=plan.accountant),
            )
        )
    data = ledger.path.read_bytes()
    crashed = ledger.path.with_name("crashed.jsonl")
    for end in range(paid[0][0], len(data) + 1):
        crashed.write_bytes(data[:end])
        due = max(epsilon for size, epsilon in paid if size <= end)
        reopened = Ledger.open(crashed)
        assert reopened.epsilon_spent() >= due
        shown = reopened.epsilon_spent()
        reopened.record("finetune/step/9", plan.finetune.event(), "s", "finetune")  # repairs
        assert crashed.read_bytes().endswith(b"\n")
        assert Ledger.open(crashed).epsilon_spent() > shown


def test_torn_line_that_parses_is_charged_and_then_a_free_replay(ledger, plan):
    ledger.record("selection", plan.selection.event(), "s", "selection")
    ledger.path.write_bytes(ledger.path.read_bytes()[:-1])
    reopened = Ledger.open(ledger.path)
    assert len(reopened.events()) == 1 and reopened.epsilon_spent() > 0
    assert reopened.record("selection", plan.selection.event(), "s", "selection")["replay"]
    assert [e.replay for e in Ledger.open(ledger.path).events()] == [False, True]


def test_torn_line_that_does_not_parse_is_cut_off_by_the_next_record(ledger, plan):
    whole = ledger.path.read_bytes()
    ledger.path.write_bytes(whole + b'{"release": "selec')
    reopened = Ledger.open(ledger.path)
    assert reopened.events() == [] and reopened.epsilon_spent() == 0
    assert ledger.path.read_bytes() != whole, "reading alone changes nothing"
    assert not reopened.record("selection", plan.selection.event(), "s", "selection")["replay"]
    assert len(ledger.path.read_text().splitlines()) == 2


@pytest.mark.parametrize(
    "damage", [b"", b"{}", b"\0\0\0", b"[]", b'{"release": 1}', b"\xff\xfe", b"garbage"]
)
def test_damaged_middle_line_names_file_and_line(ledger, damage):
    spend_all(ledger)
    lines = ledger.path.read_bytes().split(b"\n")
    lines[3] = damage
    ledger.path.write_bytes(b"\n".join(lines))
    with pytest.raises(RunDirectoryError, match=r"ledger\.jsonl, line 4"):
        Ledger.open(ledger.path)


def test_damage_met_while_running_stops_every_further_record(ledger, plan):
    with open(ledger.path, "ab") as f:
        f.write(b"garbage\n")
    for _ in range(2):
        with pytest.raises(RunDirectoryError, match=r"ledger\.jsonl, line 2"):
            ledger.record("selection", plan.selection.event(), "s", "selection")


@pytest.mark.parametrize(
    "header", ["", "x\n", "{}\n", '{"schema": 2, "plan": {}}\n', '{"schema": 2}', "[]\n"]
)
def test_damaged_header(tmp_path, header):
    path = tmp_path / "ledger.jsonl"
    path.write_text(header)
    with pytest.raises(RunDirectoryError, match=r"ledger\.jsonl, line 1"):
        Ledger.open(path)


@pytest.mark.parametrize("schema", [1, 2])
def test_ledgers_of_earlier_versions_are_read_and_not_continued(ledger, plan, schema):
    spend_all(ledger)
    ledger.record("finetune/step/1", plan.finetune.event(), "s", "finetune")  # a replay
    text = ledger.path.read_text()
    ledger.path.write_text(earlier_version(text, schema=schema))
    old = Ledger.open(ledger.path)
    assert old.plan == plan and not old.chained
    spent = ledger_spent(text, ledger.path.parent)
    assert old.events() == Ledger.open(ledger.path.parent / "new.jsonl").events()
    assert old.epsilon_spent() == pytest.approx(spent)
    assert "s" in {event.noise_id for event in old.events()}
    assert ledger_table(old).row_count > 0
    before = ledger.path.read_bytes()
    for refused in (
        old.check_continuable,
        lambda: old.record("finetune/step/1", plan.finetune.event(), "s", "finetune"),
    ):
        with pytest.raises(RunDirectoryError, match=r"earlier version .* stay readable") as error:
            refused()
        assert "\n" not in str(error.value)
    assert ledger.path.read_bytes() == before
    header = before.split(b"\n")[0].decode()
    ledger.path.write_text(header + "\n" + text.splitlines()[1] + "\n")  # a line of this version
    with pytest.raises(RunDirectoryError, match="line 2: damaged"):
        Ledger.open(ledger.path)


def earlier_version(text: str, *, schema: int) -> str:
    """A ledger as an earlier version wrote it: without a chain, in schema 1 with other names."""
    header, *lines = [json.loads(line) for line in text.splitlines()]
    plan_of_then = header["plan"]
    if schema == 1:
        for stage in ("selection", "finetune"):
            del plan_of_then[stage]["slack"]  # came with schema 2
    old = [json.dumps({"schema": schema, "plan": plan_of_then})]
    for line in lines:
        del line["prev"]
        if schema == 1:
            line["stream"] = line.pop("noise_id")
        old.append(json.dumps(line))
    return "\n".join(old) + "\n"


# The chain -----------------------------------------------------------------------------------


def test_each_line_carries_the_digest_of_the_line_before(ledger):
    spend_all(ledger)
    lines = ledger.path.read_bytes().splitlines()
    for before, line in itertools.pairwise(lines):
        assert json.loads(line)["prev"] == hashlib.sha256(before).hexdigest()
    assert "prev" not in json.loads(lines[0])


def remove(lines, at):
    return lines[:at] + lines[at + 1 :]


def swap(lines, at):
    return [*lines[:at], lines[at + 1], lines[at], *lines[at + 2 :]]


def repeat(lines, at):
    return [*lines[: at + 1], *lines[at:]]


def reword(lines, at):
    """Another line that is a ledger's event all the same: half of what was paid."""
    data = json.loads(lines[at])
    data["replay"] = True
    return [*lines[:at], json.dumps(data).encode(), *lines[at + 1 :]]


@pytest.mark.parametrize("edit", [remove, swap, repeat, reword])
def test_what_was_changed_in_the_middle_is_refused_in_one_line(ledger, edit):
    spend_all(ledger)
    lines = ledger.path.read_bytes().splitlines()
    ledger.path.write_bytes(b"\n".join(edit(lines, 2)) + b"\n")
    with pytest.raises(RunDirectoryError, match=r"ledger\.jsonl, line \d: does not foll") as error:
        Ledger.open(ledger.path)
    assert "\n" not in str(error.value)


def test_a_header_of_another_plan_breaks_the_chain(ledger):
    spend_all(ledger)
    text = ledger.path.read_text()
    ledger.path.write_text(text.replace('"epsilon": 2.0', '"epsilon": 9.0', 1))
    with pytest.raises(RunDirectoryError, match=r"line 2: does not follow"):
        Ledger.open(ledger.path)


def test_an_unended_last_line_of_another_chain_is_no_crash_of_ours(ledger, plan):
    spend_all(ledger)
    lines = ledger.path.read_bytes().splitlines()
    ledger.path.write_bytes(b"\n".join([*lines[:-2], lines[-1]]))
    with pytest.raises(RunDirectoryError, match="does not follow"):
        Ledger.open(ledger.path)


def test_the_header_carries_what_the_run_is_bound_to(tmp_path, plan):
    origin = {"config": "c0ffee", "versions": {"torch": "2"}}
    ledger = Ledger.create(tmp_path / "bound.jsonl", plan, origin=origin)
    spend_all(ledger)
    assert Ledger.open(ledger.path).header.origin == origin
    assert Ledger.open(ledger.path).plan == plan


def ledger_spent(text: str, folder: Path) -> float:
    path = folder / "new.jsonl"
    path.write_text(text)
    return Ledger.open(path).epsilon_spent()


def test_other_schema(ledger):
    ledger.path.write_text(ledger.path.read_text().replace('"schema": 3', '"schema": 4'))
    with pytest.raises(RunDirectoryError, match="schema 4"):
        Ledger.open(ledger.path)


def test_a_ledger_that_shrank_is_refused(ledger, plan):
    size = ledger.path.stat().st_size
    ledger.record("selection", plan.selection.event(), "s", "selection")
    os.truncate(ledger.path, size)
    with pytest.raises(RunDirectoryError, match="truncated"):
        ledger.events()


def _append(path: Path, name: str, n: int) -> None:
    ledger = Ledger.open(path)
    for i in range(n):
        ledger.record(f"{name}/{i}", ledger.plan.finetune.event(), "s", "finetune")


def test_two_processes_append_in_turn(tmp_path, plan):
    path = tmp_path / "ledger.jsonl"
    wide = PrivacyPlan(
        **{
            **vars(plan),
            "finetune": StagePlan(noise_multiplier=5.0, sample_rate=0.2, count=60, share=1.0),
            "steps": 60,
        }
    )
    ledger = Ledger.create(path, wide)
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_append, args=(path, name, 30)) for name in "ab"]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    assert sorted(e.release for e in ledger.events()) == sorted(
        f"{name}/{i}" for name in "ab" for i in range(30)
    )


def test_two_holders_cannot_spend_the_budget_twice(ledger, plan):
    other = Ledger.open(ledger.path)
    spend_all(ledger)
    with pytest.raises(BudgetError):
        other.record("finetune/step/0", plan.finetune.event(), "t", "finetune")
    assert other.record("finetune/step/0", plan.finetune.event(), "s", "finetune")["replay"]


def test_curve_rises_from_the_selection_to_what_is_spent(ledger, plan):
    assert ledger.epsilon_curve(4) == [(0, 0.0)]
    spend_all(ledger)
    ledger.record("finetune/step/1", plan.finetune.event(), "s", "finetune")
    curve = ledger.epsilon_curve(4)
    steps, epsilons = zip(*curve, strict=True)
    assert (
        steps[0] == 0
        and steps[-1] == STEPS
        and list(steps) == sorted(set(steps))
        and len(curve) == 4
    )
    assert list(epsilons) == sorted(epsilons) and epsilons[-1] == ledger.epsilon_spent()
    assert epsilons[0] == pytest.approx(
        compose_epsilon(plan.selection.event(), plan.delta, accountant="rdp")
    )


def test_curve_under_pld_bounds_the_exact_values(tmp_path):
    plan = make_plan(small(steps=20, accountant="pld", epsilon=2.0), DIGITS)
    ledger = Ledger.create(tmp_path / "ledger.jsonl", plan)
    spend_all(ledger)
    for step, epsilon in ledger.epsilon_curve(4):
        exact = compose_epsilon(
            [(plan.selection.event(), 1), (plan.finetune.event(), step)],
            plan.delta,
            accountant="pld",
        )
        assert exact * (1 - 1e-9) <= epsilon <= exact * 1.05


def test_non_private_run_records_without_limit(tmp_path):
    plan = make_plan(small(steps=2, non_private=True), DIGITS)
    ledger = Ledger.create(tmp_path / "ledger.jsonl", plan)
    spend_all(ledger)
    ledger.record("finetune/step/0", plan.finetune.event(), "t", "finetune")
    assert Ledger.open(ledger.path).epsilon_spent() == math.inf


def test_summary_shows_charges_replays_and_both_accountants(ledger, plan):
    spend_all(ledger)
    ledger.record("finetune/step/1", plan.finetune.event(), "s", "finetune")
    console = Console(record=True, width=160, file=io.StringIO())
    console.print(ledger_table(ledger))
    text = console.export_text()
    assert (
        f"{ledger.epsilon_spent('pld'):.4f}" in text
        and f"{ledger.epsilon_spent('rdp'):.4f}" in text
    )
    assert "Gaussian, noise 25" in text and "Poisson sample" in text and f"{STEPS + 1}" in text


def test_planned_records_need_no_accounting(ledger, monkeypatch):
    def slow(*args):
        raise AssertionError("composed although the events are within the plan")

    monkeypatch.setattr(ledger_module, "compose_epsilon", slow)
    spend_all(ledger)
