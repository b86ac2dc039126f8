"""Validation rows that training has seen are an error, or counted where they are allowed."""

import json
import shutil
from pathlib import Path

import pytest
from exports import patients
from PIL import Image

from medft.check import check
from medft.data import overlap
from medft.data.chat import write_chat
from medft.data.overlap import find_overlap
from medft.data.prepare import prepare
from medft.data.rows import load_rows
from medft.errors import MedftError


@pytest.fixture
def write(tmp_path):
    """Write a chat file of (image's gray value or None, answer, further keys)."""

    def rows(name, *given):
        folder = tmp_path / name
        folder.mkdir()
        lines = []
        for number, (gray, answer, more) in enumerate(given):
            images = []
            if gray is not None:
                images = [f"{number}.png"]
                Image.new("L", (8 + gray, 8), gray).save(folder / images[0])
            content = [*({"type": "image"} for _ in images), {"type": "text", "text": "What?"}]
            reply = {"role": "assistant", "content": answer}
            turns = [{"role": "user", "content": content}, reply]
            lines.append(json.dumps({"images": images, "messages": turns, **more}) + "\n")
        file = folder / "rows.jsonl"
        file.write_text("".join(lines))
        return load_rows(file, split="train")

    return rows


def group(name):
    return {"group_id": name}


def test_rows_of_a_group_of_training_are_found(write):
    train = write("train", (1, "a", group("p1")), (2, "b", group("p2")), (3, "c", {}))
    other = write("other", (4, "d", group("p2")), (5, "e", group("p2")), (6, "f", group("p3")))
    found = find_overlap(train, other)
    assert found.rows == ["line 1", "line 2"]
    assert found.record == {"rows": 2, "groups": 1, "same": 0}


def test_rows_without_group_share_none_although_their_lines_have_the_same_numbers(write):
    train, other = write("train", (1, "a", {})), write("other", (2, "a", {}))
    assert find_overlap(train, other).record == {"rows": 0, "groups": 0, "same": 0}


def test_the_same_images_and_text_are_found_in_copies_of_the_file(write):
    train = write("train", (1, "a", {}), (2, "b", {}), (None, "c", {}))
    other = write("other", (2, "b", {}), (1, "other text", {}), (3, "a", {}), (None, "c", {}))
    found = find_overlap(train, other)
    assert found.rows == ["line 1", "line 4"]
    assert found.same == 2


def test_files_are_read_only_where_an_image_with_the_same_text_is_as_large(write, monkeypatch):
    train = write("train", *((gray, "normal", {}) for gray in range(1, 9)))
    other = write("other", *((gray, "normal", {}) for gray in (60, 61, 4)))
    read = []
    monkeypatch.setattr(overlap, "file_sha256", lambda path: read.append(path) or str(path.stat()))
    find_overlap(train, other)
    sizes = {Path(p).stat().st_size for p in read}
    assert 0 < len(read) < 11
    assert all(sum(Path(p).stat().st_size == size for p in read) > 1 for size in sizes)


@pytest.fixture
def prepared(exports, tmp_path):
    """Prepared data of 30 patients with two films each, and its chat files."""
    rows = patients(*[f"p{i}" for i in range(30)] * 2)
    prepare(exports(a=(rows, {})), tmp_path / "out")
    write_chat(tmp_path / "out" / "pairs.parquet", tmp_path / "out" / "chat")
    return tmp_path / "out"


@pytest.fixture
def recipe(sections, write_recipe):
    def write(kind, train, validation):
        content = sections(kind)
        content["data"] |= {"train": str(train), "validation": str(validation)}
        return write_recipe(content)

    return write


@pytest.mark.parametrize("kind", ["decoder", "siglip"])
def test_one_file_for_both_is_an_error_that_counts_and_allowed_is_recorded(recipe, prepared, kind):
    train = prepared / "chat" / "train.jsonl"
    file = recipe(kind, train, train)
    with pytest.raises(MedftError, match=r"36 of 36 share a group with training \(18 groups\) or "
                                        r"have its images and text \(36 rows\)"):  # fmt: skip
        check(file, [])
    checked = check(file, ["data.allow_overlap=true"])
    assert checked.prepared.record["overlap"] == {"rows": 36, "groups": 18, "same": 36}


@pytest.mark.parametrize("kind", ["decoder", "siglip"])
def test_the_splits_of_one_preparation_share_nothing(recipe, prepared, kind):
    pairs, chat = prepared / "pairs.parquet", prepared / "chat"
    for train, validation in (
        (pairs, pairs),
        (chat / "train.jsonl", chat / "validation.jsonl"),
        (chat / "train.jsonl", pairs),
    ):
        assert "overlap" not in check(recipe(kind, train, validation), []).prepared.record


def test_a_split_of_another_seed_shares_patients(recipe, prepared, tmp_path):
    other = tmp_path / "export" / "SOURCES.yaml"
    other.write_text(other.read_text().replace("test: 0.2", "test: 0.2\n  seed: 9"))
    prepare(other, tmp_path / "anew")
    file = recipe("decoder", prepared / "pairs.parquet", tmp_path / "anew" / "pairs.parquet")
    with pytest.raises(MedftError, match="share a group with training"):
        check(file, [])


def test_chat_files_and_pairs_of_one_image_are_compared_by_its_hash(prepared, tmp_path):
    train = load_rows(prepared / "pairs.parquet", split="train")
    chat = prepared / "chat" / "train.jsonl"
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    lines = []
    for number, line in enumerate(chat.read_text().splitlines()):
        row = json.loads(line)
        shutil.copy(prepared / "chat" / row["images"][0], foreign / f"{number}.png")
        row["images"] = [f"{number}.png"]
        del row["group_id"]
        lines.append(json.dumps(row) + "\n")
    (foreign / "rows.jsonl").write_text("".join(lines))
    found = find_overlap(train, load_rows(foreign / "rows.jsonl", split="train"))
    assert found.record == {"rows": 36, "groups": 0, "same": 36}
