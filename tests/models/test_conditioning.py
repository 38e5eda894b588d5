"""Conditions of both families go through one path: label lookup, guidance, learned variances,
per-record losses.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DiTPipeline, DiTTransformer2DModel

from sapf_ray.config import ModelConfig, RunConfig, from_dict, to_dict
from sapf_ray.errors import ConfigError, DataError
from sapf_ray.grad_sample.capture import PoolCapture
from sapf_ray.models.conditioning import (
    denoiser_of,
    encode_conditions,
    label_ids,
    null_condition,
)
from sapf_ray.models.conditions import Conditions
from sapf_ray.models.denoising import Draws, draw, per_record_loss
from sapf_ray.models.loading import load_pipeline, resolution_of
from sapf_ray.models.pool import candidate_pool
from sapf_ray.models.processes import Diffusion, forward_process
from sapf_ray.models.public_model import PublicModel
from sapf_ray.models.solvers import solver
from sapf_ray.models.vae import LatentScale
from sapf_ray.privacy.keyed_rng import NoiseKey
from sapf_ray.synthesis.sampler import initial_noise, sample_images

LABELS = {0: "tabby, tabby cat", 1: "tench", 2: "cat", 3: "digit one, one, 1"}


@pytest.fixture(scope="module")
def dit(tiny_pipeline, tmp_path_factory) -> Path:
    """A DiT with learned variances and 1000 labels, as DiT-XL/2, but tiny: 4x4 latents, 6 q/k/v
    matrices.
    """
    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=4,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        sample_size=4,
        patch_size=2,
        num_embeds_ada_norm=1000,
    )
    pipe = DiTPipeline(
        transformer, load_pipeline(str(tiny_pipeline)).vae, DDIMScheduler(), id2label=LABELS
    )
    pipe.register_to_config(id2label={str(i): names for i, names in LABELS.items()})
    directory = tmp_path_factory.mktemp("dit")
    pipe.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def pipe(dit):
    return load_pipeline(str(dit))


def test_labels_are_found_by_their_names_in_prompts():
    assert label_ids(
        LABELS, 4, prompts=("a photo of a tabby cat", "An image of a cat", "Tench!")
    ) == (
        0,
        2,
        1,
    )  # longest name first
    assert label_ids(
        {0: "letter A, A", 1: "letter a, a"}, 2, prompts=("the letter a", "the letter A")
    ) == (
        1,
        0,
    )  # case counts
    assert label_ids(LABELS, 1000, prompts=("a", "b"), class_labels=(7, 999)) == (7, 999)


@pytest.mark.parametrize(
    ("prompts", "given", "words"),
    [
        (
            ("a cat", "concatenate"),
            None,
            r"'concatenate' names no label.*labels: tabby, tench, cat, digit one",
        ),
        (("a cat", "another cat"), None, r"same label as another class"),
        (("a", "b"), (1,), r"\[1\]: must be 2 different label ids from 0 to 3"),
        (("a", "b"), (1, 4), "from 0 to 3"),
        (("a", "b"), (1, 1), "different"),
    ],
)
def test_classes_without_label_are_refused_in_one_line(prompts, given, words):
    with pytest.raises(ConfigError, match=words) as caught:
        label_ids(LABELS, 4, prompts=prompts, class_labels=given)
    assert "model.class_labels" in str(caught.value) and "\n" not in str(caught.value)


def test_model_is_checked_from_config_files_alone(dit, tiny_pipeline):
    model = PublicModel.open(ModelConfig(path=str(dit)))
    model.check_classes(("a cat", "a tench"))
    assert all(p.is_meta for p in model.denoiser.parameters())
    assert len(candidate_pool(model.denoiser)) == len(model.pool("qkv")) == 6
    with pytest.raises(ConfigError, match=r"model\.class_labels.*'a ship'"):
        model.check_classes(("a ship", "a cat"))
    with pytest.raises(ConfigError, match="conditioned on prompts"):
        text_model = ModelConfig(path=str(tiny_pipeline), class_labels=(1, 2))
        PublicModel.open(text_model).check_classes(("a", "b"))
    with pytest.raises(ConfigError, match=r"class_labels = -1: must be an integer of at least 0"):
        ModelConfig(class_labels=(-1,))


def test_class_labels_survive_yaml():
    config = RunConfig(model=ModelConfig(class_labels=(3, 1)))
    nested = to_dict(config)
    assert nested["model"]["class_labels"] == [3, 1] and from_dict(nested) == config


def test_pipeline_of_another_family_is_named(tmp_path):
    (tmp_path / "model_index.json").write_text('{"_class_name": "KolorsPipeline"}')
    with pytest.raises(
        DataError, match="is a KolorsPipeline; must be one of StableDiffusionPipeline, DiTPipeline"
    ):
        load_pipeline(str(tmp_path))


def test_conditions_of_both_families_stack_alike(pipe, tiny_pipeline):
    text = load_pipeline(str(tiny_pipeline))
    of_text = encode_conditions(text, ("a", "b"))
    assert of_text.states.shape == (2, 16, 16) and len(of_text) == 2
    assert null_condition(text).states.shape == (1, 16, 16)
    of_labels = encode_conditions(pipe, ("a cat", "a tench"))
    assert of_labels.labels.tolist() == [2, 1] and of_labels.labels.dtype == torch.int64
    assert null_condition(pipe).labels.tolist() == [1000]
    assert of_labels.to("cpu", torch.bfloat16).labels.dtype == torch.int64
    assert of_text.to("cpu", torch.bfloat16).states.dtype == torch.bfloat16
    assert resolution_of(pipe) == resolution_of(text) == 8
    assert not denoiser_of(pipe).training  # else diffusers drops labels at random


def draws_of(records: np.ndarray) -> Draws:
    key = NoiseKey.create(0)
    process = Diffusion(DDPMScheduler())
    return draw(key, "p", 0, records, k=2, latent_shape=(4, 4, 4), process=process)


def test_dit_loss_trains_the_noise_half_and_mixes_no_records(pipe):
    process, denoiser, records = forward_process(pipe), denoiser_of(pipe), np.array([3, 11, 7])
    moments, labels = torch.randn(3, 8, 4, 4), torch.tensor([2, 1, 0])

    def loss(rows: list[int]) -> torch.Tensor:
        return per_record_loss(
            denoiser,
            process,
            moments=moments[rows],
            scale=LatentScale(factor=0.5),
            conditions=Conditions(kind="labels", labels=labels[rows]),
            draws=draws_of(records[rows]),
        )

    with torch.no_grad():
        together = loss([0, 1, 2])
        for i in range(3):
            torch.testing.assert_close(loss([i])[0], together[i], rtol=1e-4, atol=1e-5)
    last = denoiser.proj_out_2.requires_grad_(
        True
    )  # (patch, patch, 8 channels) features: channels vary fastest
    loss([0, 1, 2]).sum().backward()
    gradient = last.weight.grad.view(2, 2, 8, -1)
    last.requires_grad_(False).zero_grad()
    assert gradient[:, :, :4].abs().min() > 0 and gradient[:, :, 4:].abs().max() == 0


def test_dit_per_sample_norms_are_those_of_single_records(pipe):
    process, denoiser, records = forward_process(pipe), denoiser_of(pipe), np.array([5, 8])
    moments, labels, pool = (
        torch.randn(2, 8, 4, 4),
        torch.tensor([2, 1]),
        candidate_pool(denoiser_of(pipe)),
    )
    key = NoiseKey.create(0)
    draws = draw(key, "p", 0, records, k=1, latent_shape=(4, 4, 4), process=process)
    with PoolCapture(pool) as capture:
        per_record_loss(
            denoiser,
            process,
            moments=moments,
            scale=LatentScale(factor=0.5),
            conditions=Conditions(kind="labels", labels=labels),
            draws=draws,
        ).sum().backward()
    name = list(pool)[4]
    for i in range(2):
        weight = pool[name].weight.requires_grad_(True)
        part = Draws(
            posterior=draws.posterior[[i]], noise=draws.noise[[i]], timesteps=draws.timesteps[[i]]
        )
        loss = per_record_loss(
            denoiser,
            process,
            moments=moments[[i]],
            scale=LatentScale(factor=0.5),
            conditions=Conditions(kind="labels", labels=labels[[i]]),
            draws=part,
        ).sum()
        (expected,) = torch.autograd.grad(loss, weight)
        weight.requires_grad_(False)
        torch.testing.assert_close(capture.norms()[i, 4], expected.norm(), rtol=1e-3, atol=1e-7)


def test_dit_sampling_matches_the_stock_pipeline_with_guidance(pipe):
    labels, seeds = torch.tensor([2, 1, 0]), [4, 5, 6]
    conditions = Conditions(kind="labels", labels=labels)
    ours = sample_images(
        pipe, conditions, null=null_condition(pipe), seeds=seeds, steps=4, guidance_scale=3.0
    )
    noise = initial_noise(seeds, (4, 4, 4))
    stock = DiTPipeline(pipe.transformer, pipe.vae, solver(pipe))
    stock.set_progress_bar_config(disable=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("diffusers.pipelines.dit.pipeline_dit.randn_tensor", lambda **_: noise)
        theirs = stock(
            labels.tolist(), guidance_scale=3.0, num_inference_steps=4, output_type="np"
        ).images
    assert np.abs(ours.astype(int) - (theirs * 255).round()).max() <= 1


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_loss_target_follows_the_schedulers_prediction_type(prediction):
    """The loss is zero for a denoiser that predicts exactly what the scheduler's type names, and
    for no other.
    """
    scheduler = DDPMScheduler(prediction_type=prediction)
    process = Diffusion(scheduler)
    records = np.arange(6)
    draws, moments = (
        draws_of(records),
        torch.cat([torch.randn(6, 4, 4, 4), torch.full((6, 4, 4, 4), -30.0)], 1),
    )
    latents = moments[:, :4].repeat_interleave(2, 0)
    noise, t = draws.noise.flatten(0, 1), draws.timesteps.flatten()
    alpha = scheduler.alphas_cumprod[t].view(-1, 1, 1, 1)
    targets = {
        "epsilon": noise,
        "sample": latents,
        "v_prediction": alpha.sqrt() * noise - (1 - alpha).sqrt() * latents,
    }

    class Exact(torch.nn.Module):
        answer: torch.Tensor

        def forward(
            self, noisy: torch.Tensor, timesteps: torch.Tensor, **_: object
        ) -> tuple[torch.Tensor]:
            return (self.answer,)

    for kind, answer in targets.items():
        exact = Exact()
        exact.answer = answer
        loss = per_record_loss(
            exact,
            process,
            moments=moments,
            scale=LatentScale(factor=1.0),
            conditions=Conditions(states=torch.zeros(6, 1, 1)),
            draws=draws,
        )
        assert (float(loss.max()) < 1e-8) == (kind == prediction), kind


@pytest.mark.parametrize("ids", [[], [-1], ["a"], [True], [0.5]])
def test_class_labels_that_are_no_ids_are_refused(ids):
    with pytest.raises(ConfigError, match=r"model\.class_labels"):
        ModelConfig(class_labels=ids)
