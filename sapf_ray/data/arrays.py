"""Array files that are whole or not there, whatever crashes."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np


def save_array(path: Path, array: np.ndarray, *, mode: int = 0o644) -> None:
    """Writes a .npy file, on disk before it has its name; any number of processes may write the
    same.

    Args:
        mode: Permissions, from the first byte on: 0o600 for what is as sensitive as the records.
    """
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
    with os.fdopen(descriptor, "wb") as f:
        np.save(f, array)
        f.flush()
        os.fsync(f.fileno())
    os.replace(partial, path)
