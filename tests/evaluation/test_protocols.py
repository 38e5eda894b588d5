"""The benchmark's protocol: networks, training and what FID compares, on a few tiny images."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from sapf_ray.config import DataConfig, EvaluationConfig
from sapf_ray.data import open_source
from sapf_ray.errors import ConfigError
from sapf_ray.evaluation import benchmark_networks as networks
from sapf_ray.evaluation.downstream import accuracy_on_test, fit
from sapf_ray.evaluation.inputs import Inputs, resize
from sapf_ray.evaluation.learner import Average, Learner
from sapf_ray.evaluation.pictures import InMemory
from sapf_ray.evaluation.protocol import check_evaluation
from sapf_ray.evaluation.protocols import PROTOCOLS, Recipe, Task, benchmark_recipe, epochs_in_all
from tests.evaluation.test_downstream import bars
from tests.evaluation.test_protocol import write_digits

CONFIG = EvaluationConfig(protocol="dpimagebench", classifiers=["wrn"], fid_reference="train")
CIFAR = Task(data="cifar10", side=32)


def small_wrn(n_classes, side):
    return networks.wide_resnet(n_classes, depth=10, widening=1, dropout=0.3)


def pictures(n, seed):
    images, labels = bars(n, seed)
    return InMemory(pixels=images, labels=labels)


def count(model):
    return sum(weight.numel() for weight in model.parameters())


@pytest.mark.parametrize(
    ("name", "cifar", "others"),
    [("resnet", 2.6, 1.7), ("wrn", 36.5, 8.9), ("resnext", 40.6, 34.4)],
)
def test_networks_have_the_published_numbers_of_weights(name, cifar, others):
    """In millions. He et al. 2016, table 6: ResNet-110 1.7; Zagoruyko and Komodakis 2016: WRN-28-10
    36.5, WRN-40-4 8.9; Xie et al. 2017, table 7: ResNeXt-29, 8x64d 34.4. The two others as
    counted in the benchmark's own classes.
    """
    with torch.device("meta"):
        for data, millions in (("cifar10", cifar), ("celeba", others)):
            recipe = benchmark_recipe(CONFIG, name, Task(data=data, side=32))
            assert count(recipe.build(10, 32)) / 1e6 == pytest.approx(millions, rel=0.04)


@pytest.mark.parametrize("side", [16, 28, 33])
@pytest.mark.parametrize(
    "network",
    [
        networks.wide_resnet(4, depth=10, widening=1, dropout=0.3),
        networks.resnet(4, depth=8),
        networks.resnext(4, depth=11, groups=8, widening=4),
    ],
    ids=["wrn", "resnet", "resnext"],
)
def test_networks_take_any_size_and_learn(network, side):
    images = torch.rand(2, 3, side, side)
    logits = network.train()(images)
    logits.sum().backward()
    assert logits.shape == (2, 4) and all(w.grad is not None for w in network.parameters())


def test_recipes_are_the_benchmarks():
    cifar = benchmark_recipe(CONFIG, "wrn", CIFAR)
    assert (cifar.optimizer, cifar.learning_rate, cifar.weight_decay) == ("sgd", 0.1, 5e-4)
    assert (cifar.epochs, cifar.step_epochs, cifar.step_factor) == (200, 60, 0.2)
    other = benchmark_recipe(CONFIG, "wrn", Task(data="celeba", side=256))
    assert (other.optimizer, other.learning_rate, other.epochs) == ("adam", 0.01, 50)
    assert (other.batch_size, other.parts, other.average) == (256, 2, 0.9999)
    assert round(60_000 * other.held_out) == 5000 and not other.augmented
    assert epochs_in_all(CONFIG, CIFAR) == 200
    three = dataclasses.replace(CONFIG, classifiers=("resnet", "wrn", "resnext"))
    assert epochs_in_all(three, Task(data="octmnist", side=128)) == 150
    assert epochs_in_all(EvaluationConfig(), CIFAR) == 20


def test_step_sizes_fall_by_steps_and_gradients_of_parts_add_up():
    recipe = Recipe(
        build=small_wrn,
        epochs=5,
        batch_size=8,
        learning_rate=0.5,
        optimizer="sgd",
        step_epochs=2,
        parts=4,
    )
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 3))
    whole = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 3))
    whole.load_state_dict(model.state_dict())
    learner = Learner(recipe, model, n_images=16)
    inputs, labels = torch.randn(8, 3, 2, 2), torch.arange(8) % 3
    assert [len(part) for part in learner.batches(torch.arange(16))] == [2] * 8
    for part in torch.arange(8).split(2):
        learner.learn(inputs[part], labels[part])
    F.cross_entropy(whole(inputs), labels).backward()
    expected = [w - 0.5 * w.grad for w in whole.parameters()]
    assert all(map(torch.allclose, model.parameters(), expected))
    sizes = []
    for _ in range(5):
        sizes.append(learner.optimizer.param_groups[0]["lr"])
        learner.end_epoch()
    assert sizes == pytest.approx([0.5, 0.5, 0.1, 0.1, 0.02])


def test_the_average_forgets_at_once_and_keeps_statistics_of_the_network():
    model = torch.nn.BatchNorm1d(2)
    average = Average(model, 0.9999)
    with torch.no_grad():
        model.weight.fill_(11.0)
        model.running_mean.fill_(5.0)
    average.follow(model)
    assert torch.allclose(average.model.weight, torch.full((2,), 1 + 10 * 9 / 11))
    average.take_buffers(model)
    assert average.model.running_mean.tolist() == [5, 5]


@pytest.mark.parametrize("task", [CIFAR, Task(data="octmnist", side=16)])
def test_a_tiny_network_learns_by_each_recipe(task):
    recipe = dataclasses.replace(
        benchmark_recipe(CONFIG, "wrn", task), build=small_wrn, epochs=6, batch_size=16
    )
    assert accuracy_on_test(recipe, pictures(96, 0), pictures(60, 1), n_classes=3, seed=0) > 0.6


def test_of_equal_accuracies_the_later_epoch_counts(monkeypatch):
    """All held-out images are right from the first epoch on: the last average is what is tested."""
    recipe = Recipe(
        build=small_wrn, epochs=3, batch_size=16, learning_rate=0.01, average=0.5, optimizer="adam"
    )
    seen = []
    monkeypatch.setattr(
        "sapf_ray.evaluation.downstream._score",
        lambda model, *a, **k: (seen.append(model.state_dict()["0.weight"].clone()), (1.0, 0.0))[1],
    )
    model = fit(recipe, pictures(48, 0), n_classes=3, seed=0, device="cpu")
    assert torch.equal(model.state_dict()["0.weight"], seen[-1])
    assert not torch.equal(seen[0], seen[-1])


def test_fid_sees_as_many_real_images_as_there_are_synthetic_and_at_most_50_000(tmp_path):
    source = open_source(DataConfig())
    write_digits(tmp_path, source, source.class_names, 16)
    inputs = Inputs(synthetic_dir=str(tmp_path), source=source, resolution=8, config=CONFIG, seed=0)
    assert inputs.n_reference == len(inputs.reference) == 60
    assert len(np.unique(inputs.reference.labels)) > 5
    assert PROTOCOLS["dpimagebench"].most_of_fid == 50_000
    images, _ = source.read("train", np.arange(2), resolution=16)
    lanczos = resize(images, 8, "lanczos")
    assert not np.array_equal(lanczos, resize(images, 8)) and lanczos.shape == (2, 8, 8, 3)


def test_what_the_protocol_fixes_is_refused_before_anything_is_read():
    check_evaluation(CONFIG)
    for changed, message in (
        ({"classifiers": ("cnn",)}, r"classifiers = 'cnn': must be of resnet, wrn, resnext where"),
        ({"epochs": 3}, r"evaluation\.epochs = 3: is fixed where evaluation\.protocol is dpi"),
        ({"learning_rate": 0.1}, r"evaluation\.learning_rate = 0\.1: is fixed"),
    ):
        with pytest.raises(ConfigError, match=message):
            check_evaluation(dataclasses.replace(CONFIG, **changed))
    with pytest.raises(ConfigError, match=r"evaluation\.protocol = 'paper': must be one of"):
        EvaluationConfig(protocol="paper")
