"""A disk that fills while a run trains: one sentence, and the run goes on once there is room."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from small_disk import kilobytes_in, on_small_disk, only_sentence

from medft.training.checkpoints import checkpoints_of, what_is_missing

ROOT = Path(__file__).parents[2]
SCRIPTS = {"decoder": "decoder_qlora.py", "siglip": "siglip_lora.py"}
RESUME = "train.resume_from_checkpoint=true"


@pytest.fixture(scope="module")
def write(sections, tmp_path_factory):
    """A recipe with three checkpoints and evaluations; gives its file."""
    folder = tmp_path_factory.mktemp("recipes")

    def make(kind, output_dir):
        recipe = sections(kind)
        recipe["train"] |= {"output_dir": str(output_dir), "max_steps": 6, "save_steps": 2}
        recipe["train"] |= {"eval_strategy": "steps", "eval_steps": 2}
        file = folder / f"{output_dir.parent.name}.yaml"
        file.write_text(yaml.safe_dump(recipe))
        return file

    return make


@pytest.fixture(scope="module")
def undisturbed(write, run_script, tmp_path_factory):
    """A run of each kind on a disk that has room."""
    folder = tmp_path_factory.mktemp("undisturbed")
    for kind in SCRIPTS:
        run_script(kind, write(kind, folder / kind))
    return folder


def weights(run):
    saved = load_file(run / "adapter" / "adapter_model.safetensors")
    record = json.loads((run / "adapter" / "medft.json").read_text())
    own = [record.get(name) for name in ("logit_scale", "logit_bias")]
    return saved, own


def same(left, right):
    (first, own), (second, other) = weights(left), weights(right)
    assert first.keys() == second.keys()
    return own == other and all(torch.equal(first[name], second[name]) for name in first)


def losses(run):
    history = json.loads((run / "log_history.json").read_text())
    return [(name, e[name]) for e in history for name in ("loss", "eval_loss") if name in e]


def check_is_clean(disk):
    """Nothing in the run is incomplete, and nothing is left of what was."""
    run = disk / "out"
    assert all(what_is_missing(checkpoint) is None for checkpoint in checkpoints_of(run))
    assert not [path for path in disk.rglob(".*") if path.is_file() or path.name.endswith("draft")]
    for model in (run / "best_model", run / "adapter"):
        if model.exists():
            assert load_file(model / "adapter_model.safetensors")
    for file in run.glob("*.json"):
        json.loads(file.read_text())


SOME = {"siglip": (0.3, 0.97), "decoder": (0.6,)}
ALL = (0.04, 0.15, 0.3, 0.45, 0.6, 0.75, 0.9, 0.97)
CASES = [
    pytest.param(kind, share, marks=pytest.mark.slow if share in SOME[kind] else pytest.mark.proof)
    for kind in SCRIPTS
    for share in ALL
]


@pytest.mark.parametrize(("kind", "share"), CASES)
def test_training_on_a_disk_that_fills(write, undisturbed, tmp_path, kind, share):
    whole, disk = undisturbed / kind, tmp_path / "disk"
    script, file = ROOT / "recipes" / SCRIPTS[kind], write(kind, disk / "out")
    ended = on_small_disk(disk, int(share * kilobytes_in(whole)), script, file, again=RESUME)
    sentence = only_sentence(ended)
    assert f"expected room to write {disk / 'out'}, its disk is full: make room; " in sentence
    check_is_clean(ended.left)
    record = json.loads((ended.left / "out" / "run.json").read_text())
    assert record["status"] == "failed"
    assert record["error"] == f"RunError: {sentence.removeprefix('medft: error: ')}"
    complete = checkpoints_of(ended.left / "out")
    if not complete:
        assert f"no checkpoint is complete, remove {disk / 'out'} and start again" in sentence
        assert ended.code_after == 2
        return
    assert f"{complete[0].name} is complete and the run goes on from it with {RESUME}" in sentence
    assert ended.code_after == 0, ended.error_after
    check_is_clean(ended.after)
    assert same(ended.after / "out", whole)
    assert losses(ended.after / "out") == losses(whole)
    shutil.copytree(complete[0], tmp_path / "other" / "adapter")
    assert complete[0].name == "checkpoint-6" or not same(tmp_path / "other", whole)
