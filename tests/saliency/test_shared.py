"""One selection release for several runs: made once, paid by each before it looks, and only shared
where it may be.
"""

from __future__ import annotations

import json
import math
import stat
from dataclasses import replace

import pytest
import torch

from sapf_ray.config import FinetuneConfig, ModelConfig, PrivacyConfig, RunConfig, SaliencyConfig
from sapf_ray.errors import BudgetError, RunDirectoryError
from sapf_ray.models.public_model import PublicModel
from sapf_ray.privacy.fixed_point import ExactSum
from sapf_ray.privacy.keyed_rng import NoiseKey
from sapf_ray.privacy.ledger import Ledger
from sapf_ray.privacy.planner import make_plan
from sapf_ray.privacy.release import Releaser
from sapf_ray.saliency.selection import Selection, select
from sapf_ray.saliency.shared import (
    private_folder,
    released_by,
    shared_folder,
    shared_selection,
)
from tests.tiny import save_latents

N = 40
NAMES = [f"m{i}" for i in range(10)]


class Run:
    """A run that has a ledger and makes releases without data: normals from the key it is given."""

    def __init__(self, out, epsilon=8.0, **saliency):
        self.config = RunConfig(
            privacy=PrivacyConfig(epsilon=epsilon, accountant="rdp"),
            saliency=SaliencyConfig(**saliency),
            finetune=FinetuneConfig(steps=3, batch_size=8),
        )
        self.plan, self.made = make_plan(self.config, N), 0
        out.mkdir(exist_ok=True)
        path = out / "ledger.jsonl"
        self.ledger = Ledger.open(path) if path.exists() else Ledger.create(path, self.plan)

    @property
    def releaser(self) -> Releaser:
        return Releaser(key=NoiseKey(bytes(32)).bind("own"), ledger=self.ledger, plan=self.plan)

    def make(self, releaser: Releaser) -> Selection:
        self.made += 1
        total = ExactSum.zeros([(10,)], 1.0)
        (values,) = releaser.gaussian("selection", total, stage="selection")
        return Selection(
            matrices=NAMES[:1],
            scores=dict(zip(NAMES, values.tolist(), strict=True)),
            score="per_sample_norm",
            pool_size=10,
            event=releaser.ledger.events()[-1].to_dict(),
            noise_ids={"selection": releaser.noise_id("selection", total)},
        )

    def select(self, root, data="these", make=None) -> Selection:
        return shared_selection(
            root, self.config, data=data, releaser=self.releaser, make=make or self.make
        )

    def paid(self):
        return [(e.release, e.replay) for e in self.ledger.events()]


def test_one_release_for_every_ratio_and_epsilon(tmp_path):
    root = tmp_path / "selections"
    first, second = Run(tmp_path / "a", 8.0, ratio=0.3), Run(tmp_path / "b", 4.0, ratio=0.5)
    one, two = first.select(root), second.select(root)
    assert (first.made, second.made) == (1, 0)
    assert one.scores == two.scores and (one.shared, two.shared) == (True, True)
    ranked = sorted(NAMES, key=lambda name: -one.scores[name])
    assert set(one.matrices) == set(ranked[:3]) and set(two.matrices) == set(ranked[:5])
    assert first.paid() == second.paid() == [("selection", False)], "whole in each run's own ledger"
    assert (
        first.ledger.events()[0].noise_id
        == second.ledger.events()[0].noise_id
        == one.noise_ids["selection"]
        == two.noise_ids["selection"]
    )
    second.select(root)
    assert second.paid() == [("selection", False)], "a second start pays nothing and writes nothing"
    assert second.ledger.epsilon_spent() > 0


def test_the_key_goes_with_the_release_and_the_rest_is_private(tmp_path):
    run = Run(tmp_path / "a")
    run.select(tmp_path / "selections")
    private = private_folder(tmp_path / "selections", run.config, plan=run.plan)
    assert [path.name for path in private.iterdir()] == ["data_fingerprint"]
    assert stat.S_IMODE(private.stat().st_mode) == 0o700
    assert stat.S_IMODE((private / "data_fingerprint").stat().st_mode) == 0o600


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1},
        {"model": ModelConfig(path="letters-tiny")},
        {"privacy": PrivacyConfig(epsilon=8.0, accountant="rdp", reproducible_seed=0)},
        *(
            {"saliency": SaliencyConfig(**other)}
            for other in (
                {"noise_multiplier": 20.0},
                {"pool": "qkvo"},
                {"sample_rate": 0.5},
                {"score": "noisy_mean_gradient"},
                {"clipping_norm": 2.0},
                {"shard_size": 5},
            )
        ),
    ],
)
def test_what_the_scores_depend_on_is_not_shared(tmp_path, change):
    run = Run(tmp_path / "a")
    other = replace(run.config, **change)
    assert shared_folder(tmp_path, other, plan=make_plan(other, N)) != shared_folder(
        tmp_path, run.config, plan=run.plan
    )


@pytest.mark.parametrize(
    "saliency",
    [
        {"mechanism": "exponential"},
        {"mechanism": "propose_test_release"},
        {"score": "force"},
    ],
)
def test_a_choice_without_scores_serves_its_own_ratio_only(tmp_path, saliency):
    """Those scores were never released: another ratio read off them would be a release that nobody
    paid.
    """
    a, b, c = (
        Run(tmp_path / str(i), epsilon, ratio=ratio, noise_multiplier=50.0, **saliency)
        for i, (epsilon, ratio) in enumerate([(8.0, 0.3), (4.0, 0.3), (8.0, 0.5)])
    )
    folders = [shared_folder(tmp_path, run.config, plan=run.plan) for run in (a, b, c)]
    assert folders[0] == folders[1] != folders[2]


def test_a_release_broken_off_is_repeated_by_whoever_comes_next(tmp_path):
    """The first run paid and died; the next draws the same noise, and the first one, started again,
    pays no second time.
    """
    root, drawn = tmp_path / "selections", []

    def die(releaser):
        drawn.append(first.make(releaser).scores)
        raise KeyboardInterrupt

    first, second = Run(tmp_path / "a"), Run(tmp_path / "b")
    with pytest.raises(KeyboardInterrupt):
        first.select(root, make=die)
    assert released_by(shared_folder(root, first.config, plan=first.plan)) is None
    assert second.select(root).scores == drawn[0]
    again = Run(tmp_path / "a")
    assert again.select(root).scores == drawn[0] and again.made == 0
    assert again.paid() == [("selection", False)]


def test_a_run_that_cannot_pay_does_not_get_to_look(tmp_path):
    root = tmp_path / "selections"
    Run(tmp_path / "a", noise_multiplier=0.6).select(root)
    poor = Run(tmp_path / "b", noise_multiplier=0.6)
    poor.ledger.record("selection", poor.plan.selection.event(), "another", "selection")
    with pytest.raises(BudgetError):
        poor.select(root)


def test_other_data_and_a_bad_place_are_refused(tmp_path):
    root = tmp_path / "selections"
    Run(tmp_path / "a").select(root)
    with pytest.raises(RunDirectoryError, match="of other data"):
        Run(tmp_path / "b").select(root, data="changed")
    (tmp_path / "file").write_text("")
    with pytest.raises(RunDirectoryError, match=r"cluster\.selection_dir .*file"):
        Run(tmp_path / "c").select(tmp_path / "file")


def test_as_a_run_of_its_own_selects(ray_cluster, tiny_pipeline, tmp_path):
    """From real scores: the shared release keeps what `select` with the same key does."""
    (tmp_path / "latents").mkdir()
    cache = save_latents(tmp_path / "latents", tiny_pipeline, N)
    run = Run(tmp_path / "a", shard_size=15, micro_batch_size=7)
    kept = []

    def make(releaser):
        model = PublicModel.open(ModelConfig(path=str(tiny_pipeline)))
        kept.append(select(model, cache, config=run.config.saliency, releaser=releaser))
        return kept[0]

    found = run.select(tmp_path / "selections", make=make)
    assert found == replace(kept[0], shared=True) and len(found.matrices) == math.ceil(0.3 * 24)
    assert torch.tensor(list(found.scores.values())).std() > 0


def test_a_release_of_an_earlier_version_is_refused_in_one_line(tmp_path):
    root = tmp_path / "selections"
    run = Run(tmp_path / "a")
    run.select(root)
    path = shared_folder(root, run.config, plan=run.plan) / "selection.json"
    content = json.loads(path.read_text())
    del content["noise_ids"]
    path.write_text(json.dumps(content))
    with pytest.raises(RunDirectoryError, match="written by an earlier version") as error:
        Run(tmp_path / "b").select(root)
    assert "\n" not in str(error.value) and Run(tmp_path / "b").paid() == []
