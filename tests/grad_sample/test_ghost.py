"""Ghost clipping against gradients of one record at a time, against Opacus, and against its memory
promise.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from opacus.grad_sample import GradSampleModuleFastGradientClipping
from torch import Tensor, nn

from sapf_ray.errors import ConfigError
from sapf_ray.finetune.adapter import add_lora
from sapf_ray.grad_sample.ghost import GhostGradients
from sapf_ray.models.pool import candidate_pool
from sapf_ray.privacy.clipping import clip_factors
from tests.grad_sample.ghost_cases import CHOICES, Clip, chosen
from tests.networks import Case, dit_case, unet_case


class InstantiatedGradients:
    """The interface of :class:`GhostGradients` on per-sample gradients, one record at a time."""

    def __init__(self, case: Case, parameters: dict[str, nn.Parameter]) -> None:
        self.case, self.parameters = case, list(parameters.values())

    def clipped_sums(self, clip) -> list[Tensor]:
        rows = self.case.gradients(self.parameters)
        factors = clip(torch.stack([torch.cat([g.flatten() for g in row]).norm() for row in rows]))
        return [
            torch.stack([f * g for f, g in zip(factors, column, strict=True)]).sum(0)
            for column in zip(*rows, strict=True)
        ]


def total_norm(sums: list[Tensor]) -> float:
    return float(torch.cat([s.flatten() for s in sums]).norm())


def assert_same_sums(sums: list[Tensor], expected: list[Tensor]) -> None:
    difference = total_norm([a - b for a, b in zip(sums, expected, strict=True)])
    assert difference <= 1e-5 * total_norm(expected)
    for a, b in zip(sums, expected, strict=True):
        assert a.shape == b.shape and a.dtype == torch.float32
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5 * total_norm(expected))


def check(
    case: Case, parameters: dict[str, nn.Parameter], cap: int = 2**14, mode: str = "automatic"
) -> None:
    clip, oracle_clip = Clip(mode=mode), Clip(mode=mode)
    expected = InstantiatedGradients(case, parameters).clipped_sums(oracle_clip)
    with GhostGradients(
        case.model, parameters, rows_per_record=case.rows_per_record, max_temporary_bytes=cap
    ) as ghost:
        sums = ghost.clipped_sums(case.losses(), clip)
    torch.testing.assert_close(clip.norms.float(), oracle_clip.norms, rtol=2e-4, atol=1e-7)
    assert (clip.norms >= oracle_clip.norms * (1 - 1e-6)).all()
    assert_same_sums(sums, expected)
    assert all(p.grad is None for p in case.model.parameters())


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("choice", sorted(CHOICES))
def test_unet_matches_the_oracle(choice, k):
    case = unet_case(4, k)
    parameters = chosen(case, choice)
    assert parameters
    check(case, parameters)


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("choice", ["all", "attention", "biases"])
def test_dit_matches_the_oracle(choice, k):
    """The last step of a DiT calls the first block's time and class embedding again: two uses, one
    gradient.
    """
    case = dit_case(4, k)
    check(case, chosen(case, choice), mode="flat")


def test_parameters_left_trainable_but_not_chosen_change_nothing():
    case = unet_case(3)
    check(case, chosen(case, "attention", freeze=False))


def test_order_of_parameters_is_the_callers():
    case = unet_case(2)
    parameters = dict(reversed(chosen(case).items()))
    check(case, parameters)


def test_lora_factors_are_linear_layers_too():
    case = unet_case(3)
    factors = add_lora(case.model, list(candidate_pool(case.model))[::3], rank=2, seed=0)
    for p in factors.values():
        nn.init.normal_(p)
    check(case, factors)


def test_gradient_checkpointing_gives_the_same_sums():
    plain, recomputed = unet_case(3), unet_case(3)
    recomputed.model.enable_gradient_checkpointing()
    recomputed.model.train()
    clip = Clip()
    sums = []
    for case in (plain, recomputed):
        with GhostGradients(case.model, chosen(case)) as ghost:
            sums.append(ghost.clipped_sums(case.losses(), clip))
    assert_same_sums(sums[1], sums[0])


def test_many_steps_on_one_instance_and_sampling_in_between():
    case = unet_case(3)
    parameters = chosen(case)
    ghost = GhostGradients(case.model, parameters)
    first = ghost.clipped_sums(case.losses(), Clip())
    with torch.no_grad():
        case.losses()
    case.losses()  # a forward pass that is thrown away
    second = ghost.clipped_sums(case.losses(), Clip())
    assert_same_sums(second, first)
    ghost.remove()
    assert not any(m._forward_hooks for m in case.model.modules())


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
def test_opacus_ghost_clipping_is_the_reference():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, stride=2),
        nn.GroupNorm(2, 8),
        nn.SiLU(),
        nn.Conv2d(8, 8, 3, groups=2),
        nn.Flatten(),
        nn.Linear(32, 16),
        nn.LayerNorm(16),
        nn.SiLU(),
        nn.Linear(16, 4, bias=False),
    )
    x, target = torch.randn(6, 3, 8, 8), torch.randn(6, 4)
    parameters = dict(net.named_parameters())
    clip = Clip(0.3, "flat")
    with GhostGradients(net, parameters) as ghost:
        sums = ghost.clipped_sums((net(x) - target).square().sum(1), clip)
    wrapped = GradSampleModuleFastGradientClipping(
        net, max_grad_norm=0.3, use_ghost_clipping=True, loss_reduction="sum"
    )
    losses = (wrapped(x) - target).square().sum(1)
    losses.sum().backward(retain_graph=True)
    norms = wrapped.get_norm_sample()
    torch.testing.assert_close(clip.norms.float(), norms, rtol=1e-4, atol=0)
    wrapped.disable_hooks()
    wrapped.zero_grad()
    (losses * clip_factors(norms, 0.3, mode="flat")).sum().backward()
    assert_same_sums(sums, [p.grad for p in parameters.values()])


@pytest.mark.parametrize("mode", ["automatic", "flat"])
@pytest.mark.parametrize("make", [unet_case, dit_case])
def test_one_record_contributes_at_most_the_clipping_norm(make, mode):
    case = make(1)
    with GhostGradients(case.model, chosen(case)) as ghost:
        for scale in (1e-3, 1.0, 1e3, 1e6):
            norm = total_norm(ghost.clipped_sums(case.losses() * scale, Clip(0.25, mode)))
            assert 0 < norm <= 0.25 * (1 + 1e-5)
    assert norm > 0.2499  # at 1e6 both modes are at the bound: the factor is not simply too small


@pytest.mark.parametrize("bad", [float("inf"), float("nan"), 1e38])
def test_record_with_infinite_gradient_contributes_nothing(bad):
    case = unet_case(3)
    parameters = chosen(case)
    without = replace(case, batch=[torch.cat([part[:1], part[2:]]) for part in case.batch])
    clip = Clip()
    with GhostGradients(case.model, parameters) as ghost:
        expected = ghost.clipped_sums(without.losses(), Clip())
        sums = ghost.clipped_sums(case.losses() * torch.tensor([1.0, bad, 1.0]), clip)
    assert clip.norms.isfinite().tolist() == [True, False, True]
    assert_same_sums(sums, expected)


def test_a_careless_clip_function_cannot_let_an_infinite_record_in():
    case = unet_case(2)
    with GhostGradients(case.model, chosen(case)) as ghost:
        sums = ghost.clipped_sums(
            case.losses() * torch.tensor([1.0, float("nan")]), lambda norms: torch.ones(2)
        )
    assert total_norm(sums) > 0


@pytest.mark.parametrize("choice", ["all", "biases"])
@pytest.mark.parametrize("bad", [float("inf"), float("nan"), 1e38])
def test_record_with_infinite_activations_contributes_nothing(bad, choice):
    case = unet_case(3)
    without = replace(case, batch=[torch.cat([part[:1], part[2:]]) for part in case.batch])
    case.batch[0][1] = bad
    with GhostGradients(case.model, chosen(case, choice)) as ghost:
        sums, expected = (
            ghost.clipped_sums(case.losses(), Clip()),
            ghost.clipped_sums(without.losses(), Clip()),
        )
    assert_same_sums(sums, expected)


def test_infinite_factors_are_an_error():
    case = unet_case(2)
    with (
        GhostGradients(case.model, chosen(case)) as ghost,
        pytest.raises(FloatingPointError, match="not finite"),
    ):
        ghost.clipped_sums(case.losses(), lambda norms: torch.full((2,), float("inf")))


def test_low_precision_sums_are_not_rounded():
    """Near 256 bf16 counts in steps of 1 or 2: a rounded sum would swallow or double the next
    record's contribution.
    """
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
    x = torch.randn(1, 4).expand(261, 4)
    sums = []
    with GhostGradients(net, dict(net.named_parameters())) as ghost:
        for n in range(250, 262):
            with torch.autocast("cpu", torch.bfloat16):
                losses = net(x[:n]).float().square().sum(1)
            sums.append(ghost.clipped_sums(losses, Clip()))
    for previous, current in pairwise(sums):
        assert 0.99 < total_norm([b - a for a, b in zip(previous, current, strict=True)]) < 1 + 1e-4


@pytest.mark.parametrize("choice", ["all", "biases"])
@pytest.mark.parametrize("weights", ["float32", "bfloat16"])
def test_low_precision_is_close_to_float32_and_keeps_the_bound(choice, weights):
    case = unet_case(3)
    parameters = chosen(case, choice)
    with GhostGradients(case.model, parameters, max_temporary_bytes=2**14) as ghost:
        expected = ghost.clipped_sums(case.losses(), Clip())
    if weights == "bfloat16":
        case.model.bfloat16()
        case = replace(
            case, batch=[x.bfloat16() if x.is_floating_point() else x for x in case.batch]
        )
    one = replace(case, batch=[part[:1] for part in case.batch])
    with GhostGradients(case.model, parameters, max_temporary_bytes=2**14) as ghost:
        with torch.autocast("cpu", torch.bfloat16, enabled=weights == "float32"):
            losses, alone = case.losses(), one.losses()
        sums = ghost.clipped_sums(losses, Clip())
        contribution = total_norm(ghost.clipped_sums(alone * 1e6, Clip(0.25)))
    assert (
        0
        < total_norm([a - b for a, b in zip(sums, expected, strict=True)])
        < 0.05 * total_norm(expected)
    )
    assert 0.2499 < contribution <= 0.25 * (1 + 1e-5)


def test_low_precision_leaves_out_a_record_with_infinite_activations():
    case = unet_case(3)
    without = replace(case, batch=[torch.cat([part[:1], part[2:]]) for part in case.batch])
    case.batch[0][1] = float("inf")
    sums = []
    with GhostGradients(case.model, chosen(case)) as ghost:
        for batch in (case, without):
            with torch.autocast("cpu", torch.bfloat16):
                losses = batch.losses()
            sums.append(ghost.clipped_sums(losses, Clip()))
    assert total_norm([a - b for a, b in zip(*sums, strict=True)]) <= 1e-2 * total_norm(sums[1])


class Functional(nn.Module):
    """Uses a layer's weight behind its back, besides or instead of calling it."""

    def __init__(self, also: bool) -> None:
        super().__init__()
        self.layer, self.also = nn.Linear(3, 3), also

    def forward(self, x: Tensor) -> Tensor:
        y = nn.functional.linear(x, self.layer.weight)
        return y + self.layer(x) if self.also else y


@pytest.mark.parametrize("also", [True, False])
def test_weights_used_outside_their_layer_are_refused(also):
    net = Functional(also)
    with (
        GhostGradients(net, dict(net.named_parameters())) as ghost,
        pytest.raises(RuntimeError, match="weight: used outside"),
    ):
        ghost.clipped_sums(net(torch.ones(2, 3)).sum(1), Clip())


def test_wrong_arguments_are_refused_before_anything_is_summed():
    net = nn.Linear(3, 3)
    parameters = dict(net.named_parameters())
    with pytest.raises(ValueError, match="no parameters"):
        GhostGradients(net, {})
    with pytest.raises(ConfigError, match="ConvTranspose2d"):
        transposed = nn.ConvTranspose2d(3, 3, 3)
        GhostGradients(transposed, dict(transposed.named_parameters()))
    with GhostGradients(net, parameters) as ghost:
        with pytest.raises(ValueError, match="batch axis of 6 rows, must be 2"):
            ghost.clipped_sums(net(torch.ones(6, 3)).view(2, 9).sum(1), Clip())
        with pytest.raises(ValueError, match=r"must be \(n,\)"):
            ghost.clipped_sums(net(torch.ones(2, 3)).sum(), Clip())
        with pytest.raises(ValueError, match="clip returned"):
            ghost.clipped_sums(net(torch.ones(2, 3)).sum(1), lambda norms: norms.sum())
    net.requires_grad_(False)
    with pytest.raises(ValueError, match="weight: must require a gradient"):
        GhostGradients(net, parameters)
