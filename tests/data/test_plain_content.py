"""Nothing but pixels and a color profile leaves."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms
from PIL.PngImagePlugin import PngInfo

from medft.data.images import open_image
from medft.data.plain_content import plain_content
from medft.data.stored_image import store_encoded_image

NAME = b"Doe^Jane 1950-02-03"
PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
RANDOM = np.random.default_rng(3)
COLOR = Image.fromarray(RANDOM.integers(0, 255, (70, 90, 3), dtype=np.uint8))
GRAY = COLOR.convert("L")


def encoded(image, format, **options):
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()


def plain(content):
    with Image.open(io.BytesIO(content)) as image:
        return plain_content(content, image)


def segment(marker, body):
    return bytes([0xFF, marker]) + struct.pack(">H", len(body) + 2) + body


def scans(content):
    """Where each scan of a JPEG begins, from the tables and headers before it."""
    places, position = [], 2
    while content[position : position + 2] != b"\xff\xd9":
        (length,) = struct.unpack_from(">H", content, position + 2)
        if content[position + 1] == 0xDA:
            places.append(position)
            position += 2 + length
            while content[position] != 0xFF or content[position + 1] in (0, *range(0xD0, 0xD8)):
                position += 1
        else:
            position += 2 + length
    return places


PROGRESSIVE = encoded(COLOR, "JPEG", progressive=True, quality=85)
JPEGS = {
    "baseline": encoded(COLOR, "JPEG", quality=85),
    "gray": encoded(GRAY, "JPEG"),
    "progressive": PROGRESSIVE,
    "progressive gray": encoded(GRAY, "JPEG", progressive=True),
    "optimized": encoded(COLOR, "JPEG", optimize=True, subsampling=0),
    "restarts": encoded(COLOR, "JPEG", restart_marker_blocks=2),
    "profile": encoded(COLOR, "JPEG", icc_profile=PROFILE),
    "rgb": encoded(COLOR, "JPEG", keep_rgb=True),
}


@pytest.mark.parametrize("name", JPEGS)
def test_a_name_written_into_a_jpeg_in_any_way_does_not_leave(name):
    content = JPEGS[name]
    last = scans(content)[-1]
    preview = segment(0xE0, b"JFIF\0\1\2\1\0\x48\0\x48\2\3" + NAME[:18])
    further = segment(0xE0, b"JFXX\0\x10" + NAME)
    adobe = segment(0xEE, b"Adobe\0\x64\0\0\0\0\0" + NAME)
    written = [
        content + NAME,
        content + content + NAME,
        content[:2] + segment(0xFE, NAME) + content[2:],
        content[:2] + segment(0xE1, b"Exif\0\0" + NAME) + content[2:],
        content[:2] + segment(0xE2, b"MPF\0" + NAME) + content[2:],
        content[:2] + segment(0xED, b"Photoshop 3.0\0" + NAME) + content[2:],
        content[:2] + b"\xff\xff\xff" + segment(0xFE, NAME)[1:] + content[2:],
        content[:last] + segment(0xFE, NAME) + content[last:],
        content[:last] + segment(0xEF, NAME) + content[last:],
        content[:2] + preview + content[2:],
        content[:2] + further + content[2:],
    ]
    if name in ("gray", "progressive gray"):
        written.append(content[:2] + adobe + content[2:])
    for one in written:
        assert NAME[:18] in one
        stored = store_encoded_image(one, name=None, max_pixels=10**6)
        assert NAME[:18] not in stored.content
        assert stored.content.startswith(b"\xff\xd8")
        assert stored.content.endswith(b"\xff\xd9")
        assert open_image(stored.content).tobytes() == open_image(one).tobytes()


def test_what_is_left_is_read_as_the_same_pixels_and_twice_gives_the_same():
    for name, content in JPEGS.items():
        kept = plain(content)
        assert open_image(kept).tobytes() == open_image(content).tobytes(), name
        assert plain(kept) == kept
    assert len(scans(PROGRESSIVE)) > 5
    assert scans(plain(PROGRESSIVE))


def test_a_profile_stays_where_the_pixels_stay():
    for content in (JPEGS["profile"], encoded(COLOR, "PNG", icc_profile=PROFILE)):
        assert Image.open(io.BytesIO(plain(content))).info["icc_profile"] == PROFILE
    turned = Image.Exif()
    turned[0x0112] = 3
    content = encoded(COLOR, "JPEG", icc_profile=PROFILE, exif=turned)
    stored = store_encoded_image(content, name=None, max_pixels=10**6).content
    assert Image.open(io.BytesIO(stored)).info["icc_profile"] == PROFILE
    ink = encoded(COLOR.convert("CMYK"), "JPEG", icc_profile=PROFILE[:16] + b"CMYK" + PROFILE[20:])
    stored = store_encoded_image(ink, name=None, max_pixels=10**6).content
    assert "icc_profile" not in Image.open(io.BytesIO(stored)).info


@pytest.mark.parametrize("profile", [NAME, NAME * 20, bytes(36) + b"acsp" + NAME * 9])
def test_what_only_says_that_it_is_a_profile_does_not_leave(profile):
    for format in ("PNG", "JPEG"):
        content = encoded(COLOR, format, icc_profile=profile)
        kept = plain(content)
        assert NAME not in kept
        assert "icc_profile" not in Image.open(io.BytesIO(kept)).info
        stored = store_encoded_image(content, name=None, max_pixels=10**6, max_side=50)
        assert "icc_profile" not in Image.open(io.BytesIO(stored.content)).info
    named = encoded(COLOR, "PNG", icc_profile=PROFILE).replace(b"ICC Profile", NAME[:11])
    body = named[named.index(b"iCCP") : named.index(b"IDAT") - 4]
    named = named.replace(body, body[:-4] + zlib.crc32(body[:-4]).to_bytes(4, "big"))
    assert Image.open(io.BytesIO(named)).info["icc_profile"] == PROFILE
    assert NAME[:11] not in plain(named)
    assert Image.open(io.BytesIO(plain(named))).info["icc_profile"] == PROFILE


def test_a_long_profile_is_written_in_parts():
    long = (200_000).to_bytes(4, "big") + PROFILE[4:] + bytes(200_000 - len(PROFILE))
    content = encoded(COLOR, "JPEG", icc_profile=long)
    kept = plain(content + NAME)
    assert Image.open(io.BytesIO(kept)).info["icc_profile"] == long
    assert open_image(kept).tobytes() == open_image(content).tobytes()


def test_a_name_written_into_a_png_does_not_leave():
    info = PngInfo()
    info.add_text("PatientName", NAME.decode())
    info.add_itxt("Description", NAME.decode(), zip=True)
    info.add(b"prVt", NAME, after_idat=True)
    exif = Image.Exif()
    exif[0x010E] = NAME.decode()
    for image in (COLOR, GRAY, COLOR.convert("RGBA"), COLOR.quantize(9), GRAY.convert("1")):
        content = encoded(image, "PNG", pnginfo=info, exif=exif) + NAME
        assert content.count(NAME) >= 3
        stored = store_encoded_image(content, name=None, max_pixels=10**6).content
        kinds, position = set(), 8
        while position < len(stored):
            (length,) = struct.unpack_from(">I", stored, position)
            kinds.add(stored[position + 4 : position + 8])
            position += 12 + length
        assert kinds == {b"IHDR", b"IDAT", b"IEND"}
        assert NAME not in stored
        assert zlib.compress(NAME)[2:10] not in stored
        assert open_image(stored).tobytes() == open_image(content).tobytes()


def test_other_formats_are_encoded_again_without_what_they_said():
    for format in ("TIFF", "WEBP", "GIF", "BMP"):
        options = {"TIFF": {"description": NAME.decode()}, "GIF": {"comment": NAME}}.get(format, {})
        content = encoded(COLOR if format != "GIF" else COLOR.quantize(9), format, **options) + NAME
        stored = store_encoded_image(content, name=None, max_pixels=10**6)
        assert stored.content.startswith(b"\x89PNG")
        assert NAME not in stored.content


def test_what_is_laid_out_in_another_way_is_not_copied():
    baseline = JPEGS["baseline"]
    assert plain(baseline) is not None
    assert plain(baseline[:-2]) is None
    unknown = baseline[:2] + segment(0xF0, b"x") + baseline[2:]
    assert plain(unknown) is None or NAME not in unknown
    sixteen = encoded(Image.fromarray(np.zeros((3, 3), np.uint16)), "PNG")
    assert plain(sixteen) is None
    assert plain(encoded(COLOR, "PNG")[:-12]) is None
