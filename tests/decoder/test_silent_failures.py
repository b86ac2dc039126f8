"""Silent failures of the stock stack, each shown to happen there and not here.

The table of all of them, with those whose tests stand beside what they test, is in
docs/silent-failures.md.
"""

import copy
import datetime
import json

import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from peft import LoraConfig, get_peft_model
from PIL import Image
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    Trainer,
    TrainingArguments,
)
from trl import SFTConfig
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling
from trl.trainer.utils import add_fused_lm_head

from medft.check import check
from medft.config.train_keys import TrainSection
from medft.decoder.conversation import ConversationEncoder
from medft.decoder.families.mllama import MLLAMA
from medft.decoder.sampler import GlobalBatchSampler
from medft.decoder.trainer import decoder_arguments
from medft.errors import MedftError, RecipeError

CONVERSATION = [
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is seen?"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "A disc."}]},
]


@pytest.fixture
def stock(bases):
    """TRL's collator and the plain model of the tiny Mllama."""
    processor = AutoProcessor.from_pretrained(bases / "decoder", backend="pil")
    model = AutoModelForImageTextToText.from_pretrained(bases / "decoder").eval()
    return DataCollatorForVisionLanguageModeling(processor, max_length=None), model


@pytest.fixture
def recipe(sections, write_recipe):
    return write_recipe(sections("decoder"))


def image():
    return Image.new("RGB", (70, 50), (200, 10, 10))


@pytest.mark.upstream
def test_1_stock_scores_the_image_token_which_has_no_row_in_the_head(stock):
    # medft: test_collator.py::test_the_image_token_lies_beyond_the_head_and_is_no_label
    collator, model = stock
    batch = collator([{"messages": copy.deepcopy(CONVERSATION), "images": [image()]}])
    position = batch["labels"][0].tolist().index(512)
    assert model.lm_head.out_features == 512
    with pytest.raises(IndexError, match="512 is out of bounds"):
        model(**batch)
    add_fused_lm_head(model)
    with torch.no_grad():
        scored = model(**batch, fused_lm_head=True)
    assert scored.log_probs[0, position - 1] < -1  # a term of the loss that teaches nothing
    batch["labels"][0, position] = -100
    with torch.no_grad():
        assert model(**batch, fused_lm_head=True).loss != scored.loss


@pytest.mark.upstream
def test_2_stock_fails_on_prompt_and_completion(stock):
    collator, model = stock
    prompt, completion = copy.deepcopy(CONVERSATION[:1]), copy.deepcopy(CONVERSATION[1:])
    batch = collator([{"prompt": prompt, "completion": completion, "images": [image()]}])
    assert batch["cross_attention_mask"].shape[1] < batch["input_ids"].shape[1]
    with pytest.raises((RuntimeError, IndexError), match=r"must match the size|out of bounds"):
        model(**batch)


def test_2_prompt_and_completion_are_refused(recipe, tmp_path):
    image().save(tmp_path / "a.png")
    row = {"id": "r", "images": ["a.png"], "prompt": CONVERSATION[:1], "completion": "A disc."}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(MedftError, match="messages"):
        check(recipe, [f"data.train={tmp_path / 'rows.jsonl'}", "data.validation=null"])


GREETING = [
    {"role": "user", "content": [{"type": "text", "text": "Hello"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "Yes"}]},
]


@pytest.mark.upstream
def test_llamas_template_writes_todays_date_in_stock_code(stock):
    def today():
        return datetime.datetime.now().strftime("Today Date: %d %b %Y")

    before, text, after = today(), stock[0].processor.apply_chat_template(GREETING), today()
    assert before in text or after in text  # midnight may come between


def test_llamas_template_writes_the_same_date_every_day(stock):
    processor = stock[0].processor
    encoder = ConversationEncoder(processor, MLLAMA, max_image_tiles=4)
    text = processor.tokenizer.decode(encoder.encode(GREETING, "r").input_ids)
    assert "Today Date: 26 Jul 2024" in text


@pytest.mark.upstream
def test_8_all_linear_reaches_the_tower_in_stock_code(stock):
    adapted = get_peft_model(stock[1], LoraConfig(target_modules="all-linear"))
    names = [name for name, _ in adapted.named_parameters() if "lora_A" in name]
    assert sum("vision_model" in name for name in names) == 24


def test_8_all_linear_is_no_preset(recipe):
    with pytest.raises(MedftError, match=r"'all-linear' matches none: presets are language"):
        check(recipe, ["lora.targets=all-linear"])


def test_9_tokens_that_were_added_to_a_base_are_found(bases, recipe, tmp_path):
    folder = tmp_path / "base"
    model = AutoModelForImageTextToText.from_pretrained(bases / "decoder")
    processor = AutoProcessor.from_pretrained(bases / "decoder", backend="pil")
    processor.tokenizer.add_tokens([f"<finding {i}>" for i in range(9)])
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    message = r"expected a tokenizer of at most 520 tokens, .* it has 522: .* were added"
    with pytest.raises(MedftError, match=message):
        check(recipe, [f"model.base={folder}"])


@pytest.mark.upstream
def test_9_resized_embeddings_make_a_checkpoint_that_does_not_load(bases, tmp_path):
    folder = tmp_path / "base"
    model = AutoModelForImageTextToText.from_pretrained(bases / "decoder")
    model.resize_token_embeddings(522)
    model.save_pretrained(folder)
    with pytest.raises(RuntimeError, match=r"size mismatch|mismatched|ignore_mismatched_sizes"):
        AutoModelForImageTextToText.from_pretrained(folder)


@pytest.mark.upstream
def test_14_stock_takes_its_precision_from_where_nobody_looks(monkeypatch, tmp_path):
    options = {"use_cpu": True, "report_to": "none"}
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    stock = SFTConfig(str(tmp_path), **options)
    assert (stock.bf16, stock.fp16) == (True, False)  # accelerate's fp16 is overridden
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    stock = SFTConfig(str(tmp_path), bf16=False, **options)
    precision = Trainer(torch.nn.Linear(2, 2), stock).accelerator.mixed_precision
    assert precision == "bf16"  # bf16: false loses
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION")
    stock = TrainingArguments(str(tmp_path), fp16=True, **options)
    accelerator = Trainer(torch.nn.Linear(2, 2), stock).accelerator
    with accelerator.autocast():
        computed = torch.nn.Linear(2, 2)(torch.ones(1, 2)).dtype
    assert (accelerator.mixed_precision, computed) == ("fp16", torch.float32)


def test_14_precision_stands_in_one_place(monkeypatch, tmp_path, recipe):
    train = TrainSection(output_dir=str(tmp_path))
    for launched, dtype in (("fp16", "bfloat16"), ("bf16", "float32")):
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launched)
        with pytest.raises(RecipeError, match=f"it is {launched} and model.dtype is {dtype}"):
            decoder_arguments(train, dtype=dtype)
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION")
    if not torch.cuda.is_available():
        with pytest.raises(RecipeError, match=r"expected a GPU for model\.dtype float16"):
            decoder_arguments(train, dtype="float16")
    for key in ("bf16", "fp16"):
        with pytest.raises(MedftError, match=f"train.{key} is refused: precision stands in model"):
            check(recipe, [f"train.{key}=false"])


class Batches:
    """A batch sampler whose second batch is short, as where one kind of rows ends."""

    batch_size, drop_last = 3, False

    def __iter__(self):
        rows = iter(range(17))
        return iter([[next(rows) for _ in range(size)] for size in (3, 2, 3, 3, 3, 3)])

    def __len__(self):
        return 6


@pytest.mark.upstream
def test_15_accelerate_drops_rows_where_a_batch_is_short():
    sharded = [row for rank in (0, 1) for b in BatchSamplerShard(Batches(), 2, rank) for row in b]
    assert set(range(17)) - set(sharded) == {0, 1, 2, 3, 4}  # lost in every epoch, unseen


def test_15_global_batches_are_never_short():
    modalities = [1] * 11 + [0] * 6
    batches = GlobalBatchSampler(modalities, batch_size=3, num_processes=2, seed=5)
    ranks = [list(BatchSamplerShard(batches, 2, rank)) for rank in (0, 1)]
    assert {row for rank in ranks for batch in rank for row in batch} == set(range(17))
    for left, right in zip(*ranks, strict=True):
        assert len({modalities[row] for row in left + right}) == 1
