"""Ranking, layers, the pruning schedule, and SynFlow."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sapf_ray.errors import ConfigError
from sapf_ray.models.pool import candidate_pool, layer_of
from sapf_ray.saliency.scores import n_selected, schedule, top_n
from sapf_ray.saliency.synflow import ones, synflow_scores
from tests.networks import tiny_dit
from tests.tiny import tiny_unet


def top_matrices(names, scores, *, ratio, granularity="matrix"):
    return top_n(names, scores, n=n_selected(len(names), ratio), granularity=granularity)


def test_top_matrices_ceil_and_ties():
    names = ["a", "b", "c", "d"]
    assert top_matrices(names, torch.tensor([1.0, 3.0, 3.0, 2.0]), ratio=0.25) == ["b"]
    assert top_matrices(names, torch.tensor([1.0, 3.0, 3.0, 2.0]), ratio=0.3) == ["b", "c"]
    assert top_matrices(names, torch.tensor([1.0, -3.0, 3.0, 2.0]), ratio=1.0) == names
    assert [n_selected(k, 0.3) for k in (10, 60, 96, 1)] == [3, 18, 29, 1]


def test_whole_layers_are_kept_until_they_hold_enough():
    names = [
        "a.to_q",
        "a.to_k",
        "a.to_v",
        "b.to_q",
        "b.to_k",
        "b.to_v",
        "c.to_q",
        "c.to_k",
        "c.to_v",
    ]
    scores = torch.tensor(
        [9.0, 0, 0, 4, 4, 4, 1, 1, 1]
    )  # the best matrix is in the second best layer
    assert top_matrices(names, scores, ratio=0.3) == ["a.to_q", "b.to_q", "b.to_k"]
    assert top_matrices(names, scores, ratio=0.3, granularity="layer") == names[3:6]
    assert (
        top_matrices(names, scores, ratio=0.4, granularity="layer") == names[:6]
    )  # 4 matrices need two layers
    assert top_matrices(names, scores, ratio=1.0, granularity="layer") == names


def test_layers_of_a_real_pool():
    names = list(candidate_pool(tiny_unet(), "all"))
    layers = {layer_of(name) for name in names}
    attention = [layer for layer in layers if layer.endswith(("attn1", "attn2"))]
    assert len(attention) == 8 and all(
        sum(layer_of(n) == layer for n in names) == 4 for layer in attention
    )
    feed_forward = [name for name in names if layer_of(name).endswith(".ff")]
    assert len(feed_forward) == 8 and all(".ff.net." in name for name in feed_forward)
    assert {"conv_in", "time_embedding"} <= layers


@pytest.mark.parametrize("pool,kept,rounds", [(96, 29, 5), (24, 8, 1), (10, 10, 3), (2, 1, 7)])
def test_schedule_falls_to_what_is_kept(pool, kept, rounds):
    sizes = schedule(pool, kept, rounds)
    assert (
        len(sizes) == rounds
        and sizes[-1] == kept
        and sizes == sorted(sizes, reverse=True)
        and sizes[0] <= pool
    )


def test_synflow_of_a_linear_chain_conserves_flow_and_depends_on_magnitudes_alone():
    class Chain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b = nn.Linear(5, 4, bias=False), nn.Linear(4, 3, bias=False)
            self.requires_grad_(False)

        def forward(self, sample, timestep, class_labels, return_dict):
            return (self.b(self.a(sample.flatten(1))),)

        dtype, device = torch.float32, torch.device("cpu")
        config = type("Config", (), {"in_channels": 5, "sample_size": 1, "down_block_types": ()})

    chain = Chain()
    flow = float((chain.b.weight.abs() @ chain.a.weight.abs()).sum())
    scores = synflow_scores(chain, candidate_pool(chain, "all"), n=2, rounds=1)
    assert scores.tolist() == pytest.approx([flow, flow])  # Tanaka et al., theorem 1
    chain.a.weight.neg_()
    assert torch.allclose(
        synflow_scores(chain, candidate_pool(chain, "all"), n=2, rounds=1), scores
    )


@pytest.mark.parametrize("build", [tiny_unet, tiny_dit])
def test_synflow_leaves_the_model_alone_and_drops_matrices_step_by_step(build):
    denoiser = build().eval().requires_grad_(False)
    before = {n: p.clone() for n, p in denoiser.named_parameters()}
    pool = candidate_pool(denoiser)
    n = n_selected(len(pool), 0.3)
    once, often = (synflow_scores(denoiser, pool, n=n, rounds=rounds) for rounds in (1, 4))
    assert once.isfinite().all() and (often[once == 0] == 0).all()
    assert 0 < int((often > 0).sum()) <= schedule(len(pool), n, 4)[2]
    assert len(top_n(list(pool), often, n=n)) == n
    assert all(
        torch.equal(p, before[name]) and p.grad is None for name, p in denoiser.named_parameters()
    )
    assert torch.equal(
        often, synflow_scores(denoiser, pool, n=n, rounds=4)
    )  # no randomness, no data
    _, (latents, time, conditions) = ones(denoiser)
    parts = conditions.parts().values()
    assert all(value.min() in (0, 1) for value in (latents, time, *parts))


def test_pool_of_everything_refuses_what_it_cannot_take_a_gradient_of():
    net = nn.Sequential(nn.Conv2d(4, 4, 1, groups=2))
    with pytest.raises(ConfigError, match=r"saliency\.pool = 'all': .*0 \(Conv2d\)"):
        candidate_pool(net, "all")
