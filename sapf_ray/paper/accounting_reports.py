"""The reports of the accounting tables: columns, and notes that come from the rows.

Example::

    report = reproduce_accounting("table13")
    print(report.render("markdown"))
"""

from __future__ import annotations

from collections.abc import Iterable
from types import MappingProxyType
from typing import Any

from sapf_ray.config import SaliencyConfig
from sapf_ray.errors import ConfigError
from sapf_ray.paper.accounting import (
    BY_EPOCHS,
    FULL_PASS,
    OURS,
    READINGS,
    SUBSAMPLE,
    SUBSAMPLED_RECORDS,
    Reading,
    composed_epsilon,
    table9,
    table10,
    table13,
)
from sapf_ray.paper.tables import DATASET_NAMES, paper_setting
from sapf_ray.report.render import Column, Report
from sapf_ray.stages import Stage

# The paper prints its noise multipliers to one decimal.
ROUNDING = 0.05

Row = dict[str, Any]


def reproduce_accounting(name: str) -> Report:
    """One of :data:`TABLES` with its findings, computed now.

    It takes up to a minute; later calls are cached.

    Raises:
        ConfigError: No such table.
    """
    if name not in TABLES:
        raise ConfigError("table", name, f"must be one of {', '.join(TABLES)}")
    return TABLES[name]()


def _table13_report() -> Report:
    rows = table13()
    columns = (
        Column(key="dataset", header="data set", labels=DATASET_NAMES),
        Column(key="epsilon", header="ε", format="g"),
        Column(key="reading", header="selection"),
        Column(key="n_records", header="N", format=",d"),
        Column(key="sigma_s", header="σ_s", format="g"),
        Column(key="paper_noise_multiplier", header="paper's σ", format="g"),
        Column(key="epsilon_rdp", header="its ε, RDP", format=".3f"),
        Column(key="epsilon_pld", header="its ε, PLD", format=".3f"),
        Column(
            key="noise_rdp",
            header="our σ, RDP",
            format="#.4g",
        ),
        Column(
            key="noise_pld",
            header="our σ, PLD",
            format="#.4g",
        ),
    )
    return Report(
        name="table13",
        caption="Table 13: the paper's noise multipliers, the ε they compose to, and the smallest "
        "that meet ε",
        columns=columns,
        rows=rows,
        notes=tuple(_table13_notes(rows)),
        group_by=("dataset", "epsilon"),
    )


def _table13_notes(rows: list[Row]) -> list[str]:
    full = _of_reading(rows, FULL_PASS)
    by_epochs = _of_reading(rows, BY_EPOCHS)
    ours = _of_reading(rows, OURS)
    return [
        *_too_little_noise(full),
        *_too_little_noise_under_rdp(full),
        *_too_much_noise(full),
        *_other_n(by_epochs),
        _agreement_by_epochs(by_epochs),
        _gain_of_our_default(ours, full),
        "delta = 1/(N ln N) with the N of the row; add/remove one image; the paper's batch size "
        "and steps; PLD figures are upper bounds.",
    ]


def _of_reading(rows: list[Row], reading: Reading) -> list[Row]:
    return [row for row in rows if row["reading"] == reading.name]


def _epsilon_at(
    row: Row,
    accountant: str,
    *,
    rounding: float,
) -> float:
    """Epsilon of a full-pass row with the paper's noise multiplier at that edge of its rounding."""
    return composed_epsilon(
        row["dataset"],
        row["paper_noise_multiplier"] + rounding,
        sigma_s=row["sigma_s"],
        reading=FULL_PASS,
        accountant=accountant,
    )


def _too_little_noise(full: list[Row]) -> list[str]:
    """Cells whose noise does not meet epsilon, whatever its rounding."""
    notes = []
    for row in full:
        epsilon = row["epsilon"]
        if row["epsilon_pld"] <= epsilon:
            continue
        if _epsilon_at(row, "pld", rounding=ROUNDING) > epsilon:
            notes.append(
                f"{_label(row)} composes to epsilon {row['epsilon_pld']:.2f} (PLD) / "
                f"{row['epsilon_rdp']:.2f} (RDP), not {epsilon:g}, when the text is followed to "
                f"the letter ({FULL_PASS.name})."
            )
    return notes


def _too_little_noise_under_rdp(full: list[Row]) -> list[str]:
    over = [row for row in full if _epsilon_at(row, "rdp", rounding=ROUNDING) > row["epsilon"]]
    if not over:
        return []
    cells = [f"{_label(row)} at {row['epsilon']:g}: {row['epsilon_rdp']:.2f}" for row in over]
    return [
        f"Under RDP, the accountant that the paper names, {len(over)} of its {len(full)} noise "
        "multipliers exceed epsilon by more than their rounding to one decimal explains "
        f"({FULL_PASS.name}): {', '.join(cells)}."
    ]


def _too_much_noise(full: list[Row]) -> list[str]:
    """Cells whose noise spends less than 80 % of epsilon, whatever its rounding."""
    notes = []
    for row in full:
        most = 0.8 * row["epsilon"]
        if row["epsilon_pld"] >= most:
            continue
        if _epsilon_at(row, "pld", rounding=-ROUNDING) < most:
            notes.append(
                f"{_label(row)} composes to epsilon {row['epsilon_pld']:.2f} (PLD) of "
                f"{row['epsilon']:g}: far more noise than Table 3's N needs."
            )
    return notes


def _other_n(by_epochs: list[Row]) -> list[str]:
    """Data sets whose N by the printed epochs is another than that of Table 3."""
    found = {}
    for row in by_epochs:
        published = paper_setting(row["dataset"]).n_train
        if abs(row["n_records"] / published - 1) > 0.01:
            name = DATASET_NAMES[row["dataset"]]
            found[name] = f"{name} {row['n_records']:,} instead of {published:,}"
    if not found:
        return []
    return [f"The epochs of Table 13 imply another N than Table 3: {', '.join(found.values())}."]


def _agreement_by_epochs(by_epochs: list[Row]) -> str:
    same = 0
    others = []
    for row in by_epochs:
        if not row["noise_pld"]:
            continue
        if abs(row["noise_pld"] - row["paper_noise_multiplier"]) <= ROUNDING:
            same += 1
        else:
            others.append(
                f"; {_label(row)} at {row['epsilon']:g}: ours {row['noise_pld']:.4g}, the paper's "
                f"composes to {row['epsilon_pld']:.3f}"
            )
    return (
        f"With that N, a selection on {SUBSAMPLED_RECORDS:,} Poisson-sampled images and PLD "
        f"({BY_EPOCHS.name}), the smallest noise multiplier is the paper's within its rounding in "
        f"{same} of {len(by_epochs)} cases{''.join(others)}."
    )


def _gain_of_our_default(ours: list[Row], full: list[Row]) -> str:
    gains = []
    for row, paper in zip(ours, full, strict=True):
        mine = row["noise_pld"]
        theirs = paper["noise_pld"]
        if row["epsilon"] == 1 and mine and theirs:
            name = DATASET_NAMES[row["dataset"]]
            gains.append(f"{name} {theirs:.4g} to {mine:.4g} ({theirs / mine:.2f} times)")
    sigma_s = SaliencyConfig().noise_multiplier
    return (
        f"Our default, {OURS.description} at sigma_s {sigma_s:g}, needs less fine-tuning noise at "
        f"epsilon 1 than a correct full pass at the paper's sigma_s (PLD): {', '.join(gains)}."
    )


def _label(row: Row) -> str:
    return f"{DATASET_NAMES[row['dataset']]} sigma {row['paper_noise_multiplier']:g}"


def _table10_report() -> Report:
    rows = table10()
    columns = [
        Column(key="epsilon", header="ε", format="g"),
        Column(key="sigma_s", header="σ_s", format="g"),
        Column(key="paper_selection_percent", header="paper select %", format=".2f"),
        Column(key="paper_finetune_percent", header="paper tune %", format=".2f"),
    ]
    for index, reading in enumerate(READINGS):
        for stage, word in ((Stage.SELECTION, "select"), (Stage.FINETUNE, "tune")):
            key = f"{stage}_percent_{index}"
            header = f"{reading.name}: {word} %"
            columns.append(
                Column(
                    key=key,
                    header=header,
                    format=".2f",
                )
            )
    notes = [
        "Share of a stage = its RDP at order a* over the total RDP at a*, with a* the order that "
        "minimises epsilon (section 3.4); the fine-tuning noise is the smallest that meets "
        "epsilon under RDP in the same reading.",
        *[_table10_note(rows, index) for index in range(len(READINGS))],
        "Between integer orders dp-accounting overstates the RDP of a subsampled selection: at "
        "order 3.3 and rate 0.342 by 3 % for sigma_s 5 and 48 % for sigma_s 25, against numerical "
        "integration. Where the best order is fractional, the shares of the two subsample "
        "readings are upper values.",
        "The paper's 0.02 % at epsilon 10, sigma_s 20 does not fit its own 0.04 % at sigma_s 10: "
        "the cost of the selection falls with the square of sigma_s.",
    ]
    return Report(
        name="table10",
        caption="Table 10: shares of the privacy budget on CelebA",
        columns=tuple(columns),
        rows=rows,
        notes=tuple(notes),
        group_by=("epsilon",),
    )


def _table10_note(rows: list[Row], index: int) -> str:
    """How a reading's shares of the selection compare with the paper's."""
    reading = READINGS[index]
    setting = paper_setting("celeba")
    ratios = []
    differences = []
    for row in rows:
        ours = row[f"selection_percent_{index}"]
        paper = row["paper_selection_percent"]
        if ours is None:
            continue
        differences.append(abs(ours - paper))
        if paper >= 0.1:
            ratios.append(ours / paper)
    return (
        f"Reading '{reading.name}' ({reading.description}; N = {reading.n_records(setting):,}, "
        f"rate {reading.selection_rate(setting):.4f}): ours over the paper's selection share is "
        f"{_range(ratios)} in the {len(ratios)} cells of at least 0.1 %; the largest difference "
        f"is {max(differences):.2f} percentage points."
    )


def _range(values: Iterable[float]) -> str:
    values = list(values)
    return f"{min(values):.2f} to {max(values):.2f}"


def _table9_report() -> Report:
    rows = table9()
    columns = [
        Column(key="epsilon", header="ε", format="g"),
        Column(key="sigma_s", header="σ_s", format="g"),
    ]
    for index, reading in enumerate(READINGS):
        if reading is SUBSAMPLE:
            continue
        for name in ("rdp", "pld"):
            key = f"noise_{name}_{index}"
            header = f"σ, {reading.name}, {name.upper()}"
            columns.append(
                Column(
                    key=key,
                    header=header,
                    format="#.4g",
                )
            )
    columns.append(
        Column(
            key="paper_fid",
            header="paper's FID",
            format=".1f",
        )
    )
    columns.append(
        Column(
            key="paper_acc",
            header="paper's accuracy %",
            format=".1f",
        )
    )
    notes = [
        *_table9_notes(rows),
        "FID and accuracy are the paper's; ours need the paper's models and a GPU and are not "
        "computed here.",
    ]
    return Report(
        name="table9",
        caption="Table 9: fine-tuning noise multiplier for each selection noise, CelebA",
        columns=tuple(columns),
        rows=rows,
        notes=tuple(notes),
        group_by=("epsilon",),
    )


def _table9_notes(rows: list[Row]) -> list[str]:
    key = f"noise_pld_{READINGS.index(FULL_PASS)}"
    notes = []
    for epsilon in dict.fromkeys(row["epsilon"] for row in rows):
        cells = [row for row in rows if row["epsilon"] == epsilon]
        if any(row[key] is None for row in cells):
            continue
        first = cells[0]
        last = cells[-1]
        notes.append(
            f"At epsilon {epsilon:g} a full-pass selection with sigma_s {last['sigma_s']:g} "
            f"instead of {first['sigma_s']:g} lowers the fine-tuning noise from "
            f"{first[key]:.4g} to {last[key]:.4g} (PLD)."
        )
    return notes


TABLES = MappingProxyType(
    {
        "table9": _table9_report,
        "table10": _table10_report,
        "table13": _table13_report,
    }
)
