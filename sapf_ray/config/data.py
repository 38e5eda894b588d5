"""The sensitive images."""

from __future__ import annotations

from typing import Annotated

from annotated_types import Interval

from sapf_ray.config.kinds import NameIn, OpenShare
from sapf_ray.config.section import require, section


@section("data")
class DataConfig:
    """The sensitive images.

    Args:
        source: digits (scikit-learn, embedded), stand_in (public twin of digits), cifar10,
            octmnist, celeba, camelyon (the published files), image_folder (one sub-folder per
            class) or parquet (as Hugging Face datasets writes it).
        path: Directory or file of the source, see ``sapf datasets``; not used by digits and
            stand_in.
        n_records: N, number of training records, for planning without data; a run takes N from the
            data.
        prompt_template: Prompt for sources without prompts of their own (image_folder, parquet);
            {name} is the class name.
        test_fraction: Share held out as test set by image_folder and parquet where no split is
            given.
    """

    source: Annotated[str, NameIn("data.source")] = "digits"
    path: str | None = None
    n_records: Annotated[int, Interval(ge=3)] | None = None
    prompt_template: str = "An image of {name}"
    test_fraction: OpenShare = 0.2

    def __post_init__(self) -> None:
        require(
            "{name}" in self.prompt_template,
            "data.prompt_template",
            self.prompt_template,
            "must contain {name}",
        )
