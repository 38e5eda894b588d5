"""Training of the bundled public models: one optimizer loop, one loss per kind of network."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDPMScheduler
from diffusers.optimization import get_cosine_schedule_with_warmup
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from sapf_ray.glyphs import CHARACTERS
from sapf_ray.models.glyph_features import GlyphFeatures

log = logging.getLogger("pretrain_public")

# of prompts or labels, replaced by the empty one, which is what guidance subtracts
UNCONDITIONAL_SHARE = 0.1
NO_LABEL = len(CHARACTERS)


@dataclass(kw_only=True)
class Trace:
    """The randomness of a run and what its model cards report of each stage.

    Attributes:
        generator: The run's own generator.
        losses: Stage to the mean loss of its last steps.
        seconds: Stage to its seconds.
        rates: Stage to images per second.
    """

    generator: torch.Generator
    losses: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    rates: dict[str, float] = field(default_factory=dict)

    def facts(self, *stages: str) -> dict[str, object]:
        """Lines of a model card."""
        facts: dict[str, object] = {}
        for stage in stages:
            loss = f"{self.losses[stage]:.4f}"
            seconds = f"{self.seconds[stage]:.0f}"
            rate = f"{self.rates[stage]:.0f}"
            facts[f"{stage}: last loss, seconds, images/s"] = f"{loss}, {seconds}, {rate}"
        return facts


def draw_labels(
    n: int,
    generator: torch.Generator,
    *,
    digit_share: float,
) -> Tensor:
    """``n`` labels, a share ``digit_share`` of them digits (the first ten of ``CHARACTERS``)."""
    digits = torch.randint(10, (n,), generator=generator)
    letters = torch.randint(10, len(CHARACTERS), (n,), generator=generator)
    return torch.where(torch.rand(n, generator=generator) < digit_share, digits, letters)


def to_rgb(gray: Tensor) -> Tensor:
    """uint8 (n, 1, h, w) -> float (n, 3, h, w) in [0, 1]."""
    return (gray.float() / 255).expand(-1, 3, -1, -1)


def fit(
    name: str,
    parameters: list[nn.Parameter],
    *,
    loss_of_batch: Callable[[], Tensor],
    trace: Trace,
    lr: float,
    steps: int,
    batch: int,
    after_step: Callable[[], None] = lambda: None,
) -> None:
    """AdamW with clipped gradients, a linear warm-up and a cosine to zero.

    Args:
        name: Name of the stage, in log and ``trace``.
        parameters: What is trained.
        loss_of_batch: Loss of a fresh batch.
        trace: Where the stage is noted.
        lr: Largest learning rate.
        steps: Number of steps.
        batch: Number of images a step.
        after_step: Called after each step.
    """
    optimizer = torch.optim.AdamW(
        parameters,
        lr=lr,
        betas=(0.9, 0.99),
        weight_decay=0.01,
    )
    schedule = get_cosine_schedule_with_warmup(optimizer, min(200, steps // 10), steps)
    losses: list[float] = []
    start = time.perf_counter()
    for step in range(1, steps + 1):
        loss = loss_of_batch()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        after_step()
        losses.append(loss.item())
        if step % 100 == 0 or step == steps:
            recent = losses[-100:]
            mean = sum(recent) / len(recent)
            rate = step * batch / (time.perf_counter() - start)
            trace.losses[name] = mean
            trace.rates[name] = rate
            progress = f"{name} step {step}/{steps}"
            log.info("%s loss %.4f, %.0f images/s", progress, mean, rate)
    trace.seconds[name] = time.perf_counter() - start


def train_features(
    net: GlyphFeatures,
    images: Tensor,
    *,
    labels: Tensor,
    steps: int,
    trace: Trace,
    batch: int = 128,
) -> None:
    """Trains the classifier.

    Args:
        net: Trained in place.
        images: uint8 (n, 1, 32, 32).
        labels: int64 (n,).
        steps: Number of steps.
        trace: Where the stage is noted.
        batch: Number of images a step.
    """

    def loss_of_batch() -> Tensor:
        rows = torch.randint(len(images), (batch,), generator=trace.generator)
        logits = net(to_rgb(images[rows]))
        return F.cross_entropy(logits, labels[rows])

    fit(
        "features",
        list(net.parameters()),
        loss_of_batch=loss_of_batch,
        trace=trace,
        lr=3e-3,
        steps=steps,
        batch=batch,
    )


def train_vae(
    vae: AutoencoderKL,
    images: Tensor,
    *,
    steps: int,
    trace: Trace,
    batch: int = 64,
) -> None:
    """Trains the VAE.

    Args:
        vae: Trained in place.
        images: uint8 (n, 1, 32, 32).
        steps: Number of steps.
        trace: Where the stage is noted.
        batch: Number of images a step.
    """

    def loss_of_batch() -> Tensor:
        rows = torch.randint(len(images), (batch,), generator=trace.generator)
        x = 2 * to_rgb(images[rows]) - 1
        mean, log_var = encode(vae, x)
        z = _sample(mean, log_var, generator=trace.generator)
        with torch.autocast("cpu", torch.bfloat16):
            decoded = vae.decode(z).sample
        error = (decoded.float() - x).abs().mean()
        kl = 0.5 * (mean.square() + log_var.exp() - 1 - log_var).mean()
        # 1e-3 balances the two as a Laplace likelihood of scale about 0.01 would.
        return error + 1e-3 * kl

    fit(
        "vae",
        list(vae.parameters()),
        loss_of_batch=loss_of_batch,
        trace=trace,
        lr=1.5e-3,
        steps=steps,
        batch=batch,
    )


def encode(vae: AutoencoderKL, x: Tensor) -> tuple[Tensor, Tensor]:
    """Images (n, 3, 32, 32) in [-1, 1] -> posterior mean and log variance, (n, 4, 8, 8) each."""
    # bfloat16 is 1.4 times faster here; it is slower for the U-Net's smaller layers.
    with torch.autocast("cpu", torch.bfloat16):
        parameters = vae.encode(x).latent_dist.parameters
    mean, log_var = parameters.float().chunk(2, dim=1)
    return mean, log_var.clamp(-30, 20)


def _sample(
    mean: Tensor,
    log_var: Tensor,
    *,
    generator: torch.Generator,
) -> Tensor:
    """A latent of the posterior."""
    noise = torch.randn(mean.shape, generator=generator)
    return mean + (0.5 * log_var).exp() * noise


@torch.no_grad()
def encode_corpus(
    vae: AutoencoderKL,
    images: Tensor,
    *,
    trace: Trace,
    set_scale: bool = True,
) -> Tensor:
    """Latents float32 (n, 4, 8, 8) times the VAE's scaling factor.

    Args:
        vae: The encoder.
        images: uint8 (n, 1, 32, 32).
        trace: Where the stage is noted.
        set_scale: First set the factor so that the latents have std 1.
    """
    start = time.perf_counter()
    parts = []
    for part in images.split(512):
        mean, log_var = encode(vae, 2 * to_rgb(part) - 1)
        parts.append(_sample(mean, log_var, generator=trace.generator))
    latents = torch.cat(parts)
    if set_scale:
        factor = round(float(1 / latents.std()), 5)
        vae.register_to_config(scaling_factor=factor)
    factor = vae.config.scaling_factor
    seconds = time.perf_counter() - start
    trace.seconds["latents"] = seconds
    log.info("%d latents, factor %.4f, %.0f s", len(latents), factor, seconds)
    return latents.mul_(factor)


def train_denoiser(
    name: str,
    trained: nn.Module,
    *,
    predict: Callable[[Tensor, Tensor, Tensor], Tensor],
    scheduler: DDPMScheduler,
    latents: Tensor,
    labels: Tensor,
    steps: int,
    trace: Trace,
    batch: int = 96,
) -> None:
    """Trains ``trained`` to predict noise; leaves its moving average in it.

    Args:
        name: Name of the stage, in log and ``trace``.
        trained: What is trained.
        predict: (noisy latents, timesteps, labels with ``NO_LABEL`` for none) -> predicted noise.
        scheduler: Adds the noise.
        latents: float32 (n, 4, 8, 8), scaled.
        labels: int64 (n,).
        steps: Number of steps.
        trace: Where the stage is noted.
        batch: Number of images a step.
    """
    generator = trace.generator
    trained.eval()  # no dropout: labels are dropped here, by the run's own generator
    average = AveragedModel(trained, multi_avg_fn=get_ema_multi_avg_fn(0.998))
    last = scheduler.config.num_train_timesteps

    def loss_of_batch() -> Tensor:
        rows = torch.randint(len(latents), (batch,), generator=generator)
        clean = latents[rows]
        label = labels[rows].clone()
        dropped = torch.rand(batch, generator=generator) < UNCONDITIONAL_SHARE
        label[dropped] = NO_LABEL
        # Stratified time steps: the same expectation as independent ones, with less variance.
        place = torch.arange(batch) + torch.rand(batch, generator=generator)
        t = (place * (last / batch)).long().clamp_max(last - 1)
        noise = torch.randn(clean.shape, generator=generator)
        noisy = scheduler.add_noise(clean, noise, t)
        return F.mse_loss(predict(noisy, t, label), noise)

    fit(
        name,
        list(trained.parameters()),
        loss_of_batch=loss_of_batch,
        trace=trace,
        lr=1e-3,
        steps=steps,
        batch=batch,
        after_step=lambda: average.update_parameters(trained),
    )
    trained.load_state_dict(average.module.state_dict())
