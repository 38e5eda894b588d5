"""Which source a folder or file looks like, by the names in it."""

from __future__ import annotations

from pathlib import Path

from sapf_ray.data.medmnist_sets import MEDMNIST

_FILES = {
    "dataset_dict.json": "arrow",
    "state.json": "arrow",
    "batches.meta": "cifar10",
    "cifar-10-batches-py": "cifar10",
    "cifar-100-python": "cifar100",
    "list_attr_celeba.txt": "celeba",
    "camelyon17_v1.0": "camelyon",
    "train-images-idx3-ubyte": "mnist",
    "train-images-idx3-ubyte.gz": "mnist",
    "MNIST": "mnist",
    "FashionMNIST": "fashion_mnist",
    "EuroSAT_RGB": "eurosat",
    "EuroSAT_RGB.zip": "eurosat",
}
_ENDINGS = {".tar": "webdataset", ".parquet": "parquet", ".npz": "npz"}


def guess_source(path: Path) -> str | None:
    """Value of ``data.source`` that may read it; None for folders of images, and where unknown."""
    places = [path] if path.is_file() else sorted(path.iterdir())
    for place in places:
        if place.name in _FILES:
            return _FILES[place.name]
    for place in places:
        name = place.stem.partition("_")[0].lower()
        if place.suffix == ".npz" and name in MEDMNIST:
            return name
        if place.suffix in _ENDINGS:
            return _ENDINGS[place.suffix]
    inner = [place for place in places if place.is_dir() and place.name in ("data", "train")]
    return guess_source(inner[0]) if inner and path.is_dir() else None


def hint(path: Path) -> str:
    """The end of an error message that names the source, or nothing."""
    try:
        name = guess_source(path)
    except OSError:
        name = None
    return f"; it looks like data.source = {name}" if name else ""
