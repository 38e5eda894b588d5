"""The paper's privacy tables, computed: no image, no model, no GPU.

Tables 9, 10 and 13 of the paper depend on public numbers only (N, batch size, steps, noise
multipliers). Each is printed beside ours in three readings of the paper's selection step, because
no single one explains all of its tables; see :data:`READINGS`.

A stage's share of the budget is (paper, section 3.4) its RDP at order a* over the total RDP at a*,
where a* is the order that minimises epsilon of the composition;
:func:`sapf_ray.privacy.accountants.stage_shares`.

Example::

    report = reproduce_accounting("table13")
    print(report.render("markdown"))
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from sapf_ray.config import FinetuneConfig, PrivacyConfig, RunConfig, SaliencyConfig
from sapf_ray.errors import ConfigError
from sapf_ray.paper.tables import DATASET_NAMES, DATASETS, PaperSetting, paper_setting, paper_table
from sapf_ray.privacy.accountant_table import ACCOUNTANTS
from sapf_ray.privacy.accountants import compose_epsilon
from sapf_ray.privacy.events import gaussian_event
from sapf_ray.privacy.planner import PrivacyPlan, default_delta, make_plan
from sapf_ray.report.render import Column, Report

# Design, section 4: with about this many images in the selection the paper's shares come out.
SUBSAMPLED_RECORDS = 50_000
# The paper prints its noise multipliers to one decimal.
ROUNDING = 0.05


@dataclass(frozen=True, kw_only=True)
class Reading:
    """One way to read what the paper's selection and N are.

    Args:
        name: Shown in the tables.
        description: One clause for the notes.
        subsampled: The selection is a Poisson sample of expected size :data:`SUBSAMPLED_RECORDS`
            (all records where there are fewer); else a full pass.
        by_epochs: N is what the printed epochs imply, B * steps / epochs; else the N of Table 3.
    """

    name: str
    description: str
    subsampled: bool
    by_epochs: bool

    def n_records(self, setting: PaperSetting) -> int:
        """N."""
        return (
            round(setting.batch_size * setting.steps / setting.epochs)
            if self.by_epochs
            else setting.n_train
        )

    def selection_rate(self, setting: PaperSetting) -> float:
        """Poisson rate of the selection; 1 is the full pass."""
        return min(1.0, SUBSAMPLED_RECORDS / self.n_records(setting)) if self.subsampled else 1.0


FULL_PASS = Reading(
    name="full pass",
    description="the text to the letter: one release over all N images",
    subsampled=False,
    by_epochs=False,
)
SUBSAMPLE = Reading(
    name="50k of N",
    description="a Poisson sample of 50,000 of the N images of Table 3",
    subsampled=True,
    by_epochs=False,
)
BY_EPOCHS = Reading(
    name="50k, N by epochs",
    description="a Poisson sample of 50,000 of N = 4096 * 1000 / epochs images",
    subsampled=True,
    by_epochs=True,
)
READINGS: tuple[Reading, ...] = (FULL_PASS, SUBSAMPLE, BY_EPOCHS)
OURS = Reading(
    name="ours, full pass",
    description="one release of per-sample norms over all N images",
    subsampled=False,
    by_epochs=False,
)


@functools.cache
def plan(
    dataset: str, epsilon: float, sigma_s: float, reading: Reading, accountant: str
) -> PrivacyPlan | None:
    """The planner's answer in the paper's setting; None where epsilon cannot be met."""
    setting = paper_setting(dataset)
    config = RunConfig(
        privacy=PrivacyConfig(epsilon=epsilon, accountant=accountant),
        saliency=SaliencyConfig(
            noise_multiplier=sigma_s, sample_rate=reading.selection_rate(setting)
        ),
        finetune=FinetuneConfig(steps=setting.steps, batch_size=setting.batch_size),
    )
    try:
        return make_plan(config, reading.n_records(setting))
    except ConfigError:
        return None


@functools.cache
def composed_epsilon(
    dataset: str, noise_multiplier: float, sigma_s: float, reading: Reading, accountant: str
) -> float:
    """What selection and all steps with this fine-tuning noise really cost."""
    setting = paper_setting(dataset)
    n_records = reading.n_records(setting)
    events = [
        (gaussian_event(sigma_s, reading.selection_rate(setting)), 1),
        (gaussian_event(noise_multiplier, setting.batch_size / n_records), setting.steps),
    ]
    return compose_epsilon(events, default_delta(n_records), accountant=accountant)


def table13(
    datasets: Sequence[str] = DATASETS, epsilons: Sequence[float] | None = None
) -> list[dict[str, Any]]:
    """Per data set and epsilon: the paper's noise multiplier, what it composes to, and the smallest
    that fits.

    Four rows each: the three readings at the paper's sigma_s, and a full pass at our default
    sigma_s. Keys: dataset, epsilon, reading, n_records, sample_rate (of the selection), sigma_s,
    paper_noise_multiplier, epsilon_rdp, epsilon_pld, noise_rdp, noise_pld. All data sets and
    epsilons of the paper unless given.
    """
    rows = []
    for dataset in datasets:
        setting = paper_setting(dataset)
        cases = [(reading, setting.sigma_s) for reading in READINGS] + [
            (OURS, SaliencyConfig().noise_multiplier)
        ]
        for epsilon, paper_noise in setting.noise_multipliers.items():
            if epsilons is not None and epsilon not in epsilons:
                continue
            for reading, sigma_s in cases:
                row: dict[str, Any] = {
                    "dataset": dataset,
                    "epsilon": epsilon,
                    "reading": reading.name,
                    "n_records": reading.n_records(setting),
                    "sample_rate": reading.selection_rate(setting),
                    "sigma_s": sigma_s,
                    "paper_noise_multiplier": paper_noise,
                }
                for accountant in ACCOUNTANTS:
                    row[f"epsilon_{accountant}"] = composed_epsilon(
                        dataset, paper_noise, sigma_s, reading, accountant
                    )
                    row[f"noise_{accountant}"] = _noise(
                        plan(dataset, epsilon, sigma_s, reading, accountant)
                    )
                rows.append(row)
    return rows


def table10(epsilons: Sequence[float] | None = None) -> list[dict[str, Any]]:
    """Per epsilon and sigma_s on CelebA: percent of the RDP budget that selection and fine-tuning
    take.

    The fine-tuning noise of each cell is the smallest that meets epsilon under RDP in that reading,
    as the paper searches it. Keys: those of the paper's table as ``paper_*``, and per reading
    ``selection_percent_<i>``, ``finetune_percent_<i>`` with i the index in :data:`READINGS`.
    All epsilons of the paper unless given.
    """
    rows = []
    for paper in _of_epsilons("table10", epsilons):
        row = {
            "dataset": paper["dataset"],
            "epsilon": paper["epsilon"],
            "sigma_s": paper["sigma_s"],
            "paper_selection_percent": paper["selection_percent"],
            "paper_finetune_percent": paper["finetune_percent"],
        }
        for index, reading in enumerate(READINGS):
            planned = plan(paper["dataset"], paper["epsilon"], paper["sigma_s"], reading, "rdp")
            for stage in ("selection", "finetune"):
                part = None if planned is None else getattr(planned, stage)
                row[f"{stage}_percent_{index}"] = (
                    None if part is None or part.share is None else 100 * part.share
                )
        rows.append(row)
    return rows


def table9(epsilons: Sequence[float] | None = None) -> list[dict[str, Any]]:
    """Per epsilon and sigma_s on CelebA: the fine-tuning noise the planner finds, beside the
    paper's scores.

    Keys: epsilon, sigma_s, ``noise_<accountant>_<i>`` with i the index in :data:`READINGS` (first
    and last), paper_fid, paper_acc (%). FID and accuracy of ours need a GPU and are not part of
    this table. All epsilons of the paper unless given.
    """
    rows = []
    for paper in _of_epsilons("table9", epsilons):
        row = {
            "dataset": "celeba",
            "epsilon": paper["epsilon"],
            "sigma_s": paper["sigma_s"],
            "paper_fid": paper["fid"],
            "paper_acc": paper["acc"],
        }
        for index, reading in enumerate(READINGS):
            if reading is not SUBSAMPLE:
                for accountant in ACCOUNTANTS:
                    planned = plan(
                        "celeba", paper["epsilon"], paper["sigma_s"], reading, accountant
                    )
                    row[f"noise_{accountant}_{index}"] = _noise(planned)
        rows.append(row)
    return rows


def reproduce_accounting(name: str) -> Report:
    """One of :data:`TABLES` with its findings, computed now (up to a minute; later calls are
    cached).

    Raises:
        ConfigError: No such table.
    """
    if name not in TABLES:
        raise ConfigError("table", name, f"must be one of {', '.join(TABLES)}")
    return TABLES[name]()


def _of_epsilons(name: str, epsilons: Sequence[float] | None) -> list[dict[str, Any]]:
    return [row for row in paper_table(name) if epsilons is None or row["epsilon"] in epsilons]


def _noise(planned: PrivacyPlan | None) -> float | None:
    return (
        None if planned is None or planned.finetune is None else planned.finetune.noise_multiplier
    )


def _label(row: dict[str, Any]) -> str:
    return f"{DATASET_NAMES[row['dataset']]} sigma {row['paper_noise_multiplier']:g}"


def _range(values: Iterable[float], spec: str = ".2f") -> str:
    values = list(values)
    return f"{min(values):{spec}} to {max(values):{spec}}"


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
        Column(key="noise_rdp", header="our σ, RDP", format="#.4g"),
        Column(key="noise_pld", header="our σ, PLD", format="#.4g"),
    )
    return Report(
        name="table13",
        caption="Table 13: the paper's noise multipliers, the ε they compose to, and the smallest that meet ε",
        columns=columns,
        rows=rows,
        notes=tuple(_table13_notes(rows)),
        group_by=("dataset", "epsilon"),
    )


def _epsilon_at(row: dict[str, Any], accountant: str, *, rounding: float) -> float:
    """Epsilon of a full-pass row with the paper's noise multiplier at that edge of its rounding."""
    return composed_epsilon(
        row["dataset"],
        row["paper_noise_multiplier"] + rounding,
        row["sigma_s"],
        FULL_PASS,
        accountant,
    )


def _table13_notes(rows: list[dict[str, Any]]) -> list[str]:
    full, by_epochs, ours = (
        [row for row in rows if row["reading"] == r.name] for r in (FULL_PASS, BY_EPOCHS, OURS)
    )
    notes = [
        f"{_label(row)} composes to epsilon {row['epsilon_pld']:.2f} (PLD) / {row['epsilon_rdp']:.2f} (RDP), "
        f"not {row['epsilon']:g}, when the text is followed to the letter ({FULL_PASS.name})."
        for row in full
        if row["epsilon_pld"] > row["epsilon"]
        and _epsilon_at(row, "pld", rounding=ROUNDING) > row["epsilon"]
    ]
    over = [row for row in full if _epsilon_at(row, "rdp", rounding=ROUNDING) > row["epsilon"]]
    if over:
        notes.append(
            f"Under RDP, the accountant that the paper names, {len(over)} of its {len(full)} noise multipliers exceed epsilon "
            f"by more than their rounding to one decimal explains ({FULL_PASS.name}): "
            + ", ".join(
                f"{_label(row)} at {row['epsilon']:g}: {row['epsilon_rdp']:.2f}" for row in over
            )
            + "."
        )
    notes += [
        f"{_label(row)} composes to epsilon {row['epsilon_pld']:.2f} (PLD) of {row['epsilon']:g}: "
        f"far more noise than Table 3's N asks for."
        for row in full
        if row["epsilon_pld"] < 0.8 * row["epsilon"] > _epsilon_at(row, "pld", rounding=-ROUNDING)
    ]
    other_n = [
        row
        for row in by_epochs
        if abs(row["n_records"] / paper_setting(row["dataset"]).n_train - 1) > 0.01
    ]
    other_n = [
        row
        for i, row in enumerate(other_n)
        if row["dataset"] not in {r["dataset"] for r in other_n[:i]}
    ]
    if other_n:
        notes.append(
            "The epochs of Table 13 imply another N than Table 3: "
            + ", ".join(
                f"{DATASET_NAMES[row['dataset']]} {row['n_records']:,} instead of {paper_setting(row['dataset']).n_train:,}"
                for row in other_n
            )
            + "."
        )
    same = sum(
        abs(row["noise_pld"] - row["paper_noise_multiplier"]) <= ROUNDING
        for row in by_epochs
        if row["noise_pld"]
    )
    notes.append(
        f"With that N, a selection on {SUBSAMPLED_RECORDS:,} Poisson-sampled images and PLD ({BY_EPOCHS.name}), the smallest "
        f"noise multiplier is the paper's within its rounding in {same} of {len(by_epochs)} cases"
        + "".join(
            f"; {_label(row)} at {row['epsilon']:g}: ours {row['noise_pld']:.4g}, the paper's composes to "
            f"{row['epsilon_pld']:.3f}"
            for row in by_epochs
            if row["noise_pld"] and abs(row["noise_pld"] - row["paper_noise_multiplier"]) > ROUNDING
        )
        + "."
    )
    gains = [
        (a, b)
        for a, b in zip(ours, full, strict=True)
        if a["epsilon"] == 1 and a["noise_pld"] and b["noise_pld"]
    ]
    notes += [
        f"Our default, {OURS.description} at sigma_s {SaliencyConfig().noise_multiplier:g}, needs less fine-tuning noise at "
        "epsilon 1 than a correct full pass at the paper's sigma_s (PLD): "
        + ", ".join(
            f"{DATASET_NAMES[a['dataset']]} {b['noise_pld']:.4g} to {a['noise_pld']:.4g} "
            f"({b['noise_pld'] / a['noise_pld']:.2f} times)"
            for a, b in gains
        )
        + ".",
        "delta = 1/(N ln N) with the N of the row; add/remove one image; the paper's batch size and steps; PLD figures are "
        "upper bounds.",
    ]
    return notes


def _table10_report() -> Report:
    rows = table10()
    columns = [
        Column(key="epsilon", header="ε", format="g"),
        Column(key="sigma_s", header="σ_s", format="g"),
        Column(key="paper_selection_percent", header="paper select %", format=".2f"),
        Column(key="paper_finetune_percent", header="paper tune %", format=".2f"),
    ]
    for index, reading in enumerate(READINGS):
        columns += [
            Column(
                key=f"selection_percent_{index}", header=f"{reading.name}: select %", format=".2f"
            ),
            Column(key=f"finetune_percent_{index}", header=f"{reading.name}: tune %", format=".2f"),
        ]
    notes = [
        "Share of a stage = its RDP at order a* over the total RDP at a*, with a* the order that minimises epsilon "
        "(section 3.4); the fine-tuning noise is the smallest that meets epsilon under RDP in the same reading."
    ]
    setting = paper_setting("celeba")
    for index, reading in enumerate(READINGS):
        pairs = [
            (row[f"selection_percent_{index}"], row["paper_selection_percent"]) for row in rows
        ]
        pairs = [(ours, paper) for ours, paper in pairs if ours is not None]
        ratios = [ours / paper for ours, paper in pairs if paper >= 0.1]
        notes.append(
            f"Reading '{reading.name}' ({reading.description}; N = {reading.n_records(setting):,}, rate "
            f"{reading.selection_rate(setting):.4f}): ours over the paper's selection share is {_range(ratios)} in the "
            f"{len(ratios)} cells of at least 0.1 %; the largest difference is "
            f"{max(abs(ours - paper) for ours, paper in pairs):.2f} percentage points."
        )
    notes.append(
        "Between integer orders dp-accounting overstates the RDP of a subsampled selection: at order 3.3 and rate 0.342 by "
        "3 % for sigma_s 5 and 48 % for sigma_s 25, against numerical integration. Where the best order is fractional, the "
        "shares of the two subsample readings are upper values."
    )
    notes.append(
        "The paper's 0.02 % at epsilon 10, sigma_s 20 does not fit its own 0.04 % at sigma_s 10: the cost of the "
        "selection falls with the square of sigma_s."
    )
    return Report(
        name="table10",
        caption="Table 10: shares of the privacy budget on CelebA",
        columns=tuple(columns),
        rows=rows,
        notes=tuple(notes),
        group_by=("epsilon",),
    )


def _table9_report() -> Report:
    rows = table9()
    columns = [
        Column(key="epsilon", header="ε", format="g"),
        Column(key="sigma_s", header="σ_s", format="g"),
    ]
    for index, reading in enumerate(READINGS):
        if reading is not SUBSAMPLE:
            columns += [
                Column(
                    key=f"noise_{name}_{index}",
                    header=f"σ, {reading.name}, {name.upper()}",
                    format="#.4g",
                )
                for name in ("rdp", "pld")
            ]
    columns += [
        Column(key="paper_fid", header="paper's FID", format=".1f"),
        Column(key="paper_acc", header="paper's accuracy %", format=".1f"),
    ]
    index = READINGS.index(FULL_PASS)
    notes = []
    for epsilon in dict.fromkeys(row["epsilon"] for row in rows):
        noises = [row[f"noise_pld_{index}"] for row in rows if row["epsilon"] == epsilon]
        sigmas = [row["sigma_s"] for row in rows if row["epsilon"] == epsilon]
        if None in noises:
            continue
        notes.append(
            f"At epsilon {epsilon:g} a full-pass selection with sigma_s {sigmas[-1]:g} instead of {sigmas[0]:g} lowers the "
            f"fine-tuning noise from {noises[0]:.4g} to {noises[-1]:.4g} (PLD)."
        )
    notes.append(
        "FID and accuracy are the paper's; ours need the paper's models and a GPU and are not computed here."
    )
    return Report(
        name="table9",
        caption="Table 9: fine-tuning noise multiplier for each selection noise, CelebA",
        columns=tuple(columns),
        rows=rows,
        notes=tuple(notes),
        group_by=("epsilon",),
    )


TABLES = MappingProxyType(
    {"table9": _table9_report, "table10": _table10_report, "table13": _table13_report}
)
