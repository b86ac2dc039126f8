"""DICOM files that mean harm: each is a rejected row with its reason, in bounded memory."""

import io
import shutil
import struct
import time
import zlib
from pathlib import Path

import numpy as np
import pydicom.data
import pytest
from hostile import MEDFT, run_hostile
from made_dicom import RAMP, images_of, prepare_folder, write
from PIL import Image
from pydicom import dcmread
from pydicom.encaps import generate_frames
from pydicom.uid import (
    JPEG2000,
    DeflatedExplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGLSLossless,
    RLELossless,
)

from medft.data.dicom_image import dicom_images
from medft.data.tables import Rejected

LIMIT = 64_000_000
TEST_FILES = Path(pydicom.data.__file__).parent / "test_files"


def rejected(path, **options):
    with pytest.raises(Rejected) as caught:
        list(dicom_images(path, max_pixels=LIMIT, **options))
    return caught.value


def dataset_of(path):
    """The bytes of a file before and after the end of its file meta."""
    content = path.read_bytes()
    (length,) = struct.unpack_from("<I", content, 140)
    return content[: 144 + length], content[144 + length :]


def deflated(path, zeros=0):
    """Deflate a file in place, a private element of so many zeros after its pixels."""
    data = dcmread(path)
    data.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    data.save_as(path, enforce_file_format=True)
    head, body = dataset_of(path)
    packer = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    parts = [head, packer.compress(zlib.decompress(body, -zlib.MAX_WBITS))]
    if zeros:
        parts.append(packer.compress(struct.pack("<HH2sHI", 0x7FE1, 0x1010, b"OB", 0, zeros)))
        block = bytes(10**6)  # not all of them at once, which a child would seem to have as well
        parts += [packer.compress(block) for _ in range(zeros // len(block))]
        parts.append(packer.compress(bytes(zeros % len(block))))
    path.write_bytes(b"".join([*parts, packer.flush()]))


def test_a_deflated_file_is_read_and_a_bomb_is_rejected_by_parent_and_worker(tmp_path):
    write(tmp_path / "files" / "good.dcm", RAMP)
    plain = next(dicom_images(tmp_path / "files" / "good.dcm", max_pixels=LIMIT))
    deflated(tmp_path / "files" / "good.dcm")
    again = next(dicom_images(tmp_path / "files" / "good.dcm", max_pixels=LIMIT))
    assert np.array_equal(plain, again)
    write(tmp_path / "files" / "bomb.dcm", RAMP)
    deflated(tmp_path / "files" / "bomb.dcm", 6 * 4096 + 2**24)
    for name in ("good", "bomb"):
        (tmp_path / "files" / f"{name}.txt").write_text("A text.")
    assert list(dicom_images(tmp_path / "files" / "bomb.dcm", max_pixels=LIMIT))
    _, pairs, rejects = prepare_folder(tmp_path, images="{max_pixels: 4096}")
    assert [pair["images"][0]["path"] for pair in pairs] == ["good.dcm"]
    assert rejects[0]["reason"] == "too_large"
    assert "more than 16801792 bytes once inflated" in rejects[0]["detail"]
    deflate = tmp_path / "files" / "bomb.dcm"
    deflate.write_bytes(deflate.read_bytes()[:-3])
    assert rejected(deflate).reason == "bad_dicom"


@pytest.mark.slow
def test_a_deflated_file_of_gigabytes_takes_no_more_memory_than_its_bound(tmp_path):
    write(tmp_path / "files" / "bomb.dcm", RAMP)
    deflated(tmp_path / "files" / "bomb.dcm", 2_000_000_000)
    assert (tmp_path / "files" / "bomb.dcm").stat().st_size < 2_500_000
    (tmp_path / "SOURCES.yaml").write_text(
        "sources:\n  - {name: a, kind: dicom, path: files, text: text, group: PatientID}\n"
        "images: {max_pixels: 1_000_000}\n"
    )
    out = tmp_path / "out"
    words = ["data", "prepare", tmp_path / "SOURCES.yaml", "--out", out, "--max-rejects", "1"]
    outcome = run_hostile(words, command=MEDFT)
    assert outcome.code == 0
    assert outcome.peak < 1_500_000_000  # most of which is the command itself
    assert "too_large" in (out / "rejects.jsonl").read_text()


def with_tag(path, tag, vr, value):
    """Replace the value of a short element by one of other length."""
    head, body = dataset_of(path)
    start = body.index(struct.pack("<HH", *tag))
    (length,) = struct.unpack_from("<H", body, start + 6)
    new = struct.pack("<HH2sH", *tag, vr, len(value)) + value
    path.write_bytes(head + body[:start] + new + body[start + 8 + length :])


HEADERS = {
    "frames -3": ((0x28, 8), b"IS", b"-3"),
    "frames 0": ((0x28, 8), b"IS", b"0 "),
    "frames 10**9": ((0x28, 8), b"IS", b"1000000000"),
    "frames abc": ((0x28, 8), b"IS", b"abc "),
    "frames 1\\2": ((0x28, 8), b"IS", b"1\\2 "),
    "rows 0": ((0x28, 0x10), b"US", b"\0\0"),
    "rows 65535": ((0x28, 0x10), b"US", b"\xff\xff"),
    "rows of two values": ((0x28, 0x10), b"US", b"\1\0\1\0"),
    "columns 0": ((0x28, 0x11), b"US", b"\0\0"),
    "7 bits allocated": ((0x28, 0x100), b"US", b"\7\0"),
    "0 bits allocated": ((0x28, 0x100), b"US", b"\0\0"),
    "99 bits stored": ((0x28, 0x101), b"US", b"\x63\0"),
    "200 samples": ((0x28, 2), b"US", b"\xc8\0"),
    "3 samples": ((0x28, 2), b"US", b"\3\0"),
    "no color": ((0x28, 4), b"CS", b""),
    "a color that nobody shows": ((0x28, 4), b"CS", b"HSV "),
    "a sign of 7": ((0x28, 0x103), b"US", b"\7\0"),
}


@pytest.mark.parametrize("case", HEADERS)
def test_a_header_that_cannot_be_is_a_rejected_row(tmp_path, case):
    path = tmp_path / "a.dcm"
    write(path, np.stack([RAMP, RAMP + 1]))
    assert list(dicom_images(path, max_pixels=LIMIT))
    with_tag(path, *HEADERS[case])
    verdict = rejected(path)
    assert verdict.reason == "bad_dicom"
    assert len(verdict.detail) > len("a.dcm: ")


def test_such_headers_are_rejected_rows_of_prepare_also_for_every_frame(tmp_path):
    for index, case in enumerate(HEADERS):
        path = tmp_path / "files" / f"{index:02}"
        write(path, np.stack([RAMP, RAMP + 1]))
        with_tag(path, *HEADERS[case])
        path.with_name(f"{index:02}.txt").write_text("A text.")
    write(tmp_path / "files" / "good", np.stack([RAMP, RAMP + 1]))
    (tmp_path / "files" / "good.txt").write_text("Good.")
    keys = ", frames: every, keep: [NumberOfFrames, Rows, BitsAllocated]"
    summary, [pair], rejects = prepare_folder(tmp_path, keys)
    assert len(pair["images"]) == 2
    assert len(rejects) == len(HEADERS)
    assert summary["read"] == summary["accepted"] + summary["rejected"] == len(HEADERS) + 1
    assert set(summary["reasons"]) == {"bad_dicom", "too_large"}


def test_an_element_that_claims_four_gigabytes_takes_none(tmp_path):
    path = tmp_path / "files" / "a.dcm"
    write(path, RAMP)
    head, body = dataset_of(path)
    claim = struct.pack("<HH2sHI", 0x9, 0x1010, b"OB", 0, 0xFFFFFFF0)
    split = body.index(struct.pack("<HH", 0x10, 0x10))
    path.write_bytes(head + body[:split] + claim + body[split:])
    _, _, rejects = prepare_folder(tmp_path, ", keep: [PatientName]")
    assert rejects[0]["reason"] == "no_pixels"
    start = body.index(struct.pack("<HH", 0x7FE0, 0x10))
    claim = body[: start + 8] + struct.pack("<I", 0xFFFFFFF0) + body[start + 12 :]
    path.write_bytes(head + claim)
    assert images_are_equal(path, RAMP)  # its pixels are all there, whatever it claims
    path.write_bytes((head + claim)[:-2])
    assert "8190 bytes of pixels, the header says 8192" in rejected(path).detail


def images_are_equal(path, pixels):
    [image] = dicom_images(path, max_pixels=LIMIT)
    return np.array_equal(np.asarray(image), np.rint(pixels / 4095 * 255).astype(np.uint8))


def nested(depth):
    """A sequence within a sequence, each of undefined length."""
    start = struct.pack("<HH2sHI", 0x40, 0xA730, b"SQ", 0, 0xFFFFFFFF)
    start += struct.pack("<HHI", 0xFFFE, 0xE000, 0xFFFFFFFF)
    end = struct.pack("<HHI", 0xFFFE, 0xE00D, 0) + struct.pack("<HHI", 0xFFFE, 0xE0DD, 0)
    return start * depth + end * depth


@pytest.mark.parametrize(("depth", "is_read"), [(3, True), (1000, False), (20_000, False)])
def test_sequences_nested_deeper_than_the_stack_are_a_rejected_row(tmp_path, depth, is_read):
    path = tmp_path / "files" / "a.dcm"
    write(path, RAMP)
    path.with_name("a.txt").write_text("A text.")
    head, body = dataset_of(path)
    split = body.index(struct.pack("<HH", 0x7FE0, 0x10))
    path.write_bytes(head + body[:split] + nested(depth) + body[split:])
    _, pairs, rejects = prepare_folder(tmp_path, ", keep: [PatientName]")
    assert (len(pairs), len(rejects)) == ((1, 0) if is_read else (0, 1))
    assert is_read or rejects[0]["reason"] == "bad_dicom"


def encoded(size, format, **options):
    stream = io.BytesIO()
    Image.new("L", size, 7).save(stream, format, **options)
    return stream.getvalue()


def run_lengths(count):
    """A frame of one segment that gives 128 bytes `count` times."""
    return struct.pack("<16I", 1, 64, *[0] * 14) + b"\x81\x00" * count


def jpeg_ls(rows, columns):
    data = dcmread(TEST_FILES / "JPEGLSNearLossless_08.dcm")
    frame = bytearray(next(generate_frames(data.PixelData, number_of_frames=1)))
    at = frame.index(b"\xff\xf7") + 5
    frame[at : at + 4] = struct.pack(">HH", rows, columns)
    return bytes(frame)


FRAMES = {
    "jpeg": (JPEGBaseline8Bit, encoded((64, 64), "JPEG"), encoded((9000, 9000), "JPEG")),
    "jpeg without size": (
        JPEGBaseline8Bit, encoded((64, 64), "JPEG"), b"\xff\xd8" + b"\xff\xfe\0\0" * 99,
    ),
    "jpeg 2000": (
        JPEG2000Lossless, encoded((64, 64), "JPEG2000", no_jp2=True),
        encoded((5000, 5000), "JPEG2000", no_jp2=True),
    ),
    "jp2 with a box of no length": (
        JPEG2000, encoded((64, 64), "JPEG2000"), b"\0\0\0\x0cjP  \r\n\x87\n" + bytes(999),
    ),
    "jpeg-ls": (JPEGLSLossless, None, jpeg_ls(60_000, 60_000)),
    "run lengths": (RLELossless, run_lengths(32), run_lengths(500_000)),
    "run lengths of nothing": (
        RLELossless, run_lengths(32), run_lengths(0) + b"\x80" * 500_000,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", FRAMES)
def test_a_frame_larger_than_its_header_says_is_rejected_before_it_is_decoded(tmp_path, case):
    syntax, good, bad = FRAMES[case]
    path = tmp_path / "a.dcm"
    if good:
        write(path, RAMP, syntax=syntax, frame=good)
        [image] = dicom_images(path, max_pixels=LIMIT)
        assert image.size == (64, 64)
    write(path, RAMP, syntax=syntax, frame=bad)
    began = time.monotonic()
    verdict = rejected(path)
    assert time.monotonic() - began < 5
    assert verdict.reason in ("bad_dicom", "too_large")
    assert any(words in verdict.detail for words in ("the header says 64 x 64", "run-length"))


def test_every_frame_is_bounded_together_and_the_middle_one_alone_is_not(tmp_path):
    path = tmp_path / "files" / "IM1"
    frame = encoded((64, 64), "JPEG")
    write(path, RAMP, syntax=JPEGBaseline8Bit, frame=frame, NumberOfFrames=2**20)
    path.with_name("IM1.txt").write_text("A text.")
    _, _, rejects = prepare_folder(tmp_path, ", frames: every")
    assert rejects[0]["reason"] == "too_large"
    _, _, rejects = prepare_folder(tmp_path)
    assert rejects[0]["reason"] == "bad_dicom"


def test_frames_that_are_missing_reject_the_file(tmp_path):
    path = tmp_path / "files" / "IM1"
    path.parent.mkdir()
    shutil.copy(TEST_FILES / "SC_rgb_rle_2frame.dcm", path)
    path.with_name("IM1.txt").write_text("A text.")
    _, [pair], _ = prepare_folder(tmp_path, ", frames: every")
    assert [image.shape for image in images_of(pair)] == [(100, 100, 3)] * 2
    data = dcmread(path)
    data.NumberOfFrames = 3
    data.save_as(path)
    _, pairs, [line] = prepare_folder(tmp_path, ", frames: every")
    assert (pairs, line["reason"]) == ([], "bad_dicom")


@pytest.mark.parametrize("name", ["SC_rgb_rle_2frame.dcm", "JPEG2000.dcm", "CT_small.dcm"])
def test_a_truncated_file_is_rejected_even_where_its_middle_frame_is_there(tmp_path, name):
    content = (TEST_FILES / name).read_bytes()
    path = tmp_path / "a.dcm"
    path.write_bytes(content)
    assert list(dicom_images(path, max_pixels=LIMIT))
    end = content.rindex(b"\xfc\xff\xfc\xff" if name[0] == "C" else b"\xfe\xff\xdd\xe0")
    for cut in (1, 9, 200):
        path.write_bytes(content[: end - cut])
        assert rejected(path).reason == "bad_dicom"


def test_pixels_of_another_vr_are_read_from_their_start_or_rejected(tmp_path):
    path = tmp_path / "a.dcm"
    write(path, RAMP)
    content = path.read_bytes()
    [plain] = dicom_images(path, max_pixels=LIMIT)
    for vr in (b"OB", b"UN", b"OF", b"XY"):
        path.write_bytes(content.replace(b"\xe0\x7f\x10\x00OW", b"\xe0\x7f\x10\x00" + vr))
        if vr in (b"OB", b"UN"):
            assert np.array_equal(plain, next(dicom_images(path, max_pixels=LIMIT)))
        else:
            assert rejected(path).detail == f"a.dcm: pixels of VR {vr.decode()}"


def test_a_frame_of_more_bytes_than_an_image_has_is_not_sent_to_a_decoder(tmp_path):
    frame = encoded((64, 64), "JPEG")
    for more, is_read in ((2**20, True), (2**25, False)):
        write(tmp_path / "a.dcm", RAMP, syntax=JPEGBaseline8Bit, frame=frame + bytes(more))
        if is_read:
            assert list(dicom_images(tmp_path / "a.dcm", max_pixels=LIMIT))
        else:
            assert rejected(tmp_path / "a.dcm").reason == "too_large"


def test_a_frame_of_many_scans_is_rejected_before_it_is_decoded(tmp_path):
    content = encoded((64, 64), "JPEG", progressive=True)
    last = content.rindex(b"\xff\xda")
    many = content[:-2] + content[last:-2] * 200 + content[-2:]
    for frame in (content, many):
        write(tmp_path / "a.dcm", RAMP, syntax=JPEGBaseline8Bit, frame=frame)
        if frame is many:
            assert rejected(tmp_path / "a.dcm").detail.endswith("of more than 100 scans")
        else:
            assert list(dicom_images(tmp_path / "a.dcm", max_pixels=LIMIT))


def test_a_header_of_many_large_elements_takes_no_memory_in_the_process_that_lists_files(tmp_path):
    """A sparse file of a gigabyte, its elements each as long as one may be."""
    folder = tmp_path / "files"
    write(folder / "a.dcm", RAMP)
    head, body = dataset_of(folder / "a.dcm")
    with (folder / "a.dcm").open("wb") as file:
        pixels = body.index(struct.pack("<HH", 0x7FE0, 0x0010))
        file.write(head + body[:pixels])
        size = 15_000_000
        for number in range(70):
            element = struct.pack("<HH2sHI", 0x6FE1, 0x1000 + number, b"OB", 0, size)
            file.write(element)
            file.seek(size, io.SEEK_CUR)
        file.write(body[pixels:])
    (folder / "a.txt").write_text("text")
    for keys in ("", ", frames: every", ", study: StudyInstanceUID, frames: every, max_images: 2"):
        (tmp_path / "SOURCES.yaml").write_text(
            f"sources:\n  - {{name: pacs, kind: dicom, path: files, text: text{keys}}}\n"
            "images: {max_pixels: 1000000}\nsplit: {validation: 0.0}\n"
        )
        words = [tmp_path / "SOURCES.yaml", "--out", tmp_path / "out", "--max-rejects", "1"]
        outcome = run_hostile(["data", "prepare", *words])
        assert outcome.code == 0
        assert outcome.peak < 1.2e9  # of the worker, which may take that much
