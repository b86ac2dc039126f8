"""Training cases near an image."""

import json
import os
import shutil
from zipfile import ZipFile

import numpy as np
import pytest

from medft.data.images import open_image
from medft.data.rows import load_rows
from medft.errors import RunError
from medft.files import file_sha256
from medft.inference.cases import CaseIndex
from medft.models.saved import find_saved_model


def test_nearest_cases_are_those_of_comparing_all(embedder, runs, data):
    index = CaseIndex.of_run(find_saved_model(runs / "siglip"), embedder)
    rows = load_rows(data / "chat" / "train.jsonl", split="train")
    images = [open_image(data / "chat" / row["images"][0]["path"]) for row in rows]
    own = embedder.embed_images(images)
    for place in (0, 5):
        cases = index.nearest(own[place])
        assert cases[0].id == rows[place]["id"]
        assert cases[0].similarity == pytest.approx(1, abs=1e-4)
        order = np.argsort(-(own @ own[place]), kind="stable")[:5]
        assert [case.id for case in cases] == [rows[int(i)]["id"] for i in order]


def test_the_index_is_kept_and_made_anew_for_other_weights(embedder, runs, tmp_path):
    run = tmp_path / "siglip"
    shutil.copytree(runs / "siglip", run)
    CaseIndex.of_run(find_saved_model(run), embedder)
    first = (run / "index.npz").read_bytes()
    CaseIndex.of_run(find_saved_model(run), embedder)
    assert (run / "index.npz").read_bytes() == first
    (run / "index.npz").write_bytes(first[:500])  # truncated
    CaseIndex.of_run(find_saved_model(run), embedder)
    assert (run / "index.npz").read_bytes() == first
    weights = run / "adapter" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b" ")
    CaseIndex.of_run(find_saved_model(run), embedder)
    assert (run / "index.npz").read_bytes() != first


class Bomb:
    """Leaves a file where it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("unpickled",)


@pytest.mark.parametrize(
    "change",
    [
        lambda index: index | {"ids": np.array([Bomb()], dtype=object)},
        lambda index: index | {"embeddings": index["embeddings"][:, :7]},
        lambda index: index | {"embeddings": index["embeddings"] * np.nan},
        lambda index: index | {"embeddings": np.float32(1)},
        lambda index: index | {"ids": np.frombuffer(b'["a"]', np.uint8)},
        lambda index: index | {"texts": np.frombuffer(b"[" * 100_000, np.uint8)},
        lambda index: {"key": index["key"]},
    ],
)
def test_an_index_of_somebody_else_is_made_anew_and_never_unpickled(
    embedder, runs, tmp_path, monkeypatch, change
):
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "siglip"
    shutil.copytree(runs / "siglip", run)
    CaseIndex.of_run(find_saved_model(run), embedder)
    first = (run / "index.npz").read_bytes()
    with np.load(run / "index.npz") as index:
        changed = change(dict(index))
    for write in (np.savez, np.savez_compressed):
        write(run / "index.npz", **changed)
        CaseIndex.of_run(find_saved_model(run), embedder)
        assert (run / "index.npz").read_bytes() == first
    assert not (tmp_path / "unpickled").exists()


@pytest.mark.parametrize(
    "known", [None, [], {}, {"train": "x"}, {"train": {"path": 1, "sha256": "x"}}]
)
def test_a_record_without_its_rows_is_one_sentence(embedder, runs, tmp_path, known):
    run = tmp_path / "siglip"
    shutil.copytree(runs / "siglip", run)
    record = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(record | {"data": known}))
    with pytest.raises(RunError, match=r"expected the record of a run at .*data"):
        CaseIndex.of_run(find_saved_model(run), embedder)


def test_changed_training_data_is_an_error(embedder, runs, tmp_path):
    run = tmp_path / "siglip"
    shutil.copytree(runs / "siglip", run)
    record = json.loads((run / "run.json").read_text())
    record["data"]["train"]["sha256"] = "0" * 64
    (run / "run.json").write_text(json.dumps(record))
    with pytest.raises(RunError, match="training data"):
        CaseIndex.of_run(find_saved_model(run), embedder)


def test_rows_with_the_same_id_keep_their_texts(embedder, runs, data, tmp_path):
    run = tmp_path / "siglip"
    shutil.copytree(runs / "siglip", run)
    rows = [json.loads(x) for x in (data / "chat" / "train.jsonl").read_text().splitlines()[:4]]
    for number, row in enumerate(rows):
        row["id"] = "7"
        row["images"] = [str(data / "chat" / name) for name in row["images"]]
        row["messages"][1]["content"] = f"text {number}"
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    record = json.loads((run / "run.json").read_text())
    record["data"]["train"] = {"path": str(file), "sha256": file_sha256(file)}
    (run / "run.json").write_text(json.dumps(record))
    index = CaseIndex.of_run(find_saved_model(run), embedder)
    for number, row in enumerate(rows):
        [own] = embedder.embed_images([open_image(row["images"][0])])
        assert index.nearest(own)[0].text == f"text {number}"
    assert len({case.id for case in index.nearest(own)}) == 4


@pytest.mark.parametrize("index", ["pipe", "text", "objects", "of other rows", "one number"])
def test_an_index_that_somebody_else_wrote_is_made_anew(embedder, runs, tmp_path, index):
    run = shutil.copytree(runs / "siglip", tmp_path / "siglip")
    saved = find_saved_model(run)
    CaseIndex.of_run(saved, embedder)
    good = dict(np.load(run / "index.npz"))
    (run / "index.npz").unlink()
    (tmp_path / "precious").write_text("years")
    (run / ".index.npz").symlink_to(tmp_path / "precious")
    changed = {
        "text": {"ids": np.frombuffer(b"[", np.uint8)},
        "objects": {"ids": np.array([{1: 2}], dtype=object)},
        "of other rows": {"embeddings": good["embeddings"][:1]},
        "one number": {"embeddings": np.array(1.0)},
    }
    if index == "pipe":
        os.mkfifo(run / "index.npz")
    else:
        np.savez(run / "index.npz", **{**good, **changed[index]})
    found = CaseIndex.of_run(saved, embedder)
    assert len(found.ids) == len(found.embeddings) == len(good["embeddings"])
    assert (tmp_path / "precious").read_text() == "years"


def encrypted(path):
    content = bytearray(path.read_bytes())
    for begin, place in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
        content[content.index(begin) + place] |= 1
    path.write_bytes(content)


def overflowing(path):
    header = str({"descr": "<f4", "fortran_order": False, "shape": (10**30,)}).encode()
    header += b" " * (63 - (len(header) + 10) % 64) + b"\n"
    with ZipFile(path, "w") as archive:
        array = b"\x93NUMPY\1\0" + len(header).to_bytes(2, "little") + header
        archive.writestr("key.npy", array)


@pytest.mark.parametrize("change", [encrypted, overflowing])
def test_an_index_that_no_library_reads_is_made_anew(embedder, runs, tmp_path, change):
    run = shutil.copytree(runs / "siglip", tmp_path / "siglip")
    CaseIndex.of_run(find_saved_model(run), embedder)
    first = (run / "index.npz").read_bytes()
    change(run / "index.npz")
    assert (run / "index.npz").read_bytes() != first
    CaseIndex.of_run(find_saved_model(run), embedder)
    assert (run / "index.npz").read_bytes() == first


@pytest.mark.parametrize("name", ["index.npz", ".index.npz"])
def test_an_index_that_cannot_be_written_is_not_kept(embedder, runs, tmp_path, caplog, name):
    run = shutil.copytree(
        runs / "siglip", tmp_path / "siglip", ignore=shutil.ignore_patterns("*index.npz")
    )
    (run / name / "inner").mkdir(parents=True)
    found = CaseIndex.of_run(find_saved_model(run), embedder)
    assert len(found.ids) == len(found.embeddings) > 0
    assert any("are not kept for later" in line for line in caplog.messages)
    assert [path.name for path in run.glob("*index.npz")] == [name]
