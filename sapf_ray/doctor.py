"""``sapf doctor``: looks at everything a run needs, and names what mends each fault.

Each check is a row of :data:`CHECKS`, a small function of the :class:`Subject`. It returns what it
found, or raises a :class:`Fault` with the remedy. Checks leave nothing behind; that of the images
is the one that a run makes before it spends anything: by headers where there are any.
"""

from __future__ import annotations

import math
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from sapf_ray.config import RunConfig
from sapf_ray.errors import SapfError, reason
from sapf_ray.estimate.local import uses_gpus
from sapf_ray.estimate.machine import usable_cores, usable_gpus, usable_memory_gb
from sapf_ray.runs import probes, stores

LEAST_DISK_GB = 2.0
LEAST_MEMORY_GB = 4.0  # what a run with the bundled model takes, all processes together: 3 to 6 GB
LEAST_SHM_GB = 0.5

State = Literal["OK", "WARNING", "FAULT"]


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What is examined.

    Attributes:
        config: Settings of the run to be; the defaults where none is given.
        out: Where run directories will be.
        has_data: Whether the config names the user's images.
    """

    config: RunConfig
    out: Path
    has_data: bool = False


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What one check found.

    Attributes:
        check: Its name.
        state: OK, WARNING (a run works, but not as well), or FAULT.
        text: What there is.
        remedy: What mends it; empty where nothing must be mended, or the text says it.
    """

    check: str
    state: State
    text: str
    remedy: str = ""

    def line(self) -> str:
        """For people."""
        remedy = f"  ->  {self.remedy}" if self.remedy else ""
        return f"{self.state:7}  {self.check:8}  {self.text}{remedy}"


class Fault(Exception):
    """Something that a run needs does not work.

    Args:
        text: What is wrong.
        remedy: A command or setting that mends it.
        stops: False where a run works all the same.
    """

    def __init__(self, text: str, remedy: str, *, stops: bool = True) -> None:
        super().__init__(text)
        self.text = text
        self.remedy = remedy
        self.stops = stops


Check = Callable[[Subject], str]


def examine(subject: Subject) -> Iterator[Finding]:
    """All checks, in order."""
    for name, check in CHECKS.items():
        try:
            yield Finding(check=name, state="OK", text=check(subject))
        except Fault as fault:
            state: State = "FAULT" if fault.stops else "WARNING"
            yield Finding(check=name, state=state, text=fault.text, remedy=fault.remedy)
        except SapfError as error:  # says itself what to do
            yield Finding(check=name, state="FAULT", text=reason(error))
        except Exception as error:
            text = f"{type(error).__name__}: {reason(error)}"
            yield Finding(check=name, state="FAULT", text=text)


def check_versions(subject: Subject) -> str:
    """Python and the packages, against the ranges of the installed sapf-ray."""
    try:
        requirements = metadata.requires("sapf-ray") or []
    except metadata.PackageNotFoundError:
        raise Fault(
            "sapf-ray runs from a folder; its packages' versions are not known to fit",
            f"{sys.executable} -m pip install -e .",
            stops=False,
        ) from None
    wrong = []
    seen = 0
    for requirement in requirements:
        if "extra ==" in requirement:
            continue
        name = re.split(r"[^A-Za-z0-9._-]", requirement)[0]
        least = re.search(r">=\s*([\d.]+)", requirement)
        seen += 1
        try:
            have = metadata.version(name)
        except metadata.PackageNotFoundError:
            wrong.append(f"{name} is missing")
            continue
        if least is not None and numbers(have) < numbers(least[1]):
            wrong.append(f"{name} {have} is older than {least[1]}")
    if wrong:
        raise Fault("; ".join(wrong), f"{sys.executable} -m pip install -U sapf-ray")
    python = ".".join(str(part) for part in sys.version_info[:3])
    packages = ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "ray", "mlflow"))
    return f"Python {python}, {packages}; {seen} packages as required"


def numbers(version: str) -> tuple[int, ...]:
    """A version for comparison.

    >>> numbers("2.10.1+cpu") > numbers("2.6"), numbers("3") == numbers("3.0.0")
    (True, True)
    """
    parts = [int(part) for part in re.findall(r"\d+", version.partition("+")[0])[:3]]
    return tuple(parts + [0] * (3 - len(parts)))


def check_cores(subject: Subject) -> str:
    """Cores and main memory."""
    cores = usable_cores()
    memory = usable_memory_gb()
    text = f"{cores} cores, {memory:.0f} GB of memory"
    workers = subject.config.finetune.workers
    if memory < LEAST_MEMORY_GB:
        raise Fault(
            f"{text}; a run takes {LEAST_MEMORY_GB:g} or more",
            "free memory, or --finetune.num_workers 1 --synthesis.num_actors 1",
            stops=memory < LEAST_MEMORY_GB / 2,
        )
    if not subject.config.finetune.gpus and workers > cores:
        raise Fault(f"{text}; {workers} workers are requested", f"--finetune.num_workers {cores}")
    return text


def check_gpus(subject: Subject) -> str:
    """GPUs: what torch sees against what there is and what is requested."""
    gpus = usable_gpus()
    if gpus:
        return f"{len(gpus)} x {gpus[0].name}, {gpus[0].memory_gb:.0f} GB"
    if Path("/dev/nvidia0").exists() or shutil.which("nvidia-smi"):
        raise Fault(
            "there is a GPU or its driver, but torch sees none",
            "nvidia-smi (must list it), then pip install a CUDA build of torch: "
            "https://pytorch.org/get-started/locally",
            stops=uses_gpus(subject.config),
        )
    if uses_gpus(subject.config):
        raise Fault("none, but the config requests them", "set each gpus_per_… to 0")
    return "none; the bundled models need none"


def check_ray(subject: Subject) -> str:
    """A Ray that starts, or that answers at the configured address."""
    import ray

    from sapf_ray import cluster, placement

    with cluster.session(subject.config.cluster):
        resources = ray.cluster_resources()
        config = placement.placed(subject.config, placement.cluster_gpus(), model_gb=math.inf)
        cluster.check(config)
    where = subject.config.cluster.address or os.environ.get("RAY_ADDRESS") or "started here"
    cores = resources.get("CPU", 0)
    found = f"{ray.__version__}, {where}: {cores:g} CPUs, {resources.get('GPU', 0):g} GPUs"
    if where == "started here":
        return found
    return (
        f"{found}; what does not fit in its memory, latents among it, goes to disk where its nodes "
        "were told (ray start --object-spilling-directory)"
    )


def check_mlflow(subject: Subject) -> str:
    """The store of the runs."""
    from sapf_ray.runs import tracking
    from sapf_ray.runs.directory import RunDirectory

    if not subject.config.tracking.enabled:
        return "not used (tracking.enabled false)"
    uri = tracking.tracking_uri(subject.config, RunDirectory(subject.out / "any"))
    file = stores.sqlite_path(uri)
    if file is not None and not file.exists() and probes.unwritable(nearest(file.parent)) is None:
        return f"{file}, to be made by the first run"
    stores.probe(uri)
    return stores.shown(uri)


def check_disk(subject: Subject) -> str:
    """Room for run directories and for Ray's temporary files."""
    low = []
    texts = []
    for name, folder in {"out": subject.out, "temp": probes.ray_folder()}.items():
        free = shutil.disk_usage(nearest(folder)).free / 1e9
        texts.append(f"{free:.0f} GB free in {folder}")
        if free < LEAST_DISK_GB:
            low.append(name)
    if low:
        remedy = "give an --out on another disk" if "out" in low else "RAY_TMPDIR=/another/disk"
        raise Fault(f"{'; '.join(texts)}; {LEAST_DISK_GB:g} are needed", remedy)
    return "; ".join(texts)


def check_shm(subject: Subject) -> str:
    """Shared memory, where Ray keeps what processes exchange."""
    shm = Path("/dev/shm")
    if not shm.is_dir():
        raise Fault("there is no /dev/shm", "mount -t tmpfs tmpfs /dev/shm", stops=False)
    free = shutil.disk_usage(shm).free / 1e9
    if free < LEAST_SHM_GB:
        raise Fault(
            f"{free:.2f} GB free in /dev/shm; Ray is slow with less than {LEAST_SHM_GB:g}",
            "docker run --shm-size=4g …, or mount -o remount,size=4g /dev/shm",
            stops=False,
        )
    return f"{free:.1f} GB free"


def check_locks(subject: Subject) -> str:
    """The file system of run directories can be written, and locks files."""
    folder = nearest(subject.out)
    fault = probes.unwritable(folder)
    if fault is not None:
        raise Fault(f"{folder}: {fault}", "give an --out that can be written")
    if not probes.has_locks(folder):
        raise Fault(
            f"{folder}: its file system has no locks; files named *.held stand for them",
            "give an --out on a local disk, or mount with locks (NFS: without nolock)",
            stops=False,
        )
    return f"files in {folder} can be written and locked"


def check_temporary(subject: Subject) -> str:
    """The folder of Ray's sessions."""
    return str(probes.temporary_folder())


def check_weights(subject: Subject) -> str:
    """The public model, by headers of its files."""
    from sapf_ray.models.hub_cache import hub_cache
    from sapf_ray.models.location import bundled_models, resolve_model

    name = subject.config.model.path
    place = resolve_model(subject.config.model)  # checks local files
    if not Path(place).is_absolute():
        raise Fault(
            f"{place} is not whole in this machine's hub cache; a run fetches it",
            f"hf download {place}",
            stops=False,
        )
    if Path(place).is_relative_to(hub_cache()):
        return f"{name}, in this machine's hub cache"
    return f"{name} ({'bundled' if name in bundled_models() else 'local'})"


def check_data(subject: Subject) -> str:
    """The images: their listing, whether groups fit, and whether each can be read."""
    from sapf_ray.data.base import SPLITS, open_source

    if not subject.has_data:
        return "none given (sapf doctor PHOTOS/, or --config run.yaml)"
    source = open_source(subject.config.data)
    classes = len(source.class_names)
    text = f"{source.n_train:,} + {source.n_test:,} images, {classes} classes"
    if source.units is not None:
        text += f", {len(source.units):,} groups"
    splits = SPLITS if subject.config.evaluation.enabled else SPLITS[:1]
    found = source.inspect(splits)
    if subject.config.data.on_error == "stop":
        found.stop()
    elif found.n_faults:
        text += f"; {found.n_faults:,} cannot be read and are skipped"
    return text


CHECKS: Mapping[str, Check] = {
    "versions": check_versions,
    "machine": check_cores,
    "gpus": check_gpus,
    "disk": check_disk,
    "shm": check_shm,
    "locks": check_locks,
    "temp": check_temporary,
    "weights": check_weights,
    "data": check_data,
    "mlflow": check_mlflow,
    "ray": check_ray,
}
"""Name of a check → what it does, in the order in which they are made."""


def nearest(folder: Path) -> Path:
    """The folder, or the nearest above it that exists."""
    place = folder.expanduser().absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    return place
