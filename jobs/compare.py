"""The rows of a YAML file x seeds through the main job, as one table of means and standard deviations.

    python -m jobs.compare tune_spaces/digits.yaml --out runs/digits-table

The file names a preset, dotted keys that all rows override, and the rows. Finished runs are kept, so the same command
continues.
"""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import jsonargparse
import numpy as np
import yaml
from rich.console import Console

from sapf_ray import cluster
from sapf_ray.cli import load_preset
from sapf_ray.config import RunConfig, from_dict
from sapf_ray.data.base import open_source
from sapf_ray.evaluation.downstream import train_and_score
from sapf_ray.models.loading import load_pipeline, native_resolution
from sapf_ray.pipeline import Progress, run
from sapf_ray.report.terminal import progress_bars
from sapf_ray.rundir import write_atomic

Overrides = dict[str, Any]


def with_overrides(base: dict[str, Any], overrides: Overrides) -> dict[str, Any]:
    """``base`` with dotted keys set."""
    nested = deepcopy(base)
    for key, value in overrides.items():
        section, _, name = key.rpartition(".")
        (nested.setdefault(section, {}) if section else nested)[name] = value
    return nested


def real_data_scores(config: RunConfig) -> dict[str, float]:
    """Accuracy of the classifier trained on the real training images."""
    source = open_source(config.data)
    resolution = native_resolution(load_pipeline(config.model.path))
    train = source.read("train", np.arange(source.n_train), resolution)
    test = source.read("test", np.arange(source.n_test), resolution)
    return train_and_score(*train, *test, len(source.class_names), config.evaluation, config.seed)


def main(space: str, out: str = "runs/compare", seeds: tuple[int, ...] = (0, 1, 2)) -> None:
    """Runs every row with every seed and prints the table.

    Args:
        space: YAML file with keys preset, rows and, optionally, override and real_data.
        out: Directory of the runs, ``results.json`` and ``results.md``.
        seeds: One run each; also seeds the privacy noise, so the table can be repeated (not for release).
    """
    spec = yaml.safe_load(Path(space).read_text())
    base = with_overrides(load_preset(spec["preset"]), {"tracking.experiment": Path(out).name, **spec.get("override", {})})
    console = Console()
    results: dict[str, list[dict[str, Any]]] = {}
    with cluster.session(from_dict(base).cluster), progress_bars(console) as progress:
        for name, overrides in spec["rows"].items():
            for seed in seeds:
                config = from_dict(with_overrides(base, {**overrides, "seed": seed, "privacy.reproducible_seed": seed}))
                directory = Path(out) / f"{_slug(name)}-seed{seed}"
                label = f"{name} [seed {seed}]"
                metrics = run(config, str(directory), _labelled(progress, label)).metrics
                results.setdefault(name, []).append(metrics)
                _write(results, Path(out))
        if spec.get("real_data"):
            results["real training images"] = [real_data_scores(from_dict({**base, "seed": seed})) for seed in seeds]
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
