"""Models of the hub on this machine: what is in the local cache, and whether the hub is reached."""

from __future__ import annotations

import os
import socket
import threading
import urllib.request
from pathlib import Path
from urllib.parse import urlsplit

from sapf_ray.models.weight_files import INDEX, networks_of, weight_files

PATIENCE = 1.0  # seconds in which the hub answers, or counts as not reached


def hub_cache() -> Path:
    """Where the hub's libraries keep what they fetch, by their environment variables."""
    given = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE")
    if given:
        return Path(given).expanduser()
    home = os.environ.get("HF_HOME")
    if home:
        return Path(home).expanduser() / "hub"
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(cache).expanduser() / "huggingface" / "hub"


def cached_pipeline(
    hub_id: str, *, variant: str | None = None, revision: str | None = None
) -> Path | None:
    """Folder of a hub model's pipeline in the local cache; None where it is not there whole.

    Args:
        hub_id: owner/name.
        variant: ``model.variant``.
        revision: Branch, tag or commit; by default the newest that is there.
    """
    for folder in cached_snapshots(hub_id, revision):
        networks = networks_of(folder / INDEX)
        if networks and all(_has_weights(folder / name, variant) for name in networks):
            return folder
    return None


def cached_snapshots(hub_id: str, revision: str | None = None) -> list[Path]:
    """Folders of a hub model in the local cache that have a pipeline's index, the newest first.

    Args:
        hub_id: owner/name.
        revision: Branch, tag or commit; any by default.
    """
    root = hub_cache() / f"models--{hub_id.replace('/', '--')}"
    wanted = "*"
    if revision is not None:
        reference = root / "refs" / revision
        wanted = reference.read_text().strip() if reference.is_file() else revision
    if "/" in wanted:  # a branch that was never fetched
        return []
    indexes = sorted(root.glob(f"snapshots/{wanted}/{INDEX}"), key=_age)
    return [index.parent for index in indexes]


def _age(path: Path) -> float:
    return -path.stat().st_mtime


def _has_weights(folder: Path, variant: str | None) -> bool:
    """Whether they are there: a cache may have links to files that were not fetched."""
    files = weight_files(folder, variant) if folder.is_dir() else []
    return bool(files) and all(path.exists() for path in files)


def is_offline() -> bool:
    """Whether the user forbids the hub's libraries to ask it."""
    return os.environ.get("HF_HUB_OFFLINE", "0").upper() in ("1", "ON", "YES", "TRUE")


def reach_hub() -> None:
    """Asks for a connection once. The hub's libraries would ask again and again, for minutes.

    Raises:
        OSError: There is none, or the user forbids it.
    """
    if is_offline():
        raise OSError("it is not in the cache, and HF_HUB_OFFLINE is set")
    address = urlsplit(os.environ.get("HF_ENDPOINT") or "https://huggingface.co")
    proxy = urllib.request.getproxies().get(address.scheme)
    place = urlsplit(proxy) if proxy and not _goes_round_proxy(address.netloc) else address
    port = place.port or (443 if place.scheme == "https" else 80)
    outcome: list[str] = []

    def connect() -> None:
        try:
            socket.create_connection((place.hostname, port), timeout=PATIENCE).close()
        except OSError as error:
            outcome.append(str(error))
        else:
            outcome.append("")

    # looking up a name has no time limit of its own
    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(PATIENCE)
    if outcome != [""]:
        why = outcome[0] if outcome else f"no answer in {PATIENCE:g} s"
        raise OSError(f"it is not in the cache, and {place.hostname} is not reached: {why}")


def _goes_round_proxy(host: str) -> bool:
    return bool(urllib.request.proxy_bypass(host))
