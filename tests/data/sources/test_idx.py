"""MNIST's files: packed by other programs, called otherwise, damaged inside."""

from __future__ import annotations

import gzip
import struct
import zlib

import numpy as np
import pytest

from sapf_ray.data import by_position
from sapf_ray.data.catalog import DATA_SETS
from tests.data.sources.made import idx, idx_files
from tests.data.sources.published import open_named, read_all, refusal

NAME = "train-images-idx3-ubyte"


def pixels(seed=3):
    return np.random.default_rng(seed).integers(0, 256, (20, 28, 28), np.uint8)


@pytest.fixture
def folder(tmp_path):
    return idx_files(packed=True)(tmp_path, "right")


def test_every_pixel_in_any_order(folder, monkeypatch):
    monkeypatch.setattr(by_position, "STATE_EVERY", 3000)
    monkeypatch.setattr(by_position, "_INPUT", 100)
    source = open_named("mnist", folder)
    order = np.array([19, 0, 7, 7, 3])
    images, labels = source.read("train", order, resolution=28)
    assert np.array_equal(images[..., 1], pixels()[order])
    assert labels.tolist() == [9, 0, 7, 7, 3]
    assert source.prompts[7] == "An image of the digit seven"


def test_a_header_with_every_field(folder):
    """As ``gzip`` writes a file's name, and others a comment, extra fields and a checksum."""
    content = idx(pixels())
    head = struct.pack("<2sBBIBB", b"\x1f\x8b", 8, 2 | 4 | 8 | 16, 0, 0, 3)
    head += struct.pack("<H", 5) + b"extra" + b"name.idx\0" + b"a comment\0"
    head += struct.pack("<H", zlib.crc32(head) & 0xFFFF)
    deflate = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    body = deflate.compress(content) + deflate.flush()
    packed = head + body + struct.pack("<II", zlib.crc32(content), len(content))
    assert gzip.decompress(packed) == content
    (folder / f"{NAME}.gz").write_bytes(packed)
    source = open_named("mnist", folder)
    source.verify()
    assert np.array_equal(read_all(source, "train", 28)[0][..., 0], pixels())


def test_names_with_a_dot_and_files_unpacked(folder):
    for path in list(folder.iterdir()):
        content = gzip.decompress(path.read_bytes())
        (folder / path.stem.replace("-idx", ".idx")).write_bytes(content)
        path.unlink()
    source = open_named("mnist", folder)
    assert np.array_equal(read_all(source, "train", 28)[0][..., 0], pixels())


def test_a_flipped_bit_is_found(folder):
    path = folder / f"{NAME}.gz"
    content = bytearray(gzip.compress(idx(pixels()), compresslevel=0))
    content[2000] ^= 1
    path.write_bytes(content)
    assert "not a readable .gz file (CRC check failed" in refusal("mnist", folder)
    path.write_bytes(b"no gzip" * 9)
    assert "not packed by gzip" in refusal("mnist", folder)


def test_images_and_labels_must_agree(folder):
    (folder / f"{NAME}.gz").write_bytes(gzip.compress(idx(pixels()[:19])))
    message = refusal("mnist", folder)
    assert "19 train-images-idx3-ubyte.gz and 20 labels" in message
    assert DATA_SETS["mnist"].url in message
