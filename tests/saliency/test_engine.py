"""The per-sample engine against a micro-batch-of-one oracle, and the scores built on it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sapf_ray.config import SaliencyConfig
from sapf_ray.models.pool import candidate_pool
from sapf_ray.saliency.engine import PoolCapture, gradient_norms
from sapf_ray.saliency.scores import SCORES, clipped_contribution, n_selected, top_matrices
from tests.tiny import tiny_unet


def unet_batch(n: int):
    generator = torch.Generator().manual_seed(1)
    x, target = torch.randn(2, n, 4, 4, 4, generator=generator)
    states = torch.randn(n, 7, 16, generator=generator)
    return x, torch.randint(0, 1000, (n,), generator=generator), states, target


def losses(unet, x, t, states, target):
    return (unet(x, t, encoder_hidden_states=states).sample - target).square().flatten(1).mean(1)


def oracle(unet, pool, batch):
    """Per-record gradients, one forward and backward per record: list over records of lists over matrices."""
    weights = [layer.weight for layer in pool.values()]
    for w in weights:
        w.requires_grad_(True)
    rows = [torch.autograd.grad(losses(unet, *(part[i : i + 1] for part in batch)).sum(), weights) for i in range(len(batch[0]))]
    for w in weights:
        w.requires_grad_(False)
    return rows


@pytest.fixture(scope="module")
def captured():
    unet = tiny_unet().requires_grad_(False).eval()
    pool, batch = candidate_pool(unet), unet_batch(5)
    with PoolCapture(pool, keep=True) as capture:
        losses(unet, *batch).sum().backward()
    return capture, oracle(unet, pool, batch), pool


@settings(max_examples=40, deadline=None)
@given(
    tokens=st.integers(1, 40), d_in=st.integers(1, 24), d_out=st.integers(1, 24), batch=st.integers(1, 4),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_both_routes_give_the_norm_of_the_instantiated_gradient(tokens, d_in, d_out, batch, dtype):
    generator = torch.Generator().manual_seed(tokens)
    a = torch.randn(batch, tokens, d_in, generator=generator).to(dtype)
    g = torch.randn(batch, tokens, d_out, generator=generator).to(dtype)
    expected = torch.einsum("bto,bti->boi", g.double(), a.double()).flatten(1).norm(dim=1)
    torch.testing.assert_close(gradient_norms(a, g).double(), expected, rtol=2e-5, atol=1e-5)


def test_unet_norms_match_the_oracle(captured):
    capture, rows, _ = captured
    expected = torch.stack([torch.stack([g.norm() for g in row]) for row in rows])
    torch.testing.assert_close(capture.norms(), expected, rtol=1e-5, atol=1e-8)


def test_clipped_sum_matches_the_oracle(captured):
    capture, rows, _ = captured
    factors = torch.tensor([1.0, 0.5, 0.0, 2.0, 0.1])
    for k, total in enumerate(capture.clipped_sum(factors)):
        expected = sum(c * row[k] for c, row in zip(factors, rows, strict=True))
        torch.testing.assert_close(total, expected, rtol=1e-4, atol=1e-7)


def test_frozen_weights_get_no_gradient_and_hooks_are_removed():
    unet = tiny_unet().requires_grad_(False).eval()
    pool = candidate_pool(unet)
    with PoolCapture(pool) as capture:
        losses(unet, *unet_batch(2)).sum().backward()
    assert all(p.grad is None for p in unet.parameters())
    assert capture._captured == {}
    assert not losses(unet, *unet_batch(2)).requires_grad


def test_layer_used_twice_and_layer_without_gradient_are_refused():
    layer = nn.Linear(3, 3).requires_grad_(False)
    with pytest.raises(RuntimeError, match="twice"), PoolCapture({"w": layer}) as capture:
        layer(layer(torch.ones(2, 1, 3))).sum().backward()
    with PoolCapture({"w": layer}) as capture:
        pass
    with pytest.raises(RuntimeError, match="no gradient"):
        capture.norms()


@pytest.mark.parametrize("name", sorted(SCORES))
@pytest.mark.parametrize("clipping", ["automatic", "flat"])
def test_one_record_moves_the_sum_by_at_most_the_clipping_norm(name, clipping, captured):
    """Sensitivity under add/remove: one record's whole contribution is bounded, however large its gradient."""
    unet = tiny_unet().requires_grad_(False).eval()
    pool = candidate_pool(unet)
    config = SaliencyConfig(score=name, clipping=clipping, clipping_norm=0.25)
    for scale in (1e-3, 1.0, 1e6):
        with PoolCapture(pool, keep=SCORES[name].keep_gradients) as capture:
            (losses(unet, *unet_batch(1)) * scale).sum().backward()
        contribution = clipped_contribution(SCORES[name], capture, config)
        norm = torch.cat([part.flatten() for part in contribution]).norm()
        assert norm <= 0.25 * (1 + 1e-5)
        if scale == 1e6:
            assert norm > 0.249


@pytest.mark.parametrize("name", sorted(SCORES))
def test_record_with_infinite_gradient_contributes_nothing(name):
    unet = tiny_unet().requires_grad_(False).eval()
    pool = candidate_pool(unet)
    weights = torch.tensor([1.0, float("inf")])
    totals = []
    for rows, scale in ((2, weights), (1, weights[:1])):
        with PoolCapture(pool, keep=SCORES[name].keep_gradients) as capture:
            (losses(unet, *(part[:rows] for part in unet_batch(2))) * scale).sum().backward()
        totals.append(clipped_contribution(SCORES[name], capture, SaliencyConfig(score=name)))
    for both, one in zip(*totals, strict=True):
        torch.testing.assert_close(both, one, rtol=1e-4, atol=1e-7)


def test_top_matrices_ceil_and_ties():
    names = ["a", "b", "c", "d"]
    assert top_matrices(names, torch.tensor([1.0, 3.0, 3.0, 2.0]), 0.25) == ["b"]
    assert top_matrices(names, torch.tensor([1.0, 3.0, 3.0, 2.0]), 0.3) == ["b", "c"]
    assert top_matrices(names, torch.tensor([1.0, -3.0, 3.0, 2.0]), 1.0) == names
    assert [n_selected(k, 0.3) for k in (10, 60, 96, 1)] == [3, 18, 29, 1]
