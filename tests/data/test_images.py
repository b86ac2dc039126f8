"""Every image comes out as upright 8-bit RGB, or is refused with the reason."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from medft.data.images import open_image
from medft.errors import DataError


def encoded(image: Image.Image, format: str = "PNG", **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format=format, **options)
    return stream.getvalue()


def pixels(content: bytes) -> np.ndarray:
    image = open_image(content)
    assert image.mode == "RGB"
    return np.asarray(image)


def test_sixteen_bits_are_scaled_where_pillow_clips():
    gray = np.array([[0, 257, 4000, 65535]], dtype=np.uint16)
    content = encoded(Image.fromarray(gray))
    assert pixels(content)[0, :, 0].tolist() == [0, 1, 16, 255]
    clipped = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))[0, :, 0].tolist()
    assert clipped == [0, 255, 255, 255]


def test_hidden_pixels_under_transparency_become_black():
    rgba = np.zeros((1, 3, 4), dtype=np.uint8)
    rgba[0] = [[200, 100, 50, 0], [200, 100, 50, 255], [200, 100, 50, 128]]
    got = pixels(encoded(Image.fromarray(rgba)))
    assert got[0, :2].tolist() == [[0, 0, 0], [200, 100, 50]]
    assert abs(int(got[0, 2, 0]) - 100) <= 1  # half of 200, rounded by Pillow's 8-bit blend
    gray = Image.fromarray(np.array([[[90, 0], [90, 255]]], dtype=np.uint8), mode=None)
    assert pixels(encoded(gray))[0, :, 0].tolist() == [0, 90]


def test_the_orientation_a_camera_noted_is_applied():
    image = Image.new("RGB", (4, 2), "white")
    image.putpixel((0, 0), (0, 0, 0))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees
    got = pixels(encoded(image, exif=exif))
    assert got.shape == (4, 2, 3)
    assert got[0, 1].tolist() == [0, 0, 0]


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr"])
def test_other_modes_become_rgb(mode):
    image = Image.new("RGB", (5, 3), (255, 255, 255)).convert(mode)
    format = "JPEG" if mode in ("CMYK", "YCbCr") else "PNG"
    assert pixels(encoded(image, format)).shape == (3, 5, 3)


def test_the_content_decides_not_the_file_name(tmp_path):
    path = tmp_path / "scan.jpg"
    path.write_bytes(encoded(Image.new("RGB", (4, 4), "red")))
    assert open_image(path).getpixel((0, 0)) == (255, 0, 0)


def bomb(side: int) -> bytes:
    """A PNG of side x side pixels in a few kilobytes."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    lines = zlib.compress(b"\0" * (((side + 7) // 8 + 1) * side), 9)
    parts = [chunk(b"IHDR", header), chunk(b"IDAT", lines), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def test_too_many_pixels_are_refused_before_decoding():
    content = bomb(9000)
    assert len(content) < 20_000
    with pytest.raises(DataError, match="at most 64000000 pixels"):
        open_image(content)
    assert open_image(bomb(900)).size == (900, 900)


def test_damaged_and_foreign_files_are_refused(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    for content in (
        encoded(Image.fromarray(noise), "JPEG")[:2000],
        encoded(Image.fromarray(noise))[:2000],
        b"",
        b"%PDF-1.4",
        b"GIF89a",
    ):
        with pytest.raises(DataError, match="expected a complete image"):
            open_image(content)
    with pytest.raises(DataError, match="there is no file"):
        open_image(tmp_path / "none.png")


def test_animations_are_refused():
    frames = [Image.new("L", (4, 4), value) for value in (0, 90, 200)]
    content = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    with pytest.raises(DataError, match="several frames"):
        open_image(content)


def test_a_format_outside_the_list_is_not_opened():
    content = encoded(Image.new("RGB", (4, 4)), "PCX")
    with pytest.raises(DataError):
        open_image(content)


def test_what_is_no_image_is_refused_in_the_same_words_every_time():
    sentences = set()
    for _ in range(2):
        with pytest.raises(DataError, match="it is of another format") as refused:
            open_image(b"the photograph was not stored")
        sentences.add(str(refused.value))
    assert len(sentences) == 1


def test_a_jpeg_of_many_scans_is_refused_before_they_are_decoded():
    content = encoded(Image.new("L", (800, 800)), "JPEG", progressive=True)
    last = content.rindex(b"\xff\xda")
    bomb = content[:-2] + content[last:-2] * 9000 + content[-2:]
    assert len(bomb) < 400_000
    with pytest.raises(DataError, match="at most 100 scans"):
        open_image(bomb)
    assert open_image(content[:-2] + content[last:-2] * 50 + content[-2:]).size == (800, 800)


def test_damage_that_makes_pillow_raise_anything_is_a_refusal():
    many = encoded(Image.new("L", (4, 4)), "TIFF")
    (first,) = struct.unpack_from("<I", many, 4)
    (count,) = struct.unpack_from("<H", many, first)
    place = first + 2 + 12 * count
    empty = many[:place] + struct.pack("<I", len(many)) + many[place + 4 :] + bytes(6)
    sized = many.replace(struct.pack("<HHI", 256, 4, 1), struct.pack("<HHI", 256, 2, 1))
    sized = sized.replace(struct.pack("<HHI", 256, 3, 1), struct.pack("<HHI", 256, 2, 1))
    assert sized != many
    gif = encoded(Image.new("P", (9, 9)), "GIF")
    for content in (empty, sized, gif[:20], gif[:-12]):
        with pytest.raises(DataError):
            open_image(content)


def test_a_damaged_tag_beside_the_orientation_does_no_harm():
    image = Image.new("RGB", (4, 2), "white")
    tags = Image.Exif()
    tags[0x0112] = 6
    body = tags.tobytes()
    assert struct.pack(">H", 1) in body or struct.pack("<H", 1) in body
    order = ">" if b"MM" in body[:10] else "<"
    start = body.index(b"MM" if order == ">" else b"II")
    entries = struct.pack(order + "HHIHH", 0x0112, 3, 1, 6, 0)
    entries += struct.pack(order + "HHI4s", 0x011A, 2, 4, b"abc\0")  # XResolution as a text
    exif = body[:start] + (b"MM\0*" if order == ">" else b"II*\0")
    exif += struct.pack(order + "IH", 8, 2) + entries + bytes(4)
    content = encoded(image, "JPEG", exif=exif)
    assert open_image(content).size == (2, 4)
