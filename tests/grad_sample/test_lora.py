"""LoRA's per-sample gradients against peft's own forward, record by record, and Opacus."""

from __future__ import annotations

import pytest
import torch
from opacus import GradSampleModule
from torch import nn

from sapf_ray.errors import ConfigError
from sapf_ray.finetune.adapter import add_lora
from sapf_ray.finetune.micro_batch import find_micro_batch
from sapf_ray.finetune.optimizer import Clipping
from sapf_ray.grad_sample.lora import LoraGradients
from sapf_ray.models.pool import candidate_pool
from sapf_ray.privacy.clipping import clip_factors
from sapf_ray.privacy.fixed_point import grid_step
from tests.networks import dit_case
from tests.tiny import tiny_unet


def adapted_unet(
    train_a: bool = True, dtype: torch.dtype = torch.float32, every: int = 3, pool: str = "qkv"
):
    unet = tiny_unet().eval().to(dtype)
    factors = add_lora(
        unet, list(candidate_pool(unet, pool))[::every], rank=3, seed=1, train_a=train_a
    )
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():  # B starts at zero, where A's gradient vanishes
        for name, p in factors.items():
            if "lora_B" in name:
                p.copy_(0.3 * torch.randn(p.shape, generator=generator))
    return unet, factors


def batch(rows: int, dtype: torch.dtype = torch.float32):
    generator = torch.Generator().manual_seed(3)
    x, target = torch.randn(2, rows, 4, 4, 4, generator=generator).to(dtype)
    states = torch.randn(rows, 7, 16, generator=generator).to(dtype)
    return x, torch.randint(0, 1000, (rows,), generator=generator), states, target


def losses(unet, parts, k: int = 1):
    x, t, states, target = parts
    predicted = unet(x, t, encoder_hidden_states=states).sample
    return (predicted - target).float().square().flatten(1).mean(1).view(-1, k).mean(1)


def clipped_sum(sampler: LoraGradients, of_records, clip, bound: float = 1.0) -> torch.Tensor:
    """The exact sum, flat in float32, on the grid of records up to ``bound``."""
    grid = sampler.grid_step(bound)
    units = sampler.clipped_units(of_records, clip, grid=grid)
    assert all(part.dtype == torch.int64 for part in units)
    return torch.cat([part.flatten() for part in units]).float() * grid


def per_record(unet, factors, parts, k: int = 1) -> torch.Tensor:
    """(n, P) gradients by autograd through peft's forward, record by record."""
    rows = []
    for i in range(0, len(parts[0]), k):
        grads = torch.autograd.grad(
            losses(unet, tuple(p[i : i + k] for p in parts), k).sum(), list(factors.values())
        )
        rows.append(torch.cat([g.flatten() for g in grads]))
    return torch.stack(rows)


@pytest.mark.parametrize("train_a", [True, False])
@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("pool,every", [("qkv", 3), ("all", 1)])
def test_clipped_sums_match_one_record_at_a_time(train_a, k, pool, every):
    unet, factors = adapted_unet(train_a, every=every, pool=pool)
    assert pool != "all" or sum(p.dim() == 4 for p in factors.values()) > 20
    parts = batch(6)
    expected = per_record(unet, factors, parts, k)
    expected_losses = losses(unet, parts, k)
    sampler = LoraGradients(unet, factors.values(), rows_per_record=k)
    seen = []

    def clip(norms):
        seen.append(norms)
        return clip_factors(norms, 0.5, mode="automatic", gamma=1e-3)

    ours = losses(unet, parts, k)
    torch.testing.assert_close(ours, expected_losses, rtol=1e-5, atol=1e-6)
    total_of_ours = clipped_sum(sampler, ours, clip)
    torch.testing.assert_close(seen[0].float(), expected.norm(dim=1), rtol=1e-5, atol=1e-9)
    total = clip_factors(expected.norm(dim=1), 0.5, mode="automatic", gamma=1e-3) @ expected
    torch.testing.assert_close(total_of_ours, total, rtol=1e-4, atol=1e-5)
    assert all(p.grad is None for p in unet.parameters())
    assert float(clip_factors(seen[0], 0.5, mode="automatic", gamma=1e-3).mul(seen[0]).max()) <= 0.5


def test_matches_opacus_hooks():
    unet, factors = adapted_unet()
    parts = batch(4)
    wrapped = GradSampleModule(unet, loss_reduction="sum", strict=False)
    losses(wrapped, parts).sum().backward()
    expected = torch.cat([p.grad_sample.flatten(1) for p in factors.values()], dim=1)
    wrapped.remove_hooks()
    for p in factors.values():
        p.grad = None
    sampler = LoraGradients(unet, factors.values())
    ours = clipped_sum(sampler, losses(unet, parts), torch.ones_like)
    torch.testing.assert_close(ours, expected.sum(0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pool", ["qkv", "all"])
def test_bfloat16_forward_keeps_small_updates_and_float32_gradients(pool):
    unet, factors = adapted_unet(dtype=torch.bfloat16, pool=pool)
    with torch.no_grad():
        for name, p in factors.items():
            if "lora_B" in name:
                p.mul_(1e-3)  # s B A is now below the rounding of W in bfloat16
    parts = batch(3, torch.bfloat16)
    reference, same = adapted_unet(pool=pool)
    with torch.no_grad():
        for name, p in same.items():
            p.copy_(factors[name])
    expected = per_record(reference, same, batch(3))
    sampler = LoraGradients(unet, factors.values())
    ours = clipped_sum(sampler, losses(unet, parts), torch.ones_like)
    assert torch.cosine_similarity(ours, expected.sum(0), dim=0) > 0.98


def test_a_record_whose_gradient_overflows_is_left_out():
    unet, factors = adapted_unet()
    sampler = LoraGradients(unet, factors.values())
    weights = torch.tensor([1.0, float("inf"), 1.0])
    parts = batch(3)
    clip = Clipping(norm=1.0, mode="flat")
    ours = clipped_sum(sampler, losses(unet, parts) * weights, clip)
    kept = clipped_sum(sampler, losses(unet, tuple(p[[0, 2]] for p in parts)), clip)
    torch.testing.assert_close(ours, kept, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", ["flat", "automatic"])
def test_sums_do_not_depend_on_order_or_grouping_and_bound_each_record_exactly(mode):
    """The same shape of micro-batch, other mates and places: the same integers."""
    unet, factors = adapted_unet()
    sampler = LoraGradients(unet, factors.values())
    clip = Clipping(norm=0.01, mode=mode, gamma=1e-4)
    parts = batch(12)

    def units(order: list[int]) -> torch.Tensor:
        total = torch.zeros(sum(p.numel() for p in factors.values()), dtype=torch.int64)
        for start in range(0, len(order), 4):
            rows = order[start : start + 4]
            padded = [*rows, *[order[0]] * (4 - len(rows))]
            of_batch = losses(unet, tuple(p[padded] for p in parts))[: len(rows)]
            some = sampler.clipped_units(of_batch, clip, grid=grid_step(0.01))
            total += torch.cat([part.flatten() for part in some])
        return total

    everyone = list(range(12))
    total = units(everyone)
    assert torch.equal(total, units(everyone[::-1]))
    assert torch.equal(total, units(everyone[7:] + everyone[:7]))
    assert torch.equal(total, units(everyone[:5]) + units(everyone[5:]))
    for record in everyone:  # add/remove, to the last bit
        rest = [other for other in everyone if other != record]
        assert torch.equal(total - units(rest), units([record]))
        moved = (total - units(rest)).double() * grid_step(0.01)
        assert 0.009 < moved.norm() <= 0.01


def test_back_propagation_stops_below_the_first_adapter():
    unet = tiny_unet().eval()
    last = list(candidate_pool(unet))[
        -2:
    ]  # cross-attention k, v of the last block: their input needs no gradient
    factors = add_lora(unet, last, rank=2, seed=0)
    sampler = LoraGradients(unet, factors.values())
    reached = []
    for name, module in unet.named_modules():
        if name.startswith("down_blocks") and not list(module.children()):
            module.register_forward_hook(
                lambda m, i, o: (
                    reached.append(o.requires_grad) if isinstance(o, torch.Tensor) else None
                )
            )
    clipped_sum(sampler, losses(unet, batch(2)), torch.ones_like)
    assert reached and not any(reached)


def test_remove_gives_peft_its_forward_back_and_dropout_is_refused():
    unet, factors = adapted_unet()
    parts = batch(2)
    before = losses(unet, parts)
    sampler = LoraGradients(unet, factors.values())
    sampler.remove()
    after = losses(unet, parts)
    torch.testing.assert_close(before, after)
    after.sum().backward()
    assert all(p.grad is not None for p in factors.values())
    with pytest.raises(ValueError, match="not LoRA factors"):
        LoraGradients(unet, [unet.conv_in.weight])


def test_transformer_whose_time_embedding_is_used_twice():
    case = dit_case(3)
    factors = add_lora(case.model, list(candidate_pool(case.model, "all")), rank=2, seed=0)
    for p in factors.values():
        nn.init.normal_(p, std=0.3)
    rows = case.gradients(list(factors.values()))
    sampler = LoraGradients(case.model, factors.values())
    case.losses()[
        :2
    ].sum().backward()  # broken off: these gradients must not reach the next records
    ours = clipped_sum(sampler, case.losses(), Clipping(norm=0.1, mode="flat"))
    flat = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])
    expected = clip_factors(flat.norm(dim=1), 0.1, mode="flat") @ flat
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"groups": 2},
        {"dilation": 2},
        {"padding": "same"},
        {"padding": 1, "padding_mode": "circular"},
    ],
)
def test_convolutions_without_known_gradients_are_refused_before_training(options):
    net = nn.Sequential(nn.Conv2d(4, 4, 3, **options))
    with pytest.raises(
        ConfigError,
        match=r"finetune\.adapter = 'lora': must be direct: 0 is a convolution with groups",
    ):
        add_lora(net, ["0"], rank=2, seed=0)


def test_micro_batch_grows_until_memory_or_speed_ends_it():
    asked = []

    def out_of_memory_above_64(n):
        asked.append(n)
        if n > 64:
            raise torch.OutOfMemoryError("no")
        import time

        time.sleep(0.02)  # the same time for any size: doubling always pays

    assert find_micro_batch(out_of_memory_above_64, 1000, device="cpu") == 64
    assert max(asked) == 128
    assert (
        find_micro_batch(lambda n: __import__("time").sleep(n * 2e-3), 1000, device="cpu") == 8
    )  # proportional: never pays
    assert find_micro_batch(lambda n: None, 3, device="cpu") == 3
