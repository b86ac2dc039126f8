"""What a recipe says is what its trainer has, and what the record says: precision, fix, adapter."""

import json

import pytest
import torch
from peft.tuners.lora import LoraLayer

from medft.config.recipe import DecoderDataSection, DecoderModelSection
from medft.decoder.checks import check_flags
from medft.decoder.families.gemma3 import GEMMA3
from medft.decoder.families.mllama import MLLAMA
from medft.decoder.families.paligemma import PALIGEMMA
from medft.decoder.model import load_model
from medft.errors import BaseModelError
from medft.models.saved import SavedRecord


@pytest.fixture
def make(sections, write_recipe, build_trainer, mixed_rows):
    """A trainer on rows with none, one and two images."""

    def build(changes=(), **options):
        recipe = sections("decoder")
        recipe["data"] |= {"train": str(mixed_rows), "validation": None}
        recipe["train"] |= {"max_steps": 1, "save_strategy": "no", "learning_rate": 1e-3}
        recipe["train"]["warmup_steps"] = 0
        return build_trainer(write_recipe(recipe), changes, **options)

    return build


def test_full_fine_tuning_trains_every_weight_in_float32_whatever_the_dtype(make):
    trained = make(["lora=null", "model.dtype=bfloat16"])
    before = {name: p.detach().clone() for name, p in trained.model.named_parameters()}
    assert {p.dtype for p in before.values()} == {torch.float32}
    assert all(p.requires_grad for p in trained.model.parameters())
    trained.train()
    still = {n for n, p in trained.model.named_parameters() if torch.equal(p, before[n])}
    assert all("embedding" in name for name in still), still  # of tile arrangements unseen here
    # the opposite: with an adapter the base is in model.dtype
    base = make(["model.dtype=bfloat16"]).model.get_base_model()
    assert base.lm_head.weight.dtype == torch.bfloat16


def logits_of_first_row(trained, rows):
    """Of the row alone or beside others, at its own tokens."""
    batch = trained.to_device(trained.data_collator(rows))
    length = len(trained.data_collator.conversation.encode(*message_of(rows[0])).input_ids)
    labels = batch.pop("labels")
    with torch.no_grad():
        return trained.model.eval()(**batch).logits[0, : min(length, labels.shape[1])]


def message_of(record):
    return json.loads(record["messages"]), record["id"]


@pytest.mark.parametrize("fix", [True, False])
def test_the_fix_that_is_recorded_is_the_one_that_is_trained_with(make, tmp_path, fix):
    trained = make([f"model.cross_attention_fix={str(fix).lower()}"], is_fresh=False)
    for name, parameter in trained.model.named_parameters():
        if "gate" in name.rpartition(".")[2]:
            torch.nn.init.constant_(parameter, 0.5)
    trained.data_collator.isolates_rows = True  # which lets the batch below be made without it
    one, two = trained.train_dataset[8], trained.train_dataset[22]
    assert [len(row["images"]) for row in (one, two)] == [1, 2]
    gap = (logits_of_first_row(trained, [one]) - logits_of_first_row(trained, [one, two])).abs()
    # float32 rounding of sums over other lengths; the leak is a thousand times more
    assert gap.max() < 1e-5 if fix else gap.max() > 1e-3
    trained.save_model(str(tmp_path / "saved"))
    record = json.loads((tmp_path / "saved" / "medft.json").read_text())
    assert record["cross_attention_fix"] is fix


def test_the_fix_is_in_place_before_the_adapter(make, monkeypatch):
    seen = []
    isolate = type(MLLAMA).isolate_rows

    def noting(family, model):
        seen.append(any(isinstance(module, LoraLayer) for module in model.modules()))
        return isolate(family, model)

    monkeypatch.setattr(type(MLLAMA), "isolate_rows", noting)
    make(["model.cross_attention_fix=true"])
    assert seen == [False]


def test_another_way_to_make_the_base_is_taken(make):
    asked = []

    def load(model, family, quantization, *, dtype, recorded):
        asked.append((model.base, family, quantization, dtype))
        loaded = load_model(model, family, quantization, dtype=dtype)
        torch.nn.init.zeros_(loaded.lm_head.weight)
        return loaded

    trained = make(load=load)
    assert asked == [
        (trained.model.peft_config["default"].base_model_name_or_path, MLLAMA, None, "float32")
    ]
    assert not trained.model.get_base_model().lm_head.weight.any()


def test_rows_own_questions_stay_and_what_every_row_shares_goes_with_the_adapter(
    sections, write_recipe, build_trainer, tmp_path
):
    rows = []
    for number in range(8):
        system = {"role": "system", "content": "You read knees."}
        question = {"role": "user", "content": f"How is patient Doe {number}?"}
        answer = {"role": "assistant", "content": "No effusion."}
        rows.append({"messages": [system, question, answer]})
    (tmp_path / "chat.json").write_text(json.dumps({"prompts": {"a": ["So?", "How is {name}?"]}}))

    def record():
        file = tmp_path / "train.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        recipe = sections("decoder")
        recipe["data"] |= {"train": str(file), "validation": None}
        recipe["lora"]["targets"] = r"model\.language_model\.layers\.0\..*_proj"  # see text alone
        build_trainer(write_recipe(recipe)).save_model(str(tmp_path / "saved"))
        return SavedRecord.read(tmp_path / "saved")

    found = record()
    assert (found.prompts, found.system) == (["How is {name}?"], "You read knees.")
    written = [path.read_bytes() for path in (tmp_path / "saved").glob("*.json")]
    assert not any(b"Doe" in content for content in written)
    for row in rows:
        row["messages"][1]["content"] = "What is it?"
    assert record().prompts is None
    del rows[3]["messages"][0]  # one row alone has no system turn
    rows[5]["messages"][1]["content"] = "So?"
    found = record()
    assert (found.prompts, found.system) == (["So?"], None)


def test_gemma_3_is_refused_in_float16():
    data = DecoderDataSection(train="x")
    sections = {
        dtype: DecoderModelSection(base="x", dtype=dtype)
        for dtype in ("float16", "bfloat16", "float32")
    }
    with pytest.raises(BaseModelError, match="bfloat16 or float32 for gemma3, whose activations"):
        check_flags(sections["float16"], data, None, GEMMA3)
    for dtype in ("bfloat16", "float32"):
        check_flags(sections[dtype], data, None, GEMMA3)
    for family in (MLLAMA, PALIGEMMA):  # the first step is measured
        check_flags(sections["float16"], data, None, family)


@pytest.mark.parametrize("fix", [True, False])
def test_a_whole_model_that_other_tools_would_compute_otherwise_is_announced(make, caplog, fix):
    make(["lora=null", f"model.cross_attention_fix={str(fix).lower()}"])
    assert ("other tools will compute something else" in caplog.text) == fix
