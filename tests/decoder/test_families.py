"""PaliGemma and Gemma 3: what is trained, in tokens and in what each token may see."""

import copy
import io
import json

import numpy as np
import pytest
import torch
from bitsandbytes.nn import Linear4bit
from families import BASES
from PIL import Image
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    BitsAndBytesConfig,
)
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from medft.config.recipe import ModelSection, QuantizationSection
from medft.decoder.collator import DecoderCollator
from medft.decoder.conversation import ConversationEncoder, mark_trained
from medft.decoder.families import FAMILIES
from medft.decoder.families.gemma3 import GEMMA3
from medft.decoder.families.paligemma import PALIGEMMA
from medft.decoder.model import check_quantized, load_model
from medft.errors import BaseModelError, DataError
from medft.models.base import empty_model
from medft.models.lora import count_by_part, target_modules

GEMMAS = pytest.mark.parametrize("name", ["paligemma", "gemma3"])


@pytest.fixture(scope="module")
def encoders(bases):
    made = {}
    for name in ("paligemma", "gemma3"):
        processor = AutoProcessor.from_pretrained(bases / name, backend="pil")
        made[name] = ConversationEncoder(processor, FAMILIES[name], max_image_tiles=4)
    return made


@pytest.fixture
def model(bases):
    def load(name):
        section = ModelSection(base=str(bases / name), dtype="float32")
        return load_model(section, FAMILIES[name], None, dtype="float32").eval()

    return load


def turn(role, text, images=0):
    return {
        "role": role,
        "content": [{"type": "image"}] * images + [{"type": "text", "text": text}],
    }


def image(seed=0):
    values = np.random.default_rng(seed).integers(0, 255, (50, 70, 3), dtype=np.uint8)
    return Image.fromarray(values)


def row(messages, images=0, name="r"):
    content = []
    for seed in range(images):
        stream = io.BytesIO()
        image(seed).save(stream, format="PNG")
        content.append({"bytes": stream.getvalue(), "path": None})
    return {"id": name, "messages": json.dumps(messages), "images": content}


def collate(encoder, *rows, max_length=200):
    vocab_size = encoder.processor.tokenizer.vocab_size + 2000  # here the labels are looked at
    batch = DecoderCollator(
        encoder, max_length=max_length, vocab_size=vocab_size, isolates_rows=True
    )(rows)
    return batch | encoder.family.stack_images([batch.pop("images")])


def test_every_family_has_a_tiny_base_that_the_tests_read():
    assert BASES.keys() == FAMILIES.keys()


ONE = [turn("user", "What is seen?", images=1), turn("assistant", "A disc.")]
TWO = [
    turn("user", "What is seen?", images=2),
    turn("assistant", "A disc."),
    turn("user", "Where?"),
    turn("assistant", "Left, 3.5 cm."),
]
TEXT = [turn("user", "Hello"), turn("assistant", "Yes")]

GOLDEN = {
    ("paligemma", 1): "<image><bos>What is seen?\\n>>>A disc.<eos><<<",
    ("paligemma", 2): "<image><image><bos>What is seen?\\n>>>A disc.<eos><<<Where?\\n"
    ">>>Left, 3.5 cm.<eos><<<",
    ("paligemma", 0): "<bos>Hello\\n>>>Yes<eos><<<",
    ("gemma3", 1): "<bos><start_of_turn>user\\n\\n\\n<start_of_image><image_soft_token>"
    "<end_of_image>\\n\\nWhat is seen?<end_of_turn>\\n<start_of_turn>model\\n"
    ">>>A disc.<end_of_turn><<<\\n",
    ("gemma3", 2): "<bos><start_of_turn>user\\n"
    + "\\n\\n<start_of_image><image_soft_token><end_of_image>\\n\\n" * 2
    + "What is seen?<end_of_turn>\\n<start_of_turn>model\\n>>>A disc.<end_of_turn><<<\\n"
    "<start_of_turn>user\\nWhere?<end_of_turn>\\n<start_of_turn>model\\n"
    ">>>Left, 3.5 cm.<end_of_turn><<<\\n",
    ("gemma3", 0): "<bos><start_of_turn>user\\nHello<end_of_turn>\\n<start_of_turn>model\\n"
    ">>>Yes<end_of_turn><<<\\n",
}


@pytest.mark.parametrize(("name", "images"), GOLDEN)
def test_what_is_trained_decodes_to_the_assistants_words(encoders, name, images):
    messages = {0: TEXT, 1: ONE, 2: TWO}[images]
    encoder = encoders[name]
    encoded = encoder.encode(messages, "r")
    assert mark_trained(encoded, encoder, 500) == GOLDEN[name, images]
    tokens = {"paligemma": 16, "gemma3": 4}[name]
    assert encoded.input_ids.count(encoder.image_token_id) == images * tokens


def test_paligemmas_batch_is_what_its_processor_makes_of_prompt_and_suffix(encoders, bases):
    batch = collate(encoders["paligemma"], row(ONE, 1), row(ONE[:1] + TEXT[1:], 1))
    processor = AutoProcessor.from_pretrained(bases / "paligemma", backend="pil")
    expected = processor(
        text=["<image>What is seen?"] * 2, suffix=["A disc.", "Yes"],
        images=[[image()], [image()]], return_tensors="pt", padding=True, padding_side="right",
    )  # fmt: skip
    assert batch.pop("row_ids") == ["r", "r"]
    assert batch.keys() == expected.keys()
    real = expected["attention_mask"] == 1
    for name in expected:
        same = batch[name] == expected[name]
        assert same.all() if name == "pixel_values" else same[real].all(), name
    assert (batch["labels"][~real] == -100).all()


def test_gemma3s_batch_is_what_its_processor_makes(encoders, bases):
    batch = collate(encoders["gemma3"], row(TWO, 2), row(ONE, 1))
    processor = AutoProcessor.from_pretrained(bases / "gemma3", backend="pil")
    expected = processor(
        text=[processor.apply_chat_template(TWO), processor.apply_chat_template(ONE)],
        images=[[image(0), image(1)], [image(0)]],
        return_tensors="pt", padding=True, padding_side="right", add_special_tokens=False,
    )  # fmt: skip
    labels = batch.pop("labels")
    del batch["row_ids"]
    assert batch.keys() == expected.keys()
    assert all(torch.equal(batch[name], expected[name]) for name in expected)
    assert torch.equal(labels[labels >= 0], batch["input_ids"][labels >= 0])


def seen_by(model, batch, changed):
    """Positions whose logits change with the token at one position."""
    inputs = {k: v for k, v in batch.items() if k not in ("labels", "row_ids")}
    other = {**inputs, "input_ids": inputs["input_ids"].clone()}
    other["input_ids"][0, changed] = 300
    with torch.no_grad():
        gap = (model(**inputs).logits - model(**other).logits).abs().amax(dim=-1)[0]
    return set((gap > 1e-6).nonzero().flatten().tolist())


def stock_batch(bases, name, encoders, messages, images):
    """What TRL's collator for vision-language models makes of a conversation."""
    processor = AutoProcessor.from_pretrained(bases / name, backend="pil")
    processor.chat_template = encoders[name].processor.chat_template
    collator = DataCollatorForVisionLanguageModeling(processor, max_length=None)
    images = [image(seed) for seed in range(images)]
    return collator([{"messages": copy.deepcopy(messages), "images": images}])


def test_paligemmas_answers_are_causal_and_its_prompt_is_not(encoders, model, bases):
    batch = collate(encoders["paligemma"], row(TWO, 2))
    loaded = model("paligemma")
    answers = (batch["labels"][0] >= 0).nonzero().flatten().tolist()
    first, last, length = answers[0], answers[-2], batch["input_ids"].shape[1]
    prompt = 34  # behind 32 patches and <bos>
    assert seen_by(loaded, batch, prompt) == set(range(length))
    assert seen_by(loaded, batch, first) == set(range(first, length))
    assert seen_by(loaded, batch, last) == set(range(last, length))

    # stock: every token of the conversation stands in the prefix, an answer is seen before it is
    # predicted
    stock = stock_batch(bases, "paligemma", encoders, TWO, 2)
    assert stock["token_type_ids"].sum() == 0
    position = stock["input_ids"][0].tolist().index(int(batch["input_ids"][0, first]), 33)
    assert min(seen_by(loaded, stock, position)) == 0


def test_gemma3s_images_see_all_of_themselves_and_text_is_causal(encoders, model):
    batch = collate(encoders["gemma3"], row(ONE, 1))
    loaded = model("gemma3")
    length = batch["input_ids"].shape[1]
    answer = int((batch["labels"][0] >= 0).nonzero()[0])
    assert seen_by(loaded, batch, answer) == set(range(answer, length))
    inputs = {k: v for k, v in batch.items() if k not in ("labels", "row_ids")}
    with torch.no_grad():
        right = loaded(**inputs).logits
        # stock takes a batch without the marks and reads the image causally, without a word
        wrong = loaded(**{k: v for k, v in inputs.items() if k != "token_type_ids"}).logits
    first = inputs["input_ids"][0].tolist().index(encoders["gemma3"].image_token_id)
    changed = (right - wrong)[0].abs().amax(dim=-1) > 1e-6
    assert not changed[:first].any()
    assert changed[first:].all()


@GEMMAS
def test_stock_labels_hold_image_tokens_and_the_prompt(encoders, bases, name):
    encoder = encoders[name]
    labels = stock_batch(bases, name, encoders, ONE, 1)["labels"][0].tolist()
    assert labels.count(encoder.image_token_id) > 0  # in range: no error, only a wrong loss
    ours = collate(encoder, row(ONE, 1))["labels"][0]
    text = encoder.processor.tokenizer.decode(ours[ours >= 0])
    assert text in ("A disc.<eos>", "A disc.<end_of_turn>")


def test_paligemma_2_caps_its_attention_on_every_machine(model, bases, encoders):
    batch = collate(encoders["paligemma"], row(ONE, 1))
    del batch["labels"], batch["row_ids"]
    loaded = model("paligemma")
    stock = AutoModelForImageTextToText.from_pretrained(
        bases / "paligemma", attn_implementation={"text_config": "eager"}
    )
    uncapped = AutoModelForImageTextToText.from_pretrained(bases / "paligemma")
    for layer in uncapped.model.language_model.layers:  # as torch's attention, the older default
        layer.self_attn.attn_logit_softcapping = None
    with torch.no_grad():
        capped = loaded(**batch).logits
        assert torch.equal(stock.eval()(**batch).logits, capped)
        assert (uncapped.eval()(**batch).logits - capped).abs().max() > 1e-3


@GEMMAS
def test_presets_hit_the_parts_they_name_and_only_the_language_is_4_bit(bases, name):
    family = FAMILIES[name]
    empty = empty_model(AutoModelForImageTextToText, AutoConfig.from_pretrained(bases / name))
    counts = {
        preset: count_by_part(target_modules(empty, preset, family.presets), family.parts)
        for preset in family.presets
    }
    # 3 text layers, 2 tower layers; Gemma 3's projector has no linear layer
    assert counts == {
        "language": "21 language",
        "language_no_mlp": "12 language",
        "vision": "12 vision",
        **(
            {"projector": "1 projector", "all": "12 vision, 1 projector, 21 language"}
            if name == "paligemma"
            else {"all": "12 vision, 21 language"}
        ),
    }
    section = ModelSection(base=str(bases / name), dtype="float32")
    packed = load_model(section, family, QuantizationSection(), dtype="float32")
    four_bit = {n for n, module in packed.named_modules() if isinstance(module, Linear4bit)}
    assert four_bit == target_modules(empty, "language", family.presets).keys()
    config = BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=["vision_model"])
    stock = AutoModelForImageTextToText.from_pretrained(bases / name, quantization_config=config)
    assert any(isinstance(m, Linear4bit) for m in stock.model.vision_tower.modules())
    with pytest.raises(BaseModelError, match="to be unquantized, bitsandbytes made it 4-bit"):
        check_quantized(stock, family, QuantizationSection())


@GEMMAS
def test_rows_do_not_depend_on_their_neighbours(encoders, model, name):
    together = collate(encoders[name], row(ONE, 1), row(TWO, 2), row(TEXT))
    alone = collate(encoders[name], row(ONE, 1))
    loaded = model(name)
    logits = []
    for batch in (together, alone):
        with torch.no_grad():
            del batch["labels"], batch["row_ids"]
            logits.append(loaded(**batch).logits[0])
    length = len(logits[1])
    # fp32 sums over more, masked, keys; logits are below 7
    assert (logits[0][:length] - logits[1]).abs().max() <= 1e-5


@pytest.mark.parametrize(
    ("name", "messages", "reason"),
    [
        ("paligemma", [turn("system", "Be brief."), *ONE], "it knows no system turn"),
        ("paligemma", [*TEXT, turn("user", "And?", images=1)], "its images stand in the first"),
        ("gemma3", [turn("user", "a"), *TEXT], "roles must alternate"),
    ],
)
def test_what_a_template_refuses_names_the_row(encoders, name, messages, reason):
    with pytest.raises(DataError, match=f"row r: the base's chat template refuses.*{reason}"):
        encoders[name].encode(messages, "r")


@pytest.mark.parametrize(
    ("name", "text"),
    [("paligemma", "a<image>"), ("paligemma", "a<eos>"), ("gemma3", "<end_of_turn>\n"),
     ("gemma3", "<start_of_image>"), ("gemma3", "x<image_soft_token>")],
)  # fmt: skip
def test_special_tokens_in_a_text_are_refused(encoders, name, text):
    messages = [turn("user", "What?", images=1), turn("assistant", text)]
    with pytest.raises(DataError, match=r"row r: .* the assistant holds the tokenizer's <"):
        encoders[name].encode(messages, "r")


@GEMMAS
def test_blank_text_between_images_encodes(encoders, name):
    image = {"type": "image"}
    content = [image, {"type": "text", "text": "\n"}, image, {"type": "text", "text": "What?"}]
    messages = [{"role": "user", "content": content}, turn("assistant", "A disc.")]
    encoder = encoders[name]
    shown = mark_trained(encoder.encode(messages, "r"), encoder, 500)
    assert shown.count(encoder.processor.image_token) == 2
    assert "What?" in shown


@pytest.mark.parametrize(
    ("name", "text"),
    [("gemma3", "<image>"), ("gemma3", "a <|image|>"), ("paligemma", "<start_of_image>"),
     ("paligemma", "<image_soft_token>b"), ("gemma3", "<|vision_start|>")],
)  # fmt: skip
def test_what_other_models_read_as_an_image_is_refused(encoders, name, text):
    messages = [turn("user", text, images=1), turn("assistant", "A disc.")]
    with pytest.raises(DataError, match=r"row r: .* the user holds <.*other models read as an im"):
        encoders[name].encode(messages, "r")
    messages[0] = turn("user", text.replace("<", "< "), images=1)
    assert encoders[name].encode(messages, "r").input_ids


@GEMMAS
def test_a_template_that_does_not_end_a_turn_is_refused(encoders, name):
    processor = copy.copy(encoders[name].processor)
    processor.chat_template = "{% for m in messages %}{{ m.content[-1].text }}\n{% endfor %}"
    other = ConversationEncoder(processor, FAMILIES[name], max_image_tiles=4)
    end = FAMILIES[name].end_of_turn
    with pytest.raises(DataError, match=f"end the assistant's turn with {end}"):
        other.encode(TEXT, "r")


def test_a_base_without_template_is_refused_and_paligemma_gets_its_own(encoders, bases):
    processor = AutoProcessor.from_pretrained(bases / "gemma3", backend="pil")
    processor.chat_template = None
    with pytest.raises(BaseModelError, match="expected a base with a chat template"):
        ConversationEncoder(processor, GEMMA3, max_image_tiles=4)
    assert AutoProcessor.from_pretrained(bases / "paligemma").chat_template is None
    assert encoders["paligemma"].processor.chat_template == PALIGEMMA.chat_template


def test_crops_beside_the_image_are_refused(bases):
    processor = AutoProcessor.from_pretrained(bases / "gemma3", backend="pil")
    processor.image_processor.do_pan_and_scan = True
    with pytest.raises(BaseModelError, match="do_pan_and_scan to be off"):
        ConversationEncoder(processor, GEMMA3, max_image_tiles=4)


@GEMMAS
def test_a_template_that_leaves_a_text_out_is_refused(encoders, name):
    processor = copy.copy(encoders[name].processor)
    other = ConversationEncoder(processor, FAMILIES[name], max_image_tiles=4)
    processor.chat_template = (
        "{{ messages[0].content[-1].text }}{{ messages[1].content[-1].text }}"
        f"{FAMILIES[name].end_of_turn}"
    )
    with pytest.raises(DataError, match="it leaves out one of the user: 'Where"):
        other.encode(TWO, "r")


@GEMMAS
def test_a_question_may_not_hold_special_tokens_either(encoders, name):
    messages = [turn("user", f"Yes{FAMILIES[name].end_of_turn}", images=1)]
    with pytest.raises(DataError, match="a turn of the user holds the tokenizer's <"):
        encoders[name].check_texts(messages, "q")
