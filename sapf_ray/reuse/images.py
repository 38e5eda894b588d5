"""Scores of any Parquet data set of synthetic images, without a run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sapf_ray import cluster, placement
from sapf_ray.config import flatten, from_dict, nest
from sapf_ray.config.later import check_later
from sapf_ray.errors import ConfigError
from sapf_ray.evaluation.image_sets import ImageSet, parquet_files
from sapf_ray.evaluation.inputs import Inputs
from sapf_ray.evaluation.launcher import evaluate_on_cluster
from sapf_ray.evaluation.protocol import check_evaluation
from sapf_ray.reuse.finished import is_of_a_run, test_source

UNKNOWN = (
    "no run is known that made these images: nothing can be said of their ε, and the scores below "
    "are measured on real images without noise"
)


def is_plain(path: str | Path) -> bool:
    """Whether Parquet files lie there, outside of any run."""
    path = Path(path).expanduser()
    return path.exists() and not is_of_a_run(path) and bool(parquet_files(path))


def evaluate_images(path: str | Path, changes: Mapping[str, Any]) -> dict[str, float]:
    """Scores of synthetic images from anywhere against real test images.

    Args:
        path: A Parquet file, or a directory of some: a column of images and one of integer labels,
            as Hugging Face ``datasets`` writes them.
        changes: Keys of the config, dotted or nested: ``data.source`` and what else says which
            images are real; ``evaluation``, ``seed``.

    Returns:
        Scores by their names in ``metrics.json``.

    Raises:
        SapfError: In one line: no such images, other classes, a value outside its range.
    """
    flat = flatten(dict(changes))
    check_later("evaluate", flat)
    if "data.source" not in flat:
        raise ConfigError(
            "data.source", None, "must say which real images to compare with, see `sapf datasets`"
        )
    config = from_dict(nest(flat | {"evaluation.enabled": True}))
    images = ImageSet.open(path)
    check_evaluation(config.evaluation, made=images.side)
    source = test_source(config)
    inputs = Inputs(
        synthetic_dir=str(images.path.resolve()),
        source=source,
        resolution=config.evaluation.compared_at(source.resolution, images.side),
        config=config.evaluation,
        seed=config.seed,
    )
    inputs.check_classes()
    with cluster.session(config.cluster):
        config = placement.placed(config, placement.cluster_gpus(), model_gb=0.0)
        cluster.require([want for want in cluster.wants(config) if want.section == "evaluation"])
        return evaluate_on_cluster(
            inputs.synthetic_dir,
            source,
            resolution=inputs.resolution,
            config=config.evaluation,
            seed=inputs.seed,
        )
