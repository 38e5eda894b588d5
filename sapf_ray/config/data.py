"""The sensitive images."""

from __future__ import annotations

from typing import Annotated, Literal

from annotated_types import Interval

from sapf_ray.config.groups import grouping_of
from sapf_ray.config.kinds import Count, FromList, NameIn, OpenShare
from sapf_ray.config.section import require, section

PixelValue = Annotated[float, Interval(ge=-(2**31), le=2**32)]


@section("data")
class DataConfig:
    """The sensitive images.

    Args:
        source: digits (scikit-learn, embedded), stand_in (public twin of digits), a published set
            as its publisher's files hold it (cifar10, mnist, octmnist, celeba, …), or images of
            your own: image_folder (one sub-folder per class), parquet, arrow, webdataset or npz.
        path: Directory or file of the source, see ``sapf datasets``; not used by digits and
            stand_in.
        n_records: N as a nominal number, public and near the true one (50000), for sample rate,
            delta and divisors, and for planning without data. The guarantee is then for adding or
            removing an image. null: N is counted, and the guarantee is for zeroing one out; see
            docs/privacy.md.
        prompt_template: Prompt for images of your own, and for class_names; {name} is the class
            name.
        test_fraction: Share held out as test set where no split is given (images of your own,
            eurosat).
        class_names: Names of all classes, in the order of their labels. Of images of your own: a
            class may then be without images, and images of other classes are left out. Of a
            published set: other words for its classes, put into prompt_template.
        on_error: stop at images that cannot be read, or skip them, where a source keeps each image
            by itself: they then contribute nothing, N stays the listed number, and the card states
            how many they are.
        pixel_range: Values shown black and white, two numbers (0,4095 for 12 bits), for images of
            your own of more than 8 bits a channel; must be public knowledge.
        resolution: Side in pixels of images of your own, at which scores compare them; must be
            public knowledge, so none is read to find it. null: that of the synthetic images.
        groups: Whose an image is, where the guarantee is to protect a person (patient, writer) and
            not one image: column:NAME, folder:LEVEL, pattern:REGEX or published, see
            docs/person-level.md. A group is then sampled, clipped and counted as one record is
            without; n_records and finetune.batch_size are numbers of groups. Groups that do not
            fit (an empty cell, one with over half of the images) are refused, which tells of the
            data: not covered by epsilon.
        max_images_per_group: Images of a group that take part, chosen by the secret key; null: all.
            The guarantee does not need it.
    """

    source: Annotated[str, NameIn("data.source")] = "digits"
    path: str | None = None
    n_records: Annotated[int, Interval(ge=3)] | None = None
    prompt_template: str = "An image of {name}"
    test_fraction: OpenShare = 0.2
    class_names: Annotated[tuple[str, ...], FromList] = ()
    on_error: Literal["stop", "skip"] = "stop"
    pixel_range: Annotated[tuple[PixelValue, ...], FromList] | None = None
    resolution: Count | None = None
    groups: str | None = None
    max_images_per_group: Count | None = None

    def __post_init__(self) -> None:
        require(
            "{name}" in self.prompt_template,
            "data.prompt_template",
            self.prompt_template,
            "must contain {name}",
        )
        names = self.class_names
        require(
            len(names) != 1 and len(set(names)) == len(names) and all(names),
            "data.class_names",
            list(names),
            "must be two or more different names",
        )
        limits = self.pixel_range
        require(
            limits is None or (len(limits) == 2 and limits[0] < limits[1]),
            "data.pixel_range",
            limits,
            "must be two numbers, black below white, e.g. 0,4095",
        )
        if self.groups is not None:
            grouping_of(self.groups)
        require(
            self.max_images_per_group is None or self.groups is not None,
            "data.max_images_per_group",
            self.max_images_per_group,
            "must be left out where data.groups is not given",
        )
