"""The run directory: every artifact of one run, each written atomically.

A stage whose artifact is there is done; a re-run with the same config skips it. Another config in
the same directory is refused, so an artifact never belongs to a config other than
``config.yaml``'s.
"""

from __future__ import annotations

import json
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import yaml

from sapf_ray import locks
from sapf_ray.config import RunConfig, from_dict, result_keys, to_dict
from sapf_ray.errors import RunDirectoryError, reason
from sapf_ray.files import write_atomic, write_json

SYNTHESIS = "synthesis"
EVALUATION = "evaluation"
"""Folders of a finished run's directory for what is made from it later."""


def changed_keys(old: RunConfig, new: RunConfig) -> dict[str, tuple[Any, Any]]:
    """Result-bearing keys in which two configs differ, with both values."""
    before = result_keys(old)
    after = result_keys(new)
    return {
        key: (before.get(key), after.get(key))
        for key in before | after
        if before.get(key) != after.get(key)
    }


class RunDirectory:
    """Paths of one run and the lock that keeps a second process out."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root).expanduser()
        self.home = self.root  # of all that is written
        self.config = self.root / "config.yaml"
        self.plan = self.root / "plan.json"
        self.ledger = self.root / "ledger.jsonl"
        self.grounding = self.root / "grounding.json"
        self.head = self.root / "head.npz"
        self.selection = self.root / "selection.json"
        self.adapter = self.root / "adapter"
        self.synthetic = self.root / "synthetic"
        self.generations = self.root / "evolution"  # there while images evolve
        self.metrics = self.root / "metrics.json"
        self.card = self.root / "privacy_card.md"
        self.card_json = self.root / "privacy_card.json"  # the same facts, for machines
        self.registry = self.root / "registry.yaml"  # and for the DP Deployments Registry
        self.audit = self.root / "audit"  # there in a run with canaries, never released
        self.observations = self.audit / "observations"
        self.canary_coins = self.audit / "image_coins.npy"
        self.plots = self.root / "plots"
        self.sample_grid = self.plots / "synthetic.png"
        self.timings = self.root / "timings.json"
        self.orchestration = self.root / "orchestration.json"
        self.memory = self.root / "peak_memory.json"
        self.log = self.root / "run.log.jsonl"
        self.manifest = self.root / "manifest.json"  # digests of all others, written last
        self.owner = self.root / "run_id"
        self.mlflow = self.root / "mlflow_run.json"
        self.skipped = self.root / "skipped.json"
        # classes, prompts and the public model's hash: all that later results need to know
        self.public = self.root / "public.json"
        # sensitive or secret; never uploaded, deleted at the end of the run
        self.private = self.root / "private"
        self.noise_key = self.private / "noise_key"
        self.latents = self.private / "latents"
        self.spilled = self.root / "spilled"  # outlives `private`, which goes while Ray is up
        self.score = self.private / "score.json"  # of a trial: secret until it is chosen
        self.decoded = self.private / "evaluation"  # test images, and whatever scores read
        self.data_fingerprint = self.private / "data_fingerprint"
        self.fingerprint = self.private / "fingerprint.json"
        # Ray Train's checkpoints: post-processing of noisy releases
        self.checkpoints = self.root / "checkpoints"
        self._lock: IO[str] | None = None
        self._let_go: Callable[[], None] | None = None

    @property
    def name(self) -> str:
        """What the run is called in MLflow and in what is made from it."""
        return self.root.resolve().name

    def data_sets(self) -> list[Path]:
        """Other data sets of this run, which may hold the same images."""
        later = sorted(self.root.glob(f"{SYNTHESIS}/*/synthetic"))
        return [path for path in (self.root / "synthetic", *later) if path != self.synthetic]

    def claim(self, config: RunConfig) -> bool:
        """Creates or re-opens the directory for ``config``.

        Returns:
            Whether an earlier start is continued.

        Raises:
            RunDirectoryError: In use by another process, holds another config, or is not a run
                directory.
        """
        self._check_not_foreign()
        self._take_lock()
        if self.config.exists():
            if self._is_begun():
                self.check_same(config)
                return True
            if not self.differences(config):
                return True
            self.mlflow.unlink(missing_ok=True)  # the other config's parameters are there
        write_atomic(self.config, yaml.safe_dump(to_dict(config), sort_keys=False))
        return False

    def _is_begun(self) -> bool:
        """Whether anything was planned, spent or made: until then it may become another run."""
        return any(path.exists() for path in self.released if path != self.config)

    def _check_not_foreign(self) -> None:
        """The folder is a run directory, or empty, or not there yet."""
        if not self.home.exists() or self.config.exists():
            return
        if not self.home.is_dir():
            raise RunDirectoryError(f"{self._option}: is a file, must be a directory")
        for path in self.home.iterdir():
            if path.name != ".lock" and path.suffix != ".partial":
                raise RunDirectoryError(
                    f"{self._option}: not empty and no run of sapf ({path.name} is there); "
                    "use another directory"
                )

    def _take_lock(self) -> None:
        """Keeps a second process out, until this one ends."""
        try:
            self.home.parent.mkdir(parents=True, exist_ok=True)
            # for this user alone: the times at which files grow tell of the sampled records
            self.home.mkdir(mode=0o700, exist_ok=True)
            self._lock = open(self.home / ".lock", "w", encoding="utf-8")  # noqa: SIM115 held until the process ends
        except OSError as error:
            raise RunDirectoryError(
                f"{self._option}: cannot be written ({error.strerror})"
            ) from error
        try:
            self._let_go = locks.take(self._lock, wait=False)
        except locks.Held as error:
            told = f" ({error})" if str(error) else ""
            raise RunDirectoryError(
                f"{self._option}: another sapf process is working there; wait for it or use "
                f"another directory{told}"
            ) from error
        except OSError as error:
            raise RunDirectoryError(
                f"{self._option}: cannot be locked ({error.strerror}); use a directory on "
                "another file system"
            ) from error

    def release(self) -> None:
        """Lets another process in."""
        if self._lock is not None:
            if self._let_go is not None:
                self._let_go()
                self._let_go = None
            self._lock.close()
            self._lock = None

    @property
    def released(self) -> tuple[Path, ...]:
        """Files and folders that may leave the directory, as far as they are there.

        Scores are not among them, for they are measured on real images.
        """
        return (
            self.config,
            self.public,
            self.plan,
            self.ledger,
            self.grounding,
            self.head,
            self.selection,
            self.card,
            self.card_json,
            self.registry,
            self.adapter,
            self.synthetic,
        )

    def run_id(self) -> str:
        """Random hex, the same over all starts of the run."""
        if not self.owner.exists():
            write_atomic(self.owner, secrets.token_hex(16))
        return self.owner.read_text(encoding="utf-8")

    def read_config(self) -> RunConfig:
        """The config that the directory was begun with.

        Raises:
            RunDirectoryError: Not there, or damaged.
        """
        if not self.config.is_file():
            raise RunDirectoryError(
                f"{self.root}: no config.yaml there; is it a run directory of sapf?"
            )
        try:
            return from_dict(yaml.safe_load(self.config.read_text(encoding="utf-8")))
        except (yaml.YAMLError, TypeError, AttributeError) as error:
            raise RunDirectoryError(f"{self.config}: damaged ({reason(error)})") from error

    def check_same(self, config: RunConfig) -> None:
        """The directory holds no run with another result-bearing config.

        Raises:
            RunDirectoryError: It does; names the first key.
        """
        for key, (old, new) in self.differences(config).items():
            raise RunDirectoryError(
                f"{self._option}: holds a run with {key} = {old!r}, requested is {new!r}; use "
                "another directory, or the same config to continue that run"
            )

    def differences(self, config: RunConfig) -> dict[str, tuple[Any, Any]]:
        """Result-bearing keys in which ``config`` is not the directory's, with both values.

        Raises:
            RunDirectoryError: The directory's config is not there, or damaged.
        """
        return changed_keys(self.read_config(), config)

    @property
    def _option(self) -> str:
        """How the user named this directory."""
        return f"--out {self.root}"

    def prepare_private(self) -> None:
        """Makes the folder of sensitive and secret files, for this user only."""
        self.private.mkdir(mode=0o700, exist_ok=True)

    def delete_key(self) -> None:
        """Removes the noise key.

        Raises:
            RunDirectoryError: It could not be removed.
        """
        try:
            self.noise_key.unlink(missing_ok=True)
        except OSError as error:
            raise RunDirectoryError(
                f"{self.noise_key}: cannot be deleted ({error.strerror}); whoever reads it can "
                "take the noise off the results: delete it, then give the same command again"
            ) from error

    def delete_private(self) -> None:
        """Removes latents and data fingerprint.

        Raises:
            RunDirectoryError: Some of it could not be removed.
        """
        try:
            shutil.rmtree(self.private)
        except FileNotFoundError:
            pass
        except OSError as error:
            raise RunDirectoryError(
                f"{error.filename or self.private}: cannot be deleted ({error.strerror}), and may "
                "hold sensitive images; delete it, then give the same command again"
            ) from error

    def write_json(self, path: Path, value: Any) -> None:
        """Writes an artifact atomically."""
        write_json(path, value)

    @staticmethod
    def read_json(path: Path) -> Any:
        """Reads an artifact.

        Raises:
            RunDirectoryError: Damaged.
        """
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise RunDirectoryError(
                f"{path}: damaged ({error}); delete it to make that stage again"
            ) from error


class ResultDirectory(RunDirectory):
    """A folder of a finished run's directory for one thing that is made from it later.

    What the run released (adapter, ledger, selection, …) is read where it lies; all that is written
    goes to :attr:`home`, which looks like a small run directory.

    Args:
        run: The run directory.
        kind: ``synthesis`` or ``evaluation``.
        name: Name of the result.
        data_set: The synthetic data set that the result is about, its own unless given.
    """

    def __init__(
        self, run: str | Path, kind: str, *, name: str, data_set: Path | None = None
    ) -> None:
        super().__init__(run)
        self.run_card = self.card
        self.home = self.root / kind / name
        self.config = self.home / "config.yaml"
        self.synthetic = data_set or self.home / "synthetic"
        self.metrics = self.home / "metrics.json"
        self.card = self.home / "README.md"
        self.plots = self.home / "plots"
        self.sample_grid = self.plots / "synthetic.png"
        self.timings = self.home / "timings.json"
        self.orchestration = self.home / "orchestration.json"
        self.memory = self.home / "peak_memory.json"
        self.log = self.home / "run.log.jsonl"
        self.manifest = self.home / "manifest.json"
        self.spilled = self.home / "spilled"
        self.decoded = self.home / "private" / "evaluation"
        self.mlflow = self.home / "mlflow_run.json"
        self.skipped = self.home / "skipped.json"

    @property
    def name(self) -> str:
        return f"{super().name}/{self.home.name}"

    @property
    def released(self) -> tuple[Path, ...]:
        """Config and images; nothing where there are scores alone."""
        if not self.synthetic.is_relative_to(self.home):
            return ()
        return (self.config, self.synthetic)

    def check_same(self, config: RunConfig) -> None:
        for key, (old, new) in self.differences(config).items():
            raise RunDirectoryError(
                f"{self.home}: holds a result with {key} = {old!r}, requested is {new!r}; give "
                "this one another --name"
            )

    @property
    def _option(self) -> str:
        return str(self.home)
