"""Adapters: what is trained, what is made random, and that a saved directory gives back the very
same model.
"""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from sapf_ray.config import FinetuneConfig
from sapf_ray.errors import DataError
from sapf_ray.finetune.adapter import (
    WEIGHTS,
    WHOLE_WEIGHTS,
    add_adapter,
    load_adapter,
    save_weights,
    untrained,
)
from sapf_ray.models.loading import load_pipeline
from sapf_ray.models.pool import candidate_pool
from tests.networks import tiny_dit
from tests.tiny import tiny_unet

CONFIG = FinetuneConfig(lora_rank=2)


def predicted(denoiser) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    x, states = (
        torch.randn(2, 4, 4, 4, generator=generator),
        torch.randn(2, 7, 16, generator=generator),
    )
    with torch.no_grad():
        return denoiser(x, torch.tensor([10, 700]), encoder_hidden_states=states).sample


@pytest.mark.parametrize("adapter", ["lora", "direct"])
@pytest.mark.parametrize("randomize,pool", [("none", "all"), ("qkv", "qkv"), ("all", "all")])
def test_saved_directory_gives_back_the_same_model(
    tiny_pipeline, tmp_path, adapter, randomize, pool
):
    config = dataclasses.replace(CONFIG, adapter=adapter, randomize=randomize)
    trained = load_pipeline(str(tiny_pipeline)).unet
    public = predicted(trained)
    matrices = list(candidate_pool(trained, pool))[1::4]
    parameters = add_adapter(trained, matrices, config=config, seed=3)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in parameters.values():
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
    expected = predicted(trained)
    save_weights(
        trained,
        tmp_path / "adapter",
        values={name: p.detach().clone() for name, p in parameters.items()},
        config=config,
    )
    assert (tmp_path / "adapter" / WEIGHTS).exists() == (adapter == "lora")
    assert (tmp_path / "adapter" / WHOLE_WEIGHTS).exists() == (
        adapter == "direct" or randomize != "none"
    )
    pipe = load_pipeline(str(tiny_pipeline))
    load_adapter(pipe, tmp_path / "adapter")
    if (
        adapter == "lora" and randomize == "none"
    ):  # diffusers' own loader agrees, on convolutions too
        stock = load_pipeline(str(tiny_pipeline))
        stock.load_lora_weights(tmp_path / "adapter")
        torch.testing.assert_close(predicted(stock.unet), expected, rtol=1e-4, atol=1e-5)
    assert (expected - public).abs().max() > 0.01
    torch.testing.assert_close(predicted(pipe.unet), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("adapter", ["lora", "direct"])
def test_unselected_matrices_alone_become_random_with_their_own_scale(adapter):
    config = dataclasses.replace(CONFIG, adapter=adapter, randomize="qkv")
    public, first, again, other = (tiny_unet() for _ in range(4))
    names = list(candidate_pool(public))
    for unet, seed in ((first, 1), (again, 1), (other, 2)):
        add_adapter(unet, names[::3], config=config, seed=seed)
    random = untrained(first, "qkv")
    assert list(random) == [name for name in names if name not in names[::3]]
    for name, entry in random.items():
        before, weight = public.get_submodule(name).weight, entry.weight
        assert torch.equal(weight, again.get_submodule(name).weight) and not torch.equal(
            weight, other.get_submodule(name).weight
        )
        assert abs(torch.corrcoef(torch.stack([before.flatten(), weight.flatten()]))[0, 1]) < 0.5
        assert weight.detach().std().item() == pytest.approx(before.detach().std().item(), rel=0.25)
    rest = {
        n: p
        for n, p in first.named_parameters()
        if n.removesuffix(".weight") not in random and "lora_" not in n
    }
    originals = dict(public.named_parameters())
    assert all(torch.equal(p, originals[n.replace(".base_layer", "")]) for n, p in rest.items())


def test_random_weights_are_in_the_directory_not_in_the_seed(tiny_pipeline, tmp_path):
    """A twin that redraws them on loading would break with another version of torch; one that
    forgets them is caught.
    """
    config = dataclasses.replace(CONFIG, randomize="qkv")
    unet = load_pipeline(str(tiny_pipeline)).unet
    names = list(candidate_pool(unet))
    add_adapter(unet, names[:2], config=config, seed=3)
    save_weights(unet, tmp_path / "adapter", values={}, config=config)
    saved = load_file(tmp_path / "adapter" / WHOLE_WEIGHTS)
    assert set(saved) == {f"{name}.weight" for name in names[2:]}
    (tmp_path / "adapter" / WHOLE_WEIGHTS).unlink()
    pipe = load_pipeline(str(tiny_pipeline))
    load_adapter(pipe, tmp_path / "adapter")
    assert not torch.allclose(predicted(pipe.unet), predicted(unet), atol=1e-3)


@pytest.mark.parametrize("adapter", ["lora", "direct"])
def test_transformers_are_saved_and_loaded_alike(tmp_path, adapter):
    config = dataclasses.replace(CONFIG, adapter=adapter, randomize="qkv")
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(2, 4, 4, 4, generator=generator)
    inputs = {"timestep": torch.tensor([3, 700]), "class_labels": torch.tensor([0, 2])}
    trained, loaded = tiny_dit().eval(), tiny_dit().eval()
    parameters = add_adapter(
        trained, list(candidate_pool(trained, "all"))[1::3], config=config, seed=3
    )
    with torch.no_grad():
        for p in parameters.values():
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
    save_weights(
        trained,
        tmp_path / "adapter",
        values={name: p.detach().clone() for name, p in parameters.items()},
        config=config,
    )
    load_adapter(SimpleNamespace(transformer=loaded), tmp_path / "adapter")
    expected, public = trained(x, **inputs).sample, tiny_dit().eval()(x, **inputs).sample
    assert (expected - public).abs().max() > 0.01
    torch.testing.assert_close(loaded(x, **inputs).sample, expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(DataError, match="cannot be loaded as an adapter of this model"):
        load_adapter(SimpleNamespace(unet=tiny_unet()), tmp_path / "adapter")


def test_names_select_exactly_not_by_their_end():
    unet = tiny_unet()
    trainable = add_adapter(unet, ["conv_in"], config=CONFIG, seed=0)
    assert set(trainable) == {"conv_in.lora_A.default.weight", "conv_in.lora_B.default.weight"}
