"""What a grid spends is known before it starts.

Every full-scale cell plans, and the total composes all of them.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from sapf_ray.config import RunConfig
from sapf_ray.config.tuning import TuningConfig
from sapf_ray.errors import SapfError
from sapf_ray.paper.tables import paper_setting
from sapf_ray.privacy.accountants import compose_epsilon
from sapf_ray.privacy.events import gaussian_event
from sapf_ray.privacy.ledger import Ledger
from sapf_ray.privacy.planner import PrivacyPlan, make_plan, plan_events
from sapf_ray.runs.directory import RunDirectory
from sapf_ray.saliency.selection import Selection
from sapf_ray.saliency.shared import shared_folder
from sapf_ray.tune.budget import is_finished, plan_cells, selection_root, total_text, totals
from sapf_ray.tune.resources import cell_times, check_disk, measured_seconds
from sapf_ray.tune.space import Cell, load_space, make_cells
from tests.tune.test_space import GRIDS, SPACES, write

PRIVATE = TuningConfig(private=True)
RDP = {"privacy.accountant": "rdp"}  # faster to plan than PLD


def cells_of(tmp_path: Path, **keys: object) -> list[Cell]:
    return make_cells(load_space(write(tmp_path, **keys)))


def plan_without_search(config: RunConfig, n_records: int, **facts) -> PrivacyPlan:
    """All of the plan but the search for its noise.

    The search takes a second for each of the paper's settings.
    """
    without = replace(config, privacy=replace(config.privacy, non_private=True))
    return make_plan(without, n_records, **facts)


@pytest.mark.parametrize("name", [*GRIDS, *SPACES])
def test_every_cell_of_every_space_plans_without_data(name, monkeypatch):
    monkeypatch.setattr("sapf_ray.tune.budget.make_plan", plan_without_search)
    for item in plan_cells(make_cells(load_space(name))):
        if item.cell.config.data.source in ("cifar10", "octmnist", "celeba", "camelyon"):
            assert item.plan.n_records == paper_setting(item.cell.config.data.source).n_train
        setting = item.cell.labels.get("row", item.cell.labels.get("setting", ""))
        public = item.cell.method == "public" or setting.startswith("public")
        assert item.plan.reads_images == (not public or setting.endswith("head"))


@pytest.mark.long
@pytest.mark.parametrize("name", [*GRIDS, *SPACES])
def test_every_cell_of_every_space_meets_its_epsilon(name):
    for item in plan_cells(make_cells(load_space(name), RDP)):
        if item.plan.reads_images and not item.plan.non_private:
            assert 0 < item.plan.composed_epsilon <= item.cell.config.privacy.epsilon


def test_missing_data_is_told_before_a_start_and_with_the_cell(tmp_path):
    (cell,) = make_cells(load_space("table2"), RDP, only={"method": "DP-LoRA"})
    assert plan_cells([cell])[0].plan.n_records == 45_000
    with pytest.raises(SapfError, match=r"cell SD-v1-5_cifar10_DP-LoRA: .*data/cifar10"):
        plan_cells([cell], strict=True)


@pytest.mark.parametrize(
    ("base", "message"),
    [
        ({"privacy.epsilon": 1e-6}, r"cell seed0: (privacy\.epsilon|saliency\.noise_multiplier)"),
        (
            {"finetune.batch_size": 5000},
            r"cell seed0: finetune\.batch_size = 5000: must be at most .* 1297",
        ),
        ({"data.source": "nothing"}, r"cell seed0: data\.source = 'nothing'"),
        ({"model.path": "no-such-model"}, r"cell seed0: model\.path = 'no-such-model'"),
    ],
)
def test_what_cannot_be_planned_names_the_cell(tmp_path, base, message):
    base = {"finetune.batch_size": 64, "finetune.steps": 3, **RDP, **base}
    with pytest.raises(SapfError, match=message):
        plan_cells(cells_of(tmp_path, base=base, axes={"seed": [0]}), strict=True)


def test_pool_must_fit_the_model_before_a_start(tmp_path, monkeypatch):
    cells = cells_of(
        tmp_path,
        base={"finetune.steps": 1, "finetune.batch_size": 64, "saliency.ratio": 1.0, **RDP},
        axes={"saliency.pool": ["qkv"]},
    )
    monkeypatch.setattr("sapf_ray.tune.budget.PublicModel.pool", lambda model, kind: {}[kind])
    with pytest.raises(KeyError, match="qkv"):
        plan_cells(cells, strict=True)


def test_total_composes_all_runs_on_a_data_set_and_no_other(tmp_path):
    base = {
        "finetune.batch_size": 100,
        "finetune.steps": 10,
        "saliency.noise_multiplier": 9.0,
        "grounding.remedies": "none",
        **RDP,
    }
    planned = plan_cells(
        cells_of(
            tmp_path,
            base=base,
            axes={"dataset": ["digits", "stand_in"], "epsilon": [2.0, 4.0], "seed": [0, 1]},
        )
    )
    (digits, stand_in) = totals(planned, tmp_path)
    assert (digits.data, digits.runs, stand_in.runs) == ("digits", 4, 4)
    own = [item.plan for item in planned if item.cell.config.data.source == "digits"]
    events = [(gaussian_event(9.0), 2)] + [  # each seed its own selection, for both ε
        (gaussian_event(plan.finetune.noise_multiplier, 100 / 1297), 10) for plan in own
    ]
    assert digits.epsilon == pytest.approx(
        compose_epsilon(events, own[0].delta, accountant="pld"), rel=1e-9
    )
    assert digits.summed == pytest.approx(sum(plan.composed_epsilon for plan in own))
    assert max(plan.composed_epsilon for plan in own) < digits.epsilon < digits.summed
    assert "all 4 private runs together cost each training image" in total_text(digits)
    assert "4 of them share 2 selection releases, counted once" in total_text(digits)


def test_runs_for_groups_and_for_images_do_not_add_up(tmp_path):
    groups = {"column:writer": {"data.groups": "column:writer"}, "none": {}}
    base = {"data.source": "parquet", "data.n_records": 50_000, **RDP}
    cells = cells_of(tmp_path, base=base, axes={"setting": groups, "seed": [0, 1]})
    by_group, by_image = totals(plan_cells(cells), tmp_path)
    assert (by_group.unit, by_image.unit) == ("group", "image")
    assert by_group.data == "parquet by column:writer" and by_image.data == "parquet"
    assert by_group.runs == by_image.runs == 2
    assert "together cost each training group ε" in total_text(by_group)


def test_total_counts_a_selection_once_where_it_was_made_once_and_only_there(tmp_path):
    """Before a start by what cells will share, then by what their ledgers say they did."""
    base = {
        "finetune.batch_size": 100,
        "finetune.steps": 2,
        "saliency.noise_multiplier": 4.0,
        "grounding.remedies": "none",
        **RDP,
    }
    planned = plan_cells(
        cells_of(tmp_path, base=base, axes={"epsilon": [3.0, 4.0], "ratio": [0.3, 0.5]})
    )

    def composed(selections: int) -> float:
        events = [(gaussian_event(4.0), selections)]
        events += [
            (gaussian_event(item.plan.finetune.noise_multiplier, 100 / 1297), 2) for item in planned
        ]
        return compose_epsilon(events, planned[0].plan.delta, accountant="pld")

    def total():
        (found,) = totals(planned, tmp_path)
        assert found.selecting == 4 and found.epsilon == pytest.approx(
            composed(found.selections), rel=1e-9
        )
        return found.selections

    def pay(item, stream):
        run = RunDirectory(tmp_path / item.cell.name)
        run.claim(item.cell.config)
        run.release()
        ledger = Ledger.create(run.ledger, item.plan)
        ledger.record("selection", item.plan.selection.event(), stream, "selection")

    assert total() == 1
    pay(planned[0], "its own, by an earlier version")
    assert total() == 2, "that cell has its own, the other three will share one"
    folder = shared_folder(
        selection_root(planned[1].cell.config, tmp_path),
        planned[1].cell.config,
        plan=planned[1].plan,
    )
    folder.mkdir(parents=True)
    made = Selection(
        matrices=[],
        scores={},
        score="per_sample_norm",
        pool_size=0,
        event={"noise_id": "of all-x"},
        noise_ids={"selection": "of all-x"},
        shared=True,
    )
    (folder / "selection.json").write_text(json.dumps(made.to_dict()))
    pay(planned[1], "of all-x")
    assert total() == 2, "those yet to come use the release that is there"
    pay(planned[2], "of all-x")
    pay(planned[3], "a second one")
    assert total() == 3


def pay_all(item, out: Path, *, recharged: int = 0) -> None:
    """The ledger of a finished run of the cell, some of its steps paid twice."""
    run = RunDirectory(out / item.cell.name)
    run.claim(item.cell.config)
    run.release()
    ledger = Ledger.create(run.ledger, replace(item.plan, epsilon=100.0))
    if item.plan.selection is not None:
        name = f"{item.cell.name}-selection"
        ledger.record("selection", item.plan.selection.event(), name, "selection")
    for i in range(item.plan.steps + recharged):
        step = i % item.plan.steps
        ledger.record(
            f"step/{step}", item.plan.finetune.event(), f"{item.cell.name}-{i}", "finetune"
        )


def test_a_grid_that_is_cut_down_to_its_winner_costs_what_it_cost(tmp_path):
    base = {
        "finetune.batch_size": 100,
        "finetune.steps": 4,
        "grounding.remedies": "none",
        "privacy.epsilon": 2.0,
        **RDP,
    }
    rates = [1e-4, 3e-4, 1e-3, 3e-3]
    planned = plan_cells(
        cells_of(tmp_path, base=base, axes={"finetune.learning_rate": rates}),
    )
    out = tmp_path / "grid"
    for item in planned:
        pay_all(item, out)
    (whole,) = totals(planned, out)
    (winner,) = totals(planned[:1], out)
    assert (whole.runs, whole.earlier) == (4, 0) and (winner.runs, winner.earlier) == (4, 3)
    assert winner.epsilon == pytest.approx(whole.epsilon, rel=1e-9)
    assert winner.summed == pytest.approx(whole.summed)
    assert "all 4 private runs together" in total_text(winner)
    assert "3 of them ran here before, and are not among today's cells" in total_text(winner)
    # a twin that forgets them says the small number
    (forgetful,) = totals(planned[:1], tmp_path / "another grid")
    assert forgetful.epsilon < 0.7 * whole.epsilon


def test_the_winner_of_a_private_choice_counts_with_all_its_trials(tmp_path):
    base = {"finetune.batch_size": 100, "finetune.steps": 2, "grounding.remedies": "none", **RDP}
    cells = cells_of(tmp_path, base=base, axes={"seed": [0]})
    (planned,) = plan_cells(cells)
    chosen = replace(
        planned.cell, name="winner", config=replace(planned.cell.config, tuning=PRIVATE)
    )
    (winner,) = plan_cells([chosen])
    pay_all(winner, tmp_path / "grid")
    ledger = Ledger.open(tmp_path / "grid" / "winner" / "ledger.jsonl")
    (total,) = totals([planned], tmp_path / "grid")
    assert (total.runs, total.earlier, total.accountant) == (2, 1, "rdp")
    of_trial = {entry.event for entry in ledger.events()}
    whole = ledger.whole(Counter(entry.event for entry in ledger.events()))
    assert not of_trial & set(whole)
    together = [*whole.items(), *((event, n) for _, event, n in plan_events(planned.plan))]
    assert total.epsilon == pytest.approx(
        compose_epsilon(together, planned.plan.delta, accountant="rdp")
    )


def test_what_a_cell_paid_beyond_its_plan_counts(tmp_path):
    base = {"finetune.batch_size": 100, "finetune.steps": 4, "grounding.remedies": "none", **RDP}
    planned = plan_cells(cells_of(tmp_path, base=base, axes={"seed": [0]}))
    (before,) = totals(planned, tmp_path / "grid")
    pay_all(planned[0], tmp_path / "grid", recharged=3)
    (after,) = totals(planned, tmp_path / "grid")
    ledger = Ledger.open(tmp_path / "grid" / planned[0].cell.name / "ledger.jsonl")
    assert (
        after.epsilon == pytest.approx(ledger.epsilon_spent("pld"))
        and after.epsilon > before.epsilon
    )


def test_a_link_to_a_folder_is_the_same_data_set(tmp_path):
    folder = tmp_path / "photos"
    for name in ("cat", "dog"):
        (folder / name).mkdir(parents=True)
        for i in range(20):
            Image.new("RGB", (8, 8), (i, 0, 0)).save(folder / name / f"{i}.png")
    (tmp_path / "link").symlink_to(folder)
    base = {
        "data.source": "image_folder",
        "finetune.batch_size": 10,
        "finetune.steps": 2,
        "grounding.remedies": "none",
        "privacy.epsilon": 8.0,
        **RDP,
    }
    places = [str(folder), str(tmp_path / "link")]
    planned = plan_cells(cells_of(tmp_path, base=base, axes={"data.path": places}))
    (total,) = totals(planned, tmp_path / "grid")
    assert total.runs == 2


def test_total_tells_of_runs_without_noise_and_with_seeded_noise(tmp_path):
    base = {"finetune.batch_size": 100, "finetune.steps": 2, **RDP}
    planned = plan_cells(
        cells_of(
            tmp_path,
            base=base,
            repeatable=True,
            axes={
                "method": ["dp-lora", "lora-no-dp", "public"],
            },
        )
    )
    (total,) = totals(planned, tmp_path)
    assert (total.runs, total.non_private, total.seeded) == (1, 1, 1)
    assert "no guarantee" in total_text(total) and "seeded" in total_text(total)
    assert totals(plan_cells(cells_of(tmp_path, axes={"method": ["public"]})), tmp_path) == []


def finish(cell: Cell, out: Path, seconds: dict[str, float]) -> RunDirectory:
    run = RunDirectory(out / cell.name)
    run.claim(cell.config)
    run.release()
    run.write_json(run.metrics, {"seconds": seconds, "epsilon_spent": 1.0})
    run.card.write_text("card")
    return run


def test_estimate_is_measured_then_scaled_from_its_like_then_a_guess(tmp_path):
    base = {"finetune.batch_size": 64, "finetune.steps": 5, "synthesis.n_images": 100, **RDP}
    planned = plan_cells(
        cells_of(tmp_path, base=base, axes={"dataset": ["digits", "stand_in"], "seed": [0, 1]})
    )
    before = cell_times(planned, tmp_path)
    assert {guess.source for guess in before.values()} == {"guess"}
    finish(planned[0].cell, tmp_path, {"finetune": 40.0, "synthesis": 2.0})
    after = cell_times(planned, tmp_path)
    assert [after[item.cell.name].source for item in planned] == [
        "measured",
        "like it",
        "guess",
        "guess",
    ]
    assert after[planned[1].cell.name].seconds == pytest.approx(42.0), (
        "the same guess, so the same time"
    )
    assert measured_seconds(tmp_path / planned[0].cell.name) == 42.0


def test_models_of_another_size_than_the_measured_one_have_a_guess_too(tmp_path):
    base = {"finetune.batch_size": 64, "finetune.steps": 5, **RDP}
    planned = plan_cells(
        cells_of(
            tmp_path,
            base=base,
            axes={"model.path": ["glyphs-tiny", "letters-tiny", "glyphs-dit-tiny"]},
        )
    )
    assert [found.source for found in cell_times(planned, tmp_path).values()] == ["guess"] * 3


def test_finished_means_complete_and_of_the_same_config(tmp_path):
    cell, other = cells_of(tmp_path, axes={"seed": [0, 1]})
    assert not is_finished(cell, tmp_path)
    run = finish(cell, tmp_path, {})
    assert is_finished(cell, tmp_path)
    run.card.unlink()
    assert not is_finished(cell, tmp_path), "the card is written last"
    changed = Cell(name=cell.name, labels=cell.labels, method=None, config=other.config)
    with pytest.raises(SapfError, match=r"cell seed0: .*holds a run with seed = 0, requested is 1"):
        is_finished(changed, tmp_path)


def test_a_full_disk_is_told_before_the_start(tmp_path, monkeypatch):
    planned = plan_cells(
        cells_of(
            tmp_path,
            base={**RDP, "finetune.steps": 0, "synthesis.n_images": 1000},
            axes={"seed": [0, 1]},
        )
    )
    assert check_disk(planned, tmp_path / "not" / "there") is None
    for free, warning in ((6e6, "the grid writes about"), (1e6, None)):
        monkeypatch.setattr(
            "shutil.disk_usage", lambda path, free=free: type("Usage", (), {"free": free})
        )
        if warning:
            assert warning in check_disk(planned, tmp_path)
        else:
            with pytest.raises(
                SapfError, match=r"cell seed0 writes about .* the disk has 0\.0 GB free"
            ):
                check_disk(planned, tmp_path)
