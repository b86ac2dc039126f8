"""What a step computes, for every family: against plain transformers with inputs made by hand."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from families import BASES, FAMILY
from peft import LoraConfig, get_peft_model
from PIL import Image
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForImageTextToText, AutoProcessor

from medft.decoder.families import FAMILIES

# Three rows of two images: one turn, two turns, two turns; what is trained stands apart.
CONVERSATIONS = [
    [("What is seen?", "A disc.")],
    [("What is seen?", "Two small red discs."), ("Where?", "Left, 3.5 cm.")],
    [("Describe this medical image.", "No effusion."), ("Is it normal?", "Yes")],
]


@pytest.fixture
def trainer(sections, write_recipe, bases, tmp_path, build_trainer):
    """A trainer of a family on CONVERSATIONS, its adapter away from zero."""

    def make(family, changes=(), rows=None, **train):
        recipe = sections("decoder")
        recipe["model"]["base"] = str(bases / BASES[family])
        recipe["data"] |= {"train": str(rows or write_rows(tmp_path)), "validation": None}
        recipe["lora"]["dropout"] = 0.0
        recipe["train"] |= {"max_steps": 1, "save_strategy": "no", **train}
        return build_trainer(write_recipe(recipe), changes, is_fresh=False)

    return make


def drawn_images():
    return [
        [
            Image.fromarray(
                np.random.default_rng(2 * row + i).integers(0, 255, (50, 70 + 60 * i, 3), np.uint8)
            )
            for i in range(2)
        ]
        for row in range(3)
    ]


def write_rows(folder):
    lines = []
    for row, (turns, images) in enumerate(zip(CONVERSATIONS, drawn_images(), strict=True)):
        names = [f"{row}_{index}.png" for index in range(len(images))]
        for name, image in zip(names, images, strict=True):
            image.save(folder / name)
        messages = []
        for question, answer in turns:
            parts = [{"type": "text", "text": question}]
            messages.append({"role": "user", "content": parts})
            messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
        messages[0]["content"][:0] = [{"type": "image"}] * 2
        lines.append({"id": f"r{row}", "images": names, "messages": messages})
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def pieces(family, turns):
    """A conversation as text, cut where training begins and ends: [(text, trained)]."""
    made = []
    for index, (question, answer) in enumerate(turns):
        first = index == 0
        if family == "mllama":
            begin = "<|begin_of_text|>" if first else ""
            images = "<|image|><|image|>" if first else ""
            prompt = (
                f"{begin}<|start_header_id|>user<|end_header_id|>\n\n{images}{question}<|eot_id|>"
                "<|start_header_id|>assistant<|end_header_id|>\n\n"
            )
            end = "<|eot_id|>"
        elif family == "paligemma":
            prompt = ("<image>" * 32 + "<bos>" if first else "") + f"{question}\n"
            end = "<eos>"
        elif family == "gemma3":
            image = "\n\n<start_of_image>" + "<image_soft_token>" * 4 + "<end_of_image>\n\n"
            prompt = (
                ("<bos>" if first else "\n")
                + f"<start_of_turn>user\n{image * 2 if first else ''}{question}<end_of_turn>\n"
                "<start_of_turn>model\n"
            )
            end = "<end_of_turn>"
        else:
            raise NotImplementedError(family)
        made += [(prompt, False), (answer + end, True)]
    return [*made, ("\n", False)] if family == "gemma3" else made


def by_hand(family, bases):
    """Inputs and labels of the three rows, with nothing of medft in them."""
    processor = AutoProcessor.from_pretrained(bases / BASES[family], backend="pil")
    rows, labels, first_answer = [], [], []
    for turns in CONVERSATIONS:
        ids, wanted = [], []
        for text, trained in pieces(family, turns):
            tokens = processor.tokenizer(text, add_special_tokens=False)["input_ids"]
            ids += tokens
            wanted += tokens if trained else [-100] * len(tokens)
        rows.append(torch.tensor(ids))
        labels.append(torch.tensor(wanted))
        first_answer.append(next(i for i, label in enumerate(wanted) if label != -100))
    pad = processor.tokenizer.pad_token_id
    ids = pad_sequence(rows, batch_first=True, padding_value=pad)
    positions = torch.arange(ids.shape[1])[None]
    batch = {
        "input_ids": ids,
        "attention_mask": (positions < torch.tensor([[len(row)] for row in rows])).long(),
    }
    if family == "mllama":
        seen = processor.image_processor(drawn_images(), return_tensors="pt")
        tiles = seen.pop("num_tiles")
        mask = torch.zeros(3, ids.shape[1], 2, 4, dtype=torch.long)
        for row in range(3):
            at = (ids[row] == 512).nonzero().flatten().tolist()
            for image, position in enumerate(at):
                mask[row, position:, image, : tiles[row][image]] = 1
        batch |= {**seen, "cross_attention_mask": mask}
    else:
        flat = [image for row in drawn_images() for image in row]
        batch["pixel_values"] = processor.image_processor(flat, return_tensors="pt")["pixel_values"]
        if family == "paligemma":
            batch["token_type_ids"] = (positions >= torch.tensor(first_answer)[:, None]).long()
        elif family == "gemma3":
            image_token = processor.tokenizer.convert_tokens_to_ids("<image_soft_token>")
            batch["token_type_ids"] = (ids == image_token).long()
    return batch, pad_sequence(labels, batch_first=True, padding_value=-100)


def plain_model(family, bases, trained):
    """The base by plain transformers with the trainer's adapter by plain PEFT."""
    options = {"attn_implementation": {"text_config": "eager"}} if family == "paligemma" else {}
    model = AutoModelForImageTextToText.from_pretrained(bases / BASES[family], **options)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=FAMILIES[family].presets["language"])
    model = get_peft_model(model, config)
    weights = {n: p for n, p in trained.model.named_parameters() if "lora_" in n}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(weights.pop(name))
    assert not weights
    return model


def plain_loss(model, batch, labels):
    base = model.get_base_model()
    logits = base.lm_head(base.model(**batch).last_hidden_state)
    cap = getattr(base.config.get_text_config(), "final_logit_softcapping", None)
    if cap:  # PaliGemma 2's own forward leaves it out before transformers 5.23
        logits = cap * torch.tanh(logits / cap)
    return functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


@FAMILY
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_step_0_is_that_of_plain_transformers(trainer, bases, family, dtype):
    trained = trainer(family)
    trained.model.to(dtype)
    inputs = trained.to_device(trained.data_collator(list(trained.train_dataset)))
    if dtype == torch.float32:
        loss = trained.compute_loss(trained.model, inputs)
    else:  # TRL's head works in fp32: here the inputs and the model
        inputs["images"] = [
            replace(image, pixel_values=image.pixel_values.double()) for image in inputs["images"]
        ]
        loss = plain_loss(trained.model, inputs, inputs.pop("labels"))
    loss.backward()

    batch, labels = by_hand(family, bases)
    batch = {k: v.to(dtype) if v.is_floating_point() else v for k, v in batch.items()}
    plain = plain_model(family, bases, trained).to(dtype)
    expected = plain_loss(plain, batch, labels)
    expected.backward()
    gradients = {n: p.grad for n, p in trained.model.named_parameters() if p.requires_grad}
    gaps = {
        name: float((gradients[name] - p.grad).norm() / p.grad.norm())
        for name, p in plain.named_parameters()
        if p.requires_grad
    }
    # fp32 sums in another order (5e-7 was seen); fp64 leaves no room for another token or mask
    in_loss, in_gradient = (1e-5, 1e-4) if dtype == torch.float32 else (1e-9, 1e-9)
    assert loss.item() == pytest.approx(expected.item(), rel=in_loss)
    assert max(gaps.values()) < in_gradient
    wrong = labels.clone()
    wrong[0, (labels[0] >= 0).nonzero()[-1]] = -100  # without the end of one turn
    assert abs(plain_loss(plain, batch, wrong).item() - loss.item()) > 1e-3


def trajectory(made):
    """Loss and gradient norm of every step [steps, 2]."""
    made.train()
    log = [entry for entry in made.state.log_history if "loss" in entry]
    return np.array([[entry["loss"], entry["grad_norm"]] for entry in log])


@pytest.mark.parametrize(
    "family",
    [
        pytest.param("mllama", marks=pytest.mark.slow),
        pytest.param("paligemma", marks=pytest.mark.proof),
        pytest.param("gemma3", marks=pytest.mark.proof),
    ],
)
def test_accumulation_and_checkpointing_change_nothing_in_20_steps(trainer, data, family):
    # 31 rows: the fourth step of an epoch has seven
    train = {"rows": data / "chat" / "train.jsonl", "max_steps": 20, "learning_rate": 1e-3}
    batches = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}
    whole = trajectory(trainer(family, **train, **batches))
    assert whole.shape == (20, 2)
    recomputed = trajectory(trainer(family, **train, **batches, gradient_checkpointing=True))
    batches = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8}
    accumulated = trajectory(trainer(family, **train, **batches))
    for other in (recomputed, accumulated):
        gap = np.abs(other / whole - 1)
        assert gap.max() < 1e-5  # fp32 sums in another order; 2e-7 was seen, 5e-8 in the mean
    another = trajectory(trainer(family, ["train.seed=18"], **train, **batches))
    assert np.abs(another / whole - 1).mean() > 1e-3
