"""An image file as it is, but for all that is neither pixels nor a color profile.

Comments, camera data, embedded previews and what stands after the end of the image can name a
patient. A file that is not laid out as expected is not copied; it is decoded and encoded again.
What somebody hid within the compressed pixels is not looked for.
"""

import re
import struct
import zlib

from PIL import Image
from PIL.ExifTags import Base

_PNG_CHUNKS = (b"IHDR", b"IDAT", b"IEND")

_PNG_BITS = 24
"""Place of the bits a channel in a PNG file."""

_SCAN, _END = 0xDA, b"\xff\xd9"

_AFTER_SCAN = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")
"""The marker after a scan, to which stuffed bytes and restarts belong."""

_KEPT = frozenset({*range(0xC0, 0xD0), 0xDB, 0xDD, _SCAN} - {0xC8})
"""Frame headers, tables, the restart interval and scans."""

_APP0, _APP2, _APP14 = 0xE0, 0xE2, 0xEE
_DROPPED = frozenset({0xFE, *range(0xE0, 0xF0)})
"""Comments and application segments, but for what `_kept_application` keeps."""

_PROFILE_PART = 65_519
"""Bytes of a profile in a segment at most."""


def plain_content(content: bytes, image: Image.Image) -> bytes | None:
    """The file without its metadata, if decoding it gives 8-bit gray or RGB as stored; else None.

    Args:
        content: of a PNG or JPEG file.
        image: as Pillow opened it, not decoded yet.

    Returns:
        None where the image must be encoded again: other formats, wide or transparent pixels, an
        orientation to apply, a truncated file.
    """
    if image.mode not in ("RGB", "L") or image.format not in ("PNG", "JPEG"):
        return None
    if image.format == "PNG" and content[_PNG_BITS] > 8:
        return None
    if "transparency" in image.info or image.getexif().get(Base.Orientation, 1) != 1:
        return None
    profile = profile_of(image)
    return (_plain_png if image.format == "PNG" else _plain_jpeg)(content, profile)


def profile_of(image: Image.Image) -> bytes | None:
    """The color profile of an image, if that is what it is, and made for its mode."""
    profile = image.info.get("icc_profile") or b""
    is_profile = profile[36:40] == b"acsp" and int.from_bytes(profile[:4], "big") == len(profile)
    fits = profile[16:20] == {"L": b"GRAY", "RGB": b"RGB "}.get(image.mode)
    return profile if is_profile and fits else None


def _plain_png(content: bytes, profile: bytes | None) -> bytes | None:
    kept, position = [content[:8]], 8
    while position + 12 <= len(content):
        (length,) = struct.unpack_from(">I", content, position)
        chunk = content[position : position + 12 + length]
        kind = chunk[4:8]
        if kind in _PNG_CHUNKS:
            kept.append(chunk)
        if kind == b"IHDR" and profile:
            kept.append(_png_chunk(b"iCCP", b"ICC Profile\0\0" + zlib.compress(profile)))
        position += 12 + length
        if kind == b"IEND":
            return b"".join(kept)
    return None


def _png_chunk(kind: bytes, body: bytes) -> bytes:
    check = zlib.crc32(kind + body)
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", check)


def _plain_jpeg(content: bytes, profile: bytes | None) -> bytes | None:
    kept, position = [content[:2]], 2
    segments = _profile_segments(profile) if profile else b""
    while position + 4 <= len(content) and content[position] == 0xFF:
        marker = content[position + 1]
        if marker == 0xFF:  # a fill byte
            position += 1
            continue
        (length,) = struct.unpack_from(">H", content, position + 2)
        if length < 2:
            return None
        segment = content[position : position + 2 + length]
        position += len(segment)
        if marker == _APP2:
            segment, segments = segments, b""
        elif marker in _DROPPED:
            segment = _kept_application(marker, segment)
        elif marker not in _KEPT:
            return None
        kept.append(segment)
        if marker == _SCAN:
            after = _AFTER_SCAN.search(content, position)
            if after is None:
                return None
            kept.append(content[position : after.start()])
            position = after.start()
            if after[0] == _END:
                return b"".join([*kept, _END])
    return None


def _kept_application(marker: int, segment: bytes) -> bytes:
    """What an application segment says about pixels: JFIF without preview, Adobe."""
    body = segment[4:]
    if marker == _APP0 and body.startswith(b"JFIF\0") and len(body) >= 14:
        return b"\xff\xe0\0\x10" + body[:12] + b"\0\0"
    if marker == _APP14 and body.startswith(b"Adobe") and len(body) >= 12:
        return b"\xff\xee\0\x0e" + body[:12]
    return b""


def _profile_segments(profile: bytes) -> bytes:
    """A profile in the segments of a JPEG. Source: ICC.1:2022, B.4."""
    parts = [profile[at : at + _PROFILE_PART] for at in range(0, len(profile), _PROFILE_PART)]
    heads = (struct.pack(">HH", 0xFFE2, len(part) + 16) for part in parts)
    return b"".join(
        head + b"ICC_PROFILE\0" + bytes([number, len(parts)]) + part
        for number, (head, part) in enumerate(zip(heads, parts, strict=True), start=1)
    )
