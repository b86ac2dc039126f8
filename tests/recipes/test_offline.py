"""Every command works on a machine without a network, and waits for none."""

import shutil
import subprocess
import sys

import pytest
import yaml
from hostile import run_hostile

from medft.demo.exports import write_exports

UNSHARE = ["unshare", "--map-root-user", "--net"]
ISOLATED = [*UNSHARE, "sh", "-c", 'ip link set lo up 2>/dev/null; exec "$@"', "sh"]
"""A namespace with no interface but loopback, by which training processes find each other."""

REACHES = "import socket; socket.create_connection(('192.0.2.1', 80), 5)"
"""To an address that is reserved for documentation."""


def allowed():
    found = shutil.which("unshare") and shutil.which("ip")
    return bool(found) and subprocess.run([*ISOLATED, "true"], check=False).returncode == 0


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not allowed(), reason="unshare or ip is missing or not permitted here"),
]


@pytest.fixture
def isolated(tmp_path):
    """Run `medft` without a network and without being told so; it must end well."""

    def run(*words):
        outcome = run_hostile(
            words,
            command=[*ISOLATED, sys.executable, "-m", "medft.cli"],
            timeout=300,
            HF_HUB_OFFLINE="0",
            HF_HOME=str(tmp_path / "hub"),
        )
        assert outcome.code == 0, outcome.out + outcome.err
        return outcome

    return run


def test_the_namespace_has_no_network():
    done = subprocess.run(
        [*ISOLATED, sys.executable, "-c", REACHES], capture_output=True, text=True, check=False
    )
    assert "Network is unreachable" in done.stderr


@pytest.mark.parametrize("kind", ["decoder", "siglip"])
def test_every_command_runs_without_a_network(isolated, sections, tmp_path, kind):
    sources = write_exports(tmp_path / "raw", pairs=60, seed=3)
    isolated("data", "prepare", sources, "--out", tmp_path / "data", "--max-rejects", "1")
    isolated("data", "chat", tmp_path / "data" / "pairs.parquet", "--out", tmp_path / "chat")
    recipe = sections(kind)
    recipe["data"] |= {
        "train": str(tmp_path / "chat" / "train.jsonl"),
        "validation": None,
    }
    run = tmp_path / "run"
    recipe["train"] |= {"output_dir": str(run), "max_steps": 2}
    if kind == "decoder":
        recipe["quantization"] = {"bits": 4}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(recipe))
    isolated("check", tmp_path / "run.yaml")
    isolated("train", tmp_path / "run.yaml")
    rows = ["--data", tmp_path / "chat" / "train.jsonl"]
    isolated("evaluate", run, *rows, "--out", tmp_path / "evaluation")
    image = next((tmp_path / "chat" / "images").iterdir())
    prompt = ["--prompt", "What?"] if kind == "decoder" else []
    isolated("predict", run, image, *prompt, "--out", tmp_path / "predictions.jsonl")
    isolated("merge", run, "--out", tmp_path / "merged")


def test_a_base_of_the_hub_without_a_network_is_one_sentence(sections, write_recipe, tmp_path):
    words = ["check", write_recipe(sections("decoder")), "model.base=team/base"]
    outcome = run_hostile(
        words, command=[*ISOLATED, sys.executable, "-m", "medft.cli"], timeout=120,
        HF_HUB_OFFLINE="0", HF_HOME=str(tmp_path / "hub"),
    )  # fmt: skip
    assert outcome.code == 2
    [sentence] = outcome.sentences
    assert "team/base" in sentence
    assert "the hub cannot be reached" in sentence
