"""The paper's privacy tables, computed: no image, no model, no GPU.

Tables 9, 10 and 13 of the paper depend on public numbers only (N, batch size, steps, noise
multipliers). Each is printed beside ours in three readings of the paper's selection step, because
no single one explains all of its tables; see :data:`READINGS`. The rows are made here, their
reports in :mod:`sapf_ray.paper.accounting_reports`.

A stage's share of the budget is (paper, section 3.4) its RDP at order a* over the total RDP at a*,
where a* is the order that minimises epsilon of the composition;
:func:`sapf_ray.privacy.accountants.stage_shares`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sapf_ray.config import FinetuneConfig, PrivacyConfig, RunConfig, SaliencyConfig
from sapf_ray.errors import ConfigError
from sapf_ray.paper.tables import DATASETS, PaperSetting, paper_setting, paper_table
from sapf_ray.privacy.accountant_table import ACCOUNTANTS
from sapf_ray.privacy.accountants import compose_epsilon
from sapf_ray.privacy.events import gaussian_event
from sapf_ray.privacy.facts import default_delta
from sapf_ray.privacy.planner import PrivacyPlan, make_plan
from sapf_ray.stages import Stage

# Design, section 4: with about this many images in the selection the paper's shares come out.
SUBSAMPLED_RECORDS = 50_000


@dataclass(frozen=True, kw_only=True)
class Reading:
    """One way to read what the paper's selection and N are.

    Attributes:
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
        if self.by_epochs:
            return round(setting.batch_size * setting.steps / setting.epochs)
        return setting.n_train

    def selection_rate(self, setting: PaperSetting) -> float:
        """Poisson rate of the selection; 1 is the full pass."""
        if self.subsampled:
            return min(1.0, SUBSAMPLED_RECORDS / self.n_records(setting))
        return 1.0


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
def planned_run(
    dataset: str,
    epsilon: float,
    *,
    sigma_s: float,
    reading: Reading,
    accountant: str,
) -> PrivacyPlan | None:
    """The planner's answer in the paper's setting.

    Args:
        dataset: Key of :data:`sapf_ray.paper.tables.DATASETS`.
        epsilon: What the run may spend.
        sigma_s: Noise multiplier of the selection.
        reading: What selection and N are.
        accountant: Name of the accountant.

    Returns:
        None where epsilon cannot be met.
    """
    setting = paper_setting(dataset)
    rate = reading.selection_rate(setting)
    config = RunConfig(
        privacy=PrivacyConfig(epsilon=epsilon, accountant=accountant),
        saliency=SaliencyConfig(noise_multiplier=sigma_s, sample_rate=rate),
        finetune=FinetuneConfig(steps=setting.steps, batch_size=setting.batch_size),
    )
    try:
        return make_plan(config, reading.n_records(setting))
    except ConfigError:
        return None


@functools.cache
def composed_epsilon(
    dataset: str,
    noise_multiplier: float,
    *,
    sigma_s: float,
    reading: Reading,
    accountant: str,
) -> float:
    """What selection and all steps with this fine-tuning noise really cost.

    Args:
        dataset: Key of :data:`sapf_ray.paper.tables.DATASETS`.
        noise_multiplier: Noise multiplier of fine-tuning.
        sigma_s: Noise multiplier of the selection.
        reading: What selection and N are.
        accountant: Name of the accountant.
    """
    setting = paper_setting(dataset)
    n_records = reading.n_records(setting)
    selection = gaussian_event(sigma_s, reading.selection_rate(setting))
    step = gaussian_event(noise_multiplier, setting.batch_size / n_records)
    events = [(selection, 1), (step, setting.steps)]
    return compose_epsilon(events, default_delta(n_records), accountant=accountant)


def table13(
    datasets: Sequence[str] = DATASETS, epsilons: Sequence[float] | None = None
) -> list[dict[str, Any]]:
    """The paper's noise multipliers, what they compose to, and the smallest that fit.

    Four rows per data set and epsilon: the three readings at the paper's sigma_s, and a full pass
    at our default sigma_s. All data sets and epsilons of the paper unless given.

    Returns:
        Rows with the keys dataset, epsilon, reading, n_records, sample_rate (of the selection),
        sigma_s, paper_noise_multiplier, epsilon_rdp, epsilon_pld, noise_rdp, noise_pld.
    """
    rows = []
    for dataset in datasets:
        setting = paper_setting(dataset)
        cases = [(reading, setting.sigma_s) for reading in READINGS]
        cases.append((OURS, SaliencyConfig().noise_multiplier))
        for epsilon in setting.noise_multipliers:
            if epsilons is not None and epsilon not in epsilons:
                continue
            for reading, sigma_s in cases:
                rows.append(_table13_row(setting, epsilon, reading=reading, sigma_s=sigma_s))
    return rows


def _table13_row(
    setting: PaperSetting,
    epsilon: float,
    *,
    reading: Reading,
    sigma_s: float,
) -> dict[str, Any]:
    paper_noise = setting.noise_multipliers[epsilon]
    row: dict[str, Any] = {
        "dataset": setting.dataset,
        "epsilon": epsilon,
        "reading": reading.name,
        "n_records": reading.n_records(setting),
        "sample_rate": reading.selection_rate(setting),
        "sigma_s": sigma_s,
        "paper_noise_multiplier": paper_noise,
    }
    for accountant in ACCOUNTANTS:
        row[f"epsilon_{accountant}"] = composed_epsilon(
            setting.dataset,
            paper_noise,
            sigma_s=sigma_s,
            reading=reading,
            accountant=accountant,
        )
        planned = planned_run(
            setting.dataset,
            epsilon,
            sigma_s=sigma_s,
            reading=reading,
            accountant=accountant,
        )
        row[f"noise_{accountant}"] = finetune_noise(planned)
    return row


def table10(epsilons: Sequence[float] | None = None) -> list[dict[str, Any]]:
    """Percent of the RDP budget that selection and fine-tuning take on CelebA.

    One row per epsilon and sigma_s. The fine-tuning noise of each cell is the smallest that meets
    epsilon under RDP in that reading, as the paper searches it. All epsilons of the paper unless
    given.

    Returns:
        Rows with the keys of the paper's table as ``paper_*``, and per reading
        ``selection_percent_<i>``, ``finetune_percent_<i>`` with i the index in :data:`READINGS`.
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
            planned = planned_run(
                paper["dataset"],
                paper["epsilon"],
                sigma_s=paper["sigma_s"],
                reading=reading,
                accountant="rdp",
            )
            for stage in (Stage.SELECTION, Stage.FINETUNE):
                row[f"{stage}_percent_{index}"] = _share_percent(planned, stage)
        rows.append(row)
    return rows


def _share_percent(planned: PrivacyPlan | None, stage: str) -> float | None:
    """A stage's share of the budget; None where it has none."""
    part = getattr(planned, stage, None)
    if part is None or part.share is None:
        return None
    return 100 * part.share


def table9(epsilons: Sequence[float] | None = None) -> list[dict[str, Any]]:
    """The fine-tuning noise that the planner finds on CelebA, beside the paper's scores.

    One row per epsilon and sigma_s. FID and accuracy of ours need a GPU and are not part of this
    table. All epsilons of the paper unless given.

    Returns:
        Rows with the keys epsilon, sigma_s, ``noise_<accountant>_<i>`` with i the index in
        :data:`READINGS` (first and last), paper_fid, paper_acc (%).
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
            if reading is SUBSAMPLE:
                continue
            for accountant in ACCOUNTANTS:
                planned = planned_run(
                    "celeba",
                    paper["epsilon"],
                    sigma_s=paper["sigma_s"],
                    reading=reading,
                    accountant=accountant,
                )
                row[f"noise_{accountant}_{index}"] = finetune_noise(planned)
        rows.append(row)
    return rows


def _of_epsilons(name: str, epsilons: Sequence[float] | None) -> list[dict[str, Any]]:
    return [row for row in paper_table(name) if epsilons is None or row["epsilon"] in epsilons]


def finetune_noise(planned: PrivacyPlan | None) -> float | None:
    """Noise multiplier of fine-tuning; None where there is none."""
    if planned is None or planned.finetune is None:
        return None
    return planned.finetune.noise_multiplier
