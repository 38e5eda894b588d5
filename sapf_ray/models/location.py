"""Where a public model lies: bundled, in a local directory, under a catalog name or a hub id.

Reads headers of files at most and imports no deep-learning library, so listings stay fast.
"""

from __future__ import annotations

import json
from pathlib import Path

from sapf_ray.config import ModelConfig
from sapf_ray.config.section import require
from sapf_ray.errors import DataError, reason
from sapf_ray.models.catalog import PUBLIC_MODELS
from sapf_ray.models.checkpoints import checkpoint_configs, checkpoint_of
from sapf_ray.models.hub_cache import cached_pipeline
from sapf_ray.models.weight_files import INDEX, networks_in, read_header, variants_of

BUNDLED_DIR = Path(__file__).parent / "bundled"


def bundled_models() -> list[str]:
    """Names of the pipelines that ship with the package."""
    return sorted(p.parent.name for p in BUNDLED_DIR.glob("*/model_index.json"))


def resolve_model(model: ModelConfig | str) -> str:
    """The place of a model's configs; of all its files, unless :func:`checkpoint_of` has one.

    Args:
        model: How the user named it; a path alone means the defaults.

    Returns:
        The absolute path of a local directory, which a bundled model or a model of the hub that is
        in the cache also is; the hub id of one that must be fetched.

    Raises:
        DataError: A local directory that is not a diffusers pipeline, or whose weights are missing
            or truncated; a checkpoint without U-Net weights.
        ConfigError: A key that such a model does not take.
    """
    config = as_config(model)
    checkpoint = checkpoint_of(config)
    if checkpoint is not None:
        return str(checkpoint_configs(checkpoint, config))
    require(
        config.configs is None,
        "model.configs",
        config.configs,
        "must be left out, unless model.path is a single .safetensors file",
    )
    local = BUNDLED_DIR / config.path
    if not local.exists():
        local = Path(config.path).expanduser()
    if local.exists():
        require(
            config.revision is None,
            "model.revision",
            config.revision,
            "must be left out where model.path is on this machine: revisions are the hub's",
        )
        check_pipeline_directory(local, config.variant)
        return str(local.resolve())
    hub_id = _hub_id(config.path)
    if hub_id is None:
        known = [name for name, row in PUBLIC_MODELS.items() if row.hub_id]
        raise DataError(
            f"model.path = {config.path!r}: no such directory; give a diffusers directory, a "
            "single .safetensors checkpoint, a hub id (owner/name), one of the bundled models "
            f"({', '.join(bundled_models())}) or of the known ones ({', '.join(known)})"
        )
    cached = cached_pipeline(hub_id, variant=config.variant, revision=config.revision)
    if cached is None:
        return hub_id
    check_pipeline_directory(cached, config.variant)
    return str(cached)


def as_config(model: ModelConfig | str) -> ModelConfig:
    """How the user named a model; a path alone means the defaults."""
    return ModelConfig(path=model) if isinstance(model, str) else model


def _hub_id(path: str) -> str | None:
    """The hub id that a name means, if any."""
    if path in PUBLIC_MODELS and PUBLIC_MODELS[path].hub_id:
        return PUBLIC_MODELS[path].hub_id
    named = path.count("/") == 1 and not path.startswith((".", "/", "~"))
    return path if named else None


def check_pipeline_directory(directory: Path, variant: str | None = None) -> None:
    """Reads headers only, so that a broken model is found before any budget is spent.

    Args:
        directory: The pipeline's.
        variant: ``model.variant``.

    Raises:
        DataError: Not a diffusers pipeline; weights that are missing or truncated; names the file.
        ConfigError: Weights are there in another variant only.
    """
    index = directory / INDEX
    if not index.is_file():
        raise DataError(
            f"model.path = {str(directory)!r}: no {INDEX} there; expected a diffusers "
            "pipeline directory"
        )
    try:
        content = json.loads(index.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{index}: not valid JSON ({reason(error)})") from error
    if not isinstance(content, dict):
        raise DataError(f"{index}: must be a mapping, as diffusers writes it")
    _check_variant(directory, networks_in(content), variant=variant)
    for weights in sorted(directory.glob("*/*.safetensors")):
        read_header(weights)


def _check_variant(directory: Path, networks: list[str], *, variant: str | None) -> None:
    """Every network has weights, and the variant is one that is there."""
    there = {name: variants_of(directory / name) for name in networks}
    for name, found in there.items():
        if not found:
            raise DataError(
                f"model.path = {str(directory)!r}: no weights in {name}/; copy the whole pipeline"
            )
    named = sorted({found for each in there.values() for found in each if found})
    lacking = [name for name, found in there.items() if not {"", variant or ""} & found]
    unknown = variant is not None and variant not in named
    allowed = f"must be one of the variants that {directory} holds: {', '.join(named) or 'none'}"
    require(not lacking and not unknown, "model.variant", variant, allowed)
