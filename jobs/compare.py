"""Rows of settings x seeds through the main job, as one table of means and standard deviations.

    python -m jobs.compare --out runs/compare                            # real digits, 3 seeds
    python -m jobs.compare --out runs/public --source stand_in --seeds 0 --sweep learning_rate

The second form is how the digits preset was tuned: on public stand-in data, so the choice cost no privacy.
Finished runs are kept, so the same command continues.
"""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import jsonargparse
import numpy as np
from rich.console import Console

from sapf_ray import cluster
from sapf_ray.cli import load_preset
from sapf_ray.config import from_dict
from sapf_ray.data.base import open_source
from sapf_ray.evaluation.protocol import evaluate_arrays
from sapf_ray.models.loading import load_pipeline, native_resolution
from sapf_ray.pipeline import Progress, run
from sapf_ray.report.terminal import progress_bars
from sapf_ray.rundir import write_atomic

Overrides = dict[str, Any]

ROWS: dict[str, Overrides] = {
    "public model, not fine-tuned": {"finetune.steps": 0},
    "DP-SAPF, ε = 1": {"privacy.epsilon": 1.0},
    "DP-SAPF, ε = 10": {"privacy.epsilon": 10.0},
    "DP-LoRA (all matrices), ε = 1": {"privacy.epsilon": 1.0, "saliency.ratio": 1.0},
    "DP-LoRA (all matrices), ε = 10": {"privacy.epsilon": 10.0, "saliency.ratio": 1.0},
    "DP-SAPF without noise (ceiling)": {"privacy.non_private": True},
}

# what was tried on the public stand-in set, one axis at a time around the preset
SWEEPS: dict[str, dict[str, Overrides]] = {
    "learning_rate": {
        f"ε = {e:g}, lr = {lr:g}": {"privacy.epsilon": e, "finetune.learning_rate": lr}
        for e in (1.0, 10.0) for lr in (1e-3, 3e-3, 1e-2, 3e-2)
    },
    "batch": {
        f"ε = {e:g}, B = {b} x {s} steps": {"privacy.epsilon": e, "finetune.batch_size": b, "finetune.steps": s}
        for e in (1.0, 10.0) for b, s in ((256, 150), (512, 75), (1024, 40))
    },
    "averaging": {
        f"ε = {e:g}, EMA {d:g}": {"privacy.epsilon": e, "finetune.ema_decay": d} for e in (1.0, 10.0) for d in (0.0, 0.9, 0.95)
    },
    "lora_a": {
        f"ε = {e:g}, train A {a}": {"privacy.epsilon": e, "finetune.train_lora_a": a} for e in (1.0, 10.0) for a in (True, False)
    },
    "guidance": {
        f"ε = {e:g}, guidance {g:g}": {"privacy.epsilon": e, "synthesis.guidance_scale": g} for e in (1.0, 10.0) for g in (1.0, 2.0, 4.0)
    },
}


def with_overrides(base: dict[str, Any], overrides: Overrides) -> dict[str, Any]:
    """``base`` with dotted keys set."""
    nested = deepcopy(base)
    for key, value in overrides.items():
        section, _, name = key.rpartition(".")
        (nested.setdefault(section, {}) if section else nested)[name] = value
    return nested


def real_data_scores(source_name: str, seed: int) -> dict[str, float]:
    """Accuracy of the classifier trained on the real training images."""
    config = from_dict(with_overrides(load_preset("digits"), {"data.source": source_name}))
    source = open_source(config.data)
    resolution = native_resolution(load_pipeline(config.model.path))
    train = source.read("train", np.arange(source.n_train), resolution)
    test = source.read("test", np.arange(source.n_test), resolution)
    return evaluate_arrays(*train, *test, len(source.class_names), config.evaluation, seed)


def main(
    out: str = "runs/compare", source: str = "digits", preset: str = "digits", seeds: tuple[int, ...] = (0, 1, 2),
    sweep: str | None = None, rows: tuple[str, ...] | None = None, override: Overrides | None = None,
) -> None:
    """Runs every row with every seed and prints the table.

    Args:
        out: Directory of the runs, ``results.json`` and ``results.md``.
        source: ``digits``, or ``stand_in`` for tuning on public data.
        preset: Preset that all rows start from.
        seeds: One run each; also seeds the privacy noise, so the table can be repeated (not for release).
        sweep: Run one of SWEEPS instead of ROWS.
        rows: Run only these rows.
        override: Dotted keys set in every row.
    """
    base = with_overrides(load_preset(preset), {"data.source": source, "tracking.experiment": Path(out).name, **(override or {})})
    table = SWEEPS[sweep] if sweep else ROWS
    console = Console()
    results: dict[str, list[dict[str, Any]]] = {}
    with cluster.session(from_dict(base).cluster), progress_bars(console) as progress:
        for name in rows or table:
            for seed in seeds:
                config = from_dict(with_overrides(base, {**table[name], "seed": seed, "privacy.reproducible_seed": seed}))
                directory = Path(out) / f"{_slug(name)}-seed{seed}"
                label = f"{name} [seed {seed}]"
                metrics = run(config, str(directory), _labelled(progress, label)).metrics
                results.setdefault(name, []).append(metrics)
                _write(results, Path(out))
        if not sweep and not rows:
            results["real training images"] = [real_data_scores(source, seed) for seed in seeds]
    console.print(_write(results, Path(out)))


def _labelled(progress: Progress, label: str) -> Progress:
    return lambda stage, done, total: progress(f"{label} {stage}", done, total)


def _slug(name: str) -> str:
    return "".join(c if c.isalnum() or c in ".=" else "-" for c in name.replace("ε", "eps")).strip("-")


def _write(results: dict[str, list[dict[str, Any]]], out: Path) -> str:
    lines = ["| row | seeds | accuracy | FID (glyph features) | ε spent |", "|---|---|---|---|---|"]
    for name, runs in results.items():
        accuracy = 100 * np.array([r["accuracy"] for r in runs])
        fid = [r["fid_glyph"] for r in runs if "fid_glyph" in r]
        spent = {str(r.get("epsilon_spent", "-"))[:6] for r in runs}
        lines.append(
            f"| {name} | {len(runs)} | {accuracy.mean():.1f} ± {accuracy.std():.1f} % | "
            + (f"{np.mean(fid):.1f} ± {np.std(fid):.1f}" if fid else "-") + f" | {', '.join(sorted(spent))} |"
        )
    text = "\n".join(lines) + "\n"
    out.mkdir(parents=True, exist_ok=True)
    write_atomic(out / "results.json", json.dumps(results, indent=2))
    write_atomic(out / "results.md", text)
    return text


if __name__ == "__main__":
    jsonargparse.auto_cli(main)
