"""Where a public model lies: bundled, in a local directory, under a catalog name or a hub id.

Reads headers of files at most and imports no deep-learning library, so listings stay fast.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from sapf_ray.errors import DataError, reason
from sapf_ray.models.catalog import PUBLIC_MODELS

BUNDLED_DIR = Path(__file__).parent / "bundled"


def bundled_models() -> list[str]:
    """Names of the pipelines that ship with the package."""
    return sorted(p.parent.name for p in BUNDLED_DIR.glob("*/model_index.json"))


def resolve_model(path: str) -> str:
    """The place that ``model.path`` names.

    Args:
        path: Bundled or catalog name, directory or hub id.

    Returns:
        The absolute path of a bundled model or local directory; the hub id of any other.

    Raises:
        DataError: A local directory that is not a diffusers pipeline, or whose weights are
            truncated.
    """
    local = BUNDLED_DIR / path
    if not local.exists():
        local = Path(path).expanduser()
    if local.exists():
        check_pipeline_directory(local)
        return str(local.resolve())
    if path in PUBLIC_MODELS and PUBLIC_MODELS[path].hub_id:
        return PUBLIC_MODELS[path].hub_id
    if path.count("/") == 1 and not path.startswith((".", "/", "~")):
        return path
    known = [name for name, row in PUBLIC_MODELS.items() if row.hub_id]
    raise DataError(
        f"model.path = {path!r}: no such directory; give a diffusers directory, a hub id "
        f"(owner/name), one of the bundled models ({', '.join(bundled_models())}) or of the known "
        f"ones ({', '.join(known)})"
    )


def check_pipeline_directory(directory: Path) -> None:
    """Reads headers only, so that a broken model is found before any budget is spent.

    Raises:
        DataError: Not a diffusers pipeline, or truncated weights; names the file.
    """
    from safetensors import SafetensorError, safe_open

    index = directory / "model_index.json"
    if not index.is_file():
        raise DataError(
            f"model.path = {str(directory)!r}: no model_index.json there; expected a diffusers "
            "pipeline directory"
        )
    try:
        content = json.loads(index.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{index}: not valid JSON ({reason(error)})") from error
    if not isinstance(content, dict):
        raise DataError(f"{index}: must be a mapping, as diffusers writes it")
    for weights in sorted(directory.glob("*/*.safetensors")):
        try:
            with safe_open(weights, framework="pt") as file:
                file.keys()
        except (SafetensorError, OSError) as error:
            raise DataError(
                f"{weights}: truncated or damaged weights ({reason(error)}); copy the file again"
            ) from error


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


def cached_pipeline(hub_id: str) -> Path | None:
    """Folder of a hub model's newest pipeline in the local cache; None where it is not there whole.

    Args:
        hub_id: owner/name.
    """
    root = hub_cache() / f"models--{hub_id.replace('/', '--')}"
    for index in sorted(root.glob("snapshots/*/model_index.json"), key=_age):
        if all(_has_weights(index.parent / name) for name in _networks(index)):
            return index.parent
    return None


def _age(path: Path) -> float:
    return -path.stat().st_mtime


def _networks(index: Path) -> list[str]:
    """Sub-folders of a pipeline that hold weights it cannot do without."""
    try:
        names = json.loads(index.read_text())
    except (OSError, ValueError):
        return ["unet"]
    networks = ("unet", "transformer", "vae", "text_encoder")
    return [name for name in networks if (names.get(name) or [None])[0]]


def _has_weights(folder: Path) -> bool:
    files = [*folder.glob("*.safetensors"), *folder.glob("*.bin")]
    return any(path.exists() for path in files)
