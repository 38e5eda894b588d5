"""What is publicly known of each public model: bundled ones, and those of the paper (Table 4,
Figure 6) by short name.

>>> PUBLIC_MODELS["sd-v1-5"].hub_id
'stable-diffusion-v1-5/stable-diffusion-v1-5'
>>> models_json()[0]["name"]
'glyphs-tiny'
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class KnownModel:
    """One row; every field is public.

    Attributes:
        name: Value of ``model.path``.
        title: Name in prose.
        architecture: Architecture of the denoiser.
        resolution: Side of its images in pixels.
        parameters: Number of the denoiser's parameters, in millions.
        conditioning: ``text`` (prompts) or ``labels`` (class ids).
        prediction: What the denoiser predicts: ``epsilon`` or ``v_prediction``; a loaded model's
            own scheduler decides.
        hub_id: Where it is obtained, as owner/name on huggingface.co; empty where it ships with
            this package.
        licence: As far as known; it binds the user, not this program.
        notes: What else is worth knowing.
    """

    name: str
    title: str
    architecture: str
    resolution: int
    parameters: float
    conditioning: str = "text"
    prediction: str = "epsilon"
    hub_id: str = ""
    licence: str = "unknown: see the model's page"
    notes: str = ""

    @property
    def obtain(self) -> str:
        """Where the model is obtained."""
        return f"https://huggingface.co/{self.hub_id}" if self.hub_id else "ships with this package"


_OURS = "Apache-2.0 (this package)"
_RAIL = "CreativeML OpenRAIL-M"

PUBLIC_MODELS: dict[str, KnownModel] = {
    row.name: row
    for row in (
        KnownModel(
            name="glyphs-tiny",
            title="Tiny Stable Diffusion of printed and pen-drawn characters",
            architecture="U-Net",
            resolution=32,
            parameters=1.76,
            licence=_OURS,
            notes="The default. Half of its training images were digits.",
        ),
        KnownModel(
            name="letters-tiny",
            title="Tiny Stable Diffusion of letters in serif fonts",
            architecture="U-Net",
            resolution=32,
            parameters=0.75,
            licence=_OURS,
            notes="Another prior: 3 % of its training images were digits. VAE and text encoder of "
            "glyphs-tiny.",
        ),
        KnownModel(
            name="glyphs-dit-tiny",
            title="Tiny DiT of printed and pen-drawn characters",
            architecture="DiT, 6 layers, patch 2",
            resolution=32,
            parameters=0.61,
            conditioning="labels",
            licence=_OURS,
            notes="62 labels, one per character. VAE of glyphs-tiny.",
        ),
        KnownModel(
            name="sd-v1-5",
            title="Stable Diffusion v1-5",
            architecture="U-Net",
            resolution=512,
            parameters=859.5,
            licence=_RAIL,
            hub_id="stable-diffusion-v1-5/stable-diffusion-v1-5",
            notes="The paper's SD-v1-5.",
        ),
        KnownModel(
            name="sd-2-1-base",
            title="Stable Diffusion 2.1 base",
            architecture="U-Net",
            resolution=512,
            parameters=865.9,
            hub_id="Manojb/stable-diffusion-2-1-base",
            licence="CreativeML Open RAIL++-M (the original's; the copy's page may say more)",
            notes="The paper's SD-2-1-base: the copy it names, since "
            "stabilityai/stable-diffusion-2-1-base may be closed. The 768 px version of 2.1 "
            "predicts velocities; its scheduler says so and the loss follows.",
        ),
        KnownModel(
            name="realistic-v6",
            title="Realistic Vision V6.0 B1",
            architecture="U-Net",
            resolution=512,
            parameters=859.5,
            hub_id="SG161222/Realistic_Vision_V6.0_B1_noVAE",
            notes="The paper's Realistic-v6: fine-tuned from Stable Diffusion v1 for photographs.",
        ),
        KnownModel(
            name="prompt2med",
            title="Prompt2MedImage",
            architecture="U-Net",
            resolution=512,
            parameters=859.5,
            hub_id="Nihirc/Prompt2MedImage",
            notes="The paper's Prompt2med: fine-tuned from Stable Diffusion v1 for radiology "
            "images.",
        ),
        KnownModel(
            name="dit-xl-2-256",
            title="DiT-XL/2, 256 px",
            architecture="DiT, 28 layers, patch 2",
            resolution=256,
            parameters=749.8,
            conditioning="labels",
            hub_id="facebook/DiT-XL-2-256",
            licence="CC BY-NC 4.0",
            notes="1,000 ImageNet labels; for other classes name ids in model.class_labels. "
            "Learned variances: the noise half of its output is trained. 675 M in its paper: "
            "diffusers keeps time and label embeddings in every block. "
            "The DP-SAPF paper (Figure 6) does not say which DiT it used.",
        ),
    )
}
"""Short name → row, in the order in which a listing shows them."""


def models_json() -> list[dict[str, Any]]:
    """The catalog for machines: one dict per model with the fields of :class:`KnownModel`, plus
    ``bundled``.
    """
    return [{**asdict(row), "bundled": not row.hub_id} for row in PUBLIC_MODELS.values()]
