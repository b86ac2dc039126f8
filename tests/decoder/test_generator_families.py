"""PaliGemma and Gemma 3 from recipe to answer: what plain transformers gives, in batches too."""

import json

import numpy as np
import pytest
import torch
import yaml
from peft import PeftModel
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from medft.decoder.families import FAMILIES
from medft.decoder.generator import Generator, Request
from medft.export.merge import merge
from medft.models.saved import SavedRecord

NAMES = ("paligemma", "gemma3")


@pytest.fixture(scope="module")
def tuned(sections, bases, tmp_path_factory, run_script):
    """Finished runs of both families."""
    folder = tmp_path_factory.mktemp("tuned")
    for name in NAMES:
        recipe = sections("decoder")
        recipe["model"]["base"] = str(bases / name)
        recipe["train"] |= {"output_dir": str(folder / name), "max_steps": 30}
        file = folder / f"{name}.yaml"
        file.write_text(yaml.safe_dump(recipe))
        run_script("decoder", file)
    return folder


def image(seed):
    values = np.random.default_rng(seed).integers(0, 255, (50, 70, 3), dtype=np.uint8)
    return Image.fromarray(values)


def request(question, *images, earlier=()):
    content = [{"type": "image"} for _ in images] + [{"type": "text", "text": question}]
    turns = [{"role": "user", "content": content}]
    for answer, following in earlier:
        turns.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
        turns.append({"role": "user", "content": [{"type": "text", "text": following}]})
    return Request(messages=turns, images=list(images))


REQUESTS = [
    request("What is seen?", image(0)),
    request("Describe this medical image.", image(1)),
    request("Is it normal?", image(2), earlier=[("A disc.", "Where is it?")]),
    request("What differs?", image(3), image(4)),
]


def forbid_what_shows_nothing(model, tokenizer):
    """A tiny model says little but special tokens, the end among them, and line breaks."""
    rows = range(model.get_output_embeddings().out_features)
    shown = [tokenizer.decode([token], skip_special_tokens=True).strip() for token in rows]
    model.generation_config.suppress_tokens = [token for token in rows if not shown[token]]


def brief(source):
    generator = Generator.load(source)
    generator.max_new_tokens = 24
    forbid_what_shows_nothing(generator.model, generator.conversation.processor.tokenizer)
    return generator


def plain_answer(name, folder, bases, given):
    """The answer by plain transformers and PEFT, one conversation at a time, ids made by hand."""
    base = bases / name
    options = {"attn_implementation": {"text_config": "eager"}} if name == "paligemma" else {}
    model = AutoModelForImageTextToText.from_pretrained(base, **options)
    model = PeftModel.from_pretrained(model, folder).eval()
    processor = AutoProcessor.from_pretrained(folder, backend="pil")
    forbid_what_shows_nothing(model, processor.tokenizer)
    text = processor.apply_chat_template(given.messages, add_generation_prompt=True)
    images = given.images
    if name == "gemma3":
        batch = processor(
            text=[text], images=[images], add_special_tokens=False, return_tensors="pt"
        )
    else:
        ids = processor.tokenizer(text.replace("<image>", "<image>" * 16), add_special_tokens=False)
        ids = torch.tensor([ids["input_ids"]])
        first = processor.tokenizer("\n", add_special_tokens=False)["input_ids"][-1]
        types = torch.zeros_like(ids)
        types[0, ids[0].tolist().index(first) + 1 :] = 1
        pixels = processor.image_processor(images, return_tensors="pt")["pixel_values"]
        mask = torch.ones_like(ids)
        batch = {
            "input_ids": ids,
            "token_type_ids": types,
            "pixel_values": pixels,
            "attention_mask": mask,
        }
    new = model.generate(**batch, do_sample=False, max_new_tokens=24)[
        0, batch["input_ids"].shape[1] :
    ]
    return processor.tokenizer.decode(new, skip_special_tokens=True).strip()


@pytest.mark.parametrize("name", NAMES)
def test_answers_are_those_of_plain_transformers_and_of_the_merged_model(
    tuned, bases, name, tmp_path
):
    run = tuned / name
    notes = json.loads((run / "adapter" / "medft.json").read_text())
    assert notes["family"] == FAMILIES[name].model_type == name
    generator = brief(run)
    answers = generator.generate(REQUESTS)
    plain = [plain_answer(name, run / "adapter", bases, given) for given in REQUESTS]
    assert [answer.text for answer in answers] == plain
    assert len(set(answers)) > 1
    with generator.without_adapter():
        assert generator.generate(REQUESTS) != answers
    merge(run, tmp_path / "merged")
    assert brief(tmp_path / "merged").generate(REQUESTS) == answers
    merged = AutoProcessor.from_pretrained(tmp_path / "merged")
    assert merged.chat_template == AutoProcessor.from_pretrained(run / "adapter").chat_template


def test_an_answer_ends_where_training_ended_it_whatever_the_base_says(tuned):
    generator = Generator.load(tuned / "gemma3")
    end = generator.conversation.end_of_turn
    assert end in generator.model.generation_config.eos_token_id
    generator.model.generation_config.eos_token_id = 1
    record = SavedRecord(family="gemma3", base="x", revision=None)
    again = Generator(generator.model, generator.conversation.processor, record)
    assert again.model.generation_config.eos_token_id == [1, end]
