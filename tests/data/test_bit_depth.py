"""Gray values of more than 8 bits become 0..255 by the range of their source."""

import io
import json
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from medft.data.bit_depth import GrayRange, GrayScale, WideImages, WideValues, wide_values
from medft.data.image_sentences import image_sentences
from medft.data.images import open_image
from medft.data.pairs import read_pairs
from medft.data.prepare import prepare
from medft.data.table_row import Rejected
from medft.data.wide_images import HEAD, is_narrow
from medft.errors import DataError, RecipeError

RANDOM = np.random.default_rng(7)


def png(values):
    stream = io.BytesIO()
    Image.fromarray(values).save(stream, "PNG")
    return stream.getvalue()


def tiff(values, *, photometric=1, planes=1):
    """An uncompressed TIFF of any integers or floats, which Pillow does not write."""
    height, width = values.shape
    height //= planes
    kind = {"u": 1, "i": 2, "f": 3}[values.dtype.kind]
    bits, data = values.dtype.itemsize * 8, values.tobytes()
    tags = [(256, width), (257, height), (258, bits), (259, 1), (262, photometric), (273, 0)]
    tags += [(277, 1), (278, height), (279, len(data)), (339, kind)]
    if planes > 1:
        return _planar(values, planes, tags)
    start = 8 + 2 + 12 * len(tags) + 4
    entries = [struct.pack("<HHII", tag, 4, 1, start if tag == 273 else v) for tag, v in tags]
    head = b"II*\0" + struct.pack("<IH", 8, len(tags)) + b"".join(entries)
    return head + struct.pack("<I", 0) + data


def _planar(values, planes, tags):
    """A TIFF whose colors stand one after another."""
    tags = dict(tags) | {262: 2, 277: planes, 284: 2}
    lists = {258: [tags[258]] * planes, 339: [tags[339]] * planes}
    size = len(values.tobytes()) // planes
    start = 8 + 2 + 12 * len(tags) + 4
    lists |= {273: [], 279: [size] * planes}
    data_at = start + sum(4 * planes for _ in range(4))
    lists[273] = [data_at + size * plane for plane in range(planes)]
    entries, extra = [], b""
    for tag in sorted(tags):
        if tag in lists:
            entries.append(struct.pack("<HHII", tag, 4, planes, start + len(extra)))
            extra += struct.pack(f"<{planes}I", *lists[tag])
        else:
            entries.append(struct.pack("<HHII", tag, 4, 1, tags[tag]))
    head = b"II*\0" + struct.pack("<IH", 8, len(tags)) + b"".join(entries)
    return head + struct.pack("<I", 0) + extra + values.tobytes()


def series(folder, files, **images):
    """Prepares the files as one source; the pixels stored of each, the summary and the rejects."""
    (folder / "images").mkdir(parents=True)
    for name, content in files.items():
        (folder / "images" / name).write_bytes(content)
    rows = [{"file": name, "text": f"case {name}"} for name in files]
    (folder / "table.json").write_text(json.dumps(rows))
    (folder / "SOURCES.yaml").write_text(
        "sources:\n  - {name: s, kind: json, path: table.json, images: images, image: file, "
        f"text: text}}\nimages: {json.dumps(images)}\nsplit: {{validation: 0.0}}\n"
    )
    summary = prepare(folder / "SOURCES.yaml", folder / "out", max_rejects=1.0)
    stored = {}
    for row in read_pairs(folder / "out" / "pairs.parquet"):
        image = Image.open(io.BytesIO(row["images"][0]["bytes"]))
        assert image.format == "PNG"
        stored[row["images"][0]["path"]] = np.asarray(image)
    lines = (folder / "out" / "rejects.jsonl").read_text().splitlines()
    rejected = {f"{line['row']} {line['reason']}" for line in map(json.loads, lines)}
    return stored, summary["sources"]["s"], rejected


def ramp(most, side=40):
    """Values from 0 to most, most among them."""
    return np.linspace(0, most, side * side).round().astype(np.uint16).reshape(side, side)


def test_equal_values_of_a_series_stay_equal_where_the_maxima_differ(tmp_path):
    first, second = ramp(2047), ramp(2050)
    stored, counts, _ = series(tmp_path, {"a.png": png(first), "b.png": png(second)})
    assert counts["bit_depth"] == 12
    assert counts["images_by_bits"] == {"11": 1, "12": 1}
    for name, values in (("a.png", first), ("b.png", second)):
        expected = np.rint(values * (255 / 4095))
        assert (stored[name] == expected).all()
    common = np.intersect1d(first, second)
    assert len(common) > 1000
    for value in common:
        assert set(stored["a.png"][first == value]) == set(stored["b.png"][second == value])
    assert stored["a.png"].max() == 127  # not 8, as of 65,535
    alone = [np.rint(values * (255 / values.max())) for values in (first, second)]
    assert set(alone[0][first == 1000]) != set(alone[1][second == 1029])


def test_the_bits_that_are_given_decide_and_larger_values_are_rejected_not_clipped(tmp_path):
    files = {"a.png": png(ramp(900)), "b.png": png(ramp(1024)), "c.png": png(ramp(1023))}
    stored, counts, rejected = series(tmp_path, files, bit_depth=10)
    assert (stored["a.png"] == np.rint(ramp(900) * (255 / 1023))).all()
    assert stored["c.png"].max() == 255
    assert rejected == {"2 outside_bit_depth"}
    assert counts["bit_depth"] == 10


def test_percentile_is_of_each_image_alone_and_says_so(tmp_path):
    one, two = RANDOM.integers(100, 900, (50, 50)), RANDOM.integers(100, 3000, (50, 50))
    files = {"a.png": png(one.astype(np.uint16)), "b.png": png(two.astype(np.uint16))}
    stored, counts, _ = series(tmp_path, files, bit_depth="percentile")
    for name, values in (("a.png", one), ("b.png", two)):
        low, high = np.percentile(values, [0.5, 99.5])
        assert (stored[name] == np.rint(((values - low) * (255 / (high - low))).clip(0, 255))).all()
    [sentence] = image_sentences({"sources": {"s": counts}})
    assert "do not stay equal" in sentence.text
    assert sentence.needs_look


def test_signed_and_floating_point_files_have_the_range_of_their_source(tmp_path):
    signed = [np.array([[-1024, 0, 500]], np.int16), np.array([[0, 500, 3071]], np.int16)]
    floats = [np.array([[0.25, 0.5]], np.float32), np.array([[0.5, 1.25]], np.float32)]
    files = {f"s{i}.tif": tiff(values) for i, values in enumerate(signed)}
    files |= {f"f{i}.tif": tiff(values) for i, values in enumerate(floats)}
    stored, counts, _ = series(tmp_path, files)
    for i in range(2):
        assert (stored[f"s{i}.tif"] == np.rint((signed[i] + 1024.0) * (255 / 4095))).all()
        assert (stored[f"f{i}.tif"] == np.rint((floats[i] - 0.25) * 255)).all()
    assert counts["integer_range"] == [-1024, 3071]
    assert counts["float_range"] == [0.25, 1.25]
    text = image_sentences({"sources": {"s": counts}})[0].text
    assert "integers from -1,024 to 3,071 and floats from 0.25 to 1.25 became 0 to 255" in text


def test_values_that_are_not_finite_leave_the_others_as_they_are_and_are_counted(tmp_path):
    plain = np.linspace(0, 1, 12, dtype=np.float32).reshape(3, 4)
    holed = plain.copy()
    holed[0, :3] = np.nan, np.inf, -np.inf
    files = {"a.tif": tiff(plain), "b.tif": tiff(holed), "c.tif": tiff(np.full_like(plain, np.nan))}
    stored, counts, rejected = series(tmp_path, files)
    assert (stored["a.tif"] == np.rint(plain * 255.0)).all()
    assert (stored["b.tif"].ravel()[3:] == stored["a.tif"].ravel()[3:]).all()
    assert stored["b.tif"][0, :3].tolist() == [0, 255, 0]
    assert counts["non_finite_images"] == 1
    assert rejected == {"3 bad_image"}


def test_files_of_32_bits_are_not_white(tmp_path):
    values = RANDOM.integers(0, 4_000_000_000, (30, 30)).astype(np.uint32)
    values[0, :2] = 0, 4_000_000_000
    stored, counts, _ = series(tmp_path, {"a.tif": tiff(values)})
    assert counts["bit_depth"] == 32
    assert (stored["a.tif"] == np.rint(values * (255 / (2**32 - 1)))).all()


def test_a_file_in_which_0_is_white_is_inverted_as_one_of_8_bits_is(tmp_path):
    values = ramp(4095)
    files = {
        "a.tif": tiff(values, photometric=0),
        "b.tif": tiff(values),
        "c.tif": tiff((values // 16).astype(np.uint8), photometric=0),
    }
    stored, counts, _ = series(tmp_path, files)
    assert (stored["a.tif"] == 255 - stored["b.tif"]).all()
    assert np.abs(stored["a.tif"].astype(int) - stored["c.tif"]).max() <= 1
    assert counts["wide_images"] == 2


def test_the_orientation_of_a_wide_image_is_applied(tmp_path):
    values = ramp(4095)
    tags = Image.Exif()
    tags[0x0112] = 6  # to be shown turned by 90 degrees
    stream = io.BytesIO()
    Image.fromarray(values).save(stream, "PNG", exif=tags)
    stored, _, _ = series(tmp_path, {"a.png": stream.getvalue(), "b.png": png(values)})
    assert (stored["a.png"] == np.rot90(stored["b.png"], -1)).all()


def test_color_of_16_bits_is_taken_where_it_uses_them_and_rejected_where_it_would_be_dark(tmp_path):
    def color(most):
        """A PNG of 16 bits a channel, which Pillow does not write."""
        values = (np.arange(27).reshape(3, 3, 3) * most // 26).astype(">u2")
        lines = b"".join(b"\0" + row.tobytes() for row in values)
        parts = [(b"IHDR", struct.pack(">IIBBBBB", 3, 3, 16, 2, 0, 0, 0))]
        parts += [(b"IDAT", zlib.compress(lines)), (b"IEND", b"")]
        chunks = [
            struct.pack(">I", len(b)) + k + b + struct.pack(">I", zlib.crc32(k + b))
            for k, b in parts
        ]
        return b"\x89PNG\r\n\x1a\n" + b"".join(chunks), values

    full, values = color(65535)
    dark, _ = color(4095)
    stored, _, rejected = series(tmp_path, {"a.png": full, "b.png": dark})
    assert (stored["a.png"] == values >> 8).all()
    assert rejected == {"2 unknown_range"}


def test_color_that_pillow_reads_wrongly_is_rejected(tmp_path):
    planes = np.repeat(np.array([60000, 30000, 100], np.uint16), 12).reshape(9, 4)
    garbled = tiff(planes, planes=3)
    with Image.open(io.BytesIO(garbled)) as image:
        assert (image.mode, image.size) == ("RGB", (4, 3))
        assert image.getpixel((0, 0)) != (234, 117, 0)  # what the file says
    _, _, rejected = series(tmp_path, {"a.tif": garbled})
    assert rejected == {"1 unknown_range"}


def test_signed_bytes_have_the_range_of_their_source(tmp_path):
    values = [np.array([[-100, -1, 0, 1]], np.int8), np.array([[0, 1, 50, 100]], np.int8)]
    files = {f"{i}.tif": tiff(one) for i, one in enumerate(values)}
    stored, counts, _ = series(tmp_path, files)
    for i, one in enumerate(values):
        assert (stored[f"{i}.tif"] == np.rint((one + 100.0) * (255 / 200))).all()
    assert counts["integer_range"] == [-100, 100]


def test_a_pgm_has_the_values_of_its_file_and_not_those_that_pillow_stretches(tmp_path):
    values = [np.array([[0, 16, 2000]], np.uint16), np.array([[0, 16, 4095]], np.uint16)]
    files = {"c.png": png(values[1])}
    for i, one in enumerate(values):
        files[f"{i}.pgm"] = b"P5\n3 1\n%d\n" % one.max() + one.astype(">u2").tobytes()
    stored, counts, rejected = series(tmp_path, files, bit_depth=12)
    assert rejected == set()
    assert counts["integer_range"] == [0, 4095]
    for i, one in enumerate(values):
        assert (stored[f"{i}.pgm"] == np.rint(one * (255 / 4095))).all()
    assert (stored["1.pgm"] == stored["c.png"]).all()


def test_transparent_pixels_of_a_wide_png_become_black(tmp_path):
    values = np.array([[0, 300, 4000]], np.uint16)
    stream = io.BytesIO()
    Image.fromarray(values).save(stream, "PNG", transparency=4000)
    stored, _, _ = series(tmp_path, {"a.png": stream.getvalue(), "b.png": png(values)})
    assert stored["b.png"].tolist() == [[0, 19, 249]]
    assert stored["a.png"].tolist() == [[0, 19, 0]]


def test_nan_is_black_where_0_is_white_too(tmp_path):
    values = np.array([[0, 1, np.nan]], np.float32)
    stored, _, _ = series(tmp_path, {"a.tif": tiff(values, photometric=0)})
    assert stored["a.tif"].tolist() == [[255, 0, 0]]


def test_percentiles_between_two_values_lose_neither(tmp_path):
    mask = np.zeros((20, 50), np.uint16)
    mask[0, :5] = 3
    offset = np.full((10, 10), 30_000_000, np.uint32)
    offset[0, 0] += 100
    files = {"a.png": png(mask), "b.tif": tiff(offset)}
    stored, _, _ = series(tmp_path, files, bit_depth="percentile")
    assert set(stored["a.png"][0, :5].tolist()) == {255}
    assert stored["b.tif"].max() == 255


def test_an_image_of_its_own_is_scaled_only_where_its_bits_are_known(tmp_path):
    full = ramp(40_000)
    assert (np.asarray(open_image(png(full)))[..., 0] == np.rint(full / 257)).all()
    for content in (png(ramp(4095)), tiff(np.ones((2, 2), np.float32)), png(ramp(0))):
        with pytest.raises(DataError, match="which of them is white only the other images"):
            open_image(content)


def test_an_outlier_that_makes_all_others_dark_deserves_a_look():
    found = WideImages()
    for most in [4095] * 30 + [65535]:
        found.add(WideValues(np.array([[0, most]], np.uint16), False))
    counts = {**found.summary("auto"), "blank_images": 0}
    plain, warned = image_sentences({"sources": {"s": counts}})
    assert not plain.needs_look
    assert "31 images with more than 8 bits a pixel (30 of 12 bits, 1 of 16 bits" in plain.text
    assert warned.needs_look
    assert "16 times darker" in warned.text
    assert "images.bit_depth: 12 rejects them" in warned.text
    even = {**counts, "images_by_bits": {"11": 15, "12": 16}, "bit_depth": 12}
    assert len(image_sentences({"sources": {"s": even}})) == 1


def test_sources_whose_bits_differ_deserve_a_look():
    counts = []
    for most in (2047, 2050):
        found = WideImages()
        found.add(WideValues(np.array([[0, most]], np.uint16), False))
        counts.append({**found.summary("auto"), "blank_images": 0})
    first, *_ = image_sentences({"sources": {"train": counts[0], "test": counts[1]}})
    assert first.needs_look
    assert "(train 11, test 12)" in first.text
    assert "images.bit_depth: 12 keeps them" in first.text
    assert len(image_sentences({"sources": {"train": counts[0], "again": counts[0]}})) == 2


def test_a_range_found_before_that_no_longer_holds_is_a_rejection():
    scale = GrayScale(integers=GrayRange(0, 4095))
    fits, beyond = (WideValues(np.array([[most]], np.uint16), False) for most in (4095, 4096))
    assert np.asarray(scale.eight_bits(fits)).tolist() == [[255]]
    with pytest.raises(Rejected) as verdict:
        scale.eight_bits(beyond)
    assert verdict.value.reason == "outside_bit_depth"


def test_blocks_and_the_table_give_what_the_formula_gives():
    values = RANDOM.integers(0, 60_000, (1030, 1030))
    expected = np.rint((values - 100.0) * (255 / 49_900)).clip(0, 255)
    for kind in (np.uint16, np.int32, np.float32):
        wide = WideValues(values.astype(kind), False)
        assert (np.asarray(GrayRange(100, 50_000).scaled(wide)) == expected).all(), kind


@pytest.mark.parametrize("given", [7, 17, "none", 12.0, True])
def test_another_bit_depth_is_one_sentence(tmp_path, given):
    with pytest.raises(RecipeError, match="bit_depth"):
        series(tmp_path, {"a.png": png(ramp(9))}, bit_depth=given)


def test_no_head_of_a_wide_image_is_taken_for_a_narrow_one():
    eight = Image.new("L", (3, 3))
    for format in ("PNG", "JPEG", "BMP", "GIF", "WEBP"):
        stream = io.BytesIO()
        eight.save(stream, format)
        assert is_narrow(stream.getvalue()[:HEAD])
    for content in (png(ramp(5)), tiff(ramp(5)), b"P5 2 1 4095\n\0\1\0\2"):
        assert not is_narrow(content[:HEAD])
        assert wide_values(Image.open(io.BytesIO(content))) is not None


def test_bytes_in_a_table_are_looked_at_before_as_files_are(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    contents = [png(ramp(300)), png(ramp(4000)), png((ramp(255)).astype(np.uint8))]
    rows = [{"image": {"bytes": c, "path": None}, "text": str(i)} for i, c in enumerate(contents)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "t.parquet")
    (tmp_path / "SOURCES.yaml").write_text(
        "sources:\n  - {name: s, kind: parquet, path: t.parquet, image: image, text: text}\n"
        "split: {validation: 0.0}\n"
    )
    counts = prepare(tmp_path / "SOURCES.yaml", tmp_path / "out")["sources"]["s"]
    assert counts["images_by_bits"] == {"9": 1, "12": 1}
    rows = {row["text"]: row for row in read_pairs(tmp_path / "out" / "pairs.parquet")}
    first = np.asarray(open_image(rows["0"]["images"][0]["bytes"]))[..., 0]
    assert (first == np.rint(ramp(300) * (255 / 4095))).all()


def test_blank_images_are_counted_and_shown(tmp_path):
    flat = np.full((64, 64), 90, np.uint8)
    noisy = flat + RANDOM.integers(0, 2, flat.shape).astype(np.uint8)
    edge = flat.copy()
    edge[:, 32:] = 94
    files = {"a.png": png(flat), "b.png": png(noisy), "c.png": png(edge)}
    _, counts, _ = series(tmp_path, files)
    assert counts["blank_images"] == 2
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Blank images: 2" in page
    assert "s: 2 images are blank, of one gray value." in page
