"""Odd files and folders as people have them, built anew by each test.

A case is read right (dark left half, light right half), or is answered by one line with the given
words. Nothing here is downloaded, and every file is a few kilobytes.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageCms

DARK = 10
LIGHT = 200
Content = Callable[[], bytes]


@dataclass(frozen=True, kw_only=True)
class ImageCase:
    """One odd image file.

    Attributes:
        name: File name.
        content: Makes its bytes.
        words: What the one line must hold; empty where the image must be read right.
        settings: Fields of the data config.
    """

    name: str
    content: Content
    words: tuple[str, ...] = ()
    settings: dict[str, Any] = field(default_factory=dict)


def picture(width: int = 24, height: int = 16) -> Image.Image:
    """RGB: dark left half, light right half."""
    pixels = np.full((height, width, 3), DARK, np.uint8)
    pixels[:, width // 2 :] = LIGHT
    return Image.fromarray(pixels)


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    """The bytes of an image file."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def grey(kind: type, *, white: float, black: float = 0.0) -> np.ndarray:
    """The picture's grey values on another scale, of a NumPy type."""
    levels = np.asarray(picture().convert("L")) / 255
    return (black + levels * (white - black)).astype(kind)


def _turned(orientation: int, kind: str) -> bytes:
    """Stored so that the EXIF orientation turns it right."""
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    image = picture()
    if orientation in undo:
        image = image.transpose(undo[orientation])
    exif = Image.Exif()
    exif[0x0112] = orientation
    return saved(image, kind, exif=exif)


def _chunk(kind: bytes, content: bytes) -> bytes:
    checksum = zlib.crc32(kind + content)
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)


def png(pixels: np.ndarray, *, depth: int, colour: int) -> bytes:
    """A PNG of samples that Pillow does not write: 16 bits, several channels."""
    height, width = pixels.shape[:2]
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    parts = ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(*part) for part in parts)


def tiff(pixels: np.ndarray, *, photometric: int = 1, sample_format: int = 1) -> bytes:
    """An uncompressed little-endian TIFF of one strip; (H, W) or (H, W, channels)."""
    height, width = pixels.shape[:2]
    channels = 1 if pixels.ndim == 2 else pixels.shape[2]
    bits = pixels.dtype.itemsize * 8
    data = pixels.tobytes()
    start = 8 + len(data)
    extra = struct.pack(f"<{channels}H", *[bits] * channels)
    wide = channels > 2
    entries = (
        (256, 4, 1, width),
        (257, 4, 1, height),
        (258, 3, channels, start if wide else bits),
        (259, 3, 1, 1),
        (262, 3, 1, photometric),
        (273, 4, 1, 8),
        (277, 3, 1, channels),
        (278, 4, 1, height),
        (279, 4, 1, len(data)),
        (339, 3, 1, sample_format),
    )
    directory = start + (len(extra) if wide else 0)
    table = struct.pack("<H", len(entries))
    table += b"".join(struct.pack("<HHII", *entry) for entry in entries) + b"\0\0\0\0"
    return b"II*\0" + struct.pack("<I", directory) + data + extra * wide + table


def _huge_png() -> bytes:
    """Promises 60,000 x 60,000 pixels and holds none."""
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 0, 0, 0, 0)
    parts = ((b"IHDR", header), (b"IDAT", zlib.compress(b"")), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(*part) for part in parts)


def _large_png() -> bytes:
    """110 million pixels, one bit each: Pillow warns, but reads it."""
    width, height = 11_000, 10_000
    row = b"\0" + b"\0" * (width // 16) + b"\xff" * (width // 8 - width // 16)
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    parts = ((b"IHDR", header), (b"IDAT", zlib.compress(row * height, 1)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(*part) for part in parts)


def _frames(kind: str) -> bytes:
    """The picture, then a black frame."""
    black = Image.new("RGB", (24, 16))
    return saved(picture(), kind, save_all=True, append_images=[black])


def _pgm(white: int) -> bytes:
    kind = np.dtype(">u2") if white > 255 else np.uint8
    return f"P5 24 16 {white}\n".encode() + grey(kind, white=white).tobytes()


def _plain_ppm() -> bytes:
    values = " ".join(str(value) for value in np.asarray(picture()).ravel())
    return f"P3\n# a comment\n24 16\n255\n{values}\n".encode()


def _over_nothing(kind: str) -> bytes:
    """White parts are transparent."""
    alpha = np.asarray(picture().convert("L")) < 100
    image = Image.new("RGBA", (24, 16), (DARK, DARK, DARK, 255))
    image.putalpha(Image.fromarray((alpha * 255).astype(np.uint8)))
    return saved(image, kind)


def _transparent_palette(kind: str) -> bytes:
    image = Image.new("P", (24, 16))
    image.putpalette([DARK, DARK, DARK, 0, 0, 0])
    image.paste(1, (12, 0, 24, 16))
    return saved(image, kind, transparency=1)


def _profiled(kind: str) -> bytes:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    return saved(picture(), kind, icc_profile=profile)


def _in_mode(mode: str, kind: str, **options: Any) -> bytes:
    return saved(picture().convert(mode), kind, **options)


def _cut(content: bytes, share: float) -> bytes:
    return content[: int(len(content) * share)]


def _flipped(content: bytes) -> bytes:
    """Some bytes in the middle are others."""
    middle = len(content) // 2
    return (
        content[:middle]
        + bytes(255 - b for b in content[middle : middle + 8])
        + content[middle + 8 :]
    )


def _noisy(kind: str) -> bytes:
    """Too irregular to be compressed to nothing, so that a cut hits pixels."""
    rng = np.random.default_rng(0)
    return saved(Image.fromarray(rng.integers(0, 256, (64, 64, 3), np.uint8)), kind)


def _formats() -> list[ImageCase]:
    """The picture in every format that is written here."""
    kinds = {
        ".png": "PNG", ".apng": "PNG", ".jpg": "JPEG", ".JPG": "JPEG", ".jpeg": "JPEG",
        ".jpe": "JPEG", ".jfif": "JPEG", ".bmp": "BMP", ".dib": "DIB", ".gif": "GIF",
        ".tif": "TIFF", ".tiff": "TIFF", ".TIF": "TIFF", ".webp": "WEBP", ".jp2": "JPEG2000",
        ".pcx": "PCX", ".ppm": "PPM", ".pnm": "PPM", ".tga": "TGA", ".sgi": "SGI", ".rgb": "SGI",
        ".ico": "ICO", ".im": "IM", ".dds": "DDS", ".mpo": "MPO", ".qoi": "QOI",
    }  # fmt: skip
    from PIL import features

    if features.check("avif"):
        kinds[".avif"] = "AVIF"
    cases = []
    for ending, kind in kinds.items():
        options = {"lossless": True} if kind == "WEBP" else {}
        if kind == "ICO":
            options = {"sizes": [(24, 16)]}
        content = _later(saved, picture(), kind, **options)
        cases.append(ImageCase(name=f"format{ending}", content=content))
    cases.append(ImageCase(name="grey.pgm", content=lambda: _pgm(255)))
    cases.append(ImageCase(name="plain.ppm", content=_plain_ppm))
    cases.append(ImageCase(name="bits.pbm", content=_later(_in_mode, "1", "PPM")))
    cases.append(ImageCase(name="bits.xbm", content=_later(_xbm)))
    for compression in ("tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg", "tiff_deflate"):
        content = _later(saved, picture(), "TIFF", compression=compression)
        cases.append(ImageCase(name=f"{compression}.tif", content=content))
    return cases


def _xbm() -> bytes:
    """Ones are black."""
    return saved(picture().convert("L").point(lambda v: 255 * (v > 100)).convert("1"), "XBM")


def _later(make: Callable[..., bytes], *args: Any, **options: Any) -> Content:
    return lambda: make(*args, **options)


def _modes() -> list[ImageCase]:
    """Colour modes, palettes and transparency."""
    pairs = (
        ("L", "PNG"), ("LA", "PNG"), ("P", "PNG"), ("1", "PNG"), ("RGBA", "PNG"), ("L", "JPEG"),
        ("CMYK", "JPEG"), ("L", "TIFF"), ("LA", "TIFF"), ("P", "TIFF"), ("1", "TIFF"),
        ("RGBA", "TIFF"), ("CMYK", "TIFF"), ("YCbCr", "TIFF"), ("L", "GIF"), ("P", "GIF"),
        ("P", "BMP"), ("L", "BMP"), ("1", "BMP"), ("RGBA", "BMP"), ("RGBA", "TGA"), ("LA", "TGA"),
        ("L", "WEBP"), ("RGBA", "WEBP"), ("P", "PCX"), ("L", "SGI"), ("RGBA", "JPEG2000"),
        ("L", "JPEG2000"),
    )  # fmt: skip
    cases = []
    for mode, kind in pairs:
        content = _later(_in_mode, mode, kind)
        ending = {"JPEG2000": "jp2"}.get(kind, kind.lower())
        cases.append(ImageCase(name=f"mode_{mode}.{ending}", content=content))
    for kind in ("PNG", "WEBP", "TIFF"):
        content = _later(_over_nothing, kind)
        cases.append(ImageCase(name=f"clear.{kind.lower()}", content=content))
    for kind in ("PNG", "GIF"):
        content = _later(_transparent_palette, kind)
        cases.append(ImageCase(name=f"clear_palette.{kind.lower()}", content=content))
    for kind in ("GIF", "TIFF", "WEBP", "PNG"):
        cases.append(ImageCase(name=f"frames.{kind.lower()}", content=_later(_frames, kind)))
    return cases


def _depths() -> list[ImageCase]:
    """Pixels of more than 8 bits: with their range they are right, without it one line says so."""
    full = (0.0, 65535.0)
    needs = ("data.pixel_range",)
    rgb = np.asarray(picture()).astype(np.uint16) * 257
    alpha = np.full((16, 24, 1), 65535, np.uint16)
    deep = {
        "u16.png": (_later(saved, Image.fromarray(grey(np.uint16, white=65535)), "PNG"), full),
        "u12.png": (_later(saved, Image.fromarray(grey(np.uint16, white=4095)), "PNG"), (0, 4095)),
        "u16.tif": (_later(tiff, grey(np.uint16, white=65535)), full),
        "u12.tif": (_later(tiff, grey(np.uint16, white=4095)), (0, 4095)),
        "white_is_zero.tif": (
            _later(tiff, 4095 - grey(np.uint16, white=4095), photometric=0),
            (0, 4095),
        ),
        "hounsfield.tif": (
            _later(tiff, grey(np.int16, black=-1000, white=400), sample_format=2),
            (-1000, 400),
        ),
        "u32.tif": (_later(tiff, grey(np.uint32, white=100_000)), (0, 100_000)),
        "s32.tif": (
            _later(tiff, grey(np.int32, black=-500, white=500), sample_format=2),
            (-500, 500),
        ),
        "f32.tif": (_later(tiff, grey(np.float32, white=1), sample_format=3), (0, 1)),
        "f32_negative.tif": (
            _later(tiff, grey(np.float32, black=-1, white=1), sample_format=3),
            (-1, 1),
        ),
        "rgb16.png": (_later(png, rgb, depth=16, colour=2), full),
        "rgba16.png": (_later(png, np.concatenate([rgb, alpha], 2), depth=16, colour=6), full),
        "rgb16.tif": (_later(tiff, rgb, photometric=2), full),
    }
    cases = []
    for name, (content, limits) in deep.items():
        given = {"pixel_range": limits}
        cases.append(ImageCase(name=name, content=content, settings=given))
        cases.append(ImageCase(name=f"unknown_{name}", content=content, words=needs))
    stated = {"pgm16.pgm": 65535, "pgm12.pgm": 4095, "pgm10.pgm": 1023, "pgm7.pgm": 127}
    for name, white in stated.items():
        cases.append(ImageCase(name=name, content=_later(_pgm, white)))
    jp2 = _later(saved, Image.fromarray(grey(np.uint16, white=65535)), "JPEG2000")
    cases.append(ImageCase(name="u16.jp2", content=jp2))
    nan = grey(np.float32, white=1)
    nan[3, 3] = np.nan
    cases.append(
        ImageCase(
            name="nan.tif",
            content=_later(tiff, nan, sample_format=3),
            settings={"pixel_range": (0, 1)},
            words=("nan.tif", "NaN"),
        )
    )
    return cases


def _profiles() -> list[ImageCase]:
    """EXIF and colour profiles, also damaged ones, which are no reason to stop."""
    cases = []
    for orientation in (*range(1, 9), 0, 99):
        for kind in ("JPEG", "PNG", "TIFF")[: 3 if orientation == 6 else 1]:
            name = f"orientation_{orientation}.{kind.lower()}"
            cases.append(ImageCase(name=name, content=_later(_turned, orientation, kind)))
    for kind in ("JPEG", "PNG", "TIFF", "WEBP"):
        content = _later(_profiled, kind)
        cases.append(ImageCase(name=f"profile.{kind.lower()}", content=content))
    bad_profile = _later(saved, picture(), "PNG", icc_profile=b"no profile")
    cases.append(ImageCase(name="bad_profile.png", content=bad_profile))
    for i, exif in enumerate((b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0garbage")):
        content = _later(saved, picture(), "JPEG", exif=exif)
        cases.append(ImageCase(name=f"bad_exif_{i}.jpg", content=content))
    cases.append(
        ImageCase(name="comment.gif", content=_later(saved, picture(), "GIF", comment=b"\xff"))
    )
    cases.append(
        ImageCase(
            name="progressive.jpg", content=_later(saved, picture(), "JPEG", progressive=True)
        )
    )
    cases.append(
        ImageCase(name="padded.jpg", content=lambda: saved(picture(), "JPEG") + b"\0" * 99)
    )
    return cases


def _damages() -> list[ImageCase]:
    """Files that are not what their names say, cut off, or empty."""
    cases = []
    for kind in ("PNG", "JPEG", "BMP", "GIF", "TIFF", "WEBP", "JPEG2000", "PPM", "TGA"):
        ending = {"JPEG2000": "jp2"}.get(kind, kind.lower())
        for share in (0.02, 0.6):
            name = f"cut_{share}.{ending}"
            content = _later(lambda kind, share: _cut(_noisy(kind), share), kind, share)
            cases.append(ImageCase(name=name, content=content, words=(name, "cannot be read")))
    for ending in ("png", "jpg", "tif", "gif", "webp", "bmp", "jp2", "ico"):
        for what, content in (("empty", b""), ("text", b"not an image\n" * 9), ("nul", b"\0" * 99)):
            name = f"{what}.{ending}"
            cases.append(
                ImageCase(name=name, content=_later(bytes, content), words=(name, "cannot be read"))
            )
    flipped = _later(lambda: _flipped(_noisy("PNG")))
    cases.append(ImageCase(name="flipped.png", content=flipped, words=("flipped.png",)))
    cases.append(ImageCase(name="huge.png", content=_huge_png, words=("huge.png", "scale it down")))
    cases.append(ImageCase(name="large.png", content=_large_png))
    html = b"<!DOCTYPE html><title>404</title>"
    cases.append(ImageCase(name="page.jpg", content=_later(bytes, html), words=("page.jpg",)))
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EOF\n"
    cases.append(ImageCase(name="program.png", content=_later(bytes, eps), words=("program.png",)))
    pairs = (("JPEG", "png"), ("PNG", "jpg"), ("TIFF", "jpg"), ("WEBP", "png"), ("BMP", "gif"))
    for kind, ending in pairs:
        content = _later(saved, picture(), kind)
        cases.append(ImageCase(name=f"really_{kind}.{ending}", content=content))
    return cases


IMAGE_CASES = (*_formats(), *_modes(), *_depths(), *_profiles(), *_damages())


def image_folder(root: Path, case: ImageCase) -> Path:
    """Two classes, given splits, the odd image among the training images of the first."""
    ordinary = saved(picture(), "PNG")
    for part in ("train/a", "train/b", "test/a", "test/b"):
        (root / part).mkdir(parents=True)
        (root / part / "ordinary.png").write_bytes(ordinary)
    path = root / "train" / "a" / case.name
    path.write_bytes(case.content())
    return path
