"""The public corpus: deterministic, labelled, and apart from its held-out fonts."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from sapf_ray.glyphs import (
    CHARACTERS,
    HELD_OUT_FONTS,
    PRETRAIN_FONTS,
    GlyphCorpus,
    GlyphStyle,
    prompt_for,
    skeletonize,
    stand_in_digits,
)
from sapf_ray.models.glyph_features import BUNDLED_FEATURES
from sapf_ray.models.location import BUNDLED_DIR

FEW_FONTS = ("DejaVuSans", "DejaVuSansMono", "cmr10")


@pytest.fixture(scope="module")
def corpus() -> GlyphCorpus:
    return GlyphCorpus(FEW_FONTS, seed=3)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_held_out_fonts_are_not_pretrained_on():
    assert not set(HELD_OUT_FONTS) & set(PRETRAIN_FONTS)
    assert GlyphCorpus(None).fonts == PRETRAIN_FONTS


@pytest.mark.parametrize("card", ["glyphs-tiny", "glyph-features"])
def test_model_cards_name_this_corpus(card):
    text = (BUNDLED_DIR / card / "README.md").read_text()
    found = re.search(r"corpus hash \| `([0-9a-f]{64})`", text)
    assert found is not None
    assert found[1] == GlyphCorpus(PRETRAIN_FONTS, CHARACTERS).corpus_hash()
    assert not any(re.search(rf"\b{font}\b", text) for font in HELD_OUT_FONTS)
    assert BUNDLED_FEATURES.parent == BUNDLED_DIR


def test_rendering_is_deterministic_and_seeded(corpus):
    images, labels = corpus.render(64, generator())
    again, labels_again = corpus.render(64, generator())
    other, _ = corpus.render(64, generator(1))
    assert images.shape == (64, 1, 32, 32) and images.dtype == torch.uint8
    assert torch.equal(images, again) and torch.equal(labels, labels_again)
    assert not torch.equal(images, other)
    twin = GlyphCorpus(FEW_FONTS, seed=3)
    assert torch.equal(GlyphCorpus(FEW_FONTS, seed=3).render(8)[0], twin.render(8)[0])


def test_requested_classes_are_drawn(corpus):
    requested = [3, 1, 4, 61]
    assert corpus.render(4, generator(), classes=requested)[1].tolist() == requested


def test_ink_is_mostly_light_on_dark_and_centred(corpus):
    images, _ = corpus.render(512, generator())
    border = torch.cat([images[..., 0, :], images[..., -1, :]], -1).float().mean((1, 2))
    assert (border < 128).float().mean() > 0.9
    assert (images.amax((1, 2, 3)) > 120).all()
    assert images[..., 8:24, 8:24].float().mean() > images.float().mean()


def test_coarse_side_limits_the_resolution():
    style = GlyphStyle(sides=(8,))
    image = GlyphCorpus(("DejaVuSans",), "8", style=style).render(16, generator())[0].float()
    # Linear between the centres of an 8 x 8 grid: no curvature inside a cell.
    bend = image[..., 2:] - 2 * image[..., 1:-1] + image[..., :-2]
    inside = [i for i in range(30) if i % 4 in (2, 3)]
    assert bend[..., 4:-4, inside].abs().mean() < 1.0 < bend.abs().mean()


def test_stand_in_is_balanced_and_of_the_agreed_shape():
    (train, train_labels), (test, test_labels) = stand_in_digits(105, 40, seed=1)
    assert train.shape == (105, 32, 32, 3) and test.shape == (40, 32, 32, 3)
    assert train.dtype == np.uint8
    assert np.bincount(test_labels, minlength=10).tolist() == [4] * 10
    counts = np.bincount(train_labels, minlength=10)
    assert counts.max() - counts.min() <= 1
    assert np.array_equal(train, stand_in_digits(105, 40, seed=1)[0][0])


def test_skeleton_is_thin_and_connected_like_its_glyph():
    bar = np.zeros((1, 20, 20), bool)
    bar[0, 3:17, 8:13] = True
    bones = skeletonize(bar)[0]
    assert 8 <= bones.sum() <= 14
    assert bones.sum(1).max() == 1
    assert not (bones & ~bar[0]).any()


@pytest.mark.parametrize(
    ("character", "prompt"),
    [
        ("3", "An image of the digit three"),
        ("A", "An image of the uppercase letter A"),
        ("b", "An image of the lowercase letter b"),
    ],
)
def test_prompts(character, prompt):
    assert prompt_for(character) == prompt


def test_prompts_are_distinct():
    assert len({prompt_for(c) for c in CHARACTERS}) == len(CHARACTERS) == 62


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: GlyphCorpus(("Comic Sans",)), "Comic Sans"),
        (lambda: GlyphCorpus(()), "fonts"),
        (lambda: GlyphCorpus(FEW_FONTS, ""), "characters"),
        (lambda: GlyphCorpus(FEW_FONTS, "é"), "characters"),
        (lambda: GlyphCorpus(("DejaVuSansMono",)), "zero"),
        (lambda: GlyphCorpus(FEW_FONTS).render(0), "n: 0"),
        (lambda: GlyphCorpus(FEW_FONTS).render(2, classes=[1]), "classes"),
        (lambda: prompt_for("ab"), "'ab'"),
    ],
)
def test_bad_arguments_are_named(make, named):
    with pytest.raises(ValueError, match=named):
        make()
