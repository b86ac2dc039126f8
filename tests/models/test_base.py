"""A base from the hub is recorded by the commit that it was loaded from, and stays at it."""

import json
import shutil

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoProcessor

from medft.config.recipe import ModelSection
from medft.errors import BaseModelError
from medft.models.base import commit_of, identify_base, load_config, load_processor, load_weights
from medft.models.saved import SavedRecord, find_saved_model
from medft.siglip.model import load_saved

FIRST, SECOND = "a" * 40, "b" * 40
HEAD = "vision_model.head.probe"


@pytest.fixture
def hub(bases, tmp_path, monkeypatch):
    """A cache of the hub with team/base, whose main is FIRST; moves it to a commit.

    SECOND has another head, and normalizes images otherwise.
    """
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    folder = tmp_path / "hub" / "models--team--base"
    for commit in (FIRST, SECOND):
        shutil.copytree(bases / "siglip", folder / "snapshots" / commit)
    weights = folder / "snapshots" / SECOND / "model.safetensors"
    changed = load_file(weights)
    changed[HEAD] += 1
    save_file(changed, weights, metadata={"format": "pt"})
    processor = AutoProcessor.from_pretrained(weights.parent, backend="pil")
    processor.image_processor.image_mean = [0.1, 0.2, 0.3]
    processor.save_pretrained(weights.parent)

    def move_main(commit):
        (folder / "refs").mkdir(exist_ok=True)
        (folder / "refs" / "main").write_text(commit)

    move_main(FIRST)
    return move_main


def head_of(model):
    return model.state_dict()[HEAD]


def test_the_rest_of_a_base_comes_from_the_commit_of_its_configuration(hub):
    section = ModelSection(base="team/base", dtype="float32")
    load_config(section)
    assert identify_base(section) == {"base": "team/base", "revision": FIRST}
    first = head_of(load_weights(AutoModel, section, dtype=torch.float32))
    hub(SECOND)
    pinned = ModelSection(base="team/base", revision=FIRST, dtype="float32")
    assert commit_of(pinned) == FIRST
    assert torch.equal(head_of(load_weights(AutoModel, pinned, dtype=torch.float32)), first)
    means = [load_processor(s).image_processor.image_mean for s in (pinned, section)]
    assert list(means[0]) == [0.5, 0.5, 0.5]
    assert list(means[1]) == [0.1, 0.2, 0.3]
    assert commit_of(section) == SECOND  # a branch that moved is another base
    second = head_of(load_weights(AutoModel, section, dtype=torch.float32))
    assert torch.equal(second, first + 1)


def test_a_base_that_is_not_in_the_cache_has_no_commit(hub):
    with pytest.raises(BaseModelError, match="expected team/other in the hub's cache"):
        commit_of(ModelSection(base="team/other"))


def test_a_folder_has_a_hash_and_no_commit(bases):
    known = identify_base(ModelSection(base=str(bases / "siglip")))
    assert known["revision"] is None
    assert len(known["sha256"]) == 64


@pytest.mark.slow
def test_a_run_records_the_commit_and_is_loaded_at_it(
    hub, sections, write_recipe, run_script, medft, capsys
):
    recipe = sections("siglip")
    recipe["model"]["base"] = "team/base"
    recipe["train"] |= {"max_steps": 2, "save_strategy": "no", "warmup_steps": 0}
    file = write_recipe(recipe)
    run_script("siglip", file)
    run = file.with_suffix("")
    assert json.loads((run / "run.json").read_text())["base"]["revision"] == FIRST
    assert SavedRecord.read(run / "adapter").revision == FIRST
    before = head_of(load_saved(find_saved_model(run)).get_base_model())
    hub(SECOND)
    assert torch.equal(head_of(load_saved(find_saved_model(run)).get_base_model()), before)
    again = (f"train.output_dir={run}_2", f"lora.init_from={run}")
    assert medft("check", file, *again) == 2
    assert f"expected model.base with revision {FIRST}" in capsys.readouterr().err
    assert medft("check", file, *again, f"model.revision={FIRST}") == 0


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "processor_config.json"])
def test_a_base_of_the_hub_that_names_code_of_its_own_is_refused(hub, tmp_path, name):
    section = ModelSection(base="team/base")
    folder = tmp_path / "hub" / "models--team--base" / "snapshots" / FIRST
    load_processor(section)
    file = folder / name
    content = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps({**content, "auto_map": {"AutoConfig": "evil.Config"}}))
    for load in (load_config, load_processor, lambda base: load_weights(AutoModel, base)):
        with pytest.raises(BaseModelError, match=f"code of its own, .* by auto_map in {name}"):
            load(section)
    hub(SECOND)
    load_processor(section)
