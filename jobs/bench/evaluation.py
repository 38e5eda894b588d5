"""Memory of evaluation by the number of images, and its speed beside a plain torch-fidelity call.

    python -m jobs.bench.evaluation                        # the figures of docs/evaluation.md
    python -m jobs.bench.evaluation --counts 200,400 --side 64 --measured 16 --rounds 1

Memory: a process of its own for each number decodes a Parquet data set of that many images, keeps
their glyph features and trains a classifier for an epoch on 128 of them; its peak is the kernel's
(``VmHWM``), mapped pages included. Speed: Inception with random weights (the time is the same) on
images that lie decoded on disk, against torch-fidelity's own call on the same images in memory, in
turn in one process; and again with the decoding of the Parquet files, which all tasks of an
evaluation share.
"""

from __future__ import annotations

import dataclasses
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Any

import jsonargparse
import numpy as np
import torch
import torch_fidelity
from PIL import Image
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from sapf_ray.config import DataConfig, EvaluationConfig
from sapf_ray.data import open_source
from sapf_ray.evaluation.classifiers import CLASSIFIERS
from sapf_ray.evaluation.downstream import fit
from sapf_ray.evaluation.features import FEATURES, FeatureSpace
from sapf_ray.evaluation.fidelity import _Images, features_of
from sapf_ray.evaluation.inputs import Inputs
from sapf_ray.evaluation.pictures import InMemory, Pictures
from sapf_ray.evaluation.protocols import quick_recipe
from sapf_ray.privacy.verdict import PrivacyNote
from sapf_ray.synthesis.sampling_plan import SamplingPlan
from sapf_ray.synthesis.writer import copy_shard, write_manifest, write_shard

RANDOM_INCEPTION = "bench-inception"
TRAINED = 128  # images that the classifier learns from
DISTINCT = 100  # images of a data set, repeated


class RandomInception(FeatureExtractorInceptionV3):
    """The network without its file of weights."""

    def __init__(self, name: str, features_list: list[str], **options: Any) -> None:
        load = torch.hub.load_state_dict_from_url
        own = FeatureExtractorInceptionV3.load_state_dict
        module = sys.modules[FeatureExtractorInceptionV3.__module__]
        vars(module)["load_state_dict_from_url"] = lambda *a, **k: {}
        FeatureExtractorInceptionV3.load_state_dict = lambda *a, **k: None  # type: ignore
        try:
            super().__init__(name, features_list)
        finally:
            vars(module)["load_state_dict_from_url"] = load
            FeatureExtractorInceptionV3.load_state_dict = own  # type: ignore[method-assign]


def write_images(directory: Path, n: int, side: int) -> None:
    """A synthetic data set of smooth random images."""
    source = open_source(DataConfig())
    plan = SamplingPlan(n_images=n, n_classes=10, shard_size=500, seed=0)
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (DISTINCT, side // 8, side // 8, 3), dtype=np.uint8)
    images = np.stack([np.asarray(Image.fromarray(i).resize((side, side))) for i in coarse])
    first = plan.shards[0]
    write_shard(
        directory,
        plan,
        shard=first,
        images=images[np.arange(first.rows) % DISTINCT],
        class_names=source.class_names,
        prompts=source.prompts,
        spec="bench",
    )
    for shard in plan.shards[1:]:
        there = directory / shard.file
        copy_shard(directory / first.file, there, rows=shard.rows, spec="bench")
    write_manifest(
        directory,
        plan,
        class_names=source.class_names,
        prompts=source.prompts,
        spec="bench",
        privacy_note=PrivacyNote(text=""),
    )


def inputs_of(directory: Path, side: int, work: Path) -> Inputs:
    """What a metric gets."""
    config = EvaluationConfig(fid_features="glyph", epochs=1)
    return Inputs(
        synthetic_dir=str(directory),
        source=open_source(DataConfig()),
        resolution=side,
        config=config,
        seed=0,
        work=str(work),
    )


def evaluate_all(inputs: Inputs) -> dict[str, float]:
    """The child's work; seconds and peak memory."""
    started = time.perf_counter()
    images = inputs.synthetic
    decoded = time.perf_counter()
    peak_decoding = _peak_gb()
    features_of(images, ["96"], space=FEATURES["glyph"], config=inputs.config)
    seen = time.perf_counter()
    peak_features = _peak_gb()
    some = dataclasses.replace(images, labels=images.labels[:TRAINED])  # the rest costs time only
    recipe = quick_recipe(inputs.config, CLASSIFIERS["cnn"])
    fit(recipe, some, n_classes=10, seed=0, device="cpu")
    return {
        "decode_seconds": round(decoded - started, 1),
        "features_seconds": round(seen - decoded, 1),
        "classifier_seconds": round(time.perf_counter() - seen, 1),
        "decode_peak_gb": peak_decoding,
        "features_peak_gb": peak_features,
        "peak_gb": _peak_gb(),
    }


def _peak_gb() -> float:
    """The most that this process has held so far."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    peak = re.search(r"VmHWM:\s+(\d+) kB", status)
    assert peak is not None, "Linux only"
    return round(int(peak[1]) / 2**20, 3)


def memory(n: int, side: int) -> dict[str, float]:
    """Peak of a process that evaluates n images."""
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data"
        data.mkdir()
        write_images(data, n, side)
        child = [sys.executable, "-m", "jobs.bench.evaluation", "--child", str(data)]
        done = subprocess.run(
            [*child, "--side", str(side)], check=True, capture_output=True, text=True
        )
        return json.loads(done.stdout.splitlines()[-1])


def speed(n: int, side: int, *, rounds: int, device: str) -> dict[str, float]:
    """Images a second, as ratios to torch-fidelity's call within a round; the median."""
    torch_fidelity.register_feature_extractor(RANDOM_INCEPTION, RandomInception)
    space = FeatureSpace(layer="2048", options=lambda c: {"feature_extractor": RANDOM_INCEPTION})
    ratios: dict[str, list[float]] = {"stored": [], "with_decoding": []}
    rates = []
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data"
        data.mkdir()
        write_images(data, n, side)
        for number in range(rounds + 1):
            inputs = inputs_of(data, side, Path(folder) / f"work-{number}")
            decoding = _seconds(attrgetter("synthetic"), inputs)
            stored = inputs.synthetic
            pixels = InMemory(pixels=stored.read(np.arange(n)), labels=stored.labels)
            plain = _seconds(partial(_plain, device=device), pixels)
            extract = partial(features_of, layers=["2048"], space=space, config=inputs.config)
            ours = _seconds(partial(extract, device=device), stored)
            if number:  # the first warms up
                rates.append(n / plain)
                ratios["stored"].append(plain / ours)
                ratios["with_decoding"].append(plain / (ours + decoding))
    medians = {name: round(statistics.median(found), 3) for name, found in ratios.items()}
    return {"torch_fidelity_images_per_s": round(statistics.median(rates), 2), **medians}


def _plain(pictures: Pictures, *, device: str) -> None:
    torch_fidelity.calculate_metrics(
        input1=_Images(pictures),
        isc=True,
        feature_extractor=RANDOM_INCEPTION,
        feature_layer_isc="2048",
        cuda=device.startswith("cuda"),
        cache=False,
        verbose=False,
        save_cpu_ram=not device.startswith("cuda"),
    )


def _seconds(work: Callable[[Any], Any], argument: Any) -> float:
    started = time.perf_counter()
    work(argument)
    return time.perf_counter() - started


def main(
    counts: str = "4000,8000,16000",
    *,
    side: int = 512,
    measured: int = 192,
    rounds: int = 3,
    device: str = "cpu",
    child: str = "",
) -> None:
    """Prints one JSON line a figure.

    Args:
        counts: Comma-separated numbers of images whose memory is measured; empty for none.
        side: Of the images, in pixels.
        measured: Number of images of the comparison with torch-fidelity; 0 for none.
        rounds: Rounds of it after the one that warms up.
        device: cpu or cuda, for the comparison.
        child: Used by the process itself.
    """
    if child:
        with tempfile.TemporaryDirectory() as work:
            print(json.dumps(evaluate_all(inputs_of(Path(child), side, Path(work)))))
        return
    for n in filter(None, counts.split(",")):
        print(json.dumps({"images": int(n), "side": side, **memory(int(n), side)}), flush=True)
    if measured:
        found = speed(measured, side, rounds=rounds, device=device)
        print(json.dumps({"images": measured, "side": side, "device": device, **found}))


if __name__ == "__main__":
    jsonargparse.auto_cli(main)
