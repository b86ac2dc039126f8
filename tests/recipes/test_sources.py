"""The sources that ship prepare published data sets, here drawn in their layout."""

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from medft.data.pairs import read_pairs
from medft.data.prepare import prepare
from medft.errors import DataError

SOURCES = Path(__file__).parent.parent.parent / "recipes" / "sources"


def drawn(number):
    values = np.random.default_rng(number).integers(0, 255, (30, 40, 3), np.uint8)
    stream = io.BytesIO()
    Image.fromarray(values).save(stream, "JPEG")
    return stream.getvalue()


@pytest.fixture
def sources(tmp_path):
    """The file that ships, copied beside the data as its header says."""

    def copy(name):
        return shutil.copy(SOURCES / f"{name}.yaml", tmp_path)

    return lambda name: Path(copy(name))


def write_json(path, rows):
    path.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")


def test_vqa_rads_published_split_is_kept_and_what_it_shares_is_counted(sources, tmp_path):
    (tmp_path / "images").mkdir()
    for number in range(4):
        (tmp_path / "images" / f"synpic{number}.jpg").write_bytes(drawn(number))

    def row(qid, image, question, answer):
        return {
            "qid": qid, "image_name": f"synpic{image}.jpg", "image_organ": "CHEST",
            "answer": answer, "answer_type": "CLOSED", "question_type": "PRES",
            "question": question, "phrase_type": "freeform",
        }  # fmt: skip

    again = row(9, 1, "Is it normal?", "No")
    write_json(tmp_path / "train.json", [
        row(1, 0, "Is it normal?", "Yes"), again, again, row(2, 2, "How many?", 2),
        row(3, 2, "Anything?", ""),
    ])  # fmt: skip
    write_json(tmp_path / "test.json", [again, row(4, 3, "Where?", "left")])
    summary = prepare(sources("vqa_rad"), tmp_path / "out", max_rejects=0.3)
    assert summary["splits"] == {"test": 2, "train": 3}
    assert summary["sources"]["train"]["reasons"] == {"duplicate": 1, "empty_text": 1}
    # the row that stands in both published files stays in both
    assert summary["shared_between_splits"] == {"groups": 1, "pairs": 2}
    rows = list(read_pairs(tmp_path / "out" / "pairs.parquet", images=False))
    assert [r["text"] for r in rows] == ["Yes", "No", "2", "No", "left"]
    assert len({r["id"] for r in rows}) == 5
    assert json.loads(rows[0]["fields"])["image_organ"] == "CHEST"
    assert {r["license"] for r in rows} == {"CC0-1.0"}


def test_slake_is_prepared_in_both_languages(sources, tmp_path):
    for number in range(5):
        (tmp_path / "imgs" / f"xmlab{number}").mkdir(parents=True)
        (tmp_path / "imgs" / f"xmlab{number}" / "source.jpg").write_bytes(drawn(number))

    def rows(image):
        known = {
            "img_id": image, "img_name": f"xmlab{image}/source.jpg", "location": "Abdomen",
            "modality": "MRI", "answer_type": "OPEN", "base_type": "vqa",
            "content_type": "Modality", "triple": ["vhead", "_", "_"],
        }  # fmt: skip
        english = {"question": "What modality is used?", "answer": "MRI", "q_lang": "en"}
        chinese = {"question": "\u6a21\u6001?", "answer": "\u78c1\u5171\u632f", "q_lang": "zh"}
        return [{**known, **english, "qid": 2 * image}, {**known, **chinese, "qid": 2 * image + 1}]

    for name, images in (("train", (0, 1, 2)), ("validate", (3,)), ("test", (4,))):
        write_json(tmp_path / f"{name}.json", [row for image in images for row in rows(image)])
    summary = prepare(sources("slake"), tmp_path / "out")
    assert summary["splits"] == {"test": 2, "train": 6, "validation": 2}
    assert summary["groups"] == 5
    languages = [json.loads(r["fields"])["language"]
                 for r in read_pairs(tmp_path / "out" / "pairs.parquet", images=False)]  # fmt: skip
    assert sorted(languages) == ["en"] * 5 + ["zh"] * 5


def write_shard(path, numbers, answer="yes"):
    path.parent.mkdir(exist_ok=True)
    rows = [
        {"image": {"bytes": drawn(n), "path": None}, "question": f"q{n}", "answer": answer}
        for n in numbers
    ]
    pq.write_table(pa.Table.from_pylist(rows), path)


def test_path_vqas_shards_are_read_in_order_with_the_images_inside(sources, tmp_path):
    data = tmp_path / "data"
    write_shard(data / "train-00000-of-00002-aa.parquet", (0, 1))
    write_shard(data / "train-00001-of-00002-bb.parquet", (2, 3, 4))
    write_shard(data / "validation-00000-of-00001-cc.parquet", (5,))
    write_shard(data / "test-00000-of-00001-dd.parquet", (6, 1))  # an image of train
    summary = prepare(sources("path_vqa"), tmp_path / "out")
    assert summary["splits"] == {"test": 2, "train": 5, "validation": 1}
    assert summary["sources"]["train"]["read"] == 5
    assert summary["shared_between_splits"] == {"groups": 1, "pairs": 2}
    rows = list(read_pairs(tmp_path / "out" / "pairs.parquet", images=False))
    assert [r["question"] for r in rows] == ["q0", "q1", "q2", "q3", "q4", "q5", "q6", "q1"]


def test_a_pattern_without_file_or_with_another_table_is_an_error(sources, tmp_path):
    data = tmp_path / "data"
    write_shard(data / "train-00000.parquet", (0,))
    write_shard(data / "validation-00000.parquet", (1,))
    with pytest.raises(DataError, match=r"files that match data/test-\*\.parquet .* source test"):
        prepare(sources("path_vqa"), tmp_path / "out")
    write_shard(data / "test-00000.parquet", (2,))
    pq.write_table(pa.table({"question": ["a"]}), data / "train-00001.parquet")
    with pytest.raises(DataError, match=r"columns answer, image in .*train-00001\.parquet"):
        prepare(sources("path_vqa"), tmp_path / "out")
