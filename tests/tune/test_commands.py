"""`sapf tune` and `sapf reproduce` on the command line: dry runs, overrides, one-line errors."""

from __future__ import annotations

import pytest

from tests import commands
from tests.tune.test_space import write

SMALL = {"finetune.steps": 2, "finetune.batch_size": 64, "privacy.accountant": "rdp"}


def call(capsys, *arguments: str) -> tuple[int, str, str]:
    """Standard output as one line: tables wrap."""
    code, out, err = commands.call(capsys, *arguments)
    return code, " ".join(out.split()), err


def test_dry_run_lists_cells_budget_and_time_and_writes_nothing(capsys, tmp_path):
    path = write(tmp_path, base=SMALL, axes={"method": ["dp-lora", "public"], "epsilon": [2.0]})
    out = tmp_path / "grid"
    code, text, _ = call(
        capsys, "tune", path, "--dry-run", "--out", str(out), "--finetune.lora_rank", "4"
    )
    assert code == 0 and not out.exists()
    assert "2 cells, 2 to run" in text and "dp-lora_epsilon2" in text and "guess" in text
    assert "digits: all 1 private runs together cost each training image ε = " in text


def test_an_override_that_equals_the_default_still_overrides(capsys, tmp_path):
    path = write(tmp_path, base={**SMALL, "privacy.epsilon": 3.0}, axes={"method": ["dp-lora"]})
    _, text, _ = call(capsys, "tune", path, "--dry-run", "--privacy.epsilon", "10")
    assert "│ dp-lora │ dp-lora │ 10 │" in text


def test_only_takes_labels_with_commas(capsys):
    arguments = ("tune", "table2", "--smoke", "--dry-run", "--privacy.accountant", "rdp")
    _, text, _ = call(
        capsys, *arguments, "--only", "dataset=digits,method=DP-SAPF, per-sample norms"
    )
    assert "1 cells, 1 to run" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tune", "nowhere"], "nowhere: no such space"),
        (
            ["tune", "table2", "--smoke", "--dry-run", "--only", "method"],
            "--only = 'method': must be AXIS=LABEL",
        ),
        (
            ["tune", "table2", "--smoke", "--dry-run", "--max-concurrent", "-1"],
            "--max_concurrent = -1: must be at least 0",
        ),
        (
            ["tune", "table2", "--smoke", "--dry-run", "--data.source", "stand_in"],
            "--data.source: is set by the axis 'dataset'",
        ),
        (["tune", "table2", "--smoke", "--dry-run", "--finetune.steps", "few"], "finetune.steps"),
        (["tune", "table2"], "cell SD-v1-5_cifar10_DP-LoRA: "),
        (["reproduce", "table3"], "table = 'table3': must be one of table2, table5"),
    ],
)
def test_errors_are_one_line_before_anything_starts(capsys, arguments, message):
    code, _, error = call(capsys, *arguments)
    assert code == 2 and message in error and len(error.strip().splitlines()) == 1
