"""A model family: a pipeline of the user's own, of the same parts as Stable Diffusion."""

from diffusers import StableDiffusionPipeline, UNet2DConditionModel

from sapf_ray.models.families import FAMILIES, Family


class OwnPipeline(StableDiffusionPipeline):
    """Its ``model_index.json`` says ``"_class_name": "OwnPipeline"``."""


FAMILIES["OwnPipeline"] = Family(
    pipeline=OwnPipeline,
    denoiser=UNet2DConditionModel,
    folder="unet",
    components=("scheduler", "text_encoder", "tokenizer", "unet", "vae"),
    options={"safety_checker": None, "requires_safety_checker": False},
)
