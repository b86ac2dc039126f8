"""What is written down of where a result came from, and what never is."""

import json
import os
import platform
import shutil
import socket

import pytest
from datasets import Dataset

from medft.data.rows import fingerprint
from medft.foreign import at_home
from medft.models.saved import find_saved_model
from medft.provenance import folder_sha256, hardware, masked, masked_words


def test_secrets_are_masked_at_any_depth_and_the_home_folder_is_hidden(monkeypatch):
    monkeypatch.setenv("HOME", "/home/ada")
    content = {
        "hub_token": "hf_abc",
        "HF_TOKEN": "hf_abc",
        "nested": [{"api_key": "k", "deep": {"client_secret": {"value": "s"}}}],
        "Password": "p",
        "path": "/home/ada/models/x and /home/adam/y",
        "caption": "key = {answer}",
        "num_tokens": 12,
        "packages": {"tokenizers": "0.23"},
        "nothing_secret": None,
    }
    got = masked(content)
    assert "hf_abc" not in json.dumps(got)
    assert got == {
        "hub_token": "***",
        "HF_TOKEN": "***",
        "nested": [{"api_key": "***", "deep": {"client_secret": {"value": "***"}}}],
        "Password": "***",
        "path": "~/models/x and /home/adam/y",
        "caption": "key = {answer}",
        "num_tokens": 12,
        "packages": {"tokenizers": "0.23"},
        "nothing_secret": None,
    }


def test_a_command_line_shows_of_a_secret_its_key_only(monkeypatch):
    monkeypatch.setenv("HOME", "/home/ada")
    words = [
        "x.yaml",
        "train.hub_token=hf_abc",
        "train={hub_token: hf_abc}",
        "model.base=/home/ada",
    ]
    assert masked_words(words) == ["x.yaml", "train.hub_token=***", "train=***", "model.base=~"]


@pytest.mark.parametrize(
    ("home", "path", "shown"),
    [
        ("/home/a", "/home/a", "~"),
        ("/home/a", "/home/a/work", "~/work"),
        ("/home/a", "/data/home/a/work", None),
        ("/home/a", "/data/home/a", None),
        ("/home/a", "/home/ab/work", None),
        ("/home/a", "/home/a b/work", None),
        ("/home/a", "/home/a.old/work", None),
        ("/home/a", "/data/old /home/a/work", None),
        ("/home/a", "data/home/a/work", None),
        ("/home/a", "/home/a/home/a/work", "~/home/a/work"),
        ("/home/a", "/home/a/~/work", "~/~/work"),
        ("/home/a", "/data/~/work", None),
        ("/home/a", "/data/a~/work", None),
        ("/home/a/", "/home/a/work", "~/work"),
        ("/home/a.b+(c", "/home/a.b+(c/work", "~/work"),
        ("/home/a.b", "/home/axb/work", None),
        ("/", "/work", None),
        ("", "/work", None),
        ("home/a", "/home/a/work", None),
        ("home/a", "home/a/work", None),
    ],
)
def test_home_is_hidden_at_the_start_of_a_path_alone_and_found_again(
    monkeypatch, home, path, shown
):
    monkeypatch.setenv("HOME", home)
    assert masked({"base": path})["base"] == (shown or path)
    assert at_home(masked(path)) == at_home(masked(masked(path))) == type(at_home(path))(path)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("model.base=/home/a/x", "model.base=~/x"),
        ("data={train: /home/a/x, validation: '/home/a'}", "data={train: ~/x, validation: '~'}"),
        ("--config_file=/home/a.yaml", None),
        ("DataError: /home/a/x:3: none at /home/a.", "DataError: ~/x:3: none at ~."),
        ("a run in (/home/a), not /data/home/a/x", "a run in (~), not /data/home/a/x"),
        ("read file:///home/a/x", "read file://~/x"),
        ("model.base=/data/home/a/x", None),
        ("see ../home/a/x and ~/home/a/x", None),
        ("see /home/ab, /home/a-b, /home/a.b", None),
    ],
)  # fmt: skip
def test_home_is_hidden_in_sentences_and_words_where_a_path_begins(monkeypatch, text, shown):
    monkeypatch.setenv("HOME", "/home/a")
    assert masked(text) == (shown or text)


def test_a_home_that_is_a_link_is_hidden_by_both_names(monkeypatch, tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "home").symlink_to(tmp_path / "disk")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    paths = [str(tmp_path / name / "x") for name in ("home", "disk", "other")]
    assert masked(paths) == ["~/x", "~/x", paths[2]]
    assert os.path.realpath(at_home("~/x")) == paths[1]


def test_without_a_home_nothing_is_hidden(monkeypatch):
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(os, "getuid", lambda: 2**31 - 7)  # nobody's, so that it is not known
    assert masked("/home/a/x") == "/home/a/x"


def test_a_folder_that_is_called_like_home_is_not_taken_for_it(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "~" / "train.jsonl"
    path.parent.mkdir()
    path.write_text("x")
    given = path.relative_to(tmp_path)
    rows = Dataset.from_dict({"id": ["a"]})
    rows.info.download_checksums = {str(given): {"checksum": "0"}}
    assert at_home(masked(fingerprint(given, rows))["path"]).read_text() == "x"


def test_an_adapter_finds_its_base_below_a_folder_that_ends_like_home(
    runs, bases, monkeypatch, tmp_path
):
    monkeypatch.setenv("HOME", "/home/a")
    base = shutil.copytree(bases / "siglip", tmp_path / "home" / "a" / "base")
    adapter = shutil.copytree(runs / "siglip" / "adapter", tmp_path / "adapter")
    record = find_saved_model(adapter).record
    record.model_copy(update={"base": str(base)}).write(adapter)
    saved = find_saved_model(adapter)
    assert saved.base.base == str(base)
    saved.check()


def test_a_folder_hash_sees_names_and_contents(tmp_path):
    (tmp_path / "a").write_text("1")
    first = folder_sha256(tmp_path)
    (tmp_path / "a").write_text("2")
    second = folder_sha256(tmp_path)
    (tmp_path / "a").rename(tmp_path / "b")
    assert len({first, second, folder_sha256(tmp_path)}) == 3


def test_no_host_name_is_read(monkeypatch):
    for module, name in ((socket, "gethostname"), (platform, "node")):
        monkeypatch.setattr(module, name, lambda: "ward-7")
    assert platform.node() == socket.gethostname() == "ward-7"
    assert "ward-7" not in json.dumps(hardware())
