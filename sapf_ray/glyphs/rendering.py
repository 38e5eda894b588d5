"""From distance fields to images: one random warp, pen, ink and resolution per image."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from sapf_ray.glyphs.fonts import CAP_HEIGHT, FIELD

IMAGE_SIDE = 32  # pixels

Range = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class GlyphStyle:
    """Ranges (low, high) of the uniform draws that turn a glyph into an image."""

    height: Range = (0.74, 1.02)  # of a digit, in frame heights
    aspect: Range = (0.7, 1.2)  # extra horizontal scale
    rotation: Range = (-12.0, 12.0)  # degrees
    slant: Range = (-0.15, 0.35)  # shear, frame widths per frame height
    shift: float = 0.05  # largest, in frame sides
    elastic: Range = (0.0, 0.1)  # std of the warp's nodes, in half frames
    pen: Range = (1.5, 5.0)  # skeleton pen radius, 1/64 frame
    weight: Range = (-0.3, 3.0)  # outline growth, 1/64 frame
    softness: Range = (1.0, 3.0)  # half width of the ink's edge, 1/64 frame
    ink: Range = (0.7, 1.0)  # brightness
    paper: Range = (0.0, 0.08)  # brightness
    skeleton_share: float = 0.5
    sides: tuple[int, ...] = (8, 8, 8, 10, 12, 16, 24, 32)  # true resolution, drawn uniformly


PUBLIC_STYLE = GlyphStyle()
STAND_IN_STYLE = replace(
    PUBLIC_STYLE,
    height=(0.88, 1.0),
    aspect=(0.65, 0.9),
    slant=(-0.05, 0.3),
    elastic=(0.06, 0.12),
    pen=(3.0, 5.5),
    weight=(1.0, 3.5),
    softness=(2.0, 4.0),
    sides=(8,),
)


class GlyphRenderer:
    """Draws one batch of ``n`` images in a style.

    The order of the draws is part of the corpus: another order gives other images.
    """

    def __init__(
        self,
        style: GlyphStyle,
        n: int,
        *,
        generator: torch.Generator,
    ) -> None:
        self._style = style
        self._n = n
        self._generator = generator

    def skeletons(self) -> torch.Tensor:
        """Which images are drawn as pen strokes instead of print: bool (n,)."""
        return torch.rand(self._n, generator=self._generator) < self._style.skeleton_share

    def render(self, fields: torch.Tensor, skeletons: torch.Tensor) -> torch.Tensor:
        """Images uint8 (n, 1, 32, 32) of distance fields (n, 1, 64, 64)."""
        style = self._style
        scale_y = self._uniform(style.height) * FIELD / CAP_HEIGHT
        scale_x = scale_y * self._uniform(style.aspect)
        grid = self._grid(scale_x, scale_y)
        distance = F.grid_sample(fields, grid, padding_mode="border", align_corners=False)

        # Back from field pixels to 1/64 frame, so that the pen does not grow with the glyph.
        distance = distance * _per_image((scale_x * scale_y).sqrt())
        pen = self._uniform(style.pen)
        weight = self._uniform(style.weight)
        reach = _per_image(torch.where(skeletons, pen, weight))
        softness = _per_image(self._uniform(style.softness))
        ink = (0.5 + (reach - distance) / (2 * softness)).clamp(0, 1)

        ink = self._coarsen(ink)
        # Blurred ink is stretched back to full contrast, as a scanner's levels would be.
        ink = ink / ink.amax((1, 2, 3), keepdim=True).clamp_min(0.3)
        bright = self._uniform(style.ink)
        dark = self._uniform(style.paper)
        image = _per_image(dark) + _per_image(bright - dark) * ink
        return (image * 255).round().clamp(0, 255).to(torch.uint8)

    def _grid(self, scale_x: torch.Tensor, scale_y: torch.Tensor) -> torch.Tensor:
        """Where in its field each pixel of an image lies: (n, 32, 32, 2) in -1..1."""
        style = self._style
        size = [self._n, 1, IMAGE_SIDE, IMAGE_SIDE]
        forward = self._forward_map(scale_x, scale_y)
        largest = 2 * style.shift
        shifts = [self._uniform((-largest, largest)) for _ in range(2)]
        shift = torch.stack(shifts, -1)
        identity = torch.eye(2, 3).expand(self._n, 2, 3)
        grid = F.affine_grid(identity, size, align_corners=False)
        grid = grid + self._warp() - shift[:, None, None]
        return torch.einsum("nij,nhwj->nhwi", torch.linalg.inv(forward), grid)

    def _forward_map(self, scale_x: torch.Tensor, scale_y: torch.Tensor) -> torch.Tensor:
        """From field to frame (n, 2, 2): scale, then slant, then rotate; the shift comes last."""
        angle = torch.deg2rad(self._uniform(self._style.rotation))
        slant = self._uniform(self._style.slant)
        cos = angle.cos()
        sin = angle.sin()
        # y points down: a positive slant leans the top to the right
        top = torch.stack([cos * scale_x, (-cos * slant - sin) * scale_y], -1)
        bottom = torch.stack([sin * scale_x, (-sin * slant + cos) * scale_y], -1)
        return torch.stack([top, bottom], -2)

    def _warp(self) -> torch.Tensor:
        """Smooth random displacement of every pixel: (n, 32, 32, 2)."""
        nodes = torch.randn(self._n, 2, 4, 4, generator=self._generator)
        nodes = nodes * _per_image(self._uniform(self._style.elastic))
        warp = F.interpolate(nodes, IMAGE_SIDE, mode="bicubic", align_corners=True)
        return warp.permute(0, 2, 3, 1)

    def _coarsen(self, ink: torch.Tensor) -> torch.Tensor:
        """Ink reduced to each image's true resolution and enlarged again."""
        sides = self._style.sides
        drawn = torch.randint(len(sides), (self._n,), generator=self._generator)
        side = torch.tensor(sides)[drawn]
        for low in sorted(set(sides) - {IMAGE_SIDE}):
            rows = side == low
            small = F.adaptive_avg_pool2d(ink[rows], low)
            ink[rows] = F.interpolate(small, IMAGE_SIDE, mode="bilinear", align_corners=False)
        return ink

    def _uniform(self, bounds: Range) -> torch.Tensor:
        """One draw per image, (n,)."""
        low, high = bounds
        return low + (high - low) * torch.rand(self._n, generator=self._generator)


def _per_image(values: torch.Tensor) -> torch.Tensor:
    """(n,) as (n, 1, 1, 1), to multiply images with."""
    return values[:, None, None, None]
