"""A decoder is asked what it was trained on, in the same conversation, up to the same length."""

import json
import math
import shutil

import pytest

from medft.data.rows import load_rows
from medft.decoder.generator import Answer, Generator, Request
from medft.errors import RunError
from medft.inference.files import predict_files
from medft.inference.predictor import Predictor, open_image_file
from medft.inference.prompts import conversation_for, prompt_for
from medft.models.saved import SavedRecord

DECLARED = ["Describe this medical image.", "What does the image show?"]


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def changed_copy(run, folder, **changes):
    """A copy of a run's adapter whose record is changed."""
    shutil.copytree(run / "adapter", folder)
    file = folder / "medft.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    return folder


def test_a_finished_run_knows_its_prompts_and_its_longest_answer(runs, data):
    trained = Generator.load(runs / "decoder")
    record = SavedRecord.read(runs / "decoder" / "adapter")
    assert record.prompts == DECLARED
    assert record.system is None
    tokenizer = trained.conversation.processor.tokenizer
    answers = [
        json.loads(messages)[-1]["content"][0]["text"]
        for messages in load_rows(data / "chat" / "train.jsonl", split="train")["messages"]
    ]
    lengths = [len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in answers]
    assert record.longest_answer == max(lengths) + 1  # the end of the turn
    assert trained.max_new_tokens == math.ceil(1.5 * record.longest_answer)
    assert SavedRecord.read(runs / "siglip" / "adapter").longest_answer is None


def test_predict_asks_a_trained_prompt_and_says_which(runs, images, tmp_path, caplog):
    run = changed_copy(runs / "decoder", tmp_path / "a", prompts=["Report the {side} knee.", "So?"])
    table = tmp_path / "t.csv"
    table.write_text(f"image,side,question\n{images[1]},left,\n{images[2]},left,Why?\n")
    with caplog.at_level("INFO"):
        predict_files(run, [images[0]], tmp_path / "one.jsonl")
    assert "prompt: So?" in caplog.messages
    predict_files(run, [images[0], table], tmp_path / "out.jsonl")
    asked = [row["prompt"] for row in read(tmp_path / "out.jsonl")]
    assert asked == ["So?", "Report the left knee.", "Why?"]
    predict_files(run, [images[0]], tmp_path / "given.jsonl", prompt="Given?")
    assert [row["prompt"] for row in read(tmp_path / "given.jsonl")] == ["Given?"]


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        (None, "the model has none that its training rows declared"),
        (["The {side} knee."], r"fill one of the model's \(The \{side\} knee\.\), got images"),
    ],
)
def test_a_prompt_is_wanted_where_none_was_declared(runs, images, tmp_path, prompts, message):
    run = changed_copy(runs / "decoder", tmp_path / "a", prompts=prompts)
    with pytest.raises(RunError, match=message):
        predict_files(run, [images[0]], tmp_path / "out.jsonl")
    assert not (tmp_path / "out.jsonl").exists()
    with pytest.raises(RunError, match=message):
        Predictor.load(run).predict(images[0])


def test_a_siglip_is_asked_nothing(runs, images, tmp_path):
    for options in ({"prompt": "What?"}, {"max_new_tokens": 3}):
        with pytest.raises(RunError, match="expected a decoder to ask"):
            predict_files(runs / "siglip", images[:1], tmp_path / "out.jsonl", **options)


def test_the_system_turn_of_training_comes_first(runs, images):
    predictor = Predictor.load(runs / "decoder")
    assert predictor.predict(images[0]).text == predictor.predict(images[0], DECLARED[0]).text
    record = predictor.generator.record
    predictor.generator.record = record.model_copy(update={"system": "You read knees."})
    seen = []
    predictor.generator.generate = lambda requests: seen.extend(requests) or [Answer("", True)]
    predictor.predict(images[0])
    system, user = seen[0].messages
    content = [{"type": "text", "text": "You read knees."}]
    assert system == {"role": "system", "content": content}
    assert [user] == conversation_for(DECLARED[0], record)


def test_answers_that_meet_the_bound_are_marked_counted_and_generated_anew(
    runs, images, tmp_path, medft, capsys
):
    out = tmp_path / "out.csv"
    words = ("predict", runs / "decoder", *images[:3], "--out", out, "--max-new-tokens")
    assert medft(*words, 1) == 0
    assert "3 truncated" in capsys.readouterr().out
    assert out.read_text().count(",True,") == 3
    assert medft("predict", runs / "decoder", *images[:3], "--out", out) == 0
    assert "0 written" in capsys.readouterr().out
    assert medft(*words, 2) == 0
    assert "3 written" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        medft(*words, 0)
    assert "expected a whole number from 1 on, got 0" in capsys.readouterr().err


def test_an_answer_that_ends_at_the_bound_is_not_truncated(runs, images):
    generator = Generator.load(runs / "decoder")
    turns = conversation_for(prompt_for(generator.record), generator.record)
    request = Request(messages=turns, images=[open_image_file(images[0])])
    generator.max_new_tokens = 300
    [whole] = generator.generate([request])
    model, conversation = generator.model, generator.conversation
    special = sorted(model.generation_config.eos_token_id)
    generator.max_new_tokens = 4
    model.generation_config.suppress_tokens = special
    [cut] = generator.generate([request])
    assert cut.truncated
    bias = {(conversation.end_of_turn,): 1e9}
    model.generation_config.suppress_tokens = None
    model.generation_config.sequence_bias = bias
    generator.max_new_tokens = 1
    assert generator.generate([request]) == [Answer("", truncated=False)]
    assert isinstance(whole.text, str)
