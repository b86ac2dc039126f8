"""What does not load whole, or was never trained, is an error where PEFT warns."""

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForImageTextToText

from medft.config.lora_keys import LoraSection
from medft.decoder.families.mllama import MLLAMA
from medft.errors import BaseModelError
from medft.models.adapter import load_adapter
from medft.models.lora import attach_adapter


@pytest.fixture
def trained(bases, tmp_path):
    """An adapter folder with random, non-zero weights."""
    model = AutoModelForImageTextToText.from_pretrained(bases / "decoder")
    adapted = attach_adapter(
        model, LoraSection(r=4, alpha=8), MLLAMA.presets, task_type=None, seed=5
    )
    torch.manual_seed(0)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    adapted.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def load(bases, folder):
    model = AutoModelForImageTextToText.from_pretrained(bases / "decoder")
    return load_adapter(model, folder)


def test_a_whole_adapter_loads(bases, trained):
    adapted = load(bases, trained)
    saved = load_file(trained / "adapter_model.safetensors")
    got = {n.replace(".default", ""): p for n, p in adapted.named_parameters() if "lora_" in n}
    assert got.keys() == saved.keys()
    assert all(torch.equal(got[name], saved[name]) for name in saved)


def test_a_key_without_place_is_an_error_where_peft_warns(bases, trained):
    path = trained / "adapter_model.safetensors"
    weights = load_file(path)
    name = min(weights)
    weights[name.replace("language_model", "old_model")] = weights.pop(name)
    save_file(weights, path)
    model = AutoModelForImageTextToText.from_pretrained(bases / "decoder")
    with pytest.warns(UserWarning, match="missing adapter keys"):  # the trap: it loads
        PeftModel.from_pretrained(model, trained)
    with pytest.raises(BaseModelError, match="trained on another base"):
        load(bases, trained)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_adapter_of_a_training_that_diverged_is_refused_where_peft_takes_it(
    bases, trained, value
):
    path = trained / "adapter_model.safetensors"
    weights = load_file(path)
    name = max(weights)
    weights[name][0, 0] = value
    save_file(weights, path)
    model = AutoModelForImageTextToText.from_pretrained(bases / "decoder")
    PeftModel.from_pretrained(model, trained)  # the trap: it answers "!!!!"
    with pytest.raises(BaseModelError, match=f"finite numbers in .*, 1 of .* first {name}"):
        load(bases, trained)


def test_an_adapter_with_a_layer_that_was_never_trained_is_refused(bases, trained):
    path = trained / "adapter_model.safetensors"
    weights = load_file(path)
    last = {name: torch.zeros_like(w) for name, w in weights.items() if "lora_B" in name}
    save_file({**weights, **dict(list(last.items())[:1])}, path)
    with pytest.raises(BaseModelError, match=r"lora_B.weight is zero .* \(1 of 28\)"):
        load(bases, trained)
    save_file({**weights, **last}, path)
    with pytest.raises(BaseModelError, match=r"every lora_B is zero .* \(28 of 28\)"):
        load(bases, trained)


def test_damaged_adapters_are_one_sentence(bases, trained):
    config = (trained / "adapter_config.json").read_text()
    (trained / "adapter_config.json").write_text("{")
    with pytest.raises(BaseModelError, match="could not read it"):
        load(bases, trained)
    (trained / "adapter_config.json").write_text(config)
    (trained / "adapter_model.safetensors").write_bytes(b"torn")
    with pytest.raises(BaseModelError, match="it says: "):
        load(bases, trained)


def test_a_folder_without_adapter_is_an_error(bases, tmp_path):
    with pytest.raises(BaseModelError, match="found none"):
        load(bases, tmp_path)


def test_a_section_with_init_from_needs_its_adapter(bases):
    model = AutoModelForImageTextToText.from_pretrained(bases / "decoder")
    lora = LoraSection(r=4, alpha=8, init_from="runs/first")
    with pytest.raises(ValueError, match=r"expected the adapter of lora\.init_from"):
        attach_adapter(model, lora, MLLAMA.presets, task_type=None, seed=5)
