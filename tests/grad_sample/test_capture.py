"""The per-sample engine against a micro-batch-of-one oracle, and the scores built on it."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from diffusers.models.attention_processor import FusedAttnProcessor2_0
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sapf_ray.config import SaliencyConfig
from sapf_ray.grad_sample.capture import PoolCapture, gradient_norms
from sapf_ray.grad_sample.norms import MAX_TEMPORARY_BYTES
from sapf_ray.models.pool import WeightRows, attention_layers, candidate_pool
from sapf_ray.saliency.scores import SCORES
from sapf_ray.saliency.selection import clip_of
from tests.allocations import Allocations, NoSync
from tests.networks import CASES, Case, tiny_dit


def frozen_case(kind: str, n: int, k: int = 1, **options):
    case = CASES[kind](n, k, **options)
    case.model.requires_grad_(False).eval()
    return case


def capture_of(case, pool, scale=1.0, **options) -> PoolCapture:
    with PoolCapture(pool, rows_per_record=case.rows_per_record, **options) as capture:
        (case.losses() * scale).sum().backward()
    return capture


def clipped_sum(capture, factors) -> list[torch.Tensor]:
    """Sum of the per-sample gradients of each matrix, each record times its factor."""
    sums = [
        torch.zeros_like(matrix.weight, dtype=torch.float32) for matrix in capture.pool.values()
    ]
    for number, first, rows in capture.gradients():
        some = factors[first : first + len(rows)].view(-1, 1, 1)
        rows = (rows * some).masked_fill(some == 0, 0.0)
        sums[number] += rows.sum(0).view_as(sums[number])
    return sums


DATA_SCORES = sorted(name for name in SCORES if SCORES[name].contribution)


def check_against_oracle(case, pool, capture) -> None:
    """Norms and clipped sums of every matrix against the micro-batch-of-one oracle.

    Norms may be larger, by the margin for the rounding of Gram products.
    """
    rows = case.gradients([layer.weight for layer in pool.values()])
    expected = torch.stack([torch.stack([g.norm() for g in row]) for row in rows])
    torch.testing.assert_close(capture.norms(), expected, rtol=2e-4, atol=1e-8)
    assert (capture.norms() >= expected * (1 - 1e-6)).all()
    factors = torch.linspace(0, 2, len(rows))
    for j, total in enumerate(clipped_sum(capture, factors)):
        summed = torch.stack([c * row[j] for c, row in zip(factors, rows, strict=True)]).sum(0)
        assert (
            total.dtype == torch.float32 and (total - summed).norm() <= 1e-5 * summed.norm() + 1e-8
        )


@settings(max_examples=40, deadline=None)
@given(
    tokens=st.integers(1, 40),
    d_in=st.integers(1, 24),
    d_out=st.integers(1, 24),
    batch=st.integers(1, 4),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_both_routes_give_the_norm_of_the_instantiated_gradient(tokens, d_in, d_out, batch, dtype):
    generator = torch.Generator().manual_seed(tokens)
    a = torch.randn(batch, tokens, d_in, generator=generator).to(dtype)
    g = torch.randn(batch, tokens, d_out, generator=generator).to(dtype)
    expected = torch.einsum("bto,bti->boi", g.double(), a.double()).flatten(1).norm(dim=1)
    torch.testing.assert_close(gradient_norms(a, g).double(), expected, rtol=2e-4, atol=1e-5)
    assert (gradient_norms(a, g) >= expected * (1 - 1e-6)).all()


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("cap", [2048, MAX_TEMPORARY_BYTES])
@pytest.mark.parametrize("kind", sorted(CASES))
def test_norms_and_clipped_sums_match_the_oracle(kind, k, cap):
    case = frozen_case(kind, 4, k)
    for matrices, size in (("qkvo", {"unet": 32, "dit": 8}), ("all", {"unet": 83, "dit": 21})):
        pool = candidate_pool(case.model, matrices)
        assert len(pool) == size[kind]
        check_against_oracle(case, pool, capture_of(case, pool, keep=True, max_temporary_bytes=cap))


@pytest.mark.parametrize("cap", [2048, MAX_TEMPORARY_BYTES])
@pytest.mark.parametrize("kind", sorted(CASES))
def test_weighted_norms_match_the_oracle(kind, cap):
    case = frozen_case(kind, 3, 2)
    pool = candidate_pool(case.model, "all")
    capture = capture_of(case, pool, weighted=True, max_temporary_bytes=cap)
    weights = [layer.weight for layer in pool.values()]
    expected = torch.stack(
        [
            torch.stack([(w * g).abs().sum() for w, g in zip(weights, row, strict=True)])
            for row in case.gradients(weights)
        ]
    )
    torch.testing.assert_close(capture.norms(), expected, rtol=2e-4, atol=1e-8)


@pytest.mark.parametrize("kind", sorted(CASES))
def test_pruned_matrices_are_zero_in_the_forward_pass_and_keep_their_gradients(kind):
    case = frozen_case(kind, 3)
    pool = candidate_pool(case.model, "all")
    pruned = [name for i, name in enumerate(pool) if i % 5 == 2]
    with PoolCapture(pool, keep=True, pruned=pruned) as capture:
        losses = case.losses()
        losses.sum().backward()
    weighted = capture_of(case, pool, weighted=True, pruned=pruned)
    originals = {name: layer.weight.clone() for name, layer in pool.items()}
    for name in pruned:
        pool[name].weight.zero_()
    torch.testing.assert_close(losses, case.losses(), rtol=1e-5, atol=1e-6)
    check_against_oracle(case, pool, capture)
    rows = case.gradients([layer.weight for layer in pool.values()])
    expected = torch.stack(
        [
            torch.stack([(w * g).abs().sum() for w, g in zip(originals.values(), row, strict=True)])
            for row in rows
        ]
    )
    torch.testing.assert_close(weighted.norms(), expected, rtol=1e-4, atol=1e-7)
    assert (
        weighted.norms()[:, [name in pruned for name in pool]] > 0
    ).any()  # a matrix can come back


@pytest.mark.parametrize("bias", [True, False])
def test_attention_with_and_without_bias(bias):
    case = frozen_case("dit", 3, dit=tiny_dit(attention_bias=bias))
    pool = candidate_pool(case.model)
    assert all((layer.bias is not None) == bias for layer in pool.values())
    check_against_oracle(case, pool, capture_of(case, pool, keep=True))


@settings(max_examples=30, deadline=None)
@given(
    n=st.integers(1, 4),
    k=st.integers(1, 3),
    tokens=st.integers(1, 20),
    d=st.integers(1, 24),
    hidden=st.integers(2, 24),
    bias=st.booleans(),
    cap=st.sampled_from([128, 2048, MAX_TEMPORARY_BYTES]),
)
def test_any_shape_matches_the_oracle(n, k, tokens, d, hidden, bias, cap):
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(d, hidden, bias), nn.Tanh(), nn.Linear(hidden, d, bias)
    ).requires_grad_(False)
    case = Case(
        model=net,
        batch=(torch.randn(n * k, tokens, d),),
        row_losses=lambda net, x: net(x).square().flatten(1).sum(1),
        rows_per_record=k,
    )
    lower, upper = WeightRows(net[2], slice(0, d // 2)), WeightRows(net[2], slice(d // 2, d))
    pool = {"first": net[0], "lower half": lower, "upper half": upper}
    capture = capture_of(case, pool, keep=True, max_temporary_bytes=cap)
    (first, last) = zip(*case.gradients([net[0].weight, net[2].weight]), strict=True)
    rows = [(a, b[: d // 2], b[d // 2 :]) for a, b in zip(first, last, strict=True)]
    expected = torch.stack([torch.stack([part.norm() for part in row]) for row in rows])
    torch.testing.assert_close(capture.norms(), expected, rtol=2e-4, atol=1e-6)
    sums = clipped_sum(capture, torch.ones(n))
    torch.testing.assert_close(sums[0], sum(first), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(torch.cat(sums[1:]), sum(last), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", sorted(CASES))
def test_fused_projections_give_the_norms_of_the_separate_ones(kind):
    case = frozen_case(kind, 3)
    separate = candidate_pool(case.model)
    expected = capture_of(case, separate, keep=True)
    for _, layer in attention_layers(case.model):
        layer.fuse_projections()
        layer.set_processor(FusedAttnProcessor2_0())
    case.model.requires_grad_(False)
    fused = candidate_pool(case.model)
    assert (
        sum(isinstance(entry, WeightRows) for entry in fused.values())
        == {"unet": 20, "dit": 6}[kind]
    )
    everything = candidate_pool(case.model, "all")
    assert not any(name.endswith(("to_kv", "to_qkv")) for name in everything) and set(fused) <= set(
        everything
    )
    assert list(fused) == list(separate)
    actual = capture_of(case, fused, keep=True)
    torch.testing.assert_close(actual.norms(), expected.norms(), rtol=2e-5, atol=1e-8)
    factors = torch.tensor([0.5, 0.0, 2.0])
    for total, other, entry in zip(
        clipped_sum(actual, factors), clipped_sum(expected, factors), fused.values(), strict=True
    ):
        assert total.shape == entry.weight.shape
        torch.testing.assert_close(total, other, rtol=1e-4, atol=1e-7)


def test_bf16_forward_has_float32_norms_of_its_own_tensors():
    """In bf16 the engine's norms equal those of the bf16 tensors multiplied in float64: nothing
    more is lost.
    """
    case = frozen_case("unet", 3)
    case.model.bfloat16()
    case = Case(
        model=case.model,
        batch=[x.bfloat16() if x.is_floating_point() else x for x in case.batch],
        row_losses=case.row_losses,
    )
    capture = capture_of(case, candidate_pool(case.model), keep=True)
    assert capture.norms().dtype == torch.float32
    for name, ((a, g),) in capture._captured.items():
        assert a.dtype == g.dtype == torch.bfloat16
        exact = (g.double().mT @ a.double()).flatten(1).norm(dim=1).float()
        torch.testing.assert_close(capture._norms[name], exact, rtol=1e-4, atol=0)


def test_half_precision_is_cast_piece_by_piece():
    torch.manual_seed(0)
    layer = nn.Linear(32, 32).requires_grad_(False).bfloat16()
    a, g = torch.randn(2, 64, 16, 32).bfloat16()
    capture = PoolCapture({"w": layer}, keep=True, max_temporary_bytes=16 * 1024)
    with Allocations() as seen:
        capture._receive(layer, a, backprops=g)
        clipped_sum(capture, torch.ones(64))
    assert seen.largest <= 16 * 1024 < g.numel() * 4


@pytest.mark.parametrize("kind", sorted(CASES))
def test_nothing_waits_for_the_device(kind):
    case = frozen_case(kind, 3, 2)
    with PoolCapture(candidate_pool(case.model), keep=True, rows_per_record=2) as capture:
        loss = case.losses().sum()
        with NoSync():
            loss.backward()
            clipped_sum(capture, capture.norms().norm(dim=1))


def test_frozen_weights_get_no_gradient_and_hooks_are_removed():
    case = frozen_case("unet", 2)
    capture = capture_of(case, candidate_pool(case.model))
    assert all(p.grad is None for p in case.model.parameters())
    assert capture._captured == {}
    assert not case.losses().requires_grad


def test_trainable_weights_odd_batches_and_inputs_changed_in_place_are_refused():
    layer = nn.Linear(3, 3)
    with (
        pytest.raises(ValueError, match="w: pool weights must be frozen"),
        PoolCapture({"w": layer}),
    ):
        pass
    layer.requires_grad_(False)
    with (
        pytest.raises(ValueError, match="5 rows does not split into 2"),
        PoolCapture({"w": layer}, rows_per_record=2),
    ):
        layer(torch.ones(5, 3)).sum().backward()
    with (
        pytest.raises(RuntimeError, match="w: its input was changed in place"),
        PoolCapture({"w": layer}),
    ):
        x = torch.ones(2, 3)
        y = layer(x).sum()
        x.add_(1)
        y.backward()


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("layer", [nn.Linear(3, 3), nn.Conv2d(3, 3, 3, padding=1)])
def test_layer_used_twice_has_the_gradient_of_both_uses(layer, weighted):
    torch.manual_seed(0)
    net = nn.Sequential(layer, nn.Tanh(), layer).requires_grad_(False)
    x = torch.randn(4, 3, 3, 3)
    case = Case(
        model=net,
        batch=(x,),
        row_losses=lambda net, x: net(x).square().flatten(1).sum(1),
        rows_per_record=2,
    )
    with PoolCapture({"w": layer}, keep=True, rows_per_record=2, weighted=weighted) as capture:
        (case.losses().sum() + 0 * layer(x).sum()).backward()
    rows = [g for (g,) in case.gradients([layer.weight])]
    expected = torch.stack([(layer.weight * g).abs().sum() if weighted else g.norm() for g in rows])
    torch.testing.assert_close(capture.norms()[:, 0], expected, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(
        clipped_sum(capture, torch.tensor([1.0, 0.5]))[0], rows[0] + 0.5 * rows[1]
    )


def test_second_backward_pass_and_layer_without_gradient_are_refused():
    layer = nn.Linear(3, 3).requires_grad_(False)
    with pytest.raises(RuntimeError, match="second backward"), PoolCapture({"w": layer}) as capture:
        loss = layer(torch.ones(2, 1, 3)).sum()
        loss.backward(retain_graph=True)
        loss.backward()
    with PoolCapture({"w": layer}) as capture:
        pass
    with pytest.raises(RuntimeError, match="no gradient"):
        capture.norms()


@pytest.mark.parametrize("name", DATA_SCORES)
@pytest.mark.parametrize("clipping", ["automatic", "flat"])
def test_one_record_moves_the_sum_by_at_most_the_clipping_norm(name, clipping):
    """Sensitivity under add/remove: one record's whole contribution is bounded, however large its
    gradient.
    """
    case = frozen_case("unet", 1)
    pool = candidate_pool(case.model)
    config = SaliencyConfig(score=name, clipping=clipping, clipping_norm=0.25)
    for scale in (1e-3, 1.0, 1e6):
        capture = capture_of(
            case, pool, scale, keep=SCORES[name].keep_gradients, weighted=SCORES[name].weighted
        )
        contribution = SCORES[name].contribution(capture, clip_of(config))
        assert contribution.sensitivity == 0.25
        norm = torch.cat([part.flatten() for part in contribution.values()]).norm()
        assert norm <= 0.25
        if scale == 1e6:
            assert norm > 0.249
        if SCORES[name].per_matrix:
            clip = dataclasses.replace(clip_of(config), order=math.inf)
            (values,) = SCORES[name].contribution(capture, clip).values()
            assert values.min() >= 0 and values.max() <= 0.25


@pytest.mark.parametrize("name", DATA_SCORES)
def test_record_with_infinite_gradient_contributes_nothing(name):
    weights = torch.tensor([1.0, float("inf")])
    totals = []
    for rows in (2, 1):
        case = frozen_case("unet", 2)
        case = Case(
            model=case.model, batch=[part[:rows] for part in case.batch], row_losses=case.row_losses
        )
        options = {"keep": SCORES[name].keep_gradients, "weighted": SCORES[name].weighted}
        capture = capture_of(case, candidate_pool(case.model), weights[:rows], **options)
        clip = clip_of(SaliencyConfig(score=name))
        totals.append(SCORES[name].contribution(capture, clip).values())
    for both, one in zip(*totals, strict=True):
        torch.testing.assert_close(both, one, rtol=1e-4, atol=3e-6)


def test_record_with_infinite_input_is_left_out_of_the_clipped_sum():
    torch.manual_seed(0)
    layer = nn.Linear(3, 2).requires_grad_(False)
    x = torch.randn(3, 4, 3)
    x[1] = float("inf")
    with PoolCapture({"w": layer}, keep=True) as capture:
        layer(x).square().sum().backward()
    assert capture.norms().isfinite().flatten().tolist() == [True, False, True]
    (total,) = clipped_sum(capture, torch.tensor([1.0, 0.0, 1.0]))
    assert total.isfinite().all()
