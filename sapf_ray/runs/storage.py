"""Checkpoints and results on storage that the nodes do not mount.

It is any file system that pyarrow knows.

``cluster.storage`` names a folder there (``s3://bucket/runs``, ``gs://…``, ``hdfs://…``,
``file:///…``); a run has its own folder below it, named like its run directory:

* ``checkpoints/``: Ray Train's, written while training;
* what the run releases, at its end: config, plan, ledger, selection, privacy card, adapter,
  synthetic images. Scores stay in the run directory, for they are measured on real images; so does
  everything in ``private/``.
* ``synthesis/NAME/``: config and images of a later ``sapf synthesize``; of ``sapf evaluate``
  nothing, for it makes scores alone.

``published.json`` comes last and lists the files with their SHA-256: a folder without it is not
finished. A later synthesis has one of its own.
"""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.fs as fs

from sapf_ray.errors import ConfigError, RunDirectoryError, reason
from sapf_ray.files import below, file_digest
from sapf_ray.runs.directory import RunDirectory

MANIFEST = "published.json"
_ERRORS = (OSError, pa.ArrowException)


class Storage:
    """The folder of one run.

    Args:
        uri: ``cluster.storage``.
        directory: The run directory; its random id says whose folder it is.

    Raises:
        ConfigError: The URI is none, or cannot be written.
        RunDirectoryError: The folder holds another run.
    """

    def __init__(self, uri: str, directory: RunDirectory) -> None:
        self.directory = directory
        self.name = directory.root.resolve().name
        self.uri = below(uri, self.name)
        self.home = directory.config.parent
        try:
            self.filesystem, self.path = fs.FileSystem.from_uri(self.uri)
            self._claim(uri)
        except _ERRORS as error:
            allowed = (
                f"cannot be used ({reason(error)}); must be the URI of a folder that can be "
                "written, with %20 for a space, %23 for #"
            )
            raise ConfigError("cluster.storage", uri, allowed) from error

    @property
    def checkpoints(self) -> str:
        """URI for Ray Train."""
        return below(self.uri, "checkpoints")

    def publish(self) -> list[str]:
        """Copies what the run releases; files that are there already stay.

        Returns:
            Names of the files that were copied.

        Raises:
            RunDirectoryError: The storage failed; the results are in the run directory.
        """
        try:
            return self._publish()
        except _ERRORS as error:
            raise RunDirectoryError(
                f"{self.uri}: results could not be copied ({reason(error)}); they are in "
                f"{self.directory.root}, and the same command tries again"
            ) from error

    def _claim(self, uri: str) -> None:
        """Marks the folder as this run's.

        A folder of the same name may be another run's; its checkpoints must never be taken for
        this one's.
        """
        run = self.directory.run_id().encode()
        marker = f"{self.path}/{self.directory.owner.name}"
        self.filesystem.create_dir(self.path, recursive=True)
        if not self._exists(marker):
            self._write(marker, run)
        if self._read(marker) != run:
            raise RunDirectoryError(
                f"cluster.storage = {uri!r}: {self.name} there belongs to another run; give --out "
                "another name, or delete that folder"
            )

    def _publish(self) -> list[str]:
        digests = self._released()
        manifest = self._target(MANIFEST)
        published: dict[str, str] = {}
        if self._exists(manifest):
            published = json.loads(self._read(manifest))
        stale = [name for name, digest in digests.items() if published.get(name) != digest]
        if stale and published:
            self.filesystem.delete_file(manifest)  # until all are new
        for name in stale:
            self._copy(name)
        if stale:
            content = json.dumps(digests, indent=2)
            self._write(manifest, content.encode())
        return stale

    def _released(self) -> dict[str, str]:
        """Name to SHA-256 of every file that the run releases."""
        files: list[Path] = []
        for path in self.directory.released:
            if path.is_file():
                files.append(path)
            elif path.is_dir():
                files += [file for file in sorted(path.rglob("*")) if file.is_file()]
        return {path.relative_to(self.home).as_posix(): file_digest(path) for path in files}

    def _target(self, name: str) -> str:
        """Where a file of the run, or of the later result, goes."""
        inside = (self.home / name).relative_to(self.directory.root)
        return f"{self.path}/{inside.as_posix()}"

    def _copy(self, name: str) -> None:
        source = self.home.resolve() / name
        target = self._target(name)
        folder, _, _ = target.rpartition("/")
        self.filesystem.create_dir(folder, recursive=True)
        fs.copy_files(str(source), target, fs.LocalFileSystem(), self.filesystem)

    def _exists(self, path: str) -> bool:
        return self.filesystem.get_file_info(path).type != fs.FileType.NotFound

    def _write(self, path: str, content: bytes) -> None:
        with self.filesystem.open_output_stream(path) as stream:
            stream.write(content)

    def _read(self, path: str) -> bytes:
        with self.filesystem.open_input_stream(path) as stream:
            return stream.read()
