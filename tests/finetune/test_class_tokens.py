"""Learned class tokens: per-sample gradients, the joint clip, noise, and what sampling makes of
them.
"""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sapf_ray.errors import DataError
from sapf_ray.finetune.adapter import add_lora
from sapf_ray.finetune.optimizer import Clipping
from sapf_ray.grad_sample.joint import JointGradients
from sapf_ray.grad_sample.lora import LoraGradients
from sapf_ray.grad_sample.norms import squared_norms
from sapf_ray.models.class_tokens import (
    CLASS_TOKENS,
    ClassTokens,
    label_embedders,
    save_class_tokens,
    with_class_tokens,
)
from sapf_ray.models.conditioning import encode_conditions, null_condition
from sapf_ray.models.conditions import Conditions
from sapf_ray.models.loading import load_pipeline
from sapf_ray.models.pool import candidate_pool
from sapf_ray.models.solvers import solver
from sapf_ray.privacy.clipping import clip_factors, clipped_units
from sapf_ray.privacy.fixed_point import grid_step
from sapf_ray.synthesis.sampler import initial_noise, sample_images
from tests.networks import CASES

N, K, CLASSES = 6, 2, 4
LABELS = torch.tensor([2, 0, 2, 1, 0, 2])  # of class 3 there is no record
NORM = 0.01
WEIGHT = 3.0


class Batch:
    """An adapted model with offsets away from zero, and the losses of N records of K rows.

    Args:
        kind: ``unet`` (conditions are states) or ``dit`` (label ids).
    """

    def __init__(self, kind: str) -> None:
        self.case = CASES[kind](N, K)
        self.model = self.case.model
        pool = list(candidate_pool(self.model, "qkv"))
        self.factors = list(add_lora(self.model, pool[::2], rank=2, seed=0).values())
        generator = torch.Generator().manual_seed(3)
        for p in self.factors:
            p.data.normal_(std=0.3, generator=generator)
        labels = torch.arange(CLASSES - 1)  # the tiny DiT has three labels
        self.public = Conditions(kind="labels", labels=labels)
        if kind == "unet":
            self.public = Conditions(states=torch.randn(CLASSES, 7, 16, generator=generator))
        self.tokens = ClassTokens.add_to(self.model, self.public, weight=WEIGHT)
        self.tokens.values.data.normal_(std=0.3, generator=generator)

    def losses(self, records: list[int], values: Tensor | None = None) -> Tensor:
        """With ``values``, the oracle: autograd through the tokens themselves."""
        labels = LABELS[records]
        conditions = self.tokens.shift(self.public[labels], labels)
        if values is not None:
            self.tokens._rows = values[labels]
            if conditions.states is not None:
                states = self.public.states[labels] + WEIGHT * values[labels]
                conditions = replace(conditions, states=states)
        rows = torch.tensor(records).repeat_interleave(K) * K + torch.arange(K).repeat(len(records))
        x, t, _, target = (part[rows] for part in self.case.batch)
        (told,) = conditions.repeat_interleave(K).parts().values()
        per_row = self.case.row_losses(self.model, x, t, told, target)
        return per_row.unflatten(0, (-1, K)).mean(1)

    def oracle(self) -> Tensor:
        """(N, all trained values) gradients, one forward and backward pass each."""
        trained = [*self.factors, self.tokens.values]
        rows = []
        for i in range(N):
            loss = self.losses([i], self.tokens.values).sum()
            rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, trained)]))
        return torch.stack(rows)


def joint(batch: Batch, kind: type[JointGradients] = JointGradients) -> JointGradients:
    factors = LoraGradients(batch.model, batch.factors, rows_per_record=K)
    return kind(factors, batch.tokens)


def units_of(gradients: JointGradients, batch: Batch, records: list[int]) -> Tensor:
    clip = Clipping(norm=NORM, mode="automatic", gamma=1e-6)
    parts = gradients.clipped_units(batch.losses(records), clip, grid=grid_step(NORM))
    return torch.cat([part.flatten() for part in parts])


@pytest.fixture(params=["unet", "dit"])
def batch(request) -> Batch:
    return Batch(request.param)


def test_per_sample_gradients_are_those_of_one_record_alone(batch):
    expected = batch.oracle()
    gradients = joint(batch)
    found = gradients.grad_sample(batch.losses(list(range(N))))
    width = sum(p.numel() for p in batch.factors)
    scattered = torch.zeros(N, *batch.tokens.values.shape)
    scattered[torch.arange(N), LABELS] = found[:, width:].view(N, *batch.tokens.values.shape[1:])
    ours = torch.cat([found[:, :width], scattered.flatten(1)], dim=1)
    torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-6)
    assert expected[:, width:].norm() > 1e-4


def test_padding_and_a_record_that_is_not_a_number_leave_no_trace(batch):
    gradients = joint(batch)
    alone = units_of(gradients, batch, [1, 2])
    clip = Clipping(norm=NORM, mode="automatic", gamma=1e-6)
    weights = torch.tensor([1.0, 1.0, torch.nan])
    losses = (batch.losses([1, 2, 4, 5])[:3]) * weights
    parts = gradients.clipped_units(losses, clip, grid=grid_step(NORM))
    found = torch.cat([part.flatten() for part in parts])
    assert (found - alone).abs().max() <= 2, "kernels of another shape: last bits at most"


class ClippedApart(JointGradients):
    """Broken twin: factors and tokens each clipped to the whole norm."""

    def clipped_units(self, losses, clip, *, grid):
        rows = self.grad_sample(losses)
        width = sum(p.numel() for p in self.factors.parameters)
        factors, tokens = rows[:, :width], rows[:, width:]
        total = clipped_units(factors, clip(squared_norms(factors).sqrt()), grid)
        return [total, self._by_class(tokens, clip(squared_norms(tokens).sqrt()), grid)]


class TokensLeftOutOfTheNorm(JointGradients):
    """Broken twin: the norm is that of the factors alone."""

    def clipped_units(self, losses, clip, *, grid):
        rows = self.grad_sample(losses)
        width = sum(p.numel() for p in self.factors.parameters)
        scales = clip(squared_norms(rows[:, :width]).sqrt())
        total = clipped_units(rows[:, :width], scales, grid)
        return [total, self._by_class(rows[:, width:], scales, grid)]


def is_bounded(gradients: JointGradients, batch: Batch) -> bool:
    """Whether each record moves the sum by at most the norm, to the last bit."""
    norms = [units_of(gradients, batch, [i]).double().norm() * grid_step(NORM) for i in range(N)]
    assert min(norms) > 0.9 * NORM
    return max(norms) <= NORM


def test_one_norm_bounds_factors_and_tokens_together(batch):
    expected = batch.oracle()
    gradients = joint(batch)
    assert is_bounded(gradients, batch)
    scales = clip_factors(expected.norm(dim=1), NORM, mode="automatic", gamma=1e-6)
    total = units_of(gradients, batch, list(range(N))) * grid_step(NORM)
    torch.testing.assert_close(total, scales @ expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("twin", [ClippedApart, TokensLeftOutOfTheNorm])
def test_twins_that_clip_apart_are_rejected(batch, twin):
    assert not is_bounded(joint(batch, twin), batch)


def test_sums_do_not_depend_on_order_and_an_absent_class_gets_nothing():
    batch = Batch("unet")
    gradients = joint(batch)
    first = units_of(gradients, batch, [0, 1, 2]) + units_of(gradients, batch, [3, 4, 5])
    second = units_of(gradients, batch, [5, 3, 1]) + units_of(gradients, batch, [2, 0, 4])
    assert torch.equal(first, second)
    offsets = first[-batch.tokens.values.numel() :].view(batch.tokens.values.shape)
    assert (offsets[3] == 0).all() and all((offsets[c] != 0).any() for c in range(3))


# What is saved and what sampling makes of it ------------------------------------------------------

PROMPTS = ("a b", "c d", "e f")
NAMES = ("ä", "b", "c")


@pytest.fixture
def pipe(tiny_pipeline):
    return load_pipeline(str(tiny_pipeline))


def test_without_a_file_or_with_zeros_conditions_are_what_they_were(pipe, tmp_path):
    public = encode_conditions(pipe, PROMPTS)
    assert with_class_tokens(pipe, public, None) is public
    assert with_class_tokens(pipe, public, tmp_path) is public
    zeros = torch.zeros(public.states.shape)
    save_class_tokens(tmp_path, zeros, conditions=public, class_names=NAMES)
    assert torch.equal(with_class_tokens(pipe, public, tmp_path).states, public.states)


def test_the_stock_pipeline_makes_the_same_images_from_prompt_embeds(pipe, tmp_path):
    from safetensors import safe_open

    public = encode_conditions(pipe, PROMPTS)
    offsets = 3 * torch.randn(public.states.shape, generator=torch.Generator().manual_seed(0))
    save_class_tokens(tmp_path, offsets, conditions=public, class_names=NAMES)
    seeds = [1, 2, 3]
    conditions = with_class_tokens(pipe, public, tmp_path)
    null = null_condition(pipe)
    ours = sample_images(pipe, conditions, null=null, seeds=seeds, steps=5, guidance_scale=100.0)
    plain = sample_images(pipe, public, null=null, seeds=seeds, steps=5, guidance_scale=100.0)
    assert (ours != plain).any()
    pipe.scheduler = solver(pipe)
    with safe_open(tmp_path / CLASS_TOKENS, "pt") as file:
        assert file.metadata()["class_names"] == '["ä", "b", "c"]'
        stock = pipe(
            prompt_embeds=file.get_tensor("prompt_embeds"),
            latents=initial_noise(seeds, (4, 4, 4)),
            num_inference_steps=5,
            guidance_scale=100.0,
            output_type="np",
            negative_prompt=[""] * 3,
        ).images
    assert np.abs(ours.astype(int) - (stock * 255).round()).max() <= 1


def test_label_tables_hold_what_training_used(tmp_path):
    """The DiT with the offsets in its tables says what it said with shifted embeddings."""
    batch = Batch("dit")
    x, t, *_ = (part[:3] for part in batch.case.batch)
    labels = torch.tensor([2, 0, 1])
    public = copy.deepcopy(batch.model)
    batch.tokens.shift(batch.public[labels], labels)
    expected = batch.model(x, timestep=t, class_labels=labels).sample
    offsets = WEIGHT * batch.tokens.values
    save_class_tokens(tmp_path, offsets, conditions=batch.public, class_names=NAMES)
    plain = Batch("dit").model  # the same weights, no batch shifted
    for embedder in label_embedders(plain):
        embedder._forward_hooks.clear()
    with_class_tokens(Pipe(plain), batch.public, tmp_path)
    torch.testing.assert_close(plain(x, timestep=t, class_labels=labels).sample, expected)
    null = label_embedders(plain)[0].weight[3]
    assert torch.equal(null, label_embedders(public)[0].weight[3]), "no label stays what it is"


class Pipe:
    """As much of a DiT pipeline as is used."""

    def __init__(self, transformer: nn.Module) -> None:
        self.transformer = transformer


def test_tokens_of_other_classes_or_torn_files_are_told(pipe, tmp_path):
    public = encode_conditions(pipe, PROMPTS)
    zeros = torch.zeros(public.states.shape)
    save_class_tokens(tmp_path, zeros, conditions=public, class_names=NAMES)
    with pytest.raises(DataError, match=r"class_tokens\.safetensors: cannot be loaded as class"):
        with_class_tokens(pipe, public[:2], tmp_path)
    content = (tmp_path / CLASS_TOKENS).read_bytes()
    (tmp_path / CLASS_TOKENS).write_bytes(content[:-9])
    with pytest.raises(DataError, match=r"class_tokens\.safetensors: cannot be loaded as class"):
        with_class_tokens(pipe, public, tmp_path)
