"""The corpus of glyph images, its prompts, and the public stand-in of a digit set."""

from __future__ import annotations

import hashlib
import string
from collections.abc import Sequence

import numpy as np
import torch

from sapf_ray.glyphs.fonts import (
    CHARACTERS,
    DIGIT_WORDS,
    HELD_OUT_FONTS,
    PRETRAIN_FONTS,
    font_bank,
)
from sapf_ray.glyphs.rendering import PUBLIC_STYLE, STAND_IN_STYLE, GlyphRenderer, GlyphStyle

_BATCH = 2048  # images rendered at a time


def prompt_for(character: str) -> str:
    """Text prompt of one character of ``CHARACTERS``."""
    if len(character) != 1 or character not in CHARACTERS:
        raise ValueError(f"character: {character!r} is not one of {CHARACTERS!r}")
    if character.isdigit():
        return f"An image of the digit {DIGIT_WORDS[int(character)]}"
    case = "uppercase" if character.isupper() else "lowercase"
    return f"An image of the {case} letter {character}"


class GlyphCorpus:
    """Endless labelled images of ``characters`` in ``fonts``.

    A label is an index in ``characters``. The same arguments, generator state and batch sizes
    give the same images.

    Args:
        fonts: Names of fonts that matplotlib ships; ``PRETRAIN_FONTS`` if None.
        characters: Part of ``CHARACTERS``.
        seed: Seed of the corpus's own generator.
        style: Ranges of the random draws.
    """

    def __init__(
        self,
        fonts: Sequence[str] | None = None,
        characters: str = CHARACTERS,
        *,
        seed: int = 0,
        style: GlyphStyle = PUBLIC_STYLE,
    ) -> None:
        self.fonts = tuple(PRETRAIN_FONTS if fonts is None else fonts)
        self.characters = characters
        self.style = style
        if not self.fonts:
            raise ValueError("fonts: at least one font is needed")
        if not characters or set(characters) - set(CHARACTERS):
            raise ValueError(
                f"characters: {characters!r} must be a non-empty part of {CHARACTERS!r}"
            )
        banks = [font_bank(font) for font in self.fonts]
        columns = [CHARACTERS.index(character) for character in characters]
        self._bitmaps = np.stack([bitmaps[columns] for bitmaps, _ in banks])
        fields = np.stack([fields[columns] for _, fields in banks])
        self._fields = torch.from_numpy(fields)
        self._usable = _usable(self.fonts, characters)
        self._generator = torch.Generator().manual_seed(seed)

    def corpus_hash(self) -> str:
        """SHA-256 over font names, characters and base bitmaps: whether the corpus changed."""
        names = "\n".join((*self.fonts, self.characters))
        digest = hashlib.sha256(names.encode())
        digest.update(self._bitmaps.tobytes())
        return digest.hexdigest()

    def render(
        self,
        n: int,
        generator: torch.Generator | None = None,
        *,
        classes: torch.Tensor | Sequence[int] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Draw ``n`` images: uint8 (n, 1, 32, 32), 0 = black, and int64 labels (n,).

        Args:
            n: Number of images, at least 1.
            generator: Source of randomness; the corpus's own (from ``seed``) if None.
            classes: The n labels to draw; uniform over ``characters`` if None.
        """
        if n < 1:
            raise ValueError(f"n: {n} must be at least 1")
        if generator is None:
            generator = self._generator
        if classes is None:
            labels = torch.randint(len(self.characters), (n,), generator=generator)
        else:
            labels = torch.as_tensor(classes, dtype=torch.int64)
        if labels.shape != (n,):
            raise ValueError(f"classes: shape {tuple(labels.shape)} must be ({n},)")
        images = [self._render_batch(part, generator) for part in labels.split(_BATCH)]
        return torch.cat(images), labels

    def _render_batch(self, labels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        renderer = GlyphRenderer(self.style, len(labels), generator=generator)
        fonts = torch.multinomial(self._usable[labels], 1, generator=generator)[:, 0]
        skeletons = renderer.skeletons()
        fields = self._fields[fonts, labels, skeletons.long()]
        return renderer.render(fields[:, None], skeletons)


def _usable(fonts: Sequence[str], characters: str) -> torch.Tensor:
    """1 where a font draws a character as it is written by hand: float (characters, fonts)."""

    def written(font: str, character: str) -> bool:
        # A monospaced zero is dotted or slashed.
        return not ("Mono" in font and character == "0")

    rows = [[float(written(font, character)) for font in fonts] for character in characters]
    usable = torch.tensor(rows)
    if not bool((usable.sum(1) > 0).all()):
        raise ValueError(f"fonts: none of {tuple(fonts)} has a plain zero")
    return usable


def stand_in_digits(
    n_train: int,
    n_test: int,
    *,
    seed: int = 0,
) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """PUBLIC stand-in for a sensitive digit set: held-out fonts in a style of their own.

    For tuning hyperparameters without a look at sensitive data.

    Returns:
        ``(images, labels)`` for train and for test: uint8 (n, 32, 32, 3), and int64 (n,) in
        0..9, classes balanced to within one image, in random order.
    """
    corpus = GlyphCorpus(HELD_OUT_FONTS, string.digits, seed=seed, style=STAND_IN_STYLE)
    generator = torch.Generator().manual_seed(seed)
    train = _balanced_digits(corpus, n_train, generator=generator)
    test = _balanced_digits(corpus, n_test, generator=generator)
    return train, test


def _balanced_digits(
    corpus: GlyphCorpus,
    n: int,
    *,
    generator: torch.Generator,
) -> tuple[np.ndarray, np.ndarray]:
    order = torch.randperm(n, generator=generator)
    classes = torch.arange(n)[order] % 10
    images, labels = corpus.render(n, generator, classes=classes)
    rgb = images.permute(0, 2, 3, 1).expand(-1, -1, -1, 3)
    return rgb.numpy(), labels.numpy()
