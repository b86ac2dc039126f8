"""Labels are the assistant's tokens and nothing else, and images reach the model as released."""

import copy
import io
import json

import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image
from tokenizers import pre_tokenizers
from transformers import AutoProcessor

from medft.decoder.collator import DecoderCollator, check_labels
from medft.decoder.conversation import IGNORED, ConversationEncoder, mark_trained
from medft.decoder.families import FAMILIES, family_of
from medft.decoder.families.mllama import MLLAMA
from medft.errors import BaseModelError, DataError


@pytest.fixture(scope="module")
def processor(bases):
    return AutoProcessor.from_pretrained(bases / "decoder", backend="pil")


@pytest.fixture(scope="module")
def encoder(processor):
    return ConversationEncoder(processor, MLLAMA, max_image_tiles=4)


def turn(role, text, images=0):
    return {
        "role": role,
        "content": [{"type": "image"}] * images + [{"type": "text", "text": text}],
    }


def png(width=70, height=50, seed=0):
    stream = io.BytesIO()
    values = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    Image.fromarray(values).save(stream, format="PNG")
    return {"bytes": stream.getvalue(), "path": None}


def row(messages, *images, name="r"):
    return {"id": name, "messages": json.dumps(messages), "images": list(images)}


ONE = [turn("user", "What is seen?", images=1), turn("assistant", "A disc.")]
TWO = [*ONE, turn("user", "Where?"), turn("assistant", "Left, 3.5 cm.")]
TEXT = [turn("user", "Hello"), turn("assistant", "Yes")]


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        (
            ONE,
            "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\\n\\n<|image|>What is seen?"
            "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\\n\\n>>>A disc.<|eot_id|><<<",
        ),
        (
            TWO,
            "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\\n\\n<|image|>What is seen?"
            "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\\n\\n>>>A disc.<|eot_id|><<<"
            "<|start_header_id|>user<|end_header_id|>\\n\\nWhere?<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\\n\\n>>>Left, 3.5 cm.<|eot_id|><<<",
        ),
        (
            TEXT,
            "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\\n\\n"
            "Today Date: 26 Jul 2024<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\\n\\nHello<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\\n\\n>>>Yes<|eot_id|><<<",
        ),
    ],
)
def test_what_is_trained_decodes_to_the_assistants_words(encoder, messages, expected):
    assert mark_trained(encoder.encode(messages, "r"), encoder, 500) == expected


def test_the_image_token_lies_beyond_the_head_and_is_no_label(processor, encoder):
    # stock TRL copies input_ids into the labels, image token included
    encoded = encoder.encode(ONE, "r")
    assert processor.image_token_id == 512 in encoded.input_ids
    assert max(encoded.labels) < 512


def test_tokens_across_the_end_of_a_prompt_are_refused(processor):
    """GPT-2's pattern reads a line break and the word after it differently at the end of a text."""
    tokenizer = copy.deepcopy(processor.tokenizer)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    other = copy.copy(processor)
    other.tokenizer = tokenizer
    assert len(processor.tokenizer("\n\n", add_special_tokens=False)["input_ids"]) == 1
    with pytest.raises(DataError, match="row r: expected the tokens of the prompt"):
        ConversationEncoder(other, MLLAMA, max_image_tiles=4).encode(ONE, "r")


def test_a_conversation_that_the_template_refuses_names_the_row(encoder):
    with pytest.raises(DataError, match="row r7: the base's chat template refuses"):
        encoder.encode([turn("system", "Be brief."), *ONE], "r7")


def make(encoder, **options):
    options = {"max_length": 200, "vocab_size": 512, "isolates_rows": False, **options}
    return DecoderCollator(encoder, **options)


def stacked(batch, *counts):
    """The batch as stock code takes it; rows have these numbers of images."""
    images = iter(batch.pop("images"))
    rows = [[next(images) for _ in range(count)] for count in counts]
    return {**batch, **MLLAMA.stack_images(rows)}


def test_a_batch_is_what_the_processor_makes_with_labels_beside_it(processor, encoder):
    image = png()
    batch = stacked(make(encoder)([row(ONE, image), row(TWO, image)]), 1, 1)
    texts = [processor.apply_chat_template(messages) for messages in (ONE, TWO)]
    image = Image.open(io.BytesIO(image["bytes"]))
    expected = processor(
        images=[[image], [image]], text=texts, add_special_tokens=False, padding=True,
        return_tensors="pt",
    )  # fmt: skip
    assert batch.pop("row_ids") == ["r", "r"]
    assert batch.keys() == {*expected.keys(), "labels"}
    for name, tensor in expected.items():
        assert torch.equal(batch[name], tensor), name
    trained = batch["labels"] != IGNORED
    assert torch.equal(batch["labels"][trained], batch["input_ids"][trained])
    assert not trained[batch["attention_mask"] == 0].any()
    assert trained.sum(dim=1).tolist() == [
        sum(label != IGNORED for label in encoder.encode(m, "r").labels) for m in (ONE, TWO)
    ]
    assert batch["pixel_values"].shape == (2, 1, 4, 3, 56, 56)
    assert batch["cross_attention_mask"].shape == (2, batch["input_ids"].shape[1], 1, 4)


def test_a_batch_without_images_has_no_image_tensors(encoder):
    batch = make(encoder)([row(TEXT)])
    assert batch.pop("images") == []
    assert batch.keys() == {"input_ids", "attention_mask", "labels", "row_ids"}


@pytest.mark.parametrize("pad", [None, "<|eot_id|>"])
def test_a_tokenizer_without_a_padding_token_of_its_own_still_trains_the_end(processor, pad):
    other = copy.copy(processor)
    other.tokenizer = copy.deepcopy(processor.tokenizer)
    other.tokenizer.pad_token = pad
    encoder = ConversationEncoder(other, MLLAMA, max_image_tiles=4)
    batch = make(encoder)([row(TEXT), row([turn("user", "Hello there"), *TEXT[1:]])])
    end = other.tokenizer.convert_tokens_to_ids("<|eot_id|>")
    assert (batch["labels"] == end).sum(dim=1).tolist() == [1, 1]
    assert (batch["labels"][batch["attention_mask"] == 0] == IGNORED).all()


def test_mixed_image_counts_share_a_batch_only_where_rows_are_separate(encoder):
    rows = [row(ONE, png()), row(TEXT)]
    with pytest.raises(DataError, match=r"equally many images in a batch, got \[0, 1\]"):
        make(encoder)(rows)
    batch = make(encoder, isolates_rows=True)(rows)
    alone = make(encoder)(rows[:1])
    assert len(batch["images"]) == 1
    length = alone["input_ids"].shape[1]
    assert torch.equal(batch["cross_attention_mask"][:1, :length], alone["cross_attention_mask"])
    assert batch["cross_attention_mask"][1].sum() == 0


def test_only_answers_are_cut(encoder):
    whole = encoder.encode(ONE, "r")
    length = whole.prompt_length + 2
    batch = make(encoder, max_length=length)([row(ONE, png())])
    assert batch["input_ids"][0].tolist() == whole.input_ids[:length]
    assert (batch["labels"] != IGNORED).sum() == 2


def test_labels_are_checked_in_every_batch():
    fine = torch.tensor([[IGNORED, 3], [5, IGNORED]])
    check_labels(fine, 6, frozenset({4}), ["a", "b"])
    with pytest.raises(DataError, match="row b: expected labels below 5"):
        check_labels(fine, 5, frozenset(), ["a", "b"])
    with pytest.raises(DataError, match=r"row a: .* no image token among the labels, got 3"):
        check_labels(fine, 6, frozenset({3}), ["a", "b"])
    with pytest.raises(DataError, match="row b: expected at least one token"):
        check_labels(torch.tensor([[1], [IGNORED]]), 6, frozenset(), ["a", "b"])


def test_an_unreadable_image_names_the_row(encoder):
    with pytest.raises(DataError, match="row r9: expected a complete image"):
        make(encoder)([row(ONE, {"bytes": b"no image", "path": None}, name="r9")])


# one arrangement of tiles is kept where it is small enough, else the best smaller one is taken
@pytest.mark.parametrize(
    ("size", "limit", "tiles"),
    [((112, 112), 4, 4), ((112, 112), 2, 1), ((112, 112), 1, 1), ((50, 50), 1, 1),
     ((56, 300), 4, 4), ((56, 300), 3, 3), ((300, 56), 2, 2), ((1000, 30), 1, 1)],
)  # fmt: skip
def test_fewer_tiles_keep_the_ids_and_the_padding_of_the_base(encoder, size, limit, tiles):
    encoder = ConversationEncoder(encoder.processor, MLLAMA, max_image_tiles=limit)
    batch = stacked(make(encoder)([row(ONE, png(*size))]), 1)
    assert batch["pixel_values"].shape[2] == 4
    assert batch["aspect_ratio_mask"].sum() == tiles
    assert batch["cross_attention_mask"].amax(dim=(1, 2)).sum() == tiles
    arrangements = [(1, 1), (1, 2), (1, 3), (1, 4), (2, 1), (2, 2), (3, 1), (4, 1)]
    chosen = arrangements[int(batch["aspect_ratio_ids"]) - 1]
    assert chosen[0] * chosen[1] == tiles
    assert batch["pixel_values"][0, 0, tiles:].abs().sum() == 0
    assert batch["pixel_values"][0, 0, :tiles].abs().amax(dim=(1, 2, 3)).min() > 0


def test_families_are_known_by_model_type():
    assert family_of("mllama") is MLLAMA
    with pytest.raises(BaseModelError, match=rf"known family \({', '.join(FAMILIES)}\)"):
        family_of("llava")
    with pytest.raises(BaseModelError, match=r"siglip_lora\.py"):
        family_of("siglip")


def test_rows_of_a_dataset_collate_like_plain_rows(encoder):
    rows = [row(ONE, png()), row(TWO, png(seed=2))]
    from_dataset = Dataset.from_list(rows)
    left, right = make(encoder)(rows), make(encoder)([from_dataset[0], from_dataset[1]])
    assert left.pop("row_ids") == right.pop("row_ids")
    left, right = stacked(left, 1, 1), stacked(right, 1, 1)
    assert all(torch.equal(left[name], right[name]) for name in left)
