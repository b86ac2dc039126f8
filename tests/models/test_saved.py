"""What a path means, and a record that is read strictly and belongs to its weights."""

import json
import os
import shutil
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

from medft import provenance
from medft.errors import BaseModelError, RunError
from medft.export.merge import merge
from medft.inference.files import predict_files
from medft.models.base import base_sha256
from medft.models.saved import FORMAT, SavedRecord, find_saved_model
from medft.provenance import remembered_sha256

RECORD = SavedRecord(family="mllama", base="x", revision=None)


def test_a_record_is_read_back_bit_for_bit(tmp_path):
    value = torch.rand(1, generator=torch.Generator().manual_seed(3)).item() * 3
    RECORD.model_copy(update={"logit_scale": value, "caption": "{answer}"}).write(tmp_path)
    found = SavedRecord.read(tmp_path)
    assert (found.logit_scale, found.caption, found.format) == (value, "{answer}", FORMAT)
    assert found.medft is not None
    assert found.dtype == "float32"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": FORMAT + 1}, "upgrade medft"),
        ({"cross_attention": True}, "cross_attention: Extra inputs"),
        ({"cross_attention_fix": "yes"}, "cross_attention_fix: Input should be"),
        ({"family": None}, "family: Input should be"),
    ],
)
def test_what_a_record_should_not_hold_is_an_error(tmp_path, change, message):
    RECORD.write(tmp_path)
    file = tmp_path / "medft.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(BaseModelError, match=message):
        SavedRecord.read(tmp_path)


def test_a_record_without_format_is_an_older_one_and_loads(tmp_path):
    RECORD.write(tmp_path)
    file = tmp_path / "medft.json"
    content = json.loads(file.read_text())
    del content["format"]
    file.write_text(json.dumps({**content, "quantization": None}))
    assert SavedRecord.read(tmp_path) == SavedRecord.read(tmp_path)
    assert SavedRecord.read(tmp_path).family == "mllama"


def test_a_missing_or_broken_record_is_one_sentence(tmp_path):
    with pytest.raises(BaseModelError, match=r"expected medft\.json in .*, could not read it"):
        SavedRecord.read(tmp_path)
    (tmp_path / "medft.json").write_text("[]")
    with pytest.raises(BaseModelError, match="could not read it"):
        SavedRecord.read(tmp_path)


@pytest.mark.parametrize("kind", ["decoder", "siglip"])
def test_weights_other_than_the_records_are_refused(runs, tmp_path, kind):
    """Also by what continues, merges or predicts with them."""
    adapter = tmp_path / "adapter"
    shutil.copytree(runs / kind / "adapter", adapter)
    find_saved_model(adapter).check()
    file = adapter / "adapter_model.safetensors"
    weights = load_file(file)
    name = next(name for name in weights if "lora_B" in name)
    save_file({**weights, name: weights[name] * 1.5}, file, metadata={"format": "pt"})
    for use in (
        lambda: find_saved_model(adapter).check(),
        lambda: merge(adapter, tmp_path / "merged"),
    ):
        with pytest.raises(BaseModelError, match="beside, they have changed: restore them"):
            use()
    assert not (tmp_path / "merged").exists()


def test_a_merged_model_is_bound_to_its_weights_too(runs, tmp_path):
    merge(runs / "siglip", tmp_path / "merged")
    find_saved_model(tmp_path / "merged").check()
    file = tmp_path / "merged" / "model.safetensors"
    weights = load_file(file)
    save_file({**weights, "logit_bias": weights["logit_bias"] + 1}, file)
    with pytest.raises(BaseModelError, match="they have changed"):
        find_saved_model(tmp_path / "merged").check()


def write_aged(path, content, seconds):
    """Write a file that seems so old."""
    path.write_bytes(content)
    then = time.time() - seconds
    os.utime(path, (then, then))


def test_files_of_a_base_are_hashed_once(tmp_path, monkeypatch):
    base = tmp_path / "base"
    base.mkdir()
    write_aged(base / "a.bin", b"one", 9)
    write_aged(base / "b.bin", b"two", 9)
    hashed = []
    plain = provenance.file_sha256

    def counting(path):
        hashed.append(path.name)
        return plain(path)

    monkeypatch.setattr(provenance, "file_sha256", counting)
    monkeypatch.setenv("MEDFT_CACHE", str(tmp_path / "cache"))
    first = base_sha256(base)
    assert base_sha256(base) == first
    assert hashed == ["a.bin", "b.bin"]
    write_aged(base / "b.bin", b"six", 5)  # as long, and later
    assert base_sha256(base) != first
    assert hashed == ["a.bin", "b.bin", "b.bin"]
    for memory in (tmp_path / "cache" / "hashes").iterdir():
        memory.write_text("{")  # damaged: hashed again
    base_sha256(base)
    assert sorted(hashed[3:]) == ["a.bin", "b.bin"]


def test_a_file_that_changes_within_a_coarse_time_is_hashed_again(tmp_path):
    file = tmp_path / "file"
    file.write_bytes(b"one")
    then = file.stat()
    first = remembered_sha256(file)
    file.write_bytes(b"two")
    os.utime(file, ns=(then.st_atime_ns, then.st_mtime_ns))  # as if the clock had not moved
    assert remembered_sha256(file) == provenance.file_sha256(file) != first


def test_without_a_cache_folder_files_are_hashed_each_time(tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"one")
    (tmp_path / "cache").write_text("no folder")
    monkeypatch.setenv("MEDFT_CACHE", str(tmp_path / "cache"))
    assert remembered_sha256(tmp_path / "file") == provenance.file_sha256(tmp_path / "file")


def test_predict_resolves_each_run_once(runs, data, tmp_path, monkeypatch):
    read = []
    plain = SavedRecord.read.__func__

    def counting(cls, folder):
        read.append(folder.parent.name)
        return plain(cls, folder)

    monkeypatch.setattr(SavedRecord, "read", classmethod(counting))
    images = [data / "raw" / "knee" / "images" / "0000.png"]
    predict_files(
        runs / "decoder", images, tmp_path / "o.jsonl", prompt="What?", siglip=runs / "siglip"
    )
    assert sorted(read) == ["decoder", "siglip"]


@pytest.mark.parametrize("result", ["adapter", "model"])
def test_the_result_of_a_run_that_goes_on_is_not_taken_for_its_last(runs, tmp_path, result):
    run = shutil.copytree(runs / "decoder", tmp_path / "run")
    (run / "adapter").rename(run / result)
    content = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(content | {"status": "running"}))
    with pytest.raises(RunError, match=r"expected a completed run in .*, its status is running"):
        find_saved_model(run)
