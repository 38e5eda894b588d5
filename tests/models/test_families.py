"""Every further family, on a tiny pipeline made offline: it samples what its own pipeline samples,
its per-sample gradients are those of one record alone, and the stock pipeline loads its adapter.
"""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor

from sapf_ray.config import FinetuneConfig, ModelConfig
from sapf_ray.errors import ConfigError, DataError
from sapf_ray.estimate.arithmetic import forward_gflop
from sapf_ray.evolution.api import latent_means, vary_images
from sapf_ray.finetune.adapter import (
    WEIGHTS,
    add_adapter,
    check_adapter,
    load_adapter,
    sample_gradients,
    save_weights,
)
from sapf_ray.grad_sample.capture import PoolCapture
from sapf_ray.models.class_tokens import CLASS_TOKENS, save_class_tokens, with_class_tokens
from sapf_ray.models.conditioning import denoiser_of, encode_conditions, null_condition
from sapf_ray.models.conditions import Conditions
from sapf_ray.models.denoising import Draws, draw, per_record_loss
from sapf_ray.models.families import FAMILIES, FlowMatching
from sapf_ray.models.loading import load_pipeline, resolution_of
from sapf_ray.models.pool import candidate_pool
from sapf_ray.models.processes import DENSITIES, Flow, forward_process
from sapf_ray.models.public_model import PublicModel
from sapf_ray.models.solvers import solver
from sapf_ray.models.text_encoder import text_states
from sapf_ray.models.vae import LatentScale
from sapf_ray.privacy.keyed_rng import NoiseKey
from sapf_ray.saliency.synflow import synflow_scores
from sapf_ray.synthesis.sampler import decode_images, sample_images
from tests.families import FURTHER, SIDE, save_family, tiny_family

PROMPTS = ("An image of the digit three", "An image of the digit one", "an image")
SEEDS = [3, 4, 2**62]
POOLS = {"sdxl": 24, "sd3": 15, "flux": 9, "flux_schnell": 9, "pixart": 12, "sana": 6}
"""Number of q, k, v matrices; by hand from the architectures in tests/families.py."""


@pytest.fixture(scope="module", params=FURTHER)
def family(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def pipe(family) -> Any:
    return tiny_family(family)


@pytest.fixture(scope="module")
def conditions(pipe) -> Conditions:
    return encode_conditions(pipe, PROMPTS)


def sampled(pipe: Any, conditions: Conditions, guidance: float = 3.0) -> np.ndarray:
    null = null_condition(pipe)
    return sample_images(pipe, conditions, null=null, seeds=SEEDS, steps=3, guidance_scale=guidance)


def stock_images(pipe: Any, family: str, guidance: float = 3.0, **given: Any) -> np.ndarray:
    """What the stock pipeline's own call makes of the same seeds and steps, uint8."""
    given = given or {"prompt": list(PROMPTS)}
    if family == "flux_schnell":  # its guidance is called true_cfg_scale
        given |= {"true_cfg_scale": guidance}
        if "prompt" in given:
            given["negative_prompt"] = [""] * 3
    if family in ("pixart", "sana"):
        given |= {"use_resolution_binning": False, "height": 2 * SIDE, "width": 2 * SIDE}
    if family == "sana":  # sides of 32 pixels and more, as its published autoencoder wants
        pipe.check_inputs = lambda *args, **options: None
    usual, pipe.scheduler = pipe.scheduler, solver(pipe)
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    try:
        images = pipe(
            guidance_scale=guidance,
            num_inference_steps=3,
            generator=generators,
            output_type="np",
            **given,
        ).images
    finally:
        pipe.scheduler = usual
    return (images * 255).round().astype(int)


def differ(ours: np.ndarray, theirs: np.ndarray) -> int:
    return int(np.abs(ours.astype(int) - theirs).max())


def test_sampling_is_the_stock_pipelines(pipe, family, conditions):
    ours = sampled(pipe, conditions)
    assert ours.shape == (3, 2 * SIDE, 2 * SIDE, 3) and ours.std() > 10
    assert differ(ours, stock_images(pipe, family)) <= 1
    assert differ(ours, sampled(pipe, conditions, guidance=30.0)) > 1, "guidance counts"
    assert differ(ours, sampled(pipe, conditions[[1, 0, 2]], guidance=300.0)) > 2, "prompts too"


def batch_of(pipe: Any, k: int = 1) -> tuple[Tensor, Draws]:
    """Moments of three records, and their draws."""
    generator = torch.Generator().manual_seed(1)
    channels = pipe.vae.config.latent_channels
    moments = torch.randn(3, 2 * channels, SIDE, SIDE, generator=generator)
    draws = draw(
        NoiseKey.create(0),
        "p",
        0,
        np.array([3, 11, 7]),
        k=k,
        latent_shape=(channels, SIDE, SIDE),
        process=forward_process(pipe),
    )
    return moments, draws


def losses(
    pipe: Any,
    conditions: Conditions,
    rows: list[int],
    *,
    k: int = 1,
    denoiser: Any = None,
) -> Tensor:
    moments, draws = batch_of(pipe, k)
    return per_record_loss(
        denoiser or denoiser_of(pipe),
        forward_process(pipe),
        moments=moments[rows],
        scale=LatentScale.of(pipe.vae),
        conditions=conditions[rows],
        draws=Draws(
            posterior=draws.posterior[rows],
            noise=draws.noise[rows],
            timesteps=draws.timesteps[rows],
        ),
    )


def test_per_sample_norms_of_the_pool_are_those_of_single_records(pipe, family, conditions):
    pool = candidate_pool(denoiser_of(pipe))
    assert len(pool) == POOLS[family]
    with PoolCapture(pool) as capture:
        losses(pipe, conditions, [0, 1, 2]).sum().backward()
    found = capture.norms()
    weights = [matrix.weight.requires_grad_(True) for matrix in pool.values()]
    for i in range(3):
        gradients = torch.autograd.grad(losses(pipe, conditions, [i]).sum(), weights)
        expected = torch.stack([gradient.norm() for gradient in gradients])
        torch.testing.assert_close(found[i], expected, rtol=2e-3, atol=1e-6)
    for weight in weights:
        weight.requires_grad_(False)
    assert (found > 0).float().mean() > 0.8


@pytest.mark.parametrize("adapter", ["lora", "full"])
def test_per_sample_gradients_that_are_trained_are_those_of_single_records(
    pipe, family, conditions, adapter
):
    """LoRA on every linear layer and convolution that has it; and every weight of the denoiser."""
    if adapter == "full" and family in ("pixart", "sana"):
        pytest.skip("their tables of scales and shifts belong to no layer: refused, see below")
    denoiser = copy.deepcopy(denoiser_of(pipe))
    config = FinetuneConfig(adapter=adapter, lora_rank=2, draws_per_record=2)
    names = list(candidate_pool(denoiser, "qkvo"))
    trained = add_adapter(denoiser, names, config=config, seed=0)
    for value in trained.values():
        value.data += 0.1 * torch.randn(value.shape, generator=torch.Generator().manual_seed(2))
    oracle = [
        torch.autograd.grad(
            losses(pipe, conditions, [i], k=2, denoiser=denoiser).sum(),
            list(trained.values()),
            allow_unused=True,
            materialize_grads=True,
        )
        for i in range(3)
    ]
    flat = torch.stack([torch.cat([g.flatten() for g in row]) for row in oracle])
    engine = sample_gradients(denoiser, trained, config=config)
    batch = losses(pipe, conditions, [0, 1, 2], k=2, denoiser=denoiser)
    if adapter == "lora":
        torch.testing.assert_close(engine.grad_sample(batch), flat, rtol=2e-3, atol=1e-6)
        return
    seen = []

    def clip(norms: Tensor) -> Tensor:
        seen.append(norms)
        return torch.full_like(norms, 1e-3)

    units = engine.clipped_units(batch, clip, grid=2.0**-40)
    torch.testing.assert_close(seen[0].float(), flat.norm(dim=1), rtol=2e-3, atol=1e-6)
    total = torch.cat([part.flatten() for part in units]).double() * 2.0**-40
    torch.testing.assert_close(total, 1e-3 * flat.double().sum(0), rtol=2e-3, atol=1e-7)


def test_the_stock_pipeline_loads_the_adapter_and_makes_the_same_images(
    pipe, family, conditions, tmp_path
):
    trained = copy.deepcopy(denoiser_of(pipe))
    config = FinetuneConfig(lora_rank=2)
    factors = add_adapter(trained, list(candidate_pool(trained)), config=config, seed=0)
    for value in factors.values():
        value.data.normal_(std=0.5, generator=torch.Generator().manual_seed(0))
    values = {name: value.detach().clone() for name, value in factors.items()}
    save_weights(trained, tmp_path / "adapter", values=values, config=config)
    ours = tiny_family(family)
    load_adapter(ours, tmp_path / "adapter")
    images = sampled(ours, conditions)
    assert differ(images, sampled(pipe, conditions)) > 1
    stock = tiny_family(family)
    if hasattr(stock, "load_lora_weights"):
        stock.load_lora_weights(tmp_path / "adapter")
    else:  # PixArt: diffusers has no loader for it, peft has
        _load_by_peft(stock.transformer, tmp_path / "adapter" / WEIGHTS)
    assert differ(images, stock_images(stock, family)) <= 1


def _load_by_peft(transformer: Any, file: Path) -> None:
    """As docs/families.md has it."""
    factors = {name.partition(".")[2]: value for name, value in load_file(file).items()}
    names = [name.removesuffix(".lora_A.weight") for name in factors if "lora_A" in name]
    inject_adapter_in_model(LoraConfig(r=2, lora_alpha=2, target_modules=names), transformer)
    set_peft_model_state_dict(transformer, factors)


def test_variations_are_nearer_the_weaker_they_are(pipe, conditions):
    parents = sampled(pipe, conditions)

    def varied(strength: float) -> np.ndarray:
        return vary_images(
            pipe,
            parents,
            conditions=conditions,
            null=null_condition(pipe),
            seeds=np.array([7, 8, 9]),
            strength=strength,
            steps=4,
            guidance_scale=1.0,
        )

    decoded = decode_images(pipe, LatentScale.of(pipe.vae).scale(latent_means(pipe, parents)))
    apart = [np.abs(varied(s).astype(int) - decoded).mean() for s in (0.01, 0.9)]
    assert apart[0] < 0.8 * apart[1]


def test_class_tokens_are_told_to_the_stock_pipeline_by_prompt_embeds(
    pipe, family, conditions, tmp_path
):
    offsets = 3 * torch.randn(conditions.states.shape, generator=torch.Generator().manual_seed(0))
    save_class_tokens(tmp_path, offsets, conditions=conditions, class_names=("a", "b", "c"))
    images = sampled(pipe, with_class_tokens(pipe, conditions, tmp_path))
    assert differ(images, sampled(pipe, conditions)) > 1
    told = load_file(tmp_path / CLASS_TOKENS)
    told.pop("offsets")
    null = null_condition(pipe).expand(3)
    if family != "flux":
        told["negative_prompt_embeds"] = null.states
    if null.pooled is not None and family != "flux":
        told["negative_pooled_prompt_embeds"] = null.pooled
    if null.mask is not None:
        told |= {"negative_prompt_attention_mask": null.mask.long(), "negative_prompt": None}
    theirs = stock_images(pipe, family, **told)
    assert differ(images, theirs) <= 1


def test_it_is_known_without_weights_and_counted(pipe, family, tmp_path):
    model = saved(family, tmp_path)
    assert all(p.is_meta for p in model.denoiser.parameters())
    assert list(model.pool("qkvo")) == list(candidate_pool(denoiser_of(pipe), "qkvo"))
    assert len(model.content_hash) == 64
    assert forward_gflop(model) > 0
    states, cut = text_states(str(tmp_path), [*PROMPTS, "an image " * 300])
    expected = encode_conditions(pipe, PROMPTS)
    mask = 1 if expected.mask is None else expected.mask.unsqueeze(-1)
    torch.testing.assert_close(states[:3], expected.states * mask)
    assert cut == [False, False, False, True]
    loaded = load_pipeline(model.config)
    assert type(loaded).__name__ in FAMILIES and resolution_of(loaded) == 2 * SIDE
    assert not any(p.requires_grad for p in denoiser_of(loaded).parameters())


def test_synflow_scores_it(pipe):
    denoiser = denoiser_of(pipe)
    pool = candidate_pool(denoiser)
    scores = synflow_scores(denoiser, pool, n=3, rounds=2)
    assert scores.isfinite().all() and (scores > 0).any()


def saved(name: str, folder: Path) -> PublicModel:
    return PublicModel.open(ModelConfig(path=str(save_family(name, folder)), resolution=2 * SIDE))


@pytest.mark.parametrize(
    ("name", "ask", "words"),
    [
        ("sd3", lambda model: model.pool("cross_q"), r"saliency\.pool = 'cross_q': must be qkv or"),
        ("flux", lambda model: model.pool("cross_q"), r"SD3Tr|FluxTransformer2DModel has no cross"),
        ("sana", lambda model: model.pool("all"), r"'all': must be another pool.*conv_depth"),
        (
            "pixart",
            lambda model: check_adapter(model.denoiser, ["x"], adapter="full"),
            "scale_shift_table.*leave it frozen",
        ),
        (
            "flux",
            lambda model: model.check_classes(["an image " * 300]),
            r"data\.prompt_template = 'an image .*at most 512 tokens.*this one has 601",
        ),
        (
            "sana",
            lambda model: model.check_classes(["an image " * 300]),
            "at most 300 tokens",
        ),
        (
            "sd3",
            lambda model: replace(model, config=labelled(model.config)).check_classes(["a"]),
            r"model\.class_labels = \[1\]: must be left out",
        ),
        (
            "flux",
            lambda model: model.check_resolution(2 * SIDE + 2, "model.resolution"),
            r"model\.resolution = 10: must be a multiple of 4",
        ),
    ],
)
def test_what_a_family_cannot_is_refused_from_configs_alone_in_one_line(name, ask, words, tmp_path):
    model = saved(name, tmp_path)
    with pytest.raises(ConfigError, match=words) as caught:
        ask(model)
    assert "\n" not in str(caught.value)


def labelled(config: ModelConfig) -> ModelConfig:
    return replace(config, class_labels=(1,))


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("pixart", {"use_additional_conditions": True}, "as PixArt-Alpha"),
        ("pixart", {"use_additional_conditions": None, "sample_size": 128}, "as PixArt-Alpha"),
        ("sana", {"guidance_embeds": True}, "as Sana-Sprint"),
    ],
)
def test_relatives_that_are_told_more_are_refused(name, change, words, tmp_path):
    file = save_family(name, tmp_path) / "transformer" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(DataError, match=words):
        PublicModel.open(ModelConfig(path=str(tmp_path)))


def test_sd3_without_its_largest_text_encoder(tmp_path):
    pipe = tiny_family("sd3")
    pipe.register_modules(text_encoder_3=None, tokenizer_3=None)
    conditions = encode_conditions(pipe, PROMPTS)
    assert differ(sampled(pipe, conditions), stock_images(pipe, "sd3")) <= 1
    pipe.save_pretrained(tmp_path)
    model = PublicModel.open(ModelConfig(path=str(tmp_path)))
    assert len(model.content_hash) == 64
    with pytest.raises(ConfigError, match="this one has 602"):  # CLIP reads its 16 tokens
        model.check_classes(["an image " * 300])


def test_bfloat16(pipe, family):
    low = copy.deepcopy(pipe).to(torch.bfloat16)
    conditions = encode_conditions(low, PROMPTS)
    images = sampled(low, conditions)
    assert np.abs(images.astype(int) - sampled(pipe, encode_conditions(pipe, PROMPTS))).mean() < 20
    told = conditions.to("cpu", torch.bfloat16)
    assert losses(low, told, [0, 1, 2]).isfinite().all()


@pytest.mark.parametrize("of_clean", [False, True])
def test_flow_matchings_loss_is_that_of_the_training_scripts(of_clean):
    """Target n - x, or x itself through the preconditioning of train_dreambooth_lora_sd3.py."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    process = Flow(scheduler, FlowMatching(of_clean=of_clean))
    generator = torch.Generator().manual_seed(0)
    clean, noise, said = torch.randn(3, 5, 4, 4, 4, generator=generator)
    times = torch.tensor([0, 10, 500, 990, 999])
    index = 999 - times
    sigmas = scheduler.sigmas[index].view(-1, 1, 1, 1)
    noisy = (1.0 - sigmas) * clean + sigmas * noise
    torch.testing.assert_close(process.noisy(clean, noise, times), noisy)
    torch.testing.assert_close(process.told(times), scheduler.timesteps[index])
    target = noise - clean
    predicted = said
    if of_clean:
        target = clean
        predicted = said * (-sigmas) + noisy
    theirs = (predicted - target).square().mean((1, 2, 3))
    ours = (said - process.target(clean, noise, times)).square().mean((1, 2, 3))
    weights = process.weights(times)
    torch.testing.assert_close(ours if weights is None else ours * weights, theirs)


def test_times_of_sd3_are_logit_normal_in_the_part_asked_for():
    generator = torch.Generator().manual_seed(0)
    times = DENSITIES["logit_normal"](20_000, generator, (0.0, 1.0), 1000)
    u = torch.sigmoid(torch.randn(20_000, generator=generator))
    shares = torch.linspace(0.05, 0.95, 10)
    ours, theirs = torch.quantile(times / 1000, shares), torch.quantile(u, shares)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0.01)
    part = DENSITIES["logit_normal"](2000, generator, (0.2, 0.8), 1000)
    assert 200 <= part.min() < 215 and 785 < part.max() < 800
    inside = times[(times >= 200) & (times < 800)]
    assert abs(part.double().std() - inside.double().std()) < 6


def test_a_published_sana_scheduler_samples_as_its_pipeline(tmp_path):
    from diffusers import DPMSolverMultistepScheduler

    pipe = tiny_family("sana")
    pipe.scheduler = DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    conditions = encode_conditions(pipe, PROMPTS)
    assert differ(sampled(pipe, conditions), stock_images(pipe, "sana")) <= 1
    assert forward_process(pipe).scheduler.config.shift == 1.0  # as its training script has it
    parents = sampled(pipe, conditions)
    varied = vary_images(
        pipe,
        parents,
        conditions=conditions,
        null=null_condition(pipe),
        seeds=np.array(SEEDS),
        strength=0.5,
        steps=4,
        guidance_scale=1.0,
    )
    assert varied.shape == parents.shape


def test_latents_with_a_mean_and_a_deviation_for_each_channel():
    """Some SDXL autoencoders have them; the stock pipeline undoes them before it decodes."""
    pipe = tiny_family("sdxl")
    spread = {"latents_mean": [0.1, 0.2, -0.3, 0.4], "latents_std": [1.0, 2.0, 0.5, 3.0]}
    pipe.vae.register_to_config(**spread)
    conditions = encode_conditions(pipe, PROMPTS)
    assert differ(sampled(pipe, conditions), stock_images(pipe, "sdxl")) <= 1
    scale = LatentScale.of(pipe.vae)
    raw = torch.randn(2, 4, 3, 3)
    torch.testing.assert_close(scale.unscale(scale.scale(raw)), raw)


def test_sizes_of_sdxl_are_those_asked_for_and_no_records(tmp_path: Path):
    pipe = tiny_family("sdxl")
    conditions = encode_conditions(pipe, PROMPTS)
    assert conditions.ids.tolist() == [[8, 8, 0, 0, 8, 8]] * 3
    larger = sample_images(
        pipe,
        conditions,
        null=null_condition(pipe),
        seeds=SEEDS,
        steps=3,
        guidance_scale=3.0,
        resolution=16,
    )
    theirs = stock_images(pipe, "sdxl", prompt=list(PROMPTS), height=16, width=16)
    assert differ(larger, theirs) <= 1
    conditions.save(tmp_path / "c.safetensors")
    again = Conditions.load(tmp_path / "c.safetensors")
    assert again.kind == "sdxl"
    assert all(torch.equal(again.parts()[name], part) for name, part in conditions.parts().items())


def test_ddpm_families_keep_their_target():
    process = forward_process(tiny_family("pixart"))
    assert isinstance(process.scheduler, DDPMScheduler) and process.density == "uniform"
