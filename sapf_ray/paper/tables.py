"""The tables of the paper as data: what it claims, for side-by-side reports and for tests.

The CSV files beside this module are copies of the printed tables of "DP-SAPF: Saliency-Aware
Parameter Fine-tuning of Public Models for Differentially Private Image Synthesis". Nothing here is
a result of ours. Cells are as printed, also where two tables of the paper disagree (Camelyon,
epsilon 10, FID: 145.0 in Table 5, 145.9 in Tables 8 and 11).

Example::

    paper_table("table10")[0]       # {"dataset": "celeba", "epsilon": 1.0, "sigma_s": 5.0, ...}
    paper_setting("celeba").n_train   # 162770
"""

from __future__ import annotations

import csv
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from types import MappingProxyType
from typing import Any

from sapf_ray.errors import ConfigError, DataError
from sapf_ray.privacy.facts import default_delta

DATASET_NAMES: Mapping[str, str] = MappingProxyType(
    {"cifar10": "CIFAR-10", "octmnist": "OCTMNIST", "celeba": "CelebA", "camelyon": "Camelyon"}
)
DATASETS: tuple[str, ...] = tuple(DATASET_NAMES)
_MISSING = ("", "-", "any")


@dataclass(frozen=True, kw_only=True)
class PaperTable:
    """One printed table.

    Args:
        file: CSV file in ``published/``.
        caption: What the table shows.
        text: Columns of words, with what they mean.
        numbers: Columns of numbers, with their units.
    """

    file: str
    caption: str
    text: Mapping[str, str]
    numbers: Mapping[str, str]

    @property
    def columns(self) -> frozenset[str]:
        """Names of all columns."""
        return frozenset(self.text) | frozenset(self.numbers)


_DATASET = {"dataset": "key of DATASETS"}
_MODEL = {"public_model": "public text-to-image model"}
_METHOD = {"method": "name of the method"}
_FID = {"fid": "Inception FID, lower is better"}
_ACC = {"acc": "% accuracy on real test images"}
_SCORES = {**_FID, **_ACC}
_EPSILON = {"epsilon": "epsilon at delta = 1/(N ln N)"}
_SIGMA_S = {"sigma_s": "selection noise std over sensitivity"}

PAPER_TABLES: Mapping[str, PaperTable] = MappingProxyType(
    {
        "table2": PaperTable(
            file="table02_middle_block.csv",
            caption="LoRA and the middle block, CIFAR-10, epsilon 10",
            text=_METHOD,
            numbers=_SCORES,
        ),
        "table3": PaperTable(
            file="table03_datasets.csv",
            caption="Data sets",
            text=_DATASET,
            numbers={
                "train": "images",
                "val": "images",
                "test": "images",
                "resolution": "pixels a side",
                "classes": "classes",
            },
        ),
        "table5": PaperTable(
            file="table05_main.csv",
            caption="FID and accuracy of all methods",
            text={**_MODEL, **_METHOD, **_DATASET},
            numbers={**_EPSILON, **_SCORES},
        ),
        "table6": PaperTable(
            file="table06_cross_attention_query_only.csv",
            caption="Fine-tuning cross-attention queries only",
            text={**_DATASET, **_METHOD},
            numbers=_SCORES,
        ),
        "table7": PaperTable(
            file="table07_selected_matrices.csv",
            caption="Matrices selected at each ratio",
            text={
                "block": "block of the U-Net",
                "attn1": "self-attention: letters of q, k, v",
                "attn2": "cross-attention, likewise",
            },
            numbers={"ratio_percent": "% of the matrices"},
        ),
        "table8": PaperTable(
            file="table08_non_private.csv",
            caption="DP-SAPF beside the same without privacy",
            text={**_MODEL, **_DATASET},
            numbers={**_EPSILON, **_SCORES},
        ),
        "table9": PaperTable(
            file="table09_sigma_s.csv",
            caption="Selection noise, CelebA",
            text={},
            numbers={**_EPSILON, **_SIGMA_S, **_SCORES},
        ),
        "table10": PaperTable(
            file="table10_budget_shares.csv",
            caption="Shares of the privacy budget, CelebA",
            text=_DATASET,
            numbers={
                **_EPSILON,
                **_SIGMA_S,
                "selection_percent": "% of the total RDP",
                "finetune_percent": "% of the total RDP",
            },
        ),
        "table11": PaperTable(
            file="table11_no_finetuning.csv",
            caption="Public models with and without fine-tuning, epsilon 10",
            text={**_MODEL, "finetuning": "none, or the method", **_DATASET},
            numbers=_SCORES,
        ),
        "table12": PaperTable(
            file="table12_resources.csv",
            caption="Resources on CIFAR-10",
            text={**_METHOD, "stage": "select, finetune or synthesis"},
            numbers={"memory_gb": "GB of GPU memory", "hours": "hours"},
        ),
        "table13": PaperTable(
            file="table13_hyperparameters.csv",
            caption="Hyperparameters (epsilon is None where one value serves every epsilon)",
            text={"hyperparameter": "name"},
            numbers={**_EPSILON, **{name: "value on this data set" for name in DATASETS}},
        ),
        "table14": PaperTable(
            file="table14_prompts.csv",
            caption="Prompts",
            text={**_DATASET, "prompt": "text prompt"},
            numbers={"label": "class index"},
        ),
        "table15": PaperTable(
            file="table15_saliency_metrics.csv",
            caption="Alternative saliency metrics, epsilon 10",
            text={**_DATASET, "metric": "saliency metric"},
            numbers={**_SCORES, "hours": "hours of the selection"},
        ),
    }
)


@dataclass(frozen=True, kw_only=True)
class PaperSetting:
    """The public numbers of the paper's runs on one data set (its Tables 3 and 13, section 4).

    Args:
        n_train: N, training images.
        batch_size: Expected batch size B of the fine-tuning.
        steps: Fine-tuning steps.
        epochs: As printed. B * steps / epochs is another N than Table 3's for three of the four
            data sets.
        sigma_s: Selection noise multiplier.
        delta: 1 / (N ln N).
        noise_multipliers: Fine-tuning noise multiplier by epsilon.
    """

    dataset: str
    n_train: int
    batch_size: int
    steps: int
    epochs: int
    sigma_s: float
    delta: float
    noise_multipliers: Mapping[float, float]


def paper_table(name: str) -> list[dict[str, Any]]:
    """The rows of one table, e.g. ``table10``; numbers are floats and missing cells None.

    Raises:
        ConfigError: No such table.
        DataError: The installed file does not hold the declared columns.
    """
    return [dict(row) for row in _rows(name)]


@functools.cache
def _rows(name: str) -> tuple[Mapping[str, Any], ...]:
    if name not in PAPER_TABLES:
        raise ConfigError("table", name, f"must be one of {', '.join(PAPER_TABLES)}")
    table = PAPER_TABLES[name]
    text = (resources.files("sapf_ray.paper") / "published" / table.file).read_text(
        encoding="utf-8"
    )
    reader = csv.DictReader(text.splitlines())
    if set(reader.fieldnames or ()) != table.columns:
        raise DataError(
            f"{table.file}: has the columns {reader.fieldnames}, expected {sorted(table.columns)}"
        )
    rows = []
    for line, row in enumerate(reader, start=2):
        try:
            rows.append({key: _value(row[key], key in table.numbers) for key in row})
        except (ValueError, AttributeError) as error:
            raise DataError(f"{table.file}, line {line}: {error}") from error
    return tuple(rows)


def _value(cell: str, number: bool) -> str | float | None:
    if cell.strip() in _MISSING:
        return None
    return float(cell) if number else cell


@functools.cache
def paper_setting(dataset: str) -> PaperSetting:
    """The paper's setting for one of :data:`DATASETS`.

    Raises:
        ConfigError: No such data set.
    """
    if dataset not in DATASETS:
        raise ConfigError("dataset", dataset, f"must be one of {', '.join(DATASETS)}")
    n_train = int(next(row["train"] for row in _rows("table3") if row["dataset"] == dataset))
    common = {
        row["hyperparameter"]: row[dataset] for row in _rows("table13") if row["epsilon"] is None
    }
    noises = {
        row["epsilon"]: row[dataset]
        for row in _rows("table13")
        if row["hyperparameter"] == "noise_multiplier"
    }
    return PaperSetting(
        dataset=dataset,
        n_train=n_train,
        batch_size=int(common["batch_size"]),
        steps=int(common["iterations"]),
        epochs=int(common["epochs"]),
        sigma_s=common["selection_noise_multiplier"],
        delta=default_delta(n_train),
        noise_multipliers=MappingProxyType(noises),
    )
