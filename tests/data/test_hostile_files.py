"""Files that mean harm, given to `medft data prepare` in a child of its own."""

import io
import json
import os
import zlib

import numpy as np
import pytest
from hostile import run_hostile
from PIL import Image

from medft.data import workers
from medft.data.pairs import read_pairs
from medft.data.prepare import prepare

BASE = 400e6
"""Bytes of resident memory that a preparation of one small image stays below."""


def png(side=20, value=90):
    stream = io.BytesIO()
    pixels = np.full((side, side), value, np.uint8)
    pixels[: side // 2] += 50
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def sparse(path, size):
    with path.open("wb") as file:
        file.write(png())
        file.truncate(size)


def write_sources(folder, **source):
    written = {"name": "s", "kind": "json", "path": "t.json", "image": "file", "text": "text"}
    written |= source
    (folder / "SOURCES.yaml").write_text(json.dumps({"sources": [written]}))
    return folder / "SOURCES.yaml"


@pytest.fixture
def export(tmp_path):
    """A folder with an image and, beside it, what nobody may read."""
    (tmp_path / "in" / "images").mkdir(parents=True)
    (tmp_path / "in" / "images" / "good.png").write_bytes(png())
    (tmp_path / "secret.png").write_bytes(png(value=33))
    return tmp_path / "in"


def reasons(out):
    lines = (out / "rejects.jsonl").read_text().splitlines()
    return {line["row"]: line["reason"] for line in map(json.loads, lines)}


def test_images_that_are_no_files_end_as_rejected_rows_in_bounded_memory(export):
    images = export / "images"
    os.mkfifo(images / "pipe.png")
    (images / "zero.png").symlink_to("/dev/zero")
    (images / "out.png").symlink_to(export.parent / "secret.png")
    (images / "loop.png").symlink_to(images / "loop.png")
    (images / "gone.png").symlink_to(images / "nothing.png")
    (images / "folder.png").mkdir()
    sparse(images / "sparse.png", 2**42)
    sparse(images / "large.png", 2**29 + 2**24)
    expected = {
        "pipe.png": "no_regular_file", "zero.png": "no_regular_file", "out.png": "outside_root",
        "loop.png": "missing_image", "gone.png": "missing_image", "folder.png": "no_regular_file",
        "sparse.png": "too_large", "large.png": "too_large", "../../secret.png": "outside_root",
        "/dev/zero": "no_regular_file", "/proc/self/mem": "outside_root", "good.png/": None,
    }  # fmt: skip
    names = ["good.png", *expected]
    rows = [{"file": name, "text": f"row {name}"} for name in names]
    (export / "t.json").write_text(json.dumps(rows))
    sources = write_sources(export, images="images")
    words = ["data", "prepare", sources, "--out", export / "out", "--max-rejects", "1"]
    outcome = run_hostile(words, timeout=60)
    assert outcome.code == 0
    found = reasons(export / "out")
    assert {n: found.get(i) for i, n in enumerate(names, 1) if expected.get(n)} == {
        name: reason for name, reason in expected.items() if reason
    }
    assert found.keys() >= {2, 3, 4}
    assert 1 not in found
    assert outcome.peak < BASE
    for row in read_pairs(export / "out" / "pairs.parquet"):
        assert row["images"][0]["bytes"] != (export.parent / "secret.png").read_bytes()


@pytest.mark.parametrize("kind", ["csv", "json", "jsonl", "parquet"])
@pytest.mark.parametrize("what", ["pipe", "folder", "zero", "sparse"])
def test_a_table_that_is_no_file_is_one_sentence(export, kind, what):
    path = export / "t.json"
    if what == "pipe":
        os.mkfifo(path)
    elif what == "folder":
        path.mkdir()
    elif what == "zero":
        path.symlink_to("/dev/zero")
    else:
        sparse(path, 2**42)
    sources = write_sources(export, kind=kind)
    outcome = run_hostile(["data", "prepare", sources, "--out", export / "out"], timeout=60)
    assert outcome.code == 2
    assert len(outcome.sentences) == 1
    assert "t.json" in outcome.sentences[0]
    assert not (export / "out").exists()
    assert outcome.peak < BASE


@pytest.mark.parametrize("key", ["group_map", "group_key", "keep"])
def test_a_pipe_in_place_of_another_file_is_one_sentence(export, key):
    os.mkfifo(export / "pipe")
    (export / "t.json").write_text(json.dumps([{"file": "good.png", "text": "a", "p": "1"}]))
    source = {"images": "images", "group": "p"}
    sources = write_sources(export, **source, **({key: "pipe"} if key == "group_map" else {}))
    content = json.loads(sources.read_text())
    if key == "group_key":
        content[key] = "pipe"
    elif key == "keep":
        content["split"] = {"keep": "pipe"}
    sources.write_text(json.dumps(content))
    outcome = run_hostile(["data", "prepare", sources, "--out", export / "out"], timeout=60)
    assert outcome.code == 2
    assert len(outcome.sentences) == 1
    assert "pipe" in outcome.sentences[0]


def test_metadata_of_a_folder_that_is_a_link_out_of_it_is_one_sentence(export):
    (export.parent / "metadata.csv").write_text("file_name,text\ngood.png,a\n")
    (export / "images" / "metadata.csv").symlink_to(export.parent / "metadata.csv")
    sources = write_sources(export, kind="imagefolder", path="images")
    content = json.loads(sources.read_text())
    del content["sources"][0]["image"]
    sources.write_text(json.dumps(content))
    words = ["data", "prepare", sources, "--out", export / "out"]
    outcome = run_hostile(words, timeout=60)
    assert outcome.code == 2
    assert "a link that leaves the folder" in outcome.sentences[0]
    (export / "images" / "metadata.csv").unlink()
    (export.parent / "metadata.csv").rename(export / "images" / "metadata.csv")
    assert run_hostile(words, timeout=60).code == 0


def test_texts_that_are_made_to_take_memory_or_time_end_in_a_sentence_or_a_row(export):
    deep = '{"file": "good.png", "text": ' + "[" * 100_000 + "]" * 100_000 + "}"
    digits = '{"file": "good.png", "text": ' + "7" * 100_000 + "}"
    lines = [deep, digits, '{"file": "good.png", "text": "plain"}']
    (export / "t.json").write_text("\n".join(lines))
    sources = write_sources(export, kind="jsonl", images="images")
    words = ["data", "prepare", sources, "--out", export / "out", "--max-rejects", "1"]
    outcome = run_hostile(words, timeout=60)
    assert outcome.code == 0
    assert reasons(export / "out") == {1: "bad_json", 2: "bad_json"}
    (export / "t.json").write_text(f"[{deep}]")
    outcome = run_hostile(["data", "prepare", write_sources(export), "--out", export / "o"])
    assert outcome.code == 2
    assert "expected json in" in outcome.sentences[0]


def test_a_worker_that_needs_more_memory_than_it_may_take_rejects_the_row(export, monkeypatch):
    stream = io.BytesIO()
    Image.new("RGBA", (5000, 5000), (9, 9, 9, 200)).save(stream, "PNG", compress_level=1)
    (export / "images" / "huge.png").write_bytes(stream.getvalue())
    rows = [{"file": f"{name}.png", "text": name} for name in ("good", "huge", "good")]
    rows[2]["text"] = "again"
    (export / "t.json").write_text(json.dumps(rows))
    sources = write_sources(export, images="images")
    assert prepare(sources, export / "out")["sources"]["s"]["accepted"] == 3
    monkeypatch.setattr(workers, "BYTES_PER_PIXEL", 0)
    monkeypatch.setattr(workers, "SPARE_BYTES", 2**26)
    summary = prepare(sources, export / "out", max_rejects=1.0)
    assert summary["sources"]["s"]["reasons"] == {"too_large": 1}


def test_a_file_that_becomes_a_pipe_while_it_is_prepared_is_one_sentence(export, monkeypatch):
    from medft.data import prepare as module

    def swapped(path, rows, **options):
        image = export / "images" / "good.png"
        image.unlink()
        os.mkfifo(image)
        list(rows)

    (export / "t.json").write_text(json.dumps([{"file": "good.png", "text": "a"}]))
    monkeypatch.setattr(module, "write_pairs", swapped)
    with pytest.raises(module.DataError, match="was changed meanwhile"):
        prepare(write_sources(export, images="images"), export / "out")


def test_a_png_that_inflates_without_end_takes_no_memory(export):
    """Far more data than the header has pixels for, in a chunk of half a megabyte."""
    content = png()
    start = content.index(b"IDAT") - 4
    bomb = zlib.compress(bytes(500_000_000), 9)
    chunk = len(bomb).to_bytes(4, "big") + b"IDAT" + bomb
    chunk += zlib.crc32(chunk[4:]).to_bytes(4, "big")
    (export / "images" / "bomb.png").write_bytes(content[:start] + chunk + content[-12:])
    (export / "t.json").write_text(json.dumps([{"file": "bomb.png", "text": "a"}]))
    sources = write_sources(export, images="images")
    words = ["data", "prepare", sources, "--out", export / "out", "--max-rejects", "1"]
    outcome = run_hostile(words, timeout=60)
    assert outcome.code == 0
    assert outcome.peak < BASE


@pytest.mark.slow
def test_a_parquet_table_that_decodes_to_gigabytes_takes_no_memory(export):
    import pyarrow as pa
    import pyarrow.parquet as pq

    long = "x" * 60_000_000
    table = pa.table({"file": ["good.png"] * 64, "text": [long] * 64})
    pq.write_table(table, export / "t.json", use_dictionary=True, compression="zstd")
    assert (export / "t.json").stat().st_size < 1_000_000
    sources = write_sources(export, kind="parquet", images="images")
    outcome = run_hostile(["data", "prepare", sources, "--out", export / "out"], timeout=100)
    assert outcome.code == 2
    assert "holds at most 32 times its size" in outcome.sentences[0]
    assert outcome.peak < 4 * BASE  # of 64 rows at once, 3.8 GB


def test_a_limit_above_that_of_pillow_is_the_one_that_holds(export):
    stream = io.BytesIO()
    Image.new("1", (20_000, 10_000)).save(stream, "PNG")
    (export / "images" / "large.png").write_bytes(stream.getvalue())
    (export / "t.json").write_text(json.dumps([{"file": "large.png", "text": "a"}]))
    sources = write_sources(export, images="images")
    words = ["data", "prepare", sources, "--out", export / "out"]
    assert "at most 64000000 pixels" in run_hostile(words).sentences[0]
    content = json.loads(sources.read_text()) | {"images": {"max_pixels": 300_000_000}}
    sources.write_text(json.dumps(content | {"split": {"validation": 0.0}}))
    outcome = run_hostile(words)
    assert outcome.code == 0
    assert outcome.err == ""


def test_images_inside_a_table_are_looked_at_in_portions_of_bounded_size(export):
    stream = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 60_000, (700, 700)).astype(np.uint16)
    Image.fromarray(noise).save(stream, "PNG", compress_level=0)
    content = stream.getvalue()
    assert len(content) > 900_000
    images = [(number, content) for number in range(50)]
    portions = list(workers._portions([*images, *((n, f"{n}.png") for n in range(300))]))
    assert max(sum(len(c) for _, c in p if isinstance(c, bytes)) for p in portions) < 18e6
    assert max(map(len, portions)) == 256
    assert sum(map(len, portions)) == 350


def test_a_folder_in_place_of_an_output_is_one_sentence_before_the_work(export):
    (export / "out" / "pairs.parquet").mkdir(parents=True)
    sources = write_sources(export, images="images")
    (export / "t.json").write_text(json.dumps([{"file": "good.png", "text": "a"}]))
    outcome = run_hostile(["data", "prepare", sources, "--out", export / "out"])
    assert outcome.code == 2
    assert "pairs.parquet" in outcome.sentences[0]
    assert [path.name for path in (export / "out").iterdir()] == ["pairs.parquet"]
