"""DICOM in image folders: values by their public range, and no message tells of the patient."""

from __future__ import annotations

import logging
import sys
import warnings

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, JPEGLSLossless

from sapf_ray.config import DataConfig
from sapf_ray.data import open_source
from sapf_ray.errors import SapfError
from tests.data.folders import some

PATIENT = "Mustermann^Erika"
RAMP = np.tile(np.linspace(0, 1, 12), (12, 1))  # dark left, light right


def write(path, values, **elements):
    """A file as scanners write it: preamble, meta information, patient, pixels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data = Dataset()
    data.file_meta = FileMetaDataset()
    data.file_meta.MediaStorageSOPClassUID = CTImageStorage
    data.file_meta.MediaStorageSOPInstanceUID = pydicom.uid.generate_uid()
    data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data.SOPClassUID = CTImageStorage
    data.PatientName = PATIENT
    data.PatientID = "4711-0815"
    data.PatientBirthDate = "19640812"
    bits = values.dtype.itemsize * 8
    data.Rows, data.Columns = values.shape[-2:]
    data.SamplesPerPixel = 1
    data.PhotometricInterpretation = "MONOCHROME2"
    data.BitsAllocated = bits
    data.BitsStored = bits
    data.HighBit = bits - 1
    data.PixelRepresentation = int(values.dtype.kind == "i")
    data.PixelData = values.tobytes()
    for name, value in elements.items():
        setattr(data, name, value)
    data.save_as(path, enforce_file_format=True)
    return path


@pytest.fixture
def folder(tmp_path):
    """An ordinary folder, and the place of a DICOM file in it."""
    root = tmp_path / "scans"
    some(root, "train/cat", "train/dog", "test/cat", "test/dog", n=2)
    return root, root / "train" / "cat" / "00x.dcm"


def opened(root, **settings):
    return open_source(DataConfig(source="image_folder", path=str(root), **settings))


def image(root, **settings):
    source = opened(root, **settings)
    source.verify()
    assert source.n_train == 5
    return source.read("train", np.array([1]), resolution=12)[0][0]


def is_ramp(pixels, tolerance=2):
    return np.abs(pixels.astype(float) - (RAMP * 255)[..., None]).max() <= tolerance


def refused(root, path, **settings):
    with pytest.raises(SapfError) as caught:
        opened(root, **settings).verify()
    message = str(caught.value)
    assert len(message.splitlines()) == 1 and path.name in message
    for word in ("Mustermann", "Erika", "4711", "1964"):
        assert word not in message
    return message


def test_values_of_8_bits_are_shown_as_they_are(folder):
    root, path = folder
    write(path, (RAMP * 255).round().astype(np.uint8))
    assert is_ramp(image(root))
    assert is_ramp(image(root, pixel_range=(0, 5)))


@pytest.mark.parametrize("name", ["00x", "00x.1.2.840.113619"])
def test_files_of_an_archive_have_no_ending(folder, name):
    root, path = folder
    write(path.with_name(name), (RAMP * 255).round().astype(np.uint8))
    path.with_name("00y").write_bytes(b"no image")
    assert is_ramp(image(root))
    assert opened(root).notes() == ("1 files are no images: 1 without ending",)


def test_hounsfield_units_by_the_public_range(folder):
    root, path = folder
    stored = (RAMP * 1400 + 24).round().astype(np.uint16)  # -1000 to 400 after rescaling
    window = {"WindowCenter": 40, "WindowWidth": 80}  # of the file: not heeded
    write(path, stored, RescaleSlope=1, RescaleIntercept=-1024, BitsStored=12, **window)
    assert "set data.pixel_range" in refused(root, path)
    assert is_ramp(image(root, pixel_range=(-1000, 400)))


def test_signed_values_and_a_slope(folder):
    root, path = folder
    write(path, (RAMP * 200 - 100).round().astype(np.int16), RescaleSlope=2, RescaleIntercept=5)
    assert is_ramp(image(root, pixel_range=(-195, 205)), 4)


@pytest.mark.parametrize("bits", [8, 16])
def test_monochrome1_is_inverted(folder, bits):
    root, path = folder
    top = 2**bits - 1
    values = ((1 - RAMP) * top).round().astype(f"u{bits // 8}")
    write(path, values, PhotometricInterpretation="MONOCHROME1")
    assert is_ramp(image(root, pixel_range=(0, 65535)))


def test_colours_and_palettes(folder):
    root, path = folder
    grey = (RAMP * 255).round().astype(np.uint8)
    colour = np.repeat(grey[..., None], 3, axis=-1)
    flat = {"SamplesPerPixel": 3, "PlanarConfiguration": 0, "Rows": 12, "Columns": 12}
    write(path, grey, PhotometricInterpretation="RGB", PixelData=colour.tobytes(), **flat)
    assert is_ramp(image(root))
    table = (np.arange(256, dtype=np.uint16)[::-1] * 257).astype("<u2").tobytes()
    palette = {}
    for name in ("Red", "Green", "Blue"):
        palette[f"{name}PaletteColorLookupTableDescriptor"] = [256, 0, 16]
        palette[f"{name}PaletteColorLookupTableData"] = table
    write(path, 255 - grey, PhotometricInterpretation="PALETTE COLOR", **palette)
    assert is_ramp(image(root))


def test_of_several_frames_the_first_is_read_and_that_is_said_once(folder):
    root, path = folder
    frames = np.stack([(RAMP * 255).round().astype(np.uint8), np.zeros((12, 12), np.uint8)])
    write(path, frames, NumberOfFrames=2)
    write(path.with_name("01x.dcm"), frames, NumberOfFrames=2)
    source = opened(root)
    assert is_ramp(source.read("train", np.array([1]), resolution=12)[0][0])
    lines = [line for line in source.inspect().report() if "frames" in line]
    assert lines == ["2 files have several frames; the first is read"]


def test_enhanced_files_keep_slope_and_intercept_per_frame(folder):
    root, path = folder
    transform = Dataset()
    transform.RescaleSlope = 2
    transform.RescaleIntercept = -100
    group = Dataset()
    group.PixelValueTransformationSequence = [transform]
    frames = np.stack([(RAMP * 1000).round().astype(np.uint16)] * 2)
    groups = {"PerFrameFunctionalGroupsSequence": [group, Dataset()]}
    write(path, frames, NumberOfFrames=2, **groups)
    assert is_ramp(image(root, pixel_range=(-100, 1900)))


def test_a_modality_lut_is_refused(folder):
    root, path = folder
    write(path, (RAMP * 255).round().astype(np.uint8), ModalityLUTSequence=[Dataset()])
    assert "modality LUT" in refused(root, path)


def damaged(path, how):
    grey = (RAMP * 255).round().astype(np.uint8)
    write(path, grey)
    content = path.read_bytes()
    if how == "cut off":
        path.write_bytes(content[:-60])
    elif how == "cut in the header":
        path.write_bytes(content[:400])
    elif how == "no DICOM":
        path.write_bytes(b"Mustermann^Erika 4711-0815" * 20)
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "no pixels":
        write(path, grey)
        data = pydicom.dcmread(path)
        del data.PixelData
        data.save_as(path)
    elif how == "odd elements":
        path.write_bytes(content.replace(b"19640812", b"1964\xff\xff\xff\xff", 1)[:-60])
    elif how == "a name for a number":
        write(path, grey, RescaleSlope="1234567890123456")
        path.write_bytes(path.read_bytes().replace(b"1234567890123456", PATIENT.encode()))
    elif how == "a name for frames":
        write(path, grey, NumberOfFrames="123456789012")
        path.write_bytes(path.read_bytes().replace(b"123456789012", PATIENT.encode()[:12]))
    elif how == "no rows":
        data = pydicom.dcmread(path)
        del data.Rows
        data.save_as(path)
    elif how == "compressed":
        data = pydicom.dcmread(path)
        data.file_meta.TransferSyntaxUID = JPEGLSLossless
        data.PixelData = pydicom.encaps.encapsulate([b"\xff\xd8nothing\xff\xd9"])
        data["PixelData"].VR = "OB"
        data.save_as(path)


DAMAGES = (
    "cut off",
    "cut in the header",
    "no DICOM",
    "empty",
    "no pixels",
    "odd elements",
    "a name for a number",
    "a name for frames",
    "no rows",
    "compressed",
)


@pytest.mark.parametrize("how", DAMAGES)
def test_damage_is_one_line_without_the_patient(folder, how, capfd, caplog):
    root, path = folder
    damaged(path, how)
    with warnings.catch_warnings(record=True) as caught, caplog.at_level(logging.DEBUG):
        message = refused(root, path)
        skipping = opened(root, on_error="skip")
        skipping.verify()
        labels = skipping.read("train", np.arange(5), resolution=8)[1]
    assert "cannot be read as an image" in message and labels.tolist().count(-1) == 1
    if how == "compressed":
        assert "JPEG-LS" in message and "pip install pylibjpeg" in message
    said = "".join(map(str, (capfd.readouterr(), caplog.text, [w.message for w in caught])))
    for word in ("Mustermann", "Erika", "4711", "1964"):
        assert word not in said


def test_without_pydicom_one_line_names_the_extra_and_nothing_is_skipped(folder, monkeypatch):
    root, path = folder
    write(path, (RAMP * 255).round().astype(np.uint8))
    monkeypatch.setitem(sys.modules, "pydicom", None)
    for on_error in ("stop", "skip"):
        message = refused(root, path, on_error=on_error)
        assert message.endswith("pip install 'sapf-ray[dicom]'")
        with pytest.raises(SapfError, match="pip install"):
            opened(root, on_error=on_error).read("train", np.arange(5), resolution=8)


def test_only_what_describes_pixels_is_parsed(folder):
    from sapf_ray.data import dicom

    _, path = folder
    write(path, (RAMP * 255).round().astype(np.uint8))
    values, header = dicom._read(path, path.name)
    assert values.shape == (12, 12) and "Rows" in header and "PatientName" not in header
