"""Loading and the candidate pool: early, one-line errors."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch

from sapf_ray.errors import ClusterError, ConfigError, DataError
from sapf_ray.models.conditions import Conditions
from sapf_ray.models.denoising import draw, per_record_loss
from sapf_ray.models.device import pick_device
from sapf_ray.models.loading import load_pipeline, resolution_of
from sapf_ray.models.location import resolve_model
from sapf_ray.models.pool import candidate_pool
from sapf_ray.models.processes import forward_process
from sapf_ray.models.vae import LatentScale
from sapf_ray.privacy.keyed_rng import NoiseKey
from tests.tiny import save_tiny_pipeline


def test_missing_model_lists_the_bundled_ones():
    with pytest.raises(DataError, match="glyphs-tiny"):
        resolve_model("./no/such/model")
    assert resolve_model("owner/name") == "owner/name"  # a hub id is left to the hub


def test_folder_that_is_no_pipeline_and_truncated_weights(tiny_pipeline, tmp_path):
    with pytest.raises(DataError, match=r"model_index\.json"):
        resolve_model(str(tmp_path))
    broken = tmp_path / "broken"
    shutil.copytree(tiny_pipeline, broken)
    weights = broken / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(DataError, match=r"unet/diffusion_pytorch_model\.safetensors: truncated"):
        resolve_model(str(broken))


def test_pipeline_is_frozen_and_tells_its_resolution(tiny_pipeline):
    pipe = load_pipeline(str(tiny_pipeline))
    assert resolution_of(pipe) == 8
    assert not any(p.requires_grad for p in pipe.unet.parameters()) and not pipe.unet.training
    assert len(candidate_pool(pipe.unet)) == 24 and len(candidate_pool(pipe.unet, "qkvo")) == 32
    with pytest.raises(ConfigError, match="to_q"):
        candidate_pool(pipe.vae.decoder.conv_in)


def test_gpu_that_is_not_there():
    assert pick_device(0) == "cpu"
    if not torch.cuda.is_available():
        with pytest.raises(ClusterError, match="CUDA"):
            pick_device(1)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_record_loss_depends_on_the_record_alone(tmp_path, prediction):
    """No mixing across the batch: a record's loss is the same alone and among others, and the mean
    over its draws.
    """
    pipe = load_pipeline(str(save_tiny_pipeline(tmp_path, prediction)))
    process = forward_process(pipe)
    assert process.scheduler.config.prediction_type == prediction
    key, records = NoiseKey.create(0), np.array([3, 11, 7])
    moments, states = torch.randn(3, 8, 4, 4), torch.randn(3, 16, 16)

    def loss(rows: list[int], k: int = 2) -> torch.Tensor:
        draws = draw(key, "p", 0, records[rows], k=k, latent_shape=(4, 4, 4), process=process)
        with torch.no_grad():
            return per_record_loss(
                pipe.unet,
                process,
                moments=moments[rows],
                scale=LatentScale(factor=0.5),
                conditions=Conditions(states=states[rows]),
                draws=draws,
            )

    together = loss([0, 1, 2])
    for i in range(3):
        torch.testing.assert_close(loss([i])[0], together[i], rtol=1e-4, atol=1e-5)
    assert together.shape == (3,) and len(set(together.tolist())) == 3


def test_masked_tokens_change_neither_values_nor_per_sample_gradients():
    """77 tokens are filled up to 80 on CPU; the U-Net must not see it."""
    import torch

    from sapf_ray.grad_sample.capture import PoolCapture
    from sapf_ray.models.calls import text_arguments
    from sapf_ray.models.pool import candidate_pool
    from tests.tiny import tiny_unet

    unet = tiny_unet().requires_grad_(False).eval()
    generator = torch.Generator().manual_seed(0)
    x, states = (
        torch.randn(3, 4, 4, 4, generator=generator),
        torch.randn(3, 13, 16, generator=generator),
    )
    context = text_arguments(states)
    assert (
        context["encoder_hidden_states"].shape == (3, 16, 16)
        and int(context["encoder_attention_mask"].sum()) == 39
    )
    assert "encoder_attention_mask" not in text_arguments(torch.zeros(3, 32, 16))
    outputs, norms = [], []
    for conditions in ({"encoder_hidden_states": states}, context):
        with PoolCapture(candidate_pool(unet)) as capture:
            output = unet(x, 7, **conditions).sample
            output.square().sum().backward()
        outputs.append(output.detach())
        norms.append(capture.norms())
    torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(*norms, rtol=1e-4, atol=1e-7)
