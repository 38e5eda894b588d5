"""What goes in: the sensitive images, the public model, the budget."""

from __future__ import annotations

from dataclasses import dataclass

from sapf_ray.config.checks import one_of, positive_int, require

DTYPES = ("float32", "bfloat16")
ACCOUNTANTS = ("pld", "rdp")


@dataclass(frozen=True, kw_only=True)
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
            given; in (0, 1).
    """

    source: str = "digits"
    path: str | None = None
    n_records: int | None = None
    prompt_template: str = "An image of {name}"
    test_fraction: float = 0.2

    def __post_init__(self) -> None:
        if self.n_records is not None:
            positive_int("data", self, "n_records", minimum=3)
        require(
            "{name}" in self.prompt_template,
            "data.prompt_template",
            self.prompt_template,
            "must contain {name}",
        )
        require(
            0 < self.test_fraction < 1,
            "data.test_fraction",
            self.test_fraction,
            "must lie in (0, 1)",
        )


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The public model.

    Args:
        path: A name of ``sapf models`` (glyphs-tiny, sd-v1-5, ...), a local diffusers directory, or
            a hub id.
        dtype: Precision of the frozen weights and of forward passes: float32 or bfloat16.
        class_labels: Of a class-conditional model (DiT): one label id per class, in the data set's
            order; by default the labels whose names stand in the prompts.
    """

    path: str = "glyphs-tiny"
    dtype: str = "float32"
    class_labels: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        require(
            bool(self.path),
            "model.path",
            self.path,
            "must name a bundled model, a directory or a hub id",
        )
        one_of("model.dtype", self.dtype, allowed=DTYPES)
        if self.class_labels is not None:
            object.__setattr__(
                self, "class_labels", tuple(self.class_labels)
            )  # YAML has lists only
            ids = list(self.class_labels)
            whole = all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids)
            require(bool(ids) and whole, "model.class_labels", ids, "must be label ids from 0 on")


@dataclass(frozen=True, kw_only=True)
class PrivacyConfig:
    """The budget. Adjacency is add/remove one image.

    Args:
        epsilon: Planned epsilon of the whole run (selection and fine-tuning composed); > 0.
        delta: Planned delta in (0, 1); by default 1 / (N ln N).
        accountant: pld (tight, default) or rdp (as the paper).
        non_private: No noise at all: the ceiling of research comparisons. Epsilon is then infinite
            and the card says so.
        reproducible_seed: Seeds privacy noise and Poisson draws so that a run can be repeated; NOT
            for release. By default they come from a secret key drawn from the operating system.
    """

    epsilon: float = 10.0
    delta: float | None = None
    accountant: str = "pld"
    non_private: bool = False
    reproducible_seed: int | None = None

    def __post_init__(self) -> None:
        require(
            0 < self.epsilon < float("inf"),
            "privacy.epsilon",
            self.epsilon,
            "must be a finite number above 0",
        )
        if self.delta is not None:
            require(0 < self.delta < 1, "privacy.delta", self.delta, "must lie in (0, 1)")
        one_of("privacy.accountant", self.accountant, allowed=ACCOUNTANTS)
