"""What decides which images a synthetic data set holds, and which images two data sets share.

Seed and label of an image follow from its place alone
(:mod:`sapf_ray.synthesis.sampling_plan`), so a data set of 4,000 images begins with the very images
of one of 2,000 that was made alike, and these are copied instead of made again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sapf_ray.config import SynthesisConfig
from sapf_ray.errors import DataError
from sapf_ray.files import file_digest, short_hash
from sapf_ray.models.public_model import PublicModel
from sapf_ray.runs import worktime
from sapf_ray.synthesis.labelling import Labelling
from sapf_ray.synthesis.sampling_plan import SamplingPlan, Shard
from sapf_ray.synthesis.writer import (
    MANIFEST,
    copy_shard,
    is_complete,
    read_manifest,
)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """All that decides which images come out, but their number.

    Attributes:
        parts: By name, ready for JSON.
        shard_size: Images per Parquet file.
        batch_size: Images denoised together: the last bits of an image may depend on it.
    """

    parts: dict[str, Any]
    shard_size: int
    batch_size: int

    @classmethod
    def of(
        cls,
        model: PublicModel,
        adapter_dir: str | None,
        *,
        class_names: Sequence[str],
        prompts: Sequence[str],
        config: SynthesisConfig,
        seed: int,
        labelling: Labelling | None = None,
    ) -> Recipe:
        """Reads the model's and the adapter's files for their content.

        Args:
            model: The public model; its files count by their content.
            adapter_dir: The adapter, by its content, or None.
            class_names: One per class.
            prompts: One per class.
            config: Sampling options; what only says how the work is spread does not count.
            seed: Seed of the data set.
            labelling: How a private head labels images.

        Raises:
            DataError: No such adapter.
        """
        parts: dict[str, Any] = {
            "model": model.shown_by,
            "adapter": _content(Path(adapter_dir)) if adapter_dir else None,
            "classes": [list(class_names), list(prompts)],
            "sampling": [config.steps, config.guidance_scale, seed],
        }
        # absent by default, so that data sets of earlier versions are still known
        if config.class_proportions:
            parts["weights"] = list(config.class_proportions)
        side = config.side(model.resolution)
        if side != model.native_resolution:
            parts["resolution"] = side
        if labelling is not None:
            parts["labels"] = labelling.parts()
        return cls(parts=parts, shard_size=config.shard_size, batch_size=config.batch_size)

    def spec(self, n_images: int) -> str:
        """Hex digest of a data set of so many images, which each of its shards carries."""
        return short_hash({**self.parts, "size": [n_images, self.shard_size, self.batch_size]})


@worktime.working()
def adopt(
    out: Path,
    plan: SamplingPlan,
    *,
    missing: Sequence[Shard],
    donors: Iterable[Path],
    recipe: Recipe,
) -> list[Shard]:
    """Copies shards from finished data sets that were made alike.

    Args:
        out: Directory of the data set.
        plan: The whole data set.
        missing: Shards that are not there yet.
        donors: Directories that may hold such data sets.
        recipe: What decides the images.

    Returns:
        The shards that are still missing.
    """
    left = list(missing)
    for donor in donors:
        theirs = _plan_of(donor, plan, recipe)
        if theirs is None:
            continue
        by_start = {shard.start: shard for shard in theirs.shards}
        spec = recipe.spec(theirs.n_images)
        for shard in list(left):
            source = by_start.get(shard.start)
            if source is None or not _holds(source, shard, batch_size=recipe.batch_size):
                continue
            if "labels" in recipe.parts and source.rows != shard.rows:
                continue  # a head chose images, or labels, by all of the shard's
            if is_complete(donor, theirs, shard=source, spec=spec):
                copy_shard(
                    donor / source.file,
                    out / shard.file,
                    rows=shard.rows,
                    spec=recipe.spec(plan.n_images),
                )
                left.remove(shard)
    return left


def _plan_of(donor: Path, plan: SamplingPlan, recipe: Recipe) -> SamplingPlan | None:
    """The donor's plan, if it differs from ours in the number of images at most."""
    if not (donor / MANIFEST).is_file():
        return None
    try:
        manifest = read_manifest(donor)
    except DataError:  # damaged: then it gives nothing
        return None
    theirs = dataclasses.replace(plan, n_images=int(manifest["n_images"]))
    return theirs if manifest["spec"] == recipe.spec(theirs.n_images) else None


def _holds(source: Shard, shard: Shard, *, batch_size: int) -> bool:
    """Whether the images of ``shard`` are the first of ``source``, from batches of equal size."""
    same = source.rows == shard.rows
    return same or (source.rows > shard.rows and shard.rows % batch_size == 0)


def _content(directory: Path) -> dict[str, str]:
    if not directory.is_dir():
        raise DataError(f"{directory}: no such adapter directory")
    return {
        p.relative_to(directory).as_posix(): file_digest(p)
        for p in sorted(directory.rglob("*"))
        if p.is_file()
    }
