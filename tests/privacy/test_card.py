from __future__ import annotations

import dataclasses
import io
import re

import pytest
from dp_accounting.privacy_accountant import PrivacyAccountant
from rich.console import Console

from sapf_ray.config import ClusterConfig, EvaluationConfig, EvolutionConfig, RunConfig
from sapf_ray.privacy.accountant_table import ACCOUNTANTS, Accountant
from sapf_ray.privacy.accountants import ADJACENCY
from sapf_ray.privacy.card import privacy_card
from sapf_ray.privacy.card_gather import gather
from sapf_ray.privacy.ledger import Ledger
from sapf_ray.privacy.planner import make_plan
from sapf_ray.privacy.release import sampler_delta
from sapf_ray.report.tables import ledger_table

from .test_ledger import spend_all
from .test_planner import DIGITS, small


def card(tmp_path, config: RunConfig, **kwargs) -> str:
    plan = make_plan(config, DIGITS)
    ledger = Ledger.create(tmp_path / "ledger.jsonl", plan)
    if plan.evolution:
        for i in range(plan.evolution.count):
            ledger.record(f"evolution/histogram/{i}", plan.evolution.event(), "s", "evolution")
    if plan.finetune:
        spend_all(ledger)
        ledger.record("finetune/step/0", plan.finetune.event(), "s", "finetune")
    return privacy_card(
        gather(plan, ledger, config, model_name="glyphs-tiny", data_name="digits", **kwargs)
    )


def test_private_run(tmp_path):
    config = small(steps=4)
    plan = make_plan(config, DIGITS)
    text = card(tmp_path, config, scores=["accuracy"])
    for words in (
        "glyphs-tiny",
        "digits",
        "1,297",
        "| Neighbouring data sets | zero out one image |",
        "RDP accountant",
        "PLD accountant",
        f"{plan.composed_epsilon:.4f}",
        f"{plan.delta:.4g}",
        "Gaussian, noise 25",
        "| 4 | 1 |",
        f"noise {plan.finetune.noise_multiplier:g}, Poisson sample 0.197379",
        "Assumed to be public",
        "evaluation (`accuracy`) against real test and training images: yes",
        "operating system's cryptographic generator, deleted after the last release",
        "- fine-tuning (automatic clipping): bound C = 1, grid of 9.54e-07;",
        "drawn and added in integers",
        "release of exactly the same sum with exactly the same noise",
    ):
        assert words in text, words
    assert "NOT PRIVATE" not in text and "NOT FOR RELEASE" not in text


def test_what_separates_the_computation_from_the_proof_is_said(tmp_path):
    config = with_selection(mechanism="exponential")
    plan = make_plan(config, DIGITS)
    text = card(tmp_path, config)
    lost = float(re.search(r"add at most (\S+) to δ", text).group(1))
    assert lost == pytest.approx(sampler_delta(10**9, 3, epsilon=plan.composed_epsilon), rel=0.5), (
        "one selection and two steps"
    )
    assert "of which only an order or a comparison is released" in text
    assert "floating-point numbers" not in text
    slack = dataclasses.replace(plan, finetune=dataclasses.replace(plan.finetune, slack=1e-3))
    ledger = Ledger.open(tmp_path / "ledger.jsonl")
    text = privacy_card(gather(slack, ledger, config, model_name="m", data_name="d"))
    assert "can let one image count up to 1.001 C; the noise is larger by the same factor" in text


def with_selection(**saliency) -> RunConfig:
    config = small(steps=2)
    return dataclasses.replace(config, saliency=dataclasses.replace(config.saliency, **saliency))


def test_the_key_is_deleted_also_where_latents_are_kept(tmp_path):
    config = dataclasses.replace(small(steps=2), cluster=ClusterConfig(keep_cache=True))
    assert "latents of the sensitive images among them, are kept" in card(tmp_path, config)


def test_a_release_run_reads_no_real_image_for_a_score(tmp_path):
    evaluation = EvaluationConfig(enabled=False)
    text = card(tmp_path, dataclasses.replace(small(steps=2), evaluation=evaluation))
    assert "evaluation against real images: no" in text


def test_non_private_run_is_marked(tmp_path):
    text = card(tmp_path, small(steps=2, non_private=True))
    assert (
        text.index("NOT PRIVATE") < 200
        and "infinite" in text
        and "Differentially private" not in text
    )


def test_reproducible_seed_is_not_for_release(tmp_path):
    text = card(tmp_path, small(steps=2, reproducible_seed=1))
    assert text.index("NOT FOR RELEASE") < 200 and "Differentially private:" not in text


def test_release_run_without_evaluation(tmp_path):
    config = dataclasses.replace(small(steps=2), evaluation=EvaluationConfig(enabled=False))
    text = card(tmp_path, config, diagnostics=["training loss"])
    assert "against real images: no" in text and "- training loss." in text


@pytest.mark.parametrize("kwargs", [{}, {"non_private": True}])
def test_run_without_fine_tuning(tmp_path, kwargs):
    text = card(tmp_path, small(steps=0, **kwargs))
    assert "How sums and noise" not in text
    assert "No sensitive image was used" in text and "NOT PRIVATE" not in text and "None." in text


def evolving(**privacy) -> RunConfig:
    evolution = EvolutionConfig(enabled=True, iterations=3, embedding="glyph")
    return dataclasses.replace(small(steps=0, **privacy), evolution=evolution)


def test_evolution_is_a_use_of_the_images(tmp_path):
    config = evolving()
    plan = make_plan(config, DIGITS)
    text = card(tmp_path, config)
    for words in (
        f"> **Differentially private:** ε = {plan.composed_epsilon:.4g} at",
        "It covers the synthetic images and all",
        f"| evolution | Gaussian, noise {plan.evolution.noise_multiplier:g} | 3 | 0 |",
        "| Noisy histograms, one vote an image | 3 |",
        "the network that compares images (glyph)",
    ):
        assert words in text, words
    assert (
        "No sensitive image was used" not in text
        and "adapter" not in text
        and "batch size" not in text
    )


def test_evolution_without_noise_is_marked(tmp_path):
    text = card(tmp_path, evolving(non_private=True))
    assert (
        text.index("NOT PRIVATE") < 200
        and "infinite" in text
        and "No sensitive image was used" not in text
    )


class KnowsNothing(PrivacyAccountant):
    """Supports no event at all."""

    def _maybe_compose(self, event, count, do_compose):
        return self.CompositionErrorDetails(event, "never heard of it")

    def get_epsilon(self, target_delta):
        raise AssertionError("nothing was composed")


def test_an_accountant_that_does_not_know_an_event_breaks_neither_card_nor_summary(
    tmp_path, monkeypatch
):
    row = Accountant(title="Nothing", make=lambda interval: KnowsNothing(ADJACENCY))
    monkeypatch.setitem(ACCOUNTANTS._rows, "nothing", row)
    text = card(tmp_path, small(steps=2))
    assert "| ε spent, by the Nothing accountant | n/a |" in text
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(ledger_table(Ledger.open(tmp_path / "ledger.jsonl")))
    summary = console.export_text()
    assert "ε (Nothing)" in summary and summary.count("n/a") == 3  # two stages, and all


def test_skipped_records_are_counted_and_said_to_be_outside_the_guarantee(tmp_path):
    heading = "## Records that could not be read"
    text = card(tmp_path, small(steps=2), skipped={"train": 1_203, "test": 0})
    section = text[text.index(heading) :].split("\n## ")[0]
    for words in (
        "1,203 of the train split, 0 of the test split",
        "contributes nothing to any sum",
        "N = 1,297 is the number listed",
        "ε does not cover them",
        "Delete this section",
    ):
        assert words in section
    for nothing in (None, {}):
        (tmp_path / "ledger.jsonl").unlink()
        assert heading not in card(tmp_path, small(steps=2), skipped=nothing)
