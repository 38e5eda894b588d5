"""The public model as a run knows it before any weights are read.

>>> from sapf_ray.config import ModelConfig
>>> model = PublicModel.open(ModelConfig(path="glyphs-tiny"))
>>> model.family_name, model.resolution, len(model.pool("qkv"))
('StableDiffusionPipeline', 32, 60)
>>> next(model.denoiser.parameters()).device.type
'meta'
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sapf_ray.config import ModelConfig
from sapf_ray.config.section import require
from sapf_ray.errors import reason
from sapf_ray.files import file_digest, short_hash
from sapf_ray.models.checkpoints import checkpoint_of
from sapf_ray.models.conditioning import (
    CONDITIONINGS,
    blank_conditions,
    check_text_model,
    label_ids,
    predict,
)
from sapf_ray.models.families import (
    FAMILIES,
    Family,
    image_side,
    latent_side,
    read_config,
    read_index,
    unreadable,
)
from sapf_ray.models.location import as_config, resolve_model
from sapf_ray.models.pool import Matrix, candidate_pool
from sapf_ray.models.weight_check import check_denoiser_weights
from sapf_ray.models.weight_files import INDEX, weight_files

# What diffusers raises for configs that fit no network.
_FAULTS = (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError)

ACTIVATIONS_GB = 2.0  # of a batch of images, and CUDA's own


@dataclass(frozen=True, kw_only=True)
class PublicModel:
    """What config files say of a model; small, so it travels to tasks as it is.

    Whoever needs weights loads them where they are used
    (:func:`sapf_ray.models.loading.kept_pipeline`).

    Attributes:
        config: How the user named the model.
        path: Absolute directory, or hub id, on the machine that opened it.
        family_name: Key of ``FAMILIES``.
        native_resolution: Side in pixels of the images it was made for.
        denoiser_config: Config of the network that predicts noise.
        labels: Names of each label id, separated by commas; empty for a text-to-image model.
    """

    config: ModelConfig
    path: str
    family_name: str
    native_resolution: int
    denoiser_config: Mapping[str, Any]
    labels: Mapping[int, str]

    @classmethod
    def open(cls, config: ModelConfig) -> PublicModel:
        """Reads config files and builds the network without weights.

        Raises:
            DataError: The model cannot be found, is damaged, lacks weights of its denoiser, or is
                of another family.
            ConfigError: It takes no images of ``model.resolution``, or another key does not fit.
        """
        model = cls.read(config)
        try:
            _ = model.denoiser  # a config that makes no network is found now
        except _FAULTS as error:
            raise unreadable(config, error) from error
        if Path(model.path).is_absolute():
            check_denoiser_weights(model)
        model.check_resolution(config.resolution, "model.resolution")
        model.check_denoiser_takes_it()
        return model

    @classmethod
    def read(cls, config: ModelConfig) -> PublicModel:
        """Reads config files alone: enough for a model that a run has used.

        Raises:
            DataError: The model cannot be found, is damaged, or is of another family.
        """
        path = resolve_model(config)
        index, family = read_index(config)
        _check_keys(config, index, family)
        at = config.revision
        try:
            denoiser = read_config(family.denoiser, path, folder=family.folder, revision=at)
            vae = read_config(family.vae, path, folder="vae", revision=at)
            CONDITIONINGS[family.conditioning].check(denoiser, config.path)
            labels = index.get("id2label") or {}
            return cls(
                config=config,
                path=path,
                family_name=index["_class_name"],
                native_resolution=image_side(denoiser, vae),
                denoiser_config=denoiser,
                labels={int(number): names for number, names in labels.items()},
            )
        except _FAULTS as error:
            raise unreadable(config, error) from error

    @property
    def resolution(self) -> int:
        """Side in pixels of the images that it is given and makes."""
        return self.config.resolution or self.native_resolution

    @property
    def family(self) -> Family:
        """How such a model is read."""
        return FAMILIES[self.family_name]

    @functools.cached_property
    def denoiser(self) -> nn.Module:
        """The network that predicts noise, on the meta device: names and shapes, no weights."""
        with torch.device("meta"):
            return self.family.denoiser_class.from_config(self.denoiser_config)

    @property
    def sampling_gb(self) -> float:
        """Memory that sampling takes, roughly, in 10^9 bytes: the weights, half as much again for
        encoders and VAE, and activations.
        """
        parameters = sum(p.numel() for p in self.denoiser.parameters())
        size = 4 if self.config.dtype == "float32" else 2
        return 1.5 * size * parameters / 1e9 + ACTIVATIONS_GB

    @functools.cached_property
    def content_hash(self) -> str:
        """See :func:`content_hash`; takes a pass over the weights, so ask where noise needs it."""
        return content_hash(self.config)

    @property
    def shown_by(self) -> list[Any]:
        """All that decides what the model says of an image: files, precision, what is set anew.

        What is not set is absent, so keys made of it are those of before there was a choice.
        """
        config = self.config
        parts: list[Any] = [self.content_hash, config.dtype, config.class_labels]
        if config.prediction_type is not None:
            parts.append(config.prediction_type)
        return parts

    def latents_key(
        self, data_fingerprint: str, prompts: Sequence[str], features: str | None = None
    ) -> str:
        """Name of the folder for the latents of these images, the same for all runs that may share
        them.

        Args:
            data_fingerprint: Fingerprint of the images.
            prompts: One per class.
            features: Key of the public features that are kept with them, if any.
        """
        parts: list[Any] = [data_fingerprint, prompts, *self.shown_by]
        if self.resolution != self.native_resolution:  # otherwise as before there was a choice
            parts.append(["resolution", self.resolution])
        return short_hash(parts if features is None else [*parts, features])

    def pool(self, kind: str) -> dict[str, Matrix]:
        """The candidate pool without weights, see :func:`candidate_pool`.

        Raises:
            ConfigError: The model has no such matrices.
        """
        return candidate_pool(self.denoiser, kind)

    def check_classes(self, prompts: Sequence[str]) -> None:
        """Checks that the model knows the classes.

        Args:
            prompts: One per class.

        Raises:
            ConfigError: ``model.class_labels`` is needed, or does not fit; or a prompt is too long.
        """
        if not self.family.conditioned_on_labels:
            check_text_model(self.config.class_labels)
            if self.family.conditioning != "text":  # CLIP's cut has a measure: models/words.py
                from sapf_ray.models.text_encoder import check_prompt_lengths

                check_prompt_lengths(self.config, prompts)
            return
        label_ids(
            self.labels,
            self.denoiser_config["num_embeds_ada_norm"],
            prompts=prompts,
            class_labels=self.config.class_labels,
        )

    @property
    def resolution_step(self) -> int:
        """Sides are multiples of it: of what the VAE and, in a transformer, a patch reduce to one.

        A side in between would lose a row without a word: both round down.
        """
        patch = self.denoiser_config.get("patch_size") or 1
        packed = CONDITIONINGS[self.family.conditioning].pack
        return packed * patch * self.native_resolution // latent_side(self.denoiser_config)

    @property
    def full_config(self) -> Mapping[str, Any]:
        """Config of the denoiser with the defaults of its class."""
        network: Any = self.denoiser
        return network.config

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, h, w) of one image's latents at the run's resolution."""
        config = self.full_config
        side = latent_side(config) * self.resolution // self.native_resolution
        return CONDITIONINGS[self.family.conditioning].latent_channels(config), side, side

    def check_resolution(self, resolution: int | None, key: str) -> None:
        """Checks that images of this side can be made; None is the model's own.

        Args:
            resolution: Side in pixels.
            key: Config key that has it.

        Raises:
            ConfigError: Not a multiple of what the VAE, and a transformer's patches, take.
        """
        if resolution is None:
            return
        step = self.resolution_step
        require(
            resolution % step == 0,
            key,
            resolution,
            f"must be a multiple of {step}; the model was made for {self.native_resolution}",
        )

    @torch.no_grad()
    def blank_prediction(self) -> torch.Tensor:
        """What the empty network makes of one image at the run's resolution: shapes, no values."""
        noisy = torch.empty(1, *self.latent_shape, device="meta")
        kind = self.family.conditioning
        conditions = blank_conditions(kind, self.full_config, device="meta")
        return predict(self.denoiser, noisy, torch.empty(1, device="meta"), conditions)

    def check_denoiser_takes_it(self) -> None:
        """Tries the run's resolution, where it is not the model's own, on the empty network.

        Raises:
            ConfigError: The network fails, or what it predicts has another size.
        """
        if self.resolution == self.native_resolution:
            return
        try:
            made = tuple(self.blank_prediction().shape[2:])
            fault = ""
            if made != self.latent_shape[1:]:
                fault = f"it predicts {made[0]} x {made[1]} latents"
        except _FAULTS as error:
            fault = reason(error)
        require(
            not fault,
            "model.resolution",
            self.resolution,
            f"must be a size that the denoiser takes ({fault}); it was made for "
            f"{self.native_resolution}",
        )

    def __getstate__(self) -> dict[str, Any]:
        """The fields and the hash; another process builds the empty network anew."""
        return {name: value for name, value in self.__dict__.items() if name != "denoiser"}


def _check_keys(config: ModelConfig, index: Mapping[str, Any], family: Family) -> None:
    """Keys that not every model takes.

    Raises:
        ConfigError: One that this model does not.
    """
    scheduler = str((index.get("scheduler") or ["", ""])[1])
    flows = family.flow is not None or "FlowMatch" in scheduler
    require(
        config.prediction_type is None or not flows,
        "model.prediction_type",
        config.prediction_type,
        f"must be left out: the model's {scheduler} has no other prediction than its own",
    )
    require(
        checkpoint_of(config) is None or family.folder == "unet",
        "model.configs",
        config.configs,
        f"must be of a U-Net's pipeline for a single file; is a {index['_class_name']}",
    )


def content_hash(model: ModelConfig | str) -> str:
    """Hex digest over all that loading the model would read: configs, tokenizer and weights.

    Depends on contents and relative names alone, never on where or when files were written, so a
    copy has the same digest. A model of the hub is fetched first, as loading it would.

    Args:
        model: How the user named it; a path alone means the defaults.

    Raises:
        DataError: The model cannot be found or read.
    """
    config = as_config(model)
    place = resolve_model(config)
    index, family = read_index(config)
    try:
        if not Path(place).is_dir():
            which = {"variant": config.variant, "revision": config.revision}
            place = family.pipeline_class.download(place, **which, **family.options)
        folder = Path(place)
        checkpoint = checkpoint_of(config)
        files = [folder / INDEX]
        for component in family.components:
            if not (index.get(component) or [None])[0]:
                continue  # SD3 may come without T5
            files += _configs(folder / component)
            if checkpoint is None:
                files += weight_files(folder / component, config.variant)
        named = [[file.relative_to(folder).as_posix(), file_digest(file)] for file in files]
        if checkpoint is not None:
            named.append(["checkpoint", file_digest(checkpoint)])
        return short_hash(named, digits=64)
    except (OSError, ValueError) as error:
        raise unreadable(config, error) from error


def _configs(folder: Path) -> list[Path]:
    """Files of one component that are neither weights nor a read-me, in a fixed order."""
    files = sorted(path for path in folder.iterdir() if path.is_file())
    return [path for path in files if path.suffix in (".json", ".txt", ".model")]
