"""A method: FFA-LoRA (Sun et al. 2024), which trains one of the two LoRA factors."""

from sapf_ray.methods import METHODS, Method

METHODS["ffa-lora"] = Method(
    title="FFA-LoRA: the first factor stays random",
    source="Sun et al. 2024",
    overrides={"saliency.ratio": 1.0, "finetune.train_lora_a": False},
)
