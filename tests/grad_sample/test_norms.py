"""Every row of the table of layers against autograd, one record at a time."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sapf_ray.errors import ConfigError
from sapf_ray.grad_sample.layers import (
    LAYERS,
    NormQuery,
    layer_type,
)
from sapf_ray.grad_sample.norms import (
    MAX_TEMPORARY_BYTES,
    Call,
    norm_route,
    squared_norms,
    token_squared_norms,
)
from sapf_ray.grad_sample.trained import check_supported, trained_layers
from tests.allocations import Allocations, NoSync
from tests.tiny import tiny_unet

CAPS = st.sampled_from([256, 4096, 2**16, MAX_TEMPORARY_BYTES])
SUBSETS = st.sampled_from([("weight",), ("bias",), ("weight", "bias")])


def check(
    layer: nn.Module, inputs: list[torch.Tensor], trained: tuple[str, ...], k: int, cap: int
) -> None:
    """Squared norms of the layer, called on each of ``inputs`` in one forward pass, against
    autograd in float64.
    """
    trained = tuple(name for name in trained if getattr(layer, name, None) is not None) or (
        "weight",
    )
    outputs = [layer(x) for x in inputs]
    gradients = [torch.randn_like(y) for y in outputs]
    row = layer_type(layer)
    assert row is not None
    with NoSync(), torch.no_grad():
        calls = [Call(x, g) for x, g in zip(inputs, gradients, strict=True)]
        query = NormQuery(trained=trained, rows_per_record=k, max_temporary_bytes=cap)
        actual = row.squared_norms(layer, calls, query=query)
    assert actual.dtype == torch.float64
    weights = [getattr(layer.double(), name) for name in trained]
    expected = []
    for r in range(len(inputs[0]) // k):
        rows = slice(r * k, (r + 1) * k)
        loss = sum(
            (layer(x[rows].double() if x.is_floating_point() else x[rows]) * g[rows].double()).sum()
            for x, g in zip(inputs, gradients, strict=True)
        )
        expected.append(sum(g.square().sum() for g in torch.autograd.grad(loss, weights)))
    exact = torch.stack(expected).sqrt()
    torch.testing.assert_close(actual.sqrt(), exact, rtol=2e-4, atol=1e-6)
    assert (actual.sqrt() >= exact * (1 - 1e-6) - 1e-6).all()


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 3),
    k=st.integers(1, 3),
    shape=st.sampled_from([(), (1,), (5,), (3, 4)]),
    d_in=st.integers(1, 24),
    d_out=st.integers(1, 24),
    bias=st.booleans(),
    uses=st.integers(1, 2),
    trained=SUBSETS,
    cap=CAPS,
)
def test_linear(n, k, shape, d_in, d_out, bias, uses, trained, cap):
    torch.manual_seed(0)
    check(
        nn.Linear(d_in, d_out, bias=bias),
        [torch.randn(n * k, *shape, d_in) for _ in range(uses)],
        trained,
        k,
        cap,
    )


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 3),
    k=st.integers(1, 2),
    groups=st.integers(1, 3),
    c_in=st.integers(1, 3),
    c_out=st.integers(1, 3),
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    stride=st.integers(1, 2),
    dilation=st.integers(1, 2),
    padding=st.sampled_from([0, 1, (1, 0), "same", "valid"]),
    mode=st.sampled_from(["zeros", "circular", "reflect"]),
    bias=st.booleans(),
    uses=st.integers(1, 2),
    trained=SUBSETS,
    cap=CAPS,
)
def test_conv2d(
    n, k, groups, c_in, c_out, kernel, stride, dilation, padding, mode, bias, uses, trained, cap
):
    torch.manual_seed(0)
    layer = nn.Conv2d(
        groups * c_in,
        groups * c_out,
        kernel,
        1 if padding == "same" else stride,
        padding,
        dilation,
        groups,
        bias,
        mode,
    )
    check(
        layer, [torch.randn(n * k, groups * c_in, 7, 6 + u) for u in range(uses)], trained, k, cap
    )


@pytest.mark.parametrize("side, channels", [(2, 24), (12, 3)], ids=["gram", "instantiate"])
@pytest.mark.parametrize("cap", [512, 2**14, MAX_TEMPORARY_BYTES])
def test_conv2d_by_either_route(side, channels, cap):
    torch.manual_seed(0)
    assert norm_route(side**2, 9 * channels, d_out=channels) == (
        "gram" if side == 2 else "instantiate"
    )
    check(
        nn.Conv2d(channels, channels, 3, padding=1),
        [torch.randn(3, channels, side, side)],
        ("weight", "bias"),
        1,
        cap,
    )


@settings(max_examples=30, deadline=None)
@given(
    n=st.integers(1, 3),
    k=st.integers(1, 3),
    groups=st.integers(1, 3),
    width=st.integers(1, 3),
    shape=st.sampled_from([(2,), (5,), (3, 4)]),
    uses=st.integers(1, 2),
    trained=SUBSETS,
    cap=CAPS,
)
def test_group_norm(n, k, groups, width, shape, uses, trained, cap):
    torch.manual_seed(0)
    inputs = [torch.randn(n * k, groups * width, *shape) for _ in range(uses)]
    check(nn.GroupNorm(groups, groups * width, eps=1e-2), inputs, trained, k, cap)


@settings(max_examples=30, deadline=None)
@given(
    n=st.integers(1, 3),
    k=st.integers(1, 3),
    shape=st.sampled_from([(), (5,), (3, 4)]),
    normalized=st.sampled_from([(2,), (8,), (3, 2)]),
    bias=st.booleans(),
    uses=st.integers(1, 2),
    trained=SUBSETS,
    cap=CAPS,
)
def test_layer_norm(n, k, shape, normalized, bias, uses, trained, cap):
    torch.manual_seed(0)
    layer = nn.LayerNorm(normalized, eps=1e-2, bias=bias)
    check(layer, [torch.randn(n * k, *shape, *normalized) for _ in range(uses)], trained, k, cap)


@settings(max_examples=30, deadline=None)
@given(
    n=st.integers(1, 3),
    k=st.integers(1, 3),
    shape=st.sampled_from([(), (5,), (2, 3)]),
    entries=st.integers(1, 6),
    padding=st.booleans(),
    uses=st.integers(1, 2),
    cap=CAPS,
)
def test_embedding(n, k, shape, entries, padding, uses, cap):
    torch.manual_seed(0)
    layer = nn.Embedding(entries, 4, padding_idx=0 if padding else None)
    check(
        layer,
        [torch.randint(0, entries, (n * k, *shape)) for _ in range(uses)],
        ("weight",),
        k,
        cap,
    )


def test_route_of_stable_diffusion_layers():
    assert norm_route(4096, 320, d_out=320) == "instantiate"
    assert norm_route(64, 1280, d_out=1280) == "gram"
    assert norm_route(77, 768, d_out=320) == "gram"
    assert norm_route(4096, 9 * 320, d_out=320) == "instantiate"


@settings(max_examples=200, deadline=None)
@given(tokens=st.integers(1, 5000), d_in=st.integers(1, 3000), d_out=st.integers(1, 3000))
def test_gram_is_chosen_only_where_it_is_cheaper_and_smaller(tokens, d_in, d_out):
    gram = norm_route(tokens, d_in, d_out=d_out) == "gram"
    assert gram == (tokens**2 * (d_in + d_out) < tokens * d_in * d_out)
    assert not gram or 2 * tokens**2 <= d_in * d_out / 2


@pytest.mark.parametrize("tokens, d", [(64, 16), (8, 64), (300, 40)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_temporary_is_larger_than_the_cap(tokens, d, dtype):
    torch.manual_seed(0)
    a, g = torch.randn(2, 32, tokens, d).to(dtype)
    cap = 24 * 1024
    with Allocations() as seen:
        capped = token_squared_norms(a, g, max_temporary_bytes=cap)
    assert seen.peak <= cap + 32 * 16
    torch.testing.assert_close(capped, token_squared_norms(a, g), rtol=2e-4, atol=0)


def test_convolution_stays_under_the_cap():
    torch.manual_seed(0)
    layer = nn.Conv2d(16, 16, 3, padding=1)
    x, g = torch.randn(2, 8, 16, 12, 12).bfloat16()
    cap = 128 * 1024  # one record's unfolded input alone has 83 kB in float32
    with Allocations() as seen, torch.no_grad():
        query = NormQuery(trained=("weight",), max_temporary_bytes=cap)
        LAYERS[nn.Conv2d].squared_norms(layer, [Call(x, g)], query=query)
    assert 16 * 1024 < seen.peak <= cap


def test_norm_is_not_too_small_where_the_gram_sums_cancel():
    """Equal inputs and output gradients that add up to nearly nothing: the norm may err, but only
    upwards.
    """
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        a = torch.randn(1, 1, 256, generator=generator).expand(4, 16, 256) + 1e-4 * torch.randn(
            4, 16, 256, generator=generator
        )
        g = torch.randn(4, 16, 256, generator=generator)
        g = g - g.mean(1, keepdim=True)
        assert norm_route(16, 256, d_out=256) == "gram"
        true = (g.double().mT @ a.double()).flatten(1).norm(dim=1)
        assert (token_squared_norms(a, g).double().sqrt() >= true * (1 - 1e-5)).all()


def test_rows_that_do_not_split_into_records_are_refused():
    with pytest.raises(ValueError, match="5 rows does not split into 2"):
        calls = [Call(torch.ones(5, 2), torch.ones(5, 2))]
        query = NormQuery(trained=("weight",), rows_per_record=2)
        LAYERS[nn.Linear].squared_norms(nn.Linear(2, 2), calls, query=query)


class Positional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(3))
        self.inner = nn.Linear(3, 3)


class ScaledLinear(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize(
    "model, chosen, message",
    [
        (
            nn.Sequential(Positional()),
            ["0.table"],
            r"'0.table'.*module '0' of type Positional.*Linear, Conv2d",
        ),
        (nn.Sequential(ScaledLinear(2, 2)), ["0.weight"], "ScaledLinear"),
        (nn.Sequential(nn.ConvTranspose2d(2, 2, 3)), ["0.bias"], "ConvTranspose2d"),
        (nn.Sequential(nn.Embedding(3, 2, max_norm=1.0)), ["0.weight"], "max_norm"),
        (nn.Sequential(nn.Embedding(3, 2, sparse=True)), ["0.weight"], "sparse"),
        (nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)), ["0.weight"], "batch normalisation"),
        (
            nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))),
            ["0.parametrizations.weight.original0"],
            "Param",
        ),
    ],
)
def test_unsupported_parameters_are_named(model, chosen, message):
    every = dict(model.named_parameters())
    with pytest.raises(ConfigError, match=message):
        check_supported(model, {name: every[name] for name in chosen})


def test_frozen_unsupported_modules_do_not_matter():
    model = nn.Sequential(Positional(), nn.ConvTranspose2d(2, 2, 3), nn.BatchNorm2d(2).eval())
    check_supported(model, {"0.inner.weight": model[0].inner.weight})


def test_shared_and_foreign_parameters_are_refused():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].weight = model[0].weight
    with pytest.raises(ConfigError, match="shared by modules '0' and '1'"):
        check_supported(model, {"w": model[0].weight})
    with pytest.raises(ConfigError, match="must be a parameter of the Sequential"):
        check_supported(model, {"other": nn.Parameter(torch.zeros(2))})


def test_every_parameter_of_a_unet_is_supported():
    unet = tiny_unet()
    layers = trained_layers(unet, dict(unet.named_parameters()))
    assert sum(len(layer.parameters) for layer in layers) == len(list(unet.parameters()))


def too_small(norms: torch.Tensor, exact: torch.Tensor) -> bool:
    return bool((norms.double() < exact).any())


@pytest.mark.parametrize("length", [1, 63, 64, 5_000, 500_000, 20_000_000])
def test_norms_of_long_rows_are_never_too_small(length):
    rows = torch.rand(2, length, generator=torch.Generator().manual_seed(length)) + 1e-3
    exact = rows.double().square().sum(1).sqrt()
    ours = squared_norms(rows).sqrt()
    assert not too_small(ours, exact)
    assert (ours <= exact * (1 + 1e-5)).all()
    if length > 10_000_000:  # broken twin: one float32 sum over the whole row
        assert too_small(torch.linalg.vector_norm(rows, dim=1) * (1 + 1e-4), exact)


@pytest.mark.parametrize(
    "tokens, d_in, d_out, route",
    [(2_000, 640, 5_120, "instantiate"), (64, 640, 5_120, "gram"), (8, 2_560, 2_560, "gram")],
)
def test_norms_of_large_layers_are_never_too_small(tokens, d_in, d_out, route):
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(1, tokens, d_in, generator=generator) + 0.3
    g = torch.rand(1, tokens, d_out, generator=generator)
    assert norm_route(tokens, d_in, d_out=d_out) == route
    exact = (g.double().mT @ a.double()).flatten(1).norm(dim=1)
    ours = token_squared_norms(a, g).sqrt()
    assert not too_small(ours, exact)
    assert (ours <= exact * (1 + 1e-3)).all()
