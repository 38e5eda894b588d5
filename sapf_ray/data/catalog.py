"""What is publicly known of each data set.

The one home of published sizes, class names, prompts and addresses. Sizes are those of the paper's
Table 3, prompts those of its Table 14. ``n_train`` is the N of the privacy analysis; validation
images are used nowhere, neither in training nor in evaluation.

>>> DATA_SETS["cifar10"].n_train, DATA_SETS["celeba"].prompts[1]
(45000, 'An image of a male face')
>>> datasets_json()[0]["name"]
'digits'
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class KnownSet:
    """One row; every field is public.

    Attributes:
        name: Value of ``data.source``.
        title: Name in prose.
        url: Official page where the set is obtained; empty where nothing has to be obtained.
        path: What ``data.path`` must point to; empty where it is not used.
        licence: Terms of use as the publisher states them; they bind the user, not this program.
        class_names: One per label; empty where the user's own files decide.
        prompts: One per label, in the same order.
        n_train: Number of published training images, None where the user's own files decide;
            likewise the next three.
        n_val: Number of validation images, which stay unused.
        n_test: Number of test images.
        resolution: Side in pixels at which the paper uses the set.
        notes: How the records are split, and what else is worth knowing.
    """

    name: str
    title: str
    url: str = ""
    path: str = ""
    licence: str = ""
    class_names: tuple[str, ...] = ()
    prompts: tuple[str, ...] = ()
    n_train: int | None = None
    n_val: int | None = None
    n_test: int | None = None
    resolution: int | None = None
    notes: str = ""

    @property
    def obtain(self) -> str:
        """Half a sentence for error messages."""
        return f"{self.title} is obtained from {self.url}"

    @property
    def obtain_hint(self) -> str:
        """The end of an error message; empty where nothing has to be obtained."""
        return f"; {self.obtain}" if self.url else ""


DIGITS_TRAIN = 1_297
DIGITS_TEST = 500
_DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_CIFAR10 = (
    "airplane",
    "automobile",
    "bird",
    "cat",
    "deer",
    "dog",
    "frog",
    "horse",
    "ship",
    "truck",
)
_DIGIT_PROMPTS = tuple(f"An image of the digit {name}" for name in _DIGITS)
_CIFAR10_PROMPTS = tuple(
    f"An image of an {name}" if name[0] in "aeiou" else f"An image of a {name}" for name in _CIFAR10
)
_OCT = "An optical coherence tomography (OCT) image for retinal disease"

DATA_SETS: dict[str, KnownSet] = {
    row.name: row
    for row in (
        KnownSet(
            name="digits",
            title="scikit-learn digits",
            url="https://doi.org/10.24432/C50P49",
            licence="CC BY 4.0 (UCI, Alpaydin and Kaynak)",
            class_names=_DIGITS,
            prompts=_DIGIT_PROMPTS,
            n_train=DIGITS_TRAIN,
            n_val=0,
            n_test=DIGITS_TEST,
            resolution=8,
            notes="Real; ships inside a dependency.",
        ),
        KnownSet(
            name="stand_in",
            title="Rendered digits",
            licence="public: drawn from fonts",
            class_names=_DIGITS,
            prompts=_DIGIT_PROMPTS,
            n_train=DIGITS_TRAIN,
            n_val=0,
            n_test=DIGITS_TEST,
            resolution=32,
            notes="Public twin of digits, for choosing hyperparameters at no privacy cost.",
        ),
        KnownSet(
            name="cifar10",
            title="CIFAR-10",
            url="https://www.cs.toronto.edu/~kriz/cifar.html",
            path="cifar-10-batches-py/ or the folder above it",
            licence="none stated; cite Krizhevsky 2009",
            class_names=_CIFAR10,
            prompts=_CIFAR10_PROMPTS,
            n_train=45_000,
            n_val=5_000,
            n_test=10_000,
            resolution=32,
            notes="Train: the first 45,000 of the 50,000 in published order.",
        ),
        KnownSet(
            name="octmnist",
            title="OCTMNIST (MedMNIST+)",
            url="https://zenodo.org/records/10519652",
            path="octmnist_128.npz (also _224, _64 and octmnist.npz) or its folder",
            licence="CC BY 4.0",
            class_names=(
                "choroidal neovascularization",
                "diabetic macular edema",
                "drusen",
                "normal",
            ),
            prompts=tuple(f"{_OCT} {i}" for i in range(1, 5)),
            n_train=97_477,
            n_val=10_832,
            n_test=1_000,
            resolution=128,
            notes="Published split.",
        ),
        KnownSet(
            name="celeba",
            title="CelebA",
            url="http://mmlab.ie.cuhk.edu.hk/projects/CelebA.html",
            path="folder with img_align_celeba/, list_attr_celeba.txt and "
            "list_eval_partition.txt (or Kaggle's .csv)",
            licence="non-commercial research only",
            class_names=("female", "male"),
            prompts=("An image of a female face", "An image of a male face"),
            n_train=162_770,
            n_val=19_867,
            n_test=19_962,
            resolution=256,
            notes="Published partition; label: attribute Male. Several images show one person: "
            "the guarantee is per image.",
        ),
        KnownSet(
            name="camelyon",
            title="Camelyon17-WILDS",
            url="https://wilds.stanford.edu/datasets/#camelyon17",
            path="camelyon17_v1.0/ or the folder above it",
            licence="CC0",
            class_names=("normal", "tumor"),
            prompts=("A normal lymph node image", "A lymph node histopathology image"),
            n_train=302_436,
            n_val=34_904,
            n_test=85_054,
            resolution=96,
            notes="WILDS official split: train hospitals 0, 3, 4; val hospital 1; test "
            "hospital 2; its 33,560 in-distribution validation images stay unused. Many images "
            "show one patient: the guarantee is per image.",
        ),
        KnownSet(
            name="image_folder",
            title="Your own image folder",
            path="folder with one sub-folder per class",
            notes="train/ and test/ where given, else split by a hash of the file's path.",
        ),
        KnownSet(
            name="parquet",
            title="Your own Parquet files",
            path="folder of train-*.parquet and test-*.parquet",
            notes="As Hugging Face datasets and `sapf run` write them; without test files, "
            "split by a hash of the image's path.",
        ),
    )
}
"""Source name → row, in the order in which a listing shows them."""


def datasets_json() -> list[dict[str, Any]]:
    """The catalog for machines: one dict per set.

    It has the fields of :class:`KnownSet`, plus ``classes`` (or None).
    """
    rows = []
    for row in DATA_SETS.values():
        classes = len(row.class_names) or None
        rows.append({**asdict(row), "classes": classes})
    return rows
