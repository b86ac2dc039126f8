"""Inference equals plain transformers and PEFT, alone and in a batch; nearest cases are nearest."""

import json
import shutil

import numpy as np
import pytest
import torch
from peft import PeftModel
from PIL import Image
from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor

from medft.data.chat import first_texts, load_rows, messages_of
from medft.data.images import open_image
from medft.errors import BaseModelError, RunError
from medft.export.merge import merge
from medft.files import file_sha256
from medft.inference.predictor import CaseIndex, Predictor
from medft.siglip.model import resize_positions
from medft.trained import Encoder, Generator, Request


def request(name, prompt="Describe this medical image.", count=1):
    images = [Image.open(name).convert("RGB")] * count
    content = [*({"type": "image"} for _ in images), {"type": "text", "text": prompt}]
    return Request(messages=[{"role": "user", "content": content}], images=images)


@pytest.fixture(scope="module")
def pictures(data):
    return sorted((data / "raw" / "knee" / "images").glob("0*.png"))


@pytest.fixture(scope="module")
def generator(runs):
    return talkative(Generator.load(runs / "decoder"))


def talkative(generator):
    """A barely trained model says little but special tokens; they are forbidden, also the end."""
    special = generator.encoder.processor.tokenizer.get_added_vocab().values()
    generator.model.generation_config.suppress_tokens = sorted(i for i in special if i < 512)
    generator.max_new_tokens = 12
    return generator


@pytest.fixture(scope="module")
def encoder(runs):
    return Encoder.load(runs / "siglip")


def test_an_answer_is_that_of_plain_transformers_and_peft(generator, runs, bases, pictures):
    base = AutoModelForImageTextToText.from_pretrained(bases / "decoder")
    model = PeftModel.from_pretrained(base, runs / "decoder" / "adapter").eval()
    processor = AutoProcessor.from_pretrained(bases / "decoder", backend="pil")
    asked = request(pictures[0])
    text = processor.apply_chat_template(asked.messages, add_generation_prompt=True)
    batch = processor(
        images=[asked.images], text=[text], add_special_tokens=False, return_tensors="pt"
    )
    forbidden = generator.model.generation_config.suppress_tokens
    tokens = model.generate(**batch, do_sample=False, max_new_tokens=12, suppress_tokens=forbidden)
    plain = processor.decode(tokens[0, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    assert generator.generate([asked]) == [plain.strip()]
    with generator.without_adapter():
        assert generator.generate([asked]) != [plain.strip()]


def test_neighbours_do_not_change_an_answer_and_the_order_is_kept(generator, pictures):
    asked = [
        request(pictures[0]),
        request(pictures[1], "What?"),
        request(pictures[2], count=2),
        request(pictures[3], "Describe the level and side of what you see in this image."),
        request(pictures[4], count=2),
    ]
    with generator.without_adapter():  # which says more than the barely trained model
        together = generator.generate(asked)
        assert together == [generator.generate([one])[0] for one in asked]
    assert len(set(together)) == len(asked), together


def test_a_quantised_run_is_loaded_quantised_and_a_merged_model_answers(
    runs, pictures, tmp_path, generator
):
    nf4 = Generator.load(runs / "nf4")
    kinds = {type(module).__name__ for module in nf4.model.modules()}
    assert "Linear4bit" in kinds
    assert "Linear4bit" not in {type(module).__name__ for module in generator.model.modules()}
    merge(runs / "decoder", tmp_path / "merged")
    merged = talkative(Generator.load(tmp_path / "merged"))
    assert merged.generate([request(pictures[0])]) == generator.generate([request(pictures[0])])
    with pytest.raises(RunError, match="expected an adapter"):
        merged.without_adapter()


def test_embeddings_are_those_of_plain_transformers(encoder, runs, bases, pictures):
    base = AutoModel.from_pretrained(bases / "siglip")
    resize_positions(base, 84)
    model = PeftModel.from_pretrained(base, runs / "siglip" / "adapter").eval()
    processor = AutoProcessor.from_pretrained(runs / "siglip" / "adapter", backend="pil")
    images = [Image.open(path).convert("RGB") for path in pictures[:11]]
    texts = ["Normal knee radiograph.", "one cyst"]
    batch = processor(images=images, text=texts, padding="max_length", return_tensors="pt")
    with torch.no_grad():
        outputs = model(input_ids=batch["input_ids"], pixel_values=batch["pixel_values"])
    # float32 sums over other batch sizes: a few roundings of 6e-8
    assert np.allclose(encoder.embed_images(images), outputs.image_embeds.numpy(), atol=2e-6)
    assert np.allclose(encoder.embed_texts(texts), outputs.text_embeds.numpy(), atol=2e-6)
    with encoder.without_adapter():
        base_rows = encoder.embed_images(images)
    assert np.abs(base_rows - outputs.image_embeds.numpy()).max() > 1e-3


def test_nearest_cases_are_those_of_comparing_all(encoder, runs, data):
    index = CaseIndex.of_run(runs / "siglip", encoder)
    rows = load_rows(data / "chat" / "train.jsonl", split="train")
    images = [open_image(data / "chat" / row["images"][0]["path"]) for row in rows]
    own = encoder.embed_images(images)
    for place in (0, 5):
        cases = index.nearest(own[place])
        assert cases[0].id == rows[place]["id"]
        assert cases[0].similarity == pytest.approx(1, abs=1e-4)
        order = np.argsort(-(own @ own[place]), kind="stable")[:5]
        assert [case.id for case in cases] == [rows[int(i)]["id"] for i in order]


def test_the_index_is_kept_and_made_anew_for_other_weights(encoder, runs, tmp_path):
    run = tmp_path / "siglip"
    shutil.copytree(runs / "siglip", run)
    CaseIndex.of_run(run, encoder)
    first = (run / "index.npz").read_bytes()
    CaseIndex.of_run(run, encoder)
    assert (run / "index.npz").read_bytes() == first
    (run / "index.npz").write_bytes(first[:500])  # torn
    CaseIndex.of_run(run, encoder)
    assert (run / "index.npz").read_bytes() == first
    weights = run / "adapter" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes() + b" ")
    CaseIndex.of_run(run, encoder)
    assert (run / "index.npz").read_bytes() != first


def test_changed_training_data_is_an_error(encoder, runs, tmp_path):
    run = tmp_path / "siglip"
    shutil.copytree(runs / "siglip", run)
    record = json.loads((run / "run.json").read_text())
    record["data"]["train"]["sha256"] = "0" * 64
    (run / "run.json").write_text(json.dumps(record))
    with pytest.raises(RunError, match="training data"):
        CaseIndex.of_run(run, encoder)


def test_three_lines_give_a_report_an_embedding_and_cases(runs, pictures):
    predictor = Predictor.load(runs / "decoder", siglip=runs / "siglip")
    prediction = predictor.predict(str(pictures[0]))
    assert prediction.text == predictor.generator.generate([request(pictures[0])])[0]
    assert prediction.embedding.shape == (64,)
    assert np.linalg.norm(prediction.embedding) == pytest.approx(1, abs=1e-5)
    assert len(prediction.nearest) == 5
    alone = Predictor.load(runs / "siglip").predict(pictures[0])
    assert alone.text is None
    assert [case.id for case in alone.nearest] == [case.id for case in prediction.nearest]
    with pytest.raises(BaseModelError, match="expected a decoder"):
        Predictor.load(runs / "siglip", siglip=runs / "siglip")


def test_captions_are_made_as_in_training(runs, data, tmp_path):
    row = load_rows(data / "chat" / "train.jsonl", split="train")[0]
    texts = first_texts(messages_of(row))
    assert Encoder.load(runs / "siglip").caption_of(row) == texts["answer"]
    adapter = tmp_path / "adapter"
    shutil.copytree(runs / "siglip" / "adapter", adapter)
    notes = json.loads((adapter / "medft.json").read_text())
    (adapter / "medft.json").write_text(json.dumps({**notes, "caption": "{question} {answer}"}))
    expected = f"{texts['question']} {texts['answer']}"
    assert Encoder.load(adapter).caption_of(row) == expected


def test_an_adapter_without_notes_is_refused_with_a_sentence(runs, tmp_path):
    adapter = tmp_path / "adapter"
    shutil.copytree(runs / "decoder" / "adapter", adapter)
    (adapter / "medft.json").unlink()
    with pytest.raises(BaseModelError, match=r"expected medft\.json"):
        Generator.load(adapter)


def test_rows_with_the_same_id_keep_their_texts(encoder, runs, data, tmp_path):
    run = tmp_path / "siglip"
    shutil.copytree(runs / "siglip", run)
    rows = [json.loads(x) for x in (data / "chat" / "train.jsonl").read_text().splitlines()[:4]]
    for number, row in enumerate(rows):
        row["id"] = "7"
        row["images"] = [str(data / "chat" / name) for name in row["images"]]
        row["messages"][1]["content"] = f"text {number}"
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    record = json.loads((run / "run.json").read_text())
    record["data"]["train"] = {"path": str(file), "sha256": file_sha256(file)}
    (run / "run.json").write_text(json.dumps(record))
    index = CaseIndex.of_run(run, encoder)
    for number, row in enumerate(rows):
        [own] = encoder.embed_images([open_image(row["images"][0])])
        assert index.nearest(own)[0].text == f"text {number}"
    assert len({case.id for case in index.nearest(own)}) == 4
