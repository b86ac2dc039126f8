"""Compressed DICOM files: decoders and their absence, and pixels equal to those of their twins."""

import shutil
import sys
from pathlib import Path

import gdcm
import numpy as np
import pydicom.data
import pytest
from hostile import run_hostile
from made_dicom import RAMP, images_of, prepare_folder, write
from pydicom import dcmread
from pydicom.pixels import apply_modality_lut, apply_voi_lut
from pydicom.uid import (
    HTJ2K,
    MPEG2MPML,
    ExplicitVRBigEndian,
    ImplicitVRLittleEndian,
    JPEGLossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
)

from medft.data.dicom_image import MIDDLE, dicom_images, frame_count
from medft.data.tables import Rejected

LIMIT = 64_000_000
TEST_FILES = Path(pydicom.data.__file__).parent / "test_files"


def shown(path, frames=(MIDDLE,)):
    return [np.asarray(one) for one in dicom_images(Path(path), max_pixels=LIMIT, frames=frames)]


TWINS = [
    ("MR_small_RLE.dcm", "MR_small.dcm"),
    ("MR_small_jp2klossless.dcm", "MR_small.dcm"),
    ("MR_small_jpeg_ls_lossless.dcm", "MR_small.dcm"),
    ("MR_small_bigendian.dcm", "MR_small.dcm"),
    ("MR_small_implicit.dcm", "MR_small.dcm"),
    ("rtdose_rle.dcm", "rtdose.dcm"),
    ("SC_rgb_jpeg_gdcm.dcm", "SC_rgb_rle.dcm"),
    ("SC_rgb_gdcm_KY.dcm", "SC_rgb_rle.dcm"),
    ("SC_rgb_small_odd_big_endian.dcm", "SC_rgb_small_odd.dcm"),
]


@pytest.mark.parametrize(("name", "twin"), TWINS)
def test_lossless_files_are_equal_to_their_twins(name, twin):
    [found], [expected] = shown(TEST_FILES / name), shown(TEST_FILES / twin)
    assert np.array_equal(found, expected)
    assert found.std() > 5


def test_lossy_files_are_near_their_twins():
    [lossless] = shown(TEST_FILES / "SC_rgb_rle.dcm")
    for name in (
        "SC_rgb_jpeg_dcmtk.dcm",
        "SC_rgb_jpeg_lossy_gdcm.dcm",
        "SC_rgb_jls_lossy_line.dcm",
    ):
        [lossy] = shown(TEST_FILES / name)
        assert np.abs(lossy.astype(int) - lossless).mean() < 4, name


def test_jpeg_of_12_bits_is_decoded_by_a_package_under_a_permissive_license():
    [extended], [other] = (shown(TEST_FILES / f"JPEG{x}.dcm") for x in ("-lossy", "2000"))
    [same] = shown(TEST_FILES / "JPGExtended.dcm")
    assert np.array_equal(extended, same)
    # JPEG2000.dcm is the same scan in another lossy form
    assert np.corrcoef(extended.ravel(), other.ravel())[0, 1] > 0.95
    assert extended.std() > 5


@pytest.mark.parametrize("syntax", [JPEGLossless, JPEGLosslessSV1, JPEGLSLossless])
@pytest.mark.parametrize("name", ["CT_small.dcm", "MR_small.dcm", "examples_rgb_color.dcm"])
def test_lossless_jpeg_gives_the_pixels_that_were_encoded(tmp_path, syntax, name):
    reader = gdcm.ImageReader()
    reader.SetFileName(str(TEST_FILES / name))
    assert reader.Read()
    change = gdcm.ImageChangeTransferSyntax()
    change.SetTransferSyntax(gdcm.TransferSyntax(gdcm.TransferSyntax.GetTSType(str(syntax))))
    change.SetInput(reader.GetImage())
    assert change.Change()
    writer = gdcm.ImageWriter()
    writer.SetFile(reader.GetFile())
    writer.SetImage(change.GetOutput())
    writer.SetFileName(str(tmp_path / "a.dcm"))
    assert writer.Write()
    assert dcmread(tmp_path / "a.dcm").file_meta.TransferSyntaxUID == syntax
    assert np.array_equal(shown(tmp_path / "a.dcm"), shown(TEST_FILES / name))


def test_frames_are_decoded_one_by_one_and_the_middle_one_alone():
    path = TEST_FILES / "examples_ybr_color.dcm"
    assert frame_count(path, max_pixels=LIMIT) == 30
    frames = dicom_images(path, max_pixels=LIMIT, frames=range(30))
    first = np.asarray(next(frames))
    frames.close()
    all_frames = dcmread(path).pixel_array
    assert np.array_equal(first, all_frames[0])
    assert np.array_equal(shown(path)[0], all_frames[15])
    assert np.array_equal(shown(path, [3, 29])[1], all_frames[29])
    assert not np.array_equal(all_frames[15], all_frames[29])


WITHOUT_DECODERS = [
    sys.executable,
    "-c",
    "import sys; sys.modules.update(dict.fromkeys(['gdcm', 'pylibjpeg', 'openjpeg']));"
    "import medft.cli; sys.exit(medft.cli.main())",
]


def test_a_missing_decoder_ends_the_command_with_one_sentence_before_any_image(tmp_path):
    names = ["MR_small_jpeg_ls_lossless", "JPGExtended", "JPEG-lossy", "JPEG2000", "MR_small_RLE"]
    (tmp_path / "files").mkdir()
    for index, name in enumerate(names):
        shutil.copy(TEST_FILES / f"{name}.dcm", tmp_path / "files" / f"IM{index}")
        (tmp_path / "files" / f"IM{index}.txt").write_text(f"Text {index}.")
    _, pairs, _ = prepare_folder(tmp_path)
    assert len(pairs) == 5
    words = ["data", "prepare", tmp_path / "SOURCES.yaml", "--out", tmp_path / "two"]
    outcome = run_hostile(words, command=WITHOUT_DECODERS)
    assert outcome.code == 2
    # Pillow says that it decodes JPEG Extended, though not the 12 bits that most of them have
    assert outcome.sentences == [
        "expected decoders for JPEG Extended (Process 2 and 4) (2 files), JPEG-LS Lossless Image "
        f"Compression (1 files) in {tmp_path / 'files'}, none is installed: "
        'pip install "medft[dicom]"'
    ]
    assert not (tmp_path / "two").exists()
    for index in (0, 1, 2):
        (tmp_path / "files" / f"IM{index}").unlink()
    assert run_hostile(words, command=WITHOUT_DECODERS).code == 0


def test_a_syntax_that_no_package_decodes_is_a_rejected_row(tmp_path):
    frame = b"\0\0\1\xb3" + bytes(60)
    for name, syntax in (("IM1", MPEG2MPML), ("IM2", "1.2.3.4")):
        write(tmp_path / "files" / name, RAMP, syntax=MPEG2MPML, frame=frame)
        content = (tmp_path / "files" / name).read_bytes()
        (tmp_path / "files" / name).write_bytes(
            content.replace(MPEG2MPML.encode(), syntax.encode().ljust(len(MPEG2MPML), b"\0"))
        )
        (tmp_path / "files" / f"{name}.txt").write_text("A text.")
    write(tmp_path / "files" / "good", RAMP)
    (tmp_path / "files" / "good.txt").write_text("Good.")
    _, pairs, rejects = prepare_folder(tmp_path)
    assert [pair["text"] for pair in pairs] == ["Good."]
    assert [line["reason"] for line in rejects] == ["bad_dicom"] * 2
    assert rejects[0]["detail"].endswith("(MPEG2 Main Profile / Main Level)")
    assert rejects[1]["detail"].endswith("(1.2.3.4)")


def test_htj2k_has_a_decoder():
    assert pydicom.pixels.get_decoder(HTJ2K).available_plugins == ("pylibjpeg",)


WINDOW = {"WindowCenter": 700, "WindowWidth": 900}
SHOWN_AS = {
    "no window": {},
    "a slope": {"RescaleSlope": "-0.37", "RescaleIntercept": "11.3"},
    "a window": WINDOW,
    "a window and a slope": {**WINDOW, "RescaleSlope": "1.7", "RescaleIntercept": "-1024"},
    "an exact window": {**WINDOW, "VOILUTFunction": "LINEAR_EXACT"},
    "a sigmoid": {**WINDOW, "VOILUTFunction": "SIGMOID"},
    "inverted": {**WINDOW, "PhotometricInterpretation": "MONOCHROME1"},
    "no window, inverted": {"PhotometricInterpretation": "MONOCHROME1"},
}


@pytest.mark.parametrize("signed", [0, 1])
@pytest.mark.parametrize("case", SHOWN_AS)
def test_the_table_gives_what_the_arithmetic_in_float64_gives(tmp_path, case, signed):
    pixels = np.random.default_rng(3).integers(-3000 if signed else 0, 4000, (700, 300), np.int16)
    write(
        tmp_path / "a.dcm", pixels.view(np.uint16), PixelRepresentation=signed, BitsStored=16,
        HighBit=15, **SHOWN_AS[case],
    )  # fmt: skip
    header = dcmread(tmp_path / "a.dcm")
    values = apply_voi_lut(apply_modality_lut(header.pixel_array, header), header)
    low, high = float(values.min()), float(values.max())
    if "WindowWidth" in header:
        low, high = (-(2**15), 2**15 - 1) if signed else (0, 2**16 - 1)
        slope, intercept = header.get("RescaleSlope", 1), header.get("RescaleIntercept", 0)
        low, high = low * slope + intercept, high * slope + intercept
    if header.PhotometricInterpretation == "MONOCHROME1":
        low, high = high, low
    scaled = (values.astype(np.float64) - low) / (high - low) * 255
    expected = np.rint(scaled.clip(0, 255)).astype(np.uint8)
    assert np.array_equal(shown(tmp_path / "a.dcm")[0], expected)
    assert expected.std() > 5


@pytest.mark.parametrize("syntax", [ExplicitVRBigEndian, ImplicitVRLittleEndian])
def test_plain_frames_are_read_alone_in_any_byte_order(tmp_path, syntax):
    names = ["MR_small_bigendian.dcm", "MR_small_implicit.dcm"]
    data = dcmread(TEST_FILES / names[syntax == ImplicitVRLittleEndian])
    assert data.file_meta.TransferSyntaxUID == syntax
    twice = data.PixelData[: 64 * 64 * 2]
    data.PixelData = twice + twice[::-1]
    data.NumberOfFrames = 2
    data.save_as(tmp_path / "a.dcm")
    [first], [second] = shown(tmp_path / "a.dcm", [0]), shown(tmp_path / "a.dcm", [1])
    assert np.array_equal(first, shown(TEST_FILES / "MR_small.dcm")[0])
    assert not np.array_equal(first, second)


def test_colors_that_nobody_converts_are_refused_and_not_shown_as_rgb(tmp_path):
    data = dcmread(TEST_FILES / "examples_rgb_color.dcm")
    for color in ("RGB", "HSV", "YBR_PARTIAL_420"):
        data.PhotometricInterpretation = color
        data.save_as(tmp_path / "a.dcm")
        if color == "RGB":
            assert shown(tmp_path / "a.dcm")[0].shape == (240, 320, 3)
        else:
            with pytest.raises(Rejected, match=f"3 samples per pixel of {color}"):
                shown(tmp_path / "a.dcm")


def test_monochrome_images_have_one_channel_in_pairs_and_color_three(tmp_path):
    (tmp_path / "files").mkdir()
    for index, name in enumerate(["CT_small.dcm", "examples_rgb_color.dcm"]):
        shutil.copy(TEST_FILES / name, tmp_path / "files" / f"IM{index}")
        (tmp_path / "files" / f"IM{index}.txt").write_text(f"Text {index}.")
    _, pairs, _ = prepare_folder(tmp_path)
    assert [images_of(pair)[0].ndim for pair in pairs] == [2, 3]
