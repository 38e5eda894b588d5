"""What several runs on the same images cost together."""

from __future__ import annotations

import dataclasses
import json
import shutil

import pytest

from sapf_ray.config import RunConfig, from_dict, nest
from sapf_ray.privacy.accountants import compose_epsilon
from sapf_ray.privacy.ledger import Ledger
from sapf_ray.privacy.planner import PrivacyPlan, make_plan
from sapf_ray.runs.directory import RunDirectory
from sapf_ray.runs.together import find_runs, totals_of
from tests.commands import call

STEPS = 3
ONE, TWO = {"fingerprint": "aa", "secret": "s"}, {"fingerprint": "bb", "secret": "s"}


@pytest.fixture(scope="module")
def plan() -> PrivacyPlan:
    return make_plan(config_of(), 1297)


def config_of(**changes) -> RunConfig:
    settings = {
        "privacy.accountant": "rdp",
        "privacy.epsilon": 4.0,
        "finetune.batch_size": 64,
        "finetune.steps": STEPS,
    }
    return from_dict(nest(settings | changes))


def paid(root, plan, *, images=ONE, shared=None, **changes) -> RunDirectory:
    """A run that paid all it planned."""
    run = RunDirectory(root)
    run.claim(config_of(**changes))
    run.release()
    origin = {} if images == "old" else {"images": images}
    ledger = Ledger.create(run.ledger, plan, origin=origin)
    if plan.selection is not None:
        name = shared or f"{root.name}-selection"
        ledger.record("selection", plan.selection.event(), name, "selection")
    for step in range(plan.steps):
        event = plan.finetune.event()
        ledger.record(f"finetune/step/{step}", event, f"{root.name}-{step}", "finetune")
    return run


def composed(plan, *, selections: int, runs: int) -> float:
    events = [(plan.selection.event(), selections), (plan.finetune.event(), runs * plan.steps)]
    return compose_epsilon(events, plan.delta, accountant="pld")


def test_runs_on_the_same_images_compose_whatever_their_place(tmp_path, plan):
    paid(tmp_path / "here" / "a", plan)
    paid(tmp_path / "there" / "deep" / "b", plan)
    paid(tmp_path / "here" / "c", plan, images=TWO)
    one, two = totals_of(find_runs([tmp_path / "here", tmp_path / "there"]))
    assert [len(one.runs), len(two.runs)] == [2, 1] and one.comparable and two.comparable
    assert one.epsilon == pytest.approx(composed(plan, selections=2, runs=2))
    assert two.epsilon == pytest.approx(composed(plan, selections=1, runs=1))
    assert two.epsilon < one.epsilon
    assert one.epsilon < one.summed and one.summed_delta == pytest.approx(2 * plan.delta)


def test_a_release_counts_once_however_many_ledgers_paid_for_it(tmp_path, plan):
    """A shared selection, a copied run directory, a folder given twice or through a link."""
    paid(tmp_path / "a", plan, shared="of all")
    paid(tmp_path / "b", plan, shared="of all")
    (total,) = totals_of(find_runs([tmp_path]))
    assert total.epsilon == pytest.approx(composed(plan, selections=1, runs=2))
    assert (total.releases, total.repeated) == (1 + 2 * STEPS, 1)
    shutil.copytree(tmp_path / "a", tmp_path / "copy of a")
    (tmp_path / "link").symlink_to(tmp_path / "b")
    (again,) = totals_of(find_runs([tmp_path, tmp_path / "a", tmp_path / "link"]))
    assert again.epsilon == total.epsilon and len(again.runs) == 3


def test_images_and_groups_never_add_up(tmp_path, plan):
    by_group = dataclasses.replace(plan, adjacency="add_or_remove_one_group")
    paid(tmp_path / "image", plan)
    paid(tmp_path / "group", by_group, **{"data.groups": "folder:1"})
    found = totals_of(find_runs([tmp_path]))
    assert {total.unit for total in found} == {"image", "group by folder:1"}
    alone = composed(plan, selections=1, runs=1)
    assert [total.epsilon for total in found] == pytest.approx([alone, alone])


@pytest.mark.parametrize("images", ["old", None, {"fingerprint": "aa", "secret": "other"}])
def test_what_cannot_be_compared_is_told(tmp_path, plan, images):
    paid(tmp_path / "a", plan)
    paid(tmp_path / "b", plan, images=images)
    paid(tmp_path / "c", plan, images=images)
    known, other = totals_of(find_runs([tmp_path]))
    assert not known.comparable and not other.comparable
    assert other.epsilon == pytest.approx(composed(plan, selections=2, runs=2))


def test_runs_that_read_no_image_cost_nothing(tmp_path, plan):
    public = dataclasses.replace(plan, selection=None, finetune=None, steps=0)
    paid(tmp_path / "public", public, images=None)
    assert totals_of(find_runs([tmp_path])) == []


def test_a_run_without_noise_makes_the_total_infinite(tmp_path, plan):
    stage = dataclasses.replace(plan.finetune, noise_multiplier=0.0)
    bare = dataclasses.replace(plan, finetune=stage, non_private=True)
    paid(tmp_path / "a", plan)
    paid(tmp_path / "bare", bare)
    (total,) = totals_of(find_runs([tmp_path]))
    assert total.epsilon == float("inf")


def test_a_private_choice_s_winner_is_its_trials(tmp_path):
    config = config_of(**{"tuning.private": True, "finetune.steps": 2})
    plan = make_plan(config, 1297)
    run = paid(tmp_path / "winner", plan)
    ledger = Ledger.open(run.ledger)
    ledger.record("score", plan.score.event(), "score", "score")
    (total,) = totals_of(find_runs([tmp_path]))
    assert total.accountant == "rdp"
    assert total.epsilon == pytest.approx(ledger.epsilon_spent("rdp"))


# The command -----------------------------------------------------------------------------------


def test_one_run_has_its_table_and_several_their_total(tmp_path, plan, capsys):
    paid(tmp_path / "a", plan)
    paid(tmp_path / "b", plan, images="old", **{"privacy.reproducible_seed": 1})
    code, out, _ = call(capsys, "ledger", str(tmp_path / "a"))
    assert code == 0 and "this run alone" in out and "fine" in out
    code, out, _ = call(capsys, "ledger", str(tmp_path))
    words = " ".join(out.split())
    assert code == 0 and "Not covered are runs whose ledgers are elsewhere" in words
    assert "b*" in words and "seeded noise" in words and "another secret" in words


@pytest.mark.parametrize("case", ["nowhere", "empty", "edited"])
def test_bad_paths_and_ledgers_are_one_line(tmp_path, plan, capsys, case):
    (tmp_path / "empty").mkdir()
    paid(tmp_path / "edited" / "a", plan)
    run = paid(tmp_path / "edited" / "b", plan)
    lines = run.ledger.read_text().splitlines()
    data = json.loads(lines[2])
    data["event"]["event"]["noise_multiplier"] = 50.0
    lines[2] = json.dumps(data)
    run.ledger.write_text("\n".join(lines) + "\n")
    code, out, errors = call(capsys, "ledger", str(tmp_path / case), str(tmp_path / case))
    assert code == 2 and out == "" and errors.count("\n") == 1
