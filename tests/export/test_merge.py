"""Adapted = merged = reloaded from disk, with plain PEFT and plain transformers; merged != base."""

import json
import shutil
from itertools import islice

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image
from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor

from medft.config.recipe import ModelSection, QuantizationSection
from medft.decoder.families.mllama import MLLAMA
from medft.decoder.generator import Generator
from medft.decoder.model import load_model
from medft.errors import BaseModelError, RunError
from medft.export.merge import describe_difference, merge
from medft.siglip.model import resize_positions


def decoder_logits(model, bases):
    processor = AutoProcessor.from_pretrained(bases / "decoder", backend="pil")
    generator = torch.Generator().manual_seed(8)
    pixels = torch.randint(0, 255, (90, 70, 3), generator=generator, dtype=torch.uint8)
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}]
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    batch = processor(
        images=[[Image.fromarray(pixels.numpy())]], text=[text], add_special_tokens=False,
        return_tensors="pt",
    )  # fmt: skip
    with torch.no_grad():
        return model.eval()(**batch).logits


def siglip_logits(model):
    generator = torch.Generator().manual_seed(8)
    pixels = torch.randn(3, 3, 84, 84, generator=generator)
    ids = torch.randint(3, 200, (5, 64), generator=generator)
    with torch.no_grad():
        return model.eval()(input_ids=ids, pixel_values=pixels).logits_per_image


def gap(left, right):
    return ((left - right).abs().max() / right.abs().max()).item()


# W x + B A x against (W + B A) x in fp32: another order of summation, a few roundings of 6e-8
MERGED = 1e-5


def test_decoder_adapted_merged_and_reloaded_agree(runs, bases, tmp_path):
    base = AutoModelForImageTextToText.from_pretrained(bases / "decoder")
    untouched = decoder_logits(base, bases)
    adapted = decoder_logits(PeftModel.from_pretrained(base, runs / "decoder" / "adapter"), bases)
    assert merge(runs / "decoder", tmp_path / "merged") == runs / "decoder" / "adapter"
    loaded, info = AutoModelForImageTextToText.from_pretrained(
        tmp_path / "merged", output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    merged = decoder_logits(loaded, bases)
    assert gap(merged, adapted) < MERGED
    assert gap(untouched, adapted) > 1e-2
    assert AutoProcessor.from_pretrained(tmp_path / "merged").image_token_id == 512
    assert json.loads((tmp_path / "merged" / "medft.json").read_text())["merged_onto"] == "original"


def validation_batches(bases, data):
    """Each validation row with its batch, tokens by plain transformers."""
    processor = AutoProcessor.from_pretrained(bases / "decoder", backend="pil")
    for line in (data / "chat" / "validation.jsonl").read_text().splitlines():
        row = json.loads(line)
        with Image.open(data / "chat" / row["images"][0]) as image:
            yield row, processor(
                images=[[image.convert("RGB")]], return_tensors="pt", add_special_tokens=False,
                text=[processor.apply_chat_template(row["messages"])],
            )  # fmt: skip


def validation_loss(model, bases, data):
    """Token-weighted loss over the validation rows by plain transformers, one row at a time."""
    tokenizer = AutoProcessor.from_pretrained(bases / "decoder", backend="pil").tokenizer
    total, tokens = 0.0, 0
    for row, batch in validation_batches(bases, data):
        answer = row["messages"][-1]["content"][0]["text"] + tokenizer.eos_token
        length = len(tokenizer(answer, add_special_tokens=False)["input_ids"])
        with torch.no_grad():
            logits = model.eval()(**batch).logits[0, -length - 1 : -1]
        target = batch["input_ids"][0, -length:]
        total += torch.nn.functional.cross_entropy(logits, target, reduction="sum").item()
        tokens += length
    return total / tokens


def test_adapter_and_merged_model_give_the_runs_own_loss(runs, bases, data, tmp_path):
    record = json.loads((runs / "decoder" / "run.json").read_text())
    base = AutoModelForImageTextToText.from_pretrained(bases / "decoder")
    untouched = validation_loss(base, bases, data)
    adapted = PeftModel.from_pretrained(base, runs / "decoder" / "adapter")
    merge(runs / "decoder", tmp_path / "merged")
    merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged")
    own = record["metrics"]["eval_loss"]
    # the run evaluated in batches with padding: fp32 sums in another order
    assert validation_loss(adapted, bases, data) == pytest.approx(own, rel=1e-5)
    assert validation_loss(merged, bases, data) == pytest.approx(own, rel=1e-5)
    assert abs(untouched - own) > 1e-3


def test_an_adapter_of_a_4_bit_base_merges_onto_the_original(runs, bases, tmp_path):
    section = ModelSection(base=str(bases / "decoder"), dtype="float32")
    packed = load_model(section, MLLAMA, QuantizationSection(), dtype=section.dtype)
    folder = runs / "nf4" / "adapter"
    trained = decoder_logits(PeftModel.from_pretrained(packed, folder), bases)
    base = AutoModelForImageTextToText.from_pretrained(bases / "decoder")
    untouched = decoder_logits(base, bases)
    onto_original = decoder_logits(PeftModel.from_pretrained(base, folder), bases)
    merge(runs / "nf4", tmp_path / "merged")
    merged = decoder_logits(AutoModelForImageTextToText.from_pretrained(tmp_path / "merged"), bases)
    assert gap(merged, onto_original) < MERGED
    # the trained model saw rounded weights: near what it learned, nearer than the base is
    near, far = ((x - trained).abs().mean().item() for x in (merged, untouched))
    assert 0 < near < far


def test_siglip_with_scale_and_bias_survives_merging(runs, bases, tmp_path):
    merge(runs / "siglip" / "best_model", tmp_path / "best")
    merge(runs / "siglip", tmp_path / "merged")
    merged = AutoModel.from_pretrained(tmp_path / "merged")
    notes = json.loads((runs / "siglip" / "adapter" / "medft.json").read_text())
    assert merged.logit_scale.item() == notes["logit_scale"]
    assert merged.logit_bias.item() == notes["logit_bias"] != -10
    assert merged.config.vision_config.image_size == 84

    base = AutoModel.from_pretrained(bases / "siglip")
    resize_positions(base, 84)
    untouched = siglip_logits(base)
    adapted_model = PeftModel.from_pretrained(base, runs / "siglip" / "adapter")
    with torch.no_grad():
        base.logit_scale.fill_(notes["logit_scale"])
        base.logit_bias.fill_(notes["logit_bias"])
    adapted = siglip_logits(adapted_model)
    assert gap(siglip_logits(merged), adapted) < MERGED
    assert gap(untouched, adapted) > 1e-3
    size = AutoProcessor.from_pretrained(tmp_path / "merged").image_processor.size
    assert (size["height"], size["width"]) == (84, 84)


def test_a_run_directory_is_complete_and_keeps_no_pickle_in_its_results(runs, bases):
    for name, kind in (("decoder", "decoder"), ("nf4", "decoder"), ("siglip", "siglip")):
        run = runs / name
        names = {path.name for path in run.iterdir()} - {"index.npz"}  # kept by medft predict
        assert names == {
            "adapter", "best_model", "checkpoint-8", "curves.png", "log_history.json",
            "recipe.yaml", "run.json",
        }  # fmt: skip
        for result in ("adapter", "best_model"):
            inside = {path.name for path in (run / result).iterdir()}
            assert {"adapter_model.safetensors", "adapter_config.json", "medft.json"} <= inside
            assert "processor_config.json" in inside
            assert not [name for name in inside if name.endswith((".bin", ".pt", ".pth"))]
        record = json.loads((run / "run.json").read_text())
        assert record["status"] == "completed"
        assert record["batch"]["effective"] == 3
        assert record["base"]["sha256"]
        assert record["data"]["train"]["sha256"]
        assert record["metrics"]["eval_loss"] == record["best_metric"]
        assert 0 < record["trainable_parameters"] < record["total_parameters"]
        base_class = AutoModel if kind == "siglip" else AutoModelForImageTextToText
        base = base_class.from_pretrained(bases / kind)
        total = sum(p.numel() for p in base.parameters()) + record["trainable_parameters"]
        if kind == "siglip":
            total += 20 * 64 - 2  # 36 positions for 16; scale and bias are counted twice
        assert record["total_parameters"] == total


@pytest.fixture
def with_fix(runs, tmp_path):
    """A copy of a run whose adapter says that it was trained with cross_attention_fix."""
    run = shutil.copytree(runs / "decoder", tmp_path / "run")
    record = run / "adapter" / "medft.json"
    content = json.loads(record.read_text()) | {"cross_attention_fix": True}
    record.write_text(json.dumps(content))
    return run


def logits_of_rows(model, data, bases, count):
    """[S, V] logits of the first validation rows, one at a time, tokens by plain transformers."""
    found = []
    for _, batch in islice(validation_batches(bases, data), count):
        with torch.no_grad():
            found.append(model.eval()(**batch).logits[0])
    return found


def test_what_plain_transformers_makes_of_the_cross_attention_fix_is_measured_and_forced(
    with_fix, medft, capsys, caplog, data, bases, tmp_path
):
    assert medft("merge", with_fix, "--out", tmp_path / "merged") == 2
    refused = capsys.readouterr().err
    assert not (tmp_path / "merged").exists()
    assert medft("merge", with_fix, "--out", tmp_path / "merged", "--force") == 0
    figures = json.loads((tmp_path / "merged" / "merge.json").read_text())
    assert describe_difference(figures) in refused
    assert describe_difference(figures) in caplog.text
    assert (figures["rows_from"], figures["rows"]) == ("validation rows of the run", 8)
    assert (figures["onto"], figures["passed"]) == ("original", False)
    assert figures["adapter"] == str(with_fix / "adapter")
    plain = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged")
    fixed = Generator.load(tmp_path / "merged").model
    pairs = zip(*(logits_of_rows(m, data, bases, 2) for m in (plain, fixed)), strict=True)
    largest = max((one - other).abs().max().item() for one, other in pairs)
    by = figures["max_logit_difference_by"]
    assert by["with_image"] == pytest.approx(largest, rel=1e-4)  # fp32 sums in another order
    assert largest > 1e-3
    assert by["without_image"] == 0
    assert by["in_one_batch"] > 1e-3
    assert 0 < figures["mean_logit_difference"] < figures["max_logit_difference"]
    assert figures["max_logit_difference"] == max(by.values())
    assert 0 < figures["top1_agreement"] <= 1


def test_the_fix_is_measured_on_drawn_rows_where_the_runs_are_not_known(with_fix, tmp_path):
    adapter = shutil.copytree(with_fix / "adapter", tmp_path / "adapter")
    with pytest.raises(RunError, match=r"with image [01]\..* from drawn rows\): use the adapter"):
        merge(adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_merge_without_the_fix_needs_no_force_and_measures_nothing(runs, tmp_path):
    merge(runs / "decoder", tmp_path / "merged")
    assert not (tmp_path / "merged" / "merge.json").exists()


def test_what_cannot_be_merged_is_one_sentence(runs, bases, tmp_path):
    with pytest.raises(RunError, match="holds no adapter_config"):
        merge(tmp_path, tmp_path / "out")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("x")
    with pytest.raises(RunError, match="to be empty"):
        merge(runs / "decoder", tmp_path / "full")
    assert {path.name for path in (tmp_path / "full").iterdir()} == {"file"}
    broken = tmp_path / "run"
    broken.mkdir()
    record = json.loads((runs / "decoder" / "run.json").read_text())
    (broken / "run.json").write_text(json.dumps({**record, "status": "interrupted"}))
    with pytest.raises(RunError, match="its status is interrupted"):
        merge(broken, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_adapter_that_peft_cannot_merge_is_one_sentence(runs, bases, tmp_path):
    copy = tmp_path / "adapter"
    shutil.copytree(runs / "decoder" / "adapter", copy)
    config = LoraConfig(r=2, target_modules=["q_proj"], lora_bias=True)
    base = AutoModelForImageTextToText.from_pretrained(bases / "decoder")
    adapted = get_peft_model(base, config)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.ones_(parameter)
    adapted.save_pretrained(copy)
    notes = json.loads((copy / "medft.json").read_text())
    (copy / "medft.json").write_text(json.dumps({**notes, "weights": None}))
    with pytest.raises(RunError, match=f"can be merged in {copy}, PEFT says: .*lora_bias=True"):
        merge(copy, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_base_that_changed_since_is_refused(runs, bases, tmp_path):
    copy = tmp_path / "adapter"
    shutil.copytree(runs / "decoder" / "adapter", copy)
    notes = json.loads((copy / "medft.json").read_text())
    (copy / "medft.json").write_text(json.dumps({**notes, "sha256": "0" * 64}))
    with pytest.raises(BaseModelError, match="its files have changed"):
        merge(copy, tmp_path / "out")
