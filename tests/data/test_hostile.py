"""A folder as hostile as real exports: each file ends accepted or rejected, as the table says."""

import io
import json
import os
import struct
import zlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hostile import run_hostile
from PIL import Image

from medft.data.images import open_image
from medft.data.pairs import read_pairs
from medft.data.prepare import prepare

RANDOM = np.random.default_rng(0)
GRAY = RANDOM.integers(0, 255, (40, 50), dtype=np.uint8)
COLOR = RANDOM.integers(0, 255, (40, 50, 3), dtype=np.uint8)
PALETTE = Image.fromarray(COLOR).quantize(16)


def encoded(image, format="PNG", **options):
    stream = io.BytesIO()
    image.save(stream, format=format, **options)
    return stream.getvalue()


def gray(**options):
    return encoded(Image.fromarray(GRAY), **options)


def chunk(kind, body):
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def bomb(side=22400):
    """About 60 KB that would unpack to 500 MB of gray values."""
    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    packer = zlib.compressobj(9)
    parts = [packer.compress(b"\0" * (side + 1) * 100) for _ in range(side // 100)]
    body = b"".join([*parts, packer.flush()])
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")
    )


def exif(orientation):
    tags = Image.Exif()
    tags[0x0112] = orientation
    tags[0x010E] = "Jane Doe, born 1950"
    return tags


def animated(format):
    frames = [Image.new("L", (9, 9), value) for value in (0, 90, 200)]
    return encoded(frames[0], format, save_all=True, append_images=frames[1:])


def with_text():
    return encoded(Image.fromarray(GRAY), pnginfo=_text())


def _text():
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_text("PatientName", "Jane Doe")
    return info


ACCEPTED = None
# name, content of the file (None: no file is written), reason
FILES = [
    ("plain.png", gray(), ACCEPTED),
    ("color.png", encoded(Image.fromarray(COLOR)), ACCEPTED),
    ("plain.jpg", encoded(Image.fromarray(COLOR), "JPEG"), ACCEPTED),
    ("gray.jpeg", encoded(Image.fromarray(GRAY), "JPEG"), ACCEPTED),
    ("progressive.jpg", encoded(Image.fromarray(COLOR), "JPEG", progressive=True), ACCEPTED),
    ("png named.jpg", gray(), ACCEPTED),
    ("jpg named.png", encoded(Image.fromarray(COLOR), "JPEG"), ACCEPTED),
    ("no extension", gray(), ACCEPTED),
    ("umlaut \u00e4\u00f6.png", gray(), ACCEPTED),
    ("sixteen.png", encoded(Image.fromarray(GRAY.astype(np.uint16) * 200)), ACCEPTED),
    ("palette.png", encoded(PALETTE), ACCEPTED),
    ("transparent palette.png", encoded(PALETTE, transparency=3), ACCEPTED),
    ("one bit.png", encoded(Image.fromarray(GRAY).convert("1")), ACCEPTED),
    ("rgba.png", encoded(Image.fromarray(COLOR).convert("RGBA")), ACCEPTED),
    ("la.png", encoded(Image.fromarray(GRAY).convert("LA")), ACCEPTED),
    ("cmyk.jpg", encoded(Image.fromarray(COLOR).convert("CMYK"), "JPEG"), ACCEPTED),
    ("turned.jpg", encoded(Image.fromarray(COLOR), "JPEG", exif=exif(6)), ACCEPTED),
    ("named.jpg", encoded(Image.fromarray(COLOR), "JPEG", exif=exif(1)), ACCEPTED),
    ("named.png", with_text(), ACCEPTED),
    ("float.tif", encoded(Image.fromarray(GRAY.astype(np.float32)), "TIFF"), ACCEPTED),
    ("plain.bmp", encoded(Image.fromarray(GRAY), "BMP"), ACCEPTED),
    ("plain.webp", encoded(Image.fromarray(COLOR), "WEBP"), ACCEPTED),
    ("one pixel.png", encoded(Image.new("L", (1, 1), 7)), ACCEPTED),
    ("thin.png", encoded(Image.new("L", (3000, 1), 7)), ACCEPTED),
    ("half.jpg", encoded(Image.fromarray(COLOR), "JPEG")[:900], "bad_image"),
    ("half.png", gray()[:900], "bad_image"),
    ("no end.png", gray()[:-20], ACCEPTED),
    ("flipped bit.png", gray()[:200] + bytes([gray()[200] ^ 8]) + gray()[201:], "bad_image"),
    ("empty.png", b"", "bad_image"),
    ("text.png", b"this is no image", "bad_image"),
    ("page.png", b"<html>", "bad_image"),
    ("document.png", b"%PDF-1.7", "bad_image"),
    ("vector.svg", b"<svg xmlns='http://www.w3.org/2000/svg'/>", "bad_image"),
    ("postscript.png", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "bad_image"),
    ("foreign.pcx", encoded(Image.fromarray(COLOR), "PCX"), "bad_image"),
    ("moving.gif", animated("GIF"), "bad_image"),
    ("pages.tif", animated("TIFF"), "bad_image"),
    ("moving.png", animated("PNG"), "bad_image"),
    ("bomb.png", bomb(), "bad_image"),
    ("lost.png", None, "missing_image"),
    ("", None, "no_image"),
    ("../secret.png", None, "outside_root"),
    ("/etc/passwd", None, "outside_root"),
    ("link.png", None, "outside_root"),
    ("nul\0.png", None, "missing_image"),
    ("x" * 5000, None, "missing_image"),
    (".", None, "no_regular_file"),
]  # fmt: skip


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hostile")
    images = folder / "images"
    images.mkdir()
    (folder / "secret.png").write_bytes(gray())
    os.symlink(folder / "secret.png", images / "link.png")
    rows = []
    for index, (name, content, _) in enumerate(FILES):
        if content is not None:
            (images / name).write_bytes(content)
        rows.append({"file": name, "text": f"case {index}"})
    (folder / "table.json").write_text(json.dumps(rows))
    (folder / "SOURCES.yaml").write_text(
        "sources:\n  - {name: a, kind: json, path: table.json, images: images, image: file, "
        "text: text}\nsplit: {validation: 0.0}\n"
    )
    summary = prepare(folder / "SOURCES.yaml", folder / "out", max_rejects=1.0)
    return folder, summary


def test_every_case_ends_as_the_table_says(outcome):
    folder, summary = outcome
    lines = [json.loads(x) for x in (folder / "out" / "rejects.jsonl").read_text().splitlines()]
    verdicts = {line["row"] - 1: line["reason"] for line in lines}
    assert len(FILES) >= 40
    for index, (name, _, reason) in enumerate(FILES):
        assert verdicts.get(index) == reason, (name, [x for x in lines if x["row"] == index + 1])
    counts = summary["sources"]["a"]
    assert counts["read"] == counts["accepted"] + counts["rejected"] == len(FILES)
    assert all(str(folder) not in line["detail"] for line in lines)


def test_what_is_stored_shows_the_same_image_without_its_metadata(outcome):
    folder, _ = outcome
    stored = {row["text"]: row for row in read_pairs(folder / "out" / "pairs.parquet")}
    for index, (name, content, reason) in enumerate(FILES):
        if reason is ACCEPTED:
            row = stored[f"case {index}"]
            kept = row["images"][0]["bytes"]
            shown = np.asarray(open_image(kept))
            if name == "float.tif":  # scaled by the range of its source
                expected = np.rint((GRAY - GRAY.min()) * (255 / np.ptp(GRAY)))[..., None]
            else:
                expected = np.asarray(open_image(content))
            assert (shown == expected).all(), name
            assert b"Jane Doe" not in kept
            assert row["images"][0]["path"] == name
    assert b"Jane Doe" in dict((n, c) for n, c, _ in FILES)["named.png"]


def test_memory_stays_small_although_images_would_unpack_to_much(outcome):
    folder, _ = outcome
    words = [folder / "SOURCES.yaml", "--out", folder / "again", "--max-rejects", "1"]
    done = run_hostile(["data", "prepare", *words])
    assert done.code == 0
    assert done.peak < 400e6  # the bomb would unpack to 500 MB


def prepared(folder, source, **rest):
    lines = "".join(f"    {key}: {json.dumps(value)}\n" for key, value in source.items())
    text = f"sources:\n  -\n{lines}split: {{validation: 0.0}}\n" + "".join(
        f"{key}: {value}\n" for key, value in rest.items()
    )
    (folder / "SOURCES.yaml").write_text(text)
    summary = prepare(folder / "SOURCES.yaml", folder / "out", max_rejects=1.0)
    rejects = [json.loads(x) for x in (folder / "out" / "rejects.jsonl").read_text().splitlines()]
    return summary, list(read_pairs(folder / "out" / "pairs.parquet")), rejects


def test_parquet_with_bytes_structs_and_paths(tmp_path):
    (tmp_path / "here.png").write_bytes(gray())
    rows = [
        {"a": {"bytes": gray(), "path": "x.png"}, "t": "struct"},
        {"a": {"bytes": None, "path": "here.png"}, "t": "path"},
        {"a": {"bytes": None, "path": "/etc/passwd"}, "t": "outside"},
        {"a": {"bytes": b"torn", "path": None}, "t": "torn"},
        {"a": None, "t": "nothing"},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "t.parquet")
    source = {"name": "p", "kind": "parquet", "path": "t.parquet", "image": "a", "text": "t"}
    _, pairs, rejects = prepared(tmp_path, source)
    assert [row["text"] for row in pairs] == ["struct", "path"]
    assert [line["reason"] for line in rejects] == ["outside_root", "bad_image", "no_image"]
    raw = pa.table({"a": [gray()], "t": ["raw"]})
    pq.write_table(raw, tmp_path / "t.parquet")
    _, pairs, _ = prepared(tmp_path, source)
    assert pairs[0]["images"][0]["bytes"] == gray()


@pytest.mark.parametrize("key", ["text", "question", "group", "keep", "id"])
@pytest.mark.parametrize(
    ("cell", "kind"), [(["a"], "a list"), ({"a": 1}, "an object"), (b"a", "bytes")]
)
def test_a_cell_that_is_no_text_is_rejected_and_never_written_in_pythons_syntax(
    tmp_path, key, cell, kind
):
    (tmp_path / "0.png").write_bytes(gray())
    rows = [{"a": "0.png", "t": "first", "x": cell}, {"a": "0.png", "t": "second", "x": None}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "t.parquet")
    source = {"name": "p", "kind": "parquet", "path": "t.parquet", "image": "a", "text": "t"}
    given = {"text": "{t} {x}", "question": "{t}? {x}", "keep": ["x"]}.get(key, "x")
    further = {"empty_group": "image"} if key == "group" else {}
    _, pairs, [line] = prepared(tmp_path, {**source, **further, key: given})
    assert (line["row"], line["reason"], line["detail"]) == (1, "not_text", f"x holds {kind}")
    assert [row["text"] for row in pairs] == ["second"]


@pytest.mark.parametrize("name", ["metadata.csv", "metadata.jsonl"])
def test_an_image_folder(tmp_path, name):
    (tmp_path / "f" / "sub").mkdir(parents=True)
    (tmp_path / "f" / "sub" / "1.png").write_bytes(gray())
    if name.endswith("csv"):
        (tmp_path / "f" / name).write_text("file_name,text\nsub/1.png,One.\n")
    else:
        (tmp_path / "f" / name).write_text('{"file_name": "sub/1.png", "text": "One."}\n')
    source = {"name": "i", "kind": "imagefolder", "path": "f", "text": "text"}
    _, pairs, _ = prepared(tmp_path, source)
    assert [row["text"] for row in pairs] == ["One."]


def test_a_study_is_one_pair_and_its_rows_are_counted(tmp_path):
    for index in range(5):
        values = RANDOM.integers(0, 255, (20, 20), dtype=np.uint8)
        (tmp_path / f"{index}.png").write_bytes(encoded(Image.fromarray(values)))
    rows = [
        ("0.png", "s1", "Same."), ("1.png", "s2", "Other."), ("2.png", "s1", "Same."),
        ("lost.png", "s1", "Same."), ("3.png", "s3", "One."), ("4.png", "s3", "Two."),
    ]  # fmt: skip
    content = "file,study,text\n" + "".join(",".join(row) + "\n" for row in rows)
    (tmp_path / "t.csv").write_text(content)
    source = {
        "name": "s", "kind": "csv", "path": "t.csv", "image": "file", "text": "text",
        "study": "study",
    }  # fmt: skip
    summary, pairs, rejects = prepared(tmp_path, source)
    assert [(row["text"], len(row["images"])) for row in pairs] == [("Same.", 2), ("Other.", 1)]
    counts = summary["sources"]["s"]
    assert (counts["read"], counts["accepted"], counts["pairs"]) == (6, 3, 2)
    assert [(x["row"], x["reason"]) for x in rejects] == [
        (4, "missing_image"), (5, "different_texts"), (6, "different_texts"),
    ]  # fmt: skip


def test_several_image_columns_are_one_row_with_several_images(tmp_path):
    (tmp_path / "a.png").write_bytes(gray())
    (tmp_path / "b.png").write_bytes(encoded(Image.fromarray(COLOR)))
    (tmp_path / "t.csv").write_text("front,side,text\na.png,b.png,Both.\na.png,,One is missing.\n")
    source = {
        "name": "s",
        "kind": "csv",
        "path": "t.csv",
        "image": ["front", "side"],
        "text": "text",
    }
    _, pairs, rejects = prepared(tmp_path, source)
    assert [len(row["images"]) for row in pairs] == [2]
    assert rejects[0]["reason"] == "no_image"


def test_texts_of_any_size_and_cells_that_mean_nothing(tmp_path):
    (tmp_path / "a.png").write_bytes(gray())
    long = "word " * 10_000_000
    rows = [
        {"f": "a.png", "t": long}, {"f": "a.png", "t": float("nan")}, {"f": "a.png", "t": None},
        {"f": "a.png", "t": "  "}, {"f": "a.png", "t": 7}, {"f": 7, "t": "number as a path"},
    ]  # fmt: skip
    (tmp_path / "t.json").write_text(json.dumps(rows))
    source = {"name": "s", "kind": "json", "path": "t.json", "image": "f", "text": "t"}
    _, pairs, rejects = prepared(tmp_path, source)
    assert [len(row["text"]) for row in pairs] == [len(long.strip()), 1]
    assert [x["reason"] for x in rejects] == ["empty_text"] * 3 + ["missing_image"]


def test_larger_images_are_shrunk_and_smaller_ones_kept(tmp_path):
    (tmp_path / "large.png").write_bytes(encoded(Image.new("RGB", (300, 100), "red")))
    (tmp_path / "small.png").write_bytes(gray())
    (tmp_path / "t.csv").write_text("f,t\nlarge.png,L\nsmall.png,S\n")
    source = {"name": "s", "kind": "csv", "path": "t.csv", "image": "f", "text": "t"}
    _, pairs, _ = prepared(tmp_path, source, images="{max_side: 60}")
    assert [(row["width"], row["height"]) for row in pairs] == [([60], [20]), ([50], [40])]
    assert pairs[1]["images"][0]["bytes"] == gray()
