"""What is written down of where a result came from, and what never is."""

import json
import platform
import socket

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
