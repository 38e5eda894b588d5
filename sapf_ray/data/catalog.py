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

from dataclasses import asdict
from typing import Any

from sapf_ray.data.class_lists import (
    CIFAR10,
    CIFAR100,
    CIFAR100_COARSE,
    DIGITS,
    EUROSAT,
    FASHION_MNIST,
)
from sapf_ray.data.known_set import OWN, KnownSet, article
from sapf_ray.data.medmnist_sets import MEDMNIST

DIGITS_TRAIN = 1_297
DIGITS_TEST = 500
_DIGIT_PROMPTS = tuple(f"An image of the digit {name}" for name in DIGITS)


def _prompts(names: tuple[str, ...], template: str = "An image of {name}") -> tuple[str, ...]:
    """One prompt per class: the name in words, with its article."""
    words = [article(name.replace("_", " ")) for name in names]
    return tuple(template.replace("{name}", word) for word in words)


def _in_words(names: tuple[str, ...], template: str = "An image of {name}") -> tuple[str, ...]:
    """One prompt per class: the name in words."""
    return tuple(template.replace("{name}", name.replace("_", " ")) for name in names)


_FASHION_PROMPTS = _in_words(
    (
        "a t-shirt",
        "trousers",
        "a pullover",
        "a dress",
        "a coat",
        "a sandal",
        "a shirt",
        "a sneaker",
        "a bag",
        "an ankle boot",
    )
)
_EUROSAT_PROMPTS = _in_words(
    (
        "annual crop land",
        "forest",
        "herbaceous vegetation",
        "highway",
        "industrial buildings",
        "pasture",
        "permanent crop land",
        "residential buildings",
        "river",
        "sea or lake",
    ),
    "A satellite image of {name}",
)

DATA_SETS: dict[str, KnownSet] = {
    row.name: row
    for row in (
        KnownSet(
            name="digits",
            title="scikit-learn digits",
            url="https://doi.org/10.24432/C50P49",
            licence="CC BY 4.0 (UCI, Alpaydin and Kaynak)",
            class_names=DIGITS,
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
            class_names=DIGITS,
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
            class_names=CIFAR10,
            prompts=_prompts(CIFAR10),
            n_train=45_000,
            n_val=5_000,
            n_test=10_000,
            resolution=32,
            notes="Train: the first 45,000 of the 50,000 in published order.",
        ),
        KnownSet(
            name="cifar100",
            title="CIFAR-100",
            url="https://www.cs.toronto.edu/~kriz/cifar.html",
            path="cifar-100-python/ or the folder above it",
            licence="none stated; cite Krizhevsky 2009",
            class_names=CIFAR100,
            prompts=_prompts(CIFAR100),
            n_train=50_000,
            n_val=0,
            n_test=10_000,
            resolution=32,
            notes="Published split, fine labels.",
        ),
        KnownSet(
            name="cifar100_coarse",
            title="CIFAR-100, coarse labels",
            url="https://www.cs.toronto.edu/~kriz/cifar.html",
            path="cifar-100-python/ or the folder above it",
            licence="none stated; cite Krizhevsky 2009",
            class_names=CIFAR100_COARSE,
            prompts=_in_words(CIFAR100_COARSE),
            n_train=50_000,
            n_val=0,
            n_test=10_000,
            resolution=32,
            notes="Published split, the 20 superclasses.",
        ),
        KnownSet(
            name="mnist",
            title="MNIST",
            url="http://yann.lecun.com/exdb/mnist",
            path="folder of train-images-idx3-ubyte, train-labels-idx1-ubyte and the two of t10k, "
            "packed (.gz) or not, or the folder above MNIST/raw",
            licence="CC BY-SA 3.0",
            class_names=DIGITS,
            prompts=_DIGIT_PROMPTS,
            n_train=60_000,
            n_val=0,
            n_test=10_000,
            resolution=28,
            notes="Published split.",
        ),
        KnownSet(
            name="fashion_mnist",
            title="Fashion-MNIST",
            url="https://github.com/zalandoresearch/fashion-mnist",
            path="as for mnist, or the folder above FashionMNIST/raw",
            licence="MIT",
            class_names=FASHION_MNIST,
            prompts=_FASHION_PROMPTS,
            n_train=60_000,
            n_val=0,
            n_test=10_000,
            resolution=28,
            notes="Published split.",
        ),
        *MEDMNIST.values(),
        KnownSet(
            name="eurosat",
            title="EuroSAT (RGB)",
            url="https://zenodo.org/records/7711810",
            path="EuroSAT_RGB/ (or 2750/), the folder above it, or EuroSAT_RGB.zip",
            licence="MIT",
            class_names=EUROSAT,
            prompts=_EUROSAT_PROMPTS,
            n_val=0,
            resolution=64,
            notes="27,000 images; no published split: by a hash of class and file name.",
            options=("on_error", "test_fraction"),
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
            "the guarantee is per image, unless data.groups is published.",
            options=("groups", "on_error"),
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
            "show one patient: the guarantee is per image, unless data.groups is published.",
            options=("groups", "on_error"),
        ),
        KnownSet(
            name="image_folder",
            title="Your own image folder",
            path="folder with one sub-folder per class",
            notes="train/ and test/ where given, else split by a hash of the file's path; or a "
            "list (metadata.csv, .jsonl) of file_name, label and split. Every format that Pillow "
            "reads, and DICOM with pip install 'sapf-ray[dicom]'.",
            options=("groups", *OWN),
        ),
        KnownSet(
            name="parquet",
            title="Your own Parquet files",
            path="folder of train-*.parquet and test-*.parquet",
            options=("groups", *OWN),
            notes="As Hugging Face datasets and `sapf run` write them; without test files, "
            "split by a hash of the image's path.",
        ),
        KnownSet(
            name="webdataset",
            title="Your own WebDataset shards",
            path="folder of train-*.tar and test-*.tar, or a pattern such as shards/*-train-*.tar",
            notes="A sample is 0001.jpg with 0001.cls, .json (label) or .txt; classnames.txt names "
            "the numbers. Without test shards, split by a hash of the key.",
            options=OWN,
        ),
        KnownSet(
            name="arrow",
            title="Your own Hugging Face data set on disk",
            path="folder that save_to_disk wrote: dataset_dict.json with train/ and test/, or "
            "state.json, dataset_info.json and data-*.arrow",
            notes="Read through pyarrow, memory-mapped. Without a test or validation set, split by "
            "a hash of the images' paths.",
            options=OWN,
        ),
        KnownSet(
            name="npz",
            title="Your own .npz file",
            path=".npz file with train_images, train_labels, test_images, test_labels (or x_train, "
            "y_train, …; or images, labels, ids), or folder of train.npz and test.npz",
            notes="uint8, or other numbers with data.pixel_range; an array class_names names "
            "integer labels. With ids, split by their hash. Nothing is unpickled.",
            options=tuple(key for key in OWN if key != "on_error"),
        ),
    )
}
"""Source name → row, in the order in which a listing shows them."""

_SHARED = {
    "sapf_ray.data.sources._cifar": ("cifar10", "cifar100", "cifar100_coarse"),
    "sapf_ray.data.sources._idx": ("mnist", "fashion_mnist"),
    "sapf_ray.data.sources._medmnist": tuple(MEDMNIST),
}
SHARED_READERS = {name: f"{module}:" for module, names in _SHARED.items() for name in names}
"""Source name → module that enters it, where several sets are read alike."""


def datasets_json() -> list[dict[str, Any]]:
    """The catalog for machines: one dict per set.

    It has the fields of :class:`KnownSet`, plus ``classes`` (or None).
    """
    rows = []
    for row in DATA_SETS.values():
        classes = len(row.class_names) or None
        rows.append({**asdict(row), "classes": classes})
    return rows
