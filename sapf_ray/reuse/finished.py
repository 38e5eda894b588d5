"""A finished run as its later results see it."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sapf_ray.config import RunConfig, flatten, from_dict, nest, to_dict
from sapf_ray.config.later import check_later, without_units
from sapf_ray.data.base import ImageSource, open_source
from sapf_ray.data.recorded import RecordedClasses
from sapf_ray.data.whole import WholeSource
from sapf_ray.errors import DataError, RunDirectoryError
from sapf_ray.evaluation.protocol import check_evaluation
from sapf_ray.models.public_model import PublicModel
from sapf_ray.privacy.ledger import Ledger
from sapf_ray.privacy.planner import PrivacyPlan
from sapf_ray.runs.directory import SYNTHESIS, RunDirectory
from sapf_ray.synthesis.writer import MANIFEST, read_manifest


def is_finished(directory: RunDirectory) -> bool:
    """Whether all is there that a run leaves, its privacy card last."""
    if not directory.card.exists() or not directory.ledger.exists():
        return False
    return Ledger.open(directory.ledger).plan.finetune is None or directory.adapter.exists()


@dataclass(frozen=True, kw_only=True)
class Finished:
    """A finished run, or one of its later syntheses, before anything is made from it.

    Attributes:
        root: The run directory.
        own: The run's config.
        config: Settings to start from: the run's, or the later synthesis's.
        result: Name of the later synthesis, None for the run itself.
        plan: The run's privacy plan.
    """

    root: Path
    own: RunConfig
    config: RunConfig
    result: str | None
    plan: PrivacyPlan

    @classmethod
    def open(cls, path: str | Path) -> Finished:
        """Reads config and ledger.

        Raises:
            RunDirectoryError: No run directory, or not finished.
        """
        home = _home(Path(path).expanduser())
        directory = RunDirectory(home)
        result = None
        if home.parent.name == SYNTHESIS and RunDirectory(home.parent.parent).ledger.exists():
            directory = RunDirectory(home.parent.parent)
            result = home.name
        own = directory.read_config()
        if not is_finished(directory):
            raise RunDirectoryError(
                f"{directory.root}: the run is not finished, so what it made has no ε yet and "
                "cannot be called anything; finish it with its `sapf run` command first"
            )
        later = own if result is None else RunDirectory(home).read_config()
        return cls(
            root=directory.root,
            own=own,
            config=later,
            result=result,
            plan=Ledger.open(directory.ledger).plan,
        )

    @property
    def data_set(self) -> Path:
        """The synthetic images that are there already."""
        home = self.root if self.result is None else self.root / SYNTHESIS / self.result
        return home / "synthetic"

    def changed(
        self, command: str, changes: Mapping[str, Any], *, scored: bool = False
    ) -> RunConfig:
        """The settings with the changes of a command.

        Args:
            command: ``synthesize`` or ``evaluate``.
            changes: Keys of the config, dotted or nested.
            scored: Whether real images are to be read for scores.

        Raises:
            ConfigError: A key that cannot be changed, or a value outside its range.
        """
        flat = flatten(dict(changes))
        check_later(command, flat)
        flat = without_units(flat)
        if scored:
            flat["evaluation.enabled"] = True
        return from_dict(nest(flatten(to_dict(self.config)) | flat))

    @functools.cached_property
    def public(self) -> dict[str, Any]:
        """What the run noted for later results: classes, prompts, the model's hash.

        Raises:
            RunDirectoryError: Not there, which a run of an earlier version made up for by the
                manifest of its synthetic images.
        """
        directory = RunDirectory(self.root)
        if directory.public.exists():
            return directory.read_json(directory.public)
        if (directory.synthetic / MANIFEST).exists():
            return {"data": self.own.data.source, **read_manifest(directory.synthetic)}
        raise RunDirectoryError(
            f"{directory.public}: gone, and so is {directory.synthetic / MANIFEST}; one of them is "
            "needed for names and prompts of the classes"
        )

    @property
    def classes(self) -> ImageSource:
        """The run's classes, without its images."""
        public = self.public
        return RecordedClasses(
            public["data"],
            public["class_names"],
            prompts=public["prompts"],
            n_train=self.plan.n_records,
        )

    def check(
        self, config: RunConfig, *, source: ImageSource, model: PublicModel, images: bool
    ) -> None:
        """Finds what would stop the stages.

        Args:
            config: The settings with what is changed.
            source: The images that scores are measured on, or the bare classes.
            model: The public model.
            images: Whether images are made, and not scored alone.

        Raises:
            SapfError: In one line, naming the field.
        """
        recorded = self.classes
        same = source.class_names == recorded.class_names
        if not images:  # scores go by the names
            same = sorted(source.class_names) == sorted(recorded.class_names)
        if not same:
            raise DataError(
                f"data.source = {config.data.source!r}: its classes are "
                f"{', '.join(source.class_names)}, those of the run "
                f"{', '.join(recorded.class_names)}"
            )
        check_evaluation(config.evaluation, made=config.synthesis.side(model.resolution))
        if not images:
            return
        if self.public.get("model") not in (None, model.content_hash):
            raise DataError(
                f"model.path = {config.model.path!r}: its files are not those that {self.root} was "
                "made with; give the same model"
            )
        config.synthesis.check_classes(len(recorded.class_names))
        model.check_resolution(config.synthesis.resolution, "synthesis.resolution")


def test_source(config: RunConfig) -> ImageSource:
    """The real images that scores are measured on.

    Raises:
        SapfError: As :func:`sapf_ray.data.base.open_source`.
    """
    source = open_source(config.data)
    return WholeSource(source) if config.evaluation.test_images == "all" else source


def is_of_a_run(path: Path) -> bool:
    """Whether a path is a run directory, a later synthesis, or the data set of one of them."""
    return RunDirectory(_home(path)).config.exists()


def _home(path: Path) -> Path:
    """The folder of which ``path`` is the data set, or ``path`` itself."""
    is_data_set = path.name == "synthetic" and RunDirectory(path.parent).config.exists()
    return path.parent if is_data_set else path
