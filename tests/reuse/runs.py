"""Finished runs without running them: what a run leaves, with a made-up adapter and ledger."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
import yaml
from diffusers import StableDiffusionPipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

from sapf_ray import cluster, placement
from sapf_ray.config import RunConfig, from_dict, nest, to_dict
from sapf_ray.models.loading import load_pipeline
from sapf_ray.models.public_model import PublicModel
from sapf_ray.privacy.card import privacy_card
from sapf_ray.privacy.card_gather import gather
from sapf_ray.privacy.ledger import Ledger
from sapf_ray.privacy.planner import make_plan
from sapf_ray.privacy.verdict import PrivacyNote
from sapf_ray.runs import context
from sapf_ray.runs.directory import RunDirectory
from sapf_ray.synthesis import launcher

CLASSES = ("bright_cell", "dark_cell")
PROMPTS = tuple(f"An image of {name}" for name in ("bright cell", "dark cell"))
N = 100


def config_of(model: Path, **changes: Any) -> RunConfig:
    """Its images lie nowhere."""
    return from_dict(
        nest(
            {
                "data.source": "image_folder",
                "data.path": "/nowhere/photos",
                "model.path": str(model),
                "privacy.epsilon": 8.0,
                "privacy.accountant": "rdp",
                "finetune.batch_size": 16,
                "finetune.steps": 4,
                "synthesis.n_images": 20,
                "synthesis.steps": 2,
                "synthesis.batch_size": 5,
                "synthesis.shard_size": 10,
                "evaluation.enabled": False,
                "evaluation.epochs": 1,
                "tracking.enabled": False,
                **{key.replace("__", "."): value for key, value in changes.items()},
            }
        )
    )


def save_adapter(model: Path, directory: Path) -> None:
    """A LoRA of the tiny pipeline, large enough to change pixels."""
    pipe = load_pipeline(str(model))
    pipe.unet.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_v"]))
    torch.manual_seed(0)
    for name, parameter in pipe.unet.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=3.0)
    StableDiffusionPipeline.save_lora_weights(
        directory, unet_lora_layers=get_peft_model_state_dict(pipe.unet)
    )


def finished_run(root: Path, config: RunConfig) -> RunDirectory:
    """Writes the run directory and its synthetic images."""
    directory = RunDirectory(root)
    root.mkdir(parents=True)
    plan = make_plan(config, N)
    directory.run_id()
    directory.config.write_text(yaml.safe_dump(to_dict(config)))
    ledger = Ledger.create(directory.ledger, plan)
    if plan.selection is not None:
        ledger.record("selection", plan.selection.event(), "a-b", "selection")
    for step in range(plan.steps if plan.finetune else 0):
        ledger.record(f"finetune/step/{step}", plan.finetune.event(), "a-b", "finetune")
    if plan.finetune is not None:
        save_adapter(Path(config.model.path), directory.adapter)
    model = PublicModel.open(config.model)
    public = {
        "data": "photos",
        "class_names": CLASSES,
        "prompts": PROMPTS,
        "model": model.content_hash,
    }
    directory.public.write_text(json.dumps(public))
    make_images(directory.synthetic, directory, config)
    card = privacy_card(gather(plan, ledger, config, model_name="tiny", data_name="photos"))
    directory.card.write_text(card)
    return directory


def make_images(out: Path, directory: RunDirectory, config: RunConfig) -> list[tuple[int, int]]:
    """The synthesis of a run with this config; returns its progress."""
    progress: list[tuple[int, int]] = []
    launcher.synthesize(
        out,
        PublicModel.open(config.model),
        adapter_dir=directory.adapter if directory.adapter.exists() else None,
        class_names=CLASSES,
        prompts=PROMPTS,
        config=config.synthesis,
        seed=config.image_seed,
        privacy_note=PrivacyNote(text=""),
        on_progress=lambda *step: progress.append(step),
    )
    return progress


def without_ray(patched: pytest.MonkeyPatch) -> None:
    """All in this process: Ray and its actors take seconds to start and have their own tests."""
    patched.setattr(cluster, "session", lambda config, spills=None: contextlib.nullcontext())
    patched.setattr(placement, "cluster_gpus", lambda: placement.Gpus(count=0))
    patched.setattr(cluster, "require", lambda wants: None)
    patched.setattr("sapf_ray.reuse.commands.check_shared", lambda directory: None)
    patched.setattr(launcher, "_actor_count", lambda config: 1)
    patched.setattr(launcher, "_run_queue", in_this_process)
    patched.setattr(context, "Meter", Mock())


def in_this_process(
    job: launcher.SamplingJob, shards: list[Any], *, count: int, on_wait: Callable[[], None]
) -> Iterator[tuple[int, float]]:
    """In place of the actors, whose processes take seconds to start."""
    actor = launcher.SamplingActor(job)
    for shard in shards:
        yield actor.make_shard(shard).value


def digests(directory: Path) -> dict[str, str]:
    """Of the shards and the manifest."""
    files = [*directory.glob("*.parquet"), directory / "manifest.json"]
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(files)}


def snapshot(root: Path) -> dict[str, tuple[str, int]]:
    """Content and time of every file of a folder."""
    return {
        p.relative_to(root).as_posix(): (
            hashlib.sha256(p.read_bytes()).hexdigest(),
            p.stat().st_mtime_ns,
        )
        for p in sorted(root.rglob("*"))
        if p.is_file()
    }
