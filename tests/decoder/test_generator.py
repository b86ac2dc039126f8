"""Answers of a trained Mllama are those of plain transformers and PEFT."""

import json
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from medft.decoder.generator import Answer, Generator, Request
from medft.errors import RunError
from medft.export.merge import merge


def request(name, prompt="Describe this medical image.", count=1):
    images = [Image.open(name).convert("RGB")] * count
    content = [*({"type": "image"} for _ in images), {"type": "text", "text": prompt}]
    return Request(messages=[{"role": "user", "content": content}], images=images)


@pytest.fixture(scope="module")
def generator(runs):
    return talkative(Generator.load(runs / "decoder"))


def talkative(generator):
    """A barely trained model says little but special tokens; they are forbidden, also the end."""
    special = generator.conversation.processor.tokenizer.get_added_vocab().values()
    generator.model.generation_config.suppress_tokens = sorted(i for i in special if i < 512)
    generator.max_new_tokens = 12
    return generator


def test_an_answer_is_that_of_plain_transformers_and_peft(generator, runs, bases, images):
    base = AutoModelForImageTextToText.from_pretrained(bases / "decoder")
    model = PeftModel.from_pretrained(base, runs / "decoder" / "adapter").eval()
    processor = AutoProcessor.from_pretrained(bases / "decoder", backend="pil")
    asked = request(images[0])
    text = processor.apply_chat_template(asked.messages, add_generation_prompt=True)
    batch = processor(
        images=[asked.images], text=[text], add_special_tokens=False, return_tensors="pt"
    )
    forbidden = generator.model.generation_config.suppress_tokens
    tokens = model.generate(**batch, do_sample=False, max_new_tokens=12, suppress_tokens=forbidden)
    plain = processor.decode(tokens[0, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    assert generator.generate([asked]) == [Answer(plain.strip(), truncated=True)]
    with generator.without_adapter():
        assert generator.generate([asked])[0].text != plain.strip()


@pytest.mark.gpu
def test_answers_on_a_gpu_are_those_on_the_cpu(runs, images):
    made = talkative(Generator.load(runs / "decoder"))
    asked = [request(image) for image in images[:5]]
    assert made.model.device.type == "cuda"
    with made.without_adapter():
        answers = made.generate(asked)
        made.model.to("cpu")
        assert answers == made.generate(asked)
    assert all(answer.text for answer in answers)


def test_an_adapter_on_single_tokens_answers(runs, bases, images, tmp_path):
    adapter = shutil.copytree(runs / "decoder" / "adapter", tmp_path / "adapter")
    base = AutoModelForImageTextToText.from_pretrained(bases / "decoder")
    config = LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[5])
    adapted = get_peft_model(base, config)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.ones_(parameter)
    adapted.save_pretrained(adapter)
    notes = json.loads((adapter / "medft.json").read_text())
    (adapter / "medft.json").write_text(json.dumps({**notes, "weights": None}))
    generator = talkative(Generator.load(adapter))
    [answer] = generator.generate([request(images[0])])
    with generator.without_adapter():
        assert generator.generate([request(images[0])]) != [answer]


def test_neighbours_do_not_change_an_answer_and_the_order_is_kept(generator, images):
    asked = [
        request(images[0]),
        request(images[1], "What?"),
        request(images[2], count=2),
        request(images[3], "Describe the level and side of what you see in this image."),
        request(images[4], count=2),
    ]
    with generator.without_adapter():  # which says more than the barely trained model
        together = generator.generate(asked)
        assert together == [generator.generate([one])[0] for one in asked]
    assert len(set(together)) == len(asked), together


def test_a_quantized_run_is_loaded_quantized_and_a_merged_model_answers(
    runs, images, tmp_path, generator
):
    nf4 = Generator.load(runs / "nf4")
    kinds = {type(module).__name__ for module in nf4.model.modules()}
    assert "Linear4bit" in kinds
    assert "Linear4bit" not in {type(module).__name__ for module in generator.model.modules()}
    merge(runs / "decoder", tmp_path / "merged")
    merged = talkative(Generator.load(tmp_path / "merged"))
    assert merged.generate([request(images[0])]) == generator.generate([request(images[0])])
    with pytest.raises(RunError, match="expected an adapter"), merged.without_adapter():
        pass
