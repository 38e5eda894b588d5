"""The sets of MedMNIST+ with 2-D images and one label each.

Class names, sizes and order are those of ``medmnist.INFO`` (package medmnist 3, Zenodo record
10519652; Yang et al., Scientific Data 2023). Prompts are ours, except OCTMNIST's, which are those
of the DP-SAPF paper's Table 14.
"""

from __future__ import annotations

from sapf_ray.data.known_set import KnownSet

_URL = "https://zenodo.org/records/10519652"
_OCT = "An optical coherence tomography (OCT) image for retinal disease"
_OCT_PROMPTS = tuple(f"{_OCT} {i}" for i in range(1, 5))
_ORGANS = (
    "bladder",
    "femur-left",
    "femur-right",
    "heart",
    "kidney-left",
    "kidney-right",
    "liver",
    "lung-left",
    "lung-right",
    "pancreas",
    "spleen",
)
_CT = "An abdominal CT image of the {name}"


def _row(
    title: str,
    sizes: tuple[int, int, int],
    *,
    classes: tuple[str, ...],
    prompt: str = "",
    prompts: tuple[str, ...] = (),
    licence: str = "CC BY 4.0",
    notes: str = "",
) -> KnownSet:
    """A set by its title; ``prompt`` holds ``{name}``, with words for hyphens."""
    name = title.lower()
    n_train, n_val, n_test = sizes
    words = [label.replace("-", " ") for label in classes]
    return KnownSet(
        name=name,
        title=f"{title} (MedMNIST+)",
        url=_URL,
        path=f"{name}_128.npz (also _224, _64 and {name}.npz) or its folder",
        licence=licence,
        class_names=classes,
        prompts=prompts or tuple(prompt.replace("{name}", word) for word in words),
        n_train=n_train,
        n_val=n_val,
        n_test=n_test,
        resolution=128,
        notes=f"Published split.{notes}",
    )


_ROWS = (
    _row(
        "OCTMNIST",
        (97_477, 10_832, 1_000),
        classes=("choroidal neovascularization", "diabetic macular edema", "drusen", "normal"),
        prompts=_OCT_PROMPTS,
    ),
    _row(
        "PathMNIST",
        (89_996, 10_004, 7_180),
        classes=(
            "adipose",
            "background",
            "debris",
            "lymphocytes",
            "mucus",
            "smooth muscle",
            "normal colon mucosa",
            "cancer-associated stroma",
            "colorectal adenocarcinoma epithelium",
        ),
        prompt="A histopathology image of {name}",
        notes=" Several images show one patient: the guarantee is per image.",
    ),
    _row(
        "DermaMNIST",
        (7_007, 1_003, 2_005),
        classes=(
            "actinic keratoses and intraepithelial carcinoma",
            "basal cell carcinoma",
            "benign keratosis-like lesions",
            "dermatofibroma",
            "melanoma",
            "melanocytic nevi",
            "vascular lesions",
        ),
        prompt="A dermatoscopic image of {name}",
        licence="CC BY-NC 4.0",
        notes=" Several images show one lesion: the guarantee is per image.",
    ),
    _row(
        "PneumoniaMNIST",
        (4_708, 524, 624),
        classes=("normal", "pneumonia"),
        prompt="A chest X-ray image: {name}",
    ),
    _row(
        "BreastMNIST",
        (546, 78, 156),
        classes=("malignant", "normal, benign"),
        prompt="A breast ultrasound image: {name}",
    ),
    _row(
        "BloodMNIST",
        (11_959, 1_712, 3_421),
        classes=(
            "basophil",
            "eosinophil",
            "erythroblast",
            "immature granulocytes(myelocytes, metamyelocytes and promyelocytes)",
            "lymphocyte",
            "monocyte",
            "neutrophil",
            "platelet",
        ),
        prompt="A microscope image of a blood cell: {name}",
    ),
    _row(
        "TissueMNIST",
        (165_466, 23_640, 47_280),
        classes=(
            "Collecting Duct, Connecting Tubule",
            "Distal Convoluted Tubule",
            "Glomerular endothelial cells",
            "Interstitial endothelial cells",
            "Leukocytes",
            "Podocytes",
            "Proximal Tubule Segments",
            "Thick Ascending Limb",
        ),
        prompt="A microscope image of a kidney cortex cell: {name}",
    ),
    _row("OrganAMNIST", (34_561, 6_491, 17_778), classes=_ORGANS, prompt=f"{_CT}, axial"),
    _row("OrganCMNIST", (12_975, 2_392, 8_216), classes=_ORGANS, prompt=f"{_CT}, coronal"),
    _row("OrganSMNIST", (13_932, 2_452, 8_827), classes=_ORGANS, prompt=f"{_CT}, sagittal"),
)

MEDMNIST: dict[str, KnownSet] = {row.name: row for row in _ROWS}
"""Source name → row."""

_SOLID = (
    "organmnist3d",
    "nodulemnist3d",
    "adrenalmnist3d",
    "fracturemnist3d",
    "vesselmnist3d",
    "synapsemnist3d",
)

NOT_OFFERED: dict[str, str] = {
    "chestmnist": "has 14 labels an image (multi-label); a record must have one",
    "retinamnist": "has grades on a scale (ordinal regression) and no classes",
    **dict.fromkeys(_SOLID, "holds volumes; images must be two-dimensional"),
}
"""Sets of the same collection that cannot be used → why."""
