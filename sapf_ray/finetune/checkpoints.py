"""Where training's checkpoints lie, and the newest of them that can be trusted.

Ray Train copies a checkpoint into its folder file by file and rewrites its own snapshot in place,
so a machine that dies there, or a full disk, leaves a torn file. A torn checkpoint is passed over:
training goes on from the one before it and replays the steps between (same streams, same releases,
no budget). A torn snapshot is removed, for Ray refuses to start with it; nothing is lost, as the
checkpoints are found by looking.
"""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator

import pyarrow.fs as fs

from sapf_ray.errors import RunDirectoryError, SapfError, reason
from sapf_ray.finetune.loop import TrainState
from sapf_ray.finetune.optimizer import release_name
from sapf_ray.privacy.ledger import Ledger
from sapf_ray.runs import runlog

STATE_FILE = "state.pt"
SNAPSHOT = "checkpoint_manager_snapshot.json"
_PREFIX = "checkpoint_"


def latest_state(storage: str) -> TrainState | None:
    """The newest whole checkpoint under ``storage``; None where there is none.

    Args:
        storage: Path or URI (any that pyarrow knows) of one Ray Train run.
    """
    return newest(storage)[1]


def newest(storage: str) -> tuple[str | None, TrainState | None]:
    """Name and content of the newest whole checkpoint."""
    for name in _checkpoints(*fs.FileSystem.from_uri(storage)):
        try:
            return name, load_state(storage, name)
        except SapfError as error:
            logging.getLogger(__name__).warning("%s; passed over", error)
            runlog.event("checkpoint_skipped", runlog.WARNING, checkpoint=name)
    return None, None


def load_state(storage: str, name: str) -> TrainState:
    """The named checkpoint.

    Raises:
        SapfError: Missing or torn.
    """
    filesystem, root = fs.FileSystem.from_uri(storage)
    path = f"{root}/{name}/{STATE_FILE}"
    try:
        with filesystem.open_input_stream(path) as stream:
            return TrainState.load(io.BytesIO(stream.read()), path)
    except OSError as error:
        raise SapfError(f"{path}: cannot be read ({reason(error)})") from error


def repair_snapshot(storage: str) -> None:
    """Removes Ray's list of checkpoints where it is torn or names one that is gone."""
    filesystem, root = fs.FileSystem.from_uri(storage)
    path = f"{root}/{SNAPSHOT}"
    if filesystem.get_file_info(path).type == fs.FileType.NotFound:
        return
    with filesystem.open_input_stream(path) as stream:
        content = stream.read()
    present = set(_checkpoints(filesystem, root))
    try:
        listed = json.loads(content)["checkpoint_results"]
        whole = all(result["checkpoint_dir_name"] in present for result in listed)
    except (ValueError, KeyError, TypeError):
        whole = False
    if not whole:
        filesystem.delete_file(path)
        runlog.event("snapshot_removed", runlog.WARNING)


def check_paid(
    state: TrainState | None,
    ledger: Ledger,
    *,
    run_id: str,
) -> None:
    """A checkpoint holds only steps that the ledger shows as paid by this very run.

    Of the last step the ledger must show the very release, so that a checkpoint of another training
    with as many steps does not pass.

    Args:
        state: The checkpoint; None where there is none.
        ledger: The run's ledger.
        run_id: Fingerprint of the run's bound key, with which its noise ids begin.

    Raises:
        RunDirectoryError: The checkpoint has a step that the ledger does not show.
    """
    if state is None or state.step == 0:
        return
    mine = [event for event in ledger.events() if event.noise_id.startswith(f"{run_id}-")]
    paid = {event.release for event in mine}
    last = release_name(state.step - 1)
    missing = [name for name in map(release_name, range(state.step)) if name not in paid]
    if not missing and (last, state.noise_id) not in {(e.release, e.noise_id) for e in mine}:
        missing = [last]
    if missing:
        raise RunDirectoryError(
            f"{ledger.path}: does not show {missing[0]}, which a checkpoint contains; restore the "
            "ledger that belongs to it, or start a new run in another directory"
        )


def _checkpoints(filesystem: fs.FileSystem, root: str) -> Iterator[str]:
    """Names of the checkpoints' folders, newest first (Ray names them by time)."""
    try:
        found = filesystem.get_file_info(fs.FileSelector(root, allow_not_found=True))
    except OSError as error:
        raise SapfError(f"{root}: checkpoints cannot be listed ({reason(error)})") from error
    names = [
        i.base_name
        for i in found
        if i.type == fs.FileType.Directory and i.base_name.startswith(_PREFIX)
    ]
    yield from sorted(names, reverse=True)
