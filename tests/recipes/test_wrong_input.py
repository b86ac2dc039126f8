"""Wrong input is one clear sentence and exit code 2, by each of the three ways to start a run."""

import json
import re
import runpy
from pathlib import Path

import pytest

from medft.errors import run_command

ROOT = Path(__file__).parent.parent.parent


def script(kind):
    """The main function of a recipe script, as `python recipes/x.py` runs it."""
    name = {"decoder": "decoder_qlora.py", "siglip": "siglip_lora.py"}[kind]
    return runpy.run_path(str(ROOT / "recipes" / name))["main"]


@pytest.fixture
def start(medft):
    """Gives the exit code of `medft check`, `medft train` or the script."""

    def run(way, kind, words):
        return run_command(script(kind), words) if way == "script" else medft(way, *words)

    return run


def lines(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


QUESTION = {"role": "user", "content": "What?"}
ANSWER = {"role": "assistant", "content": "A disc."}


def empty_file(recipe, folder):
    (folder / "empty.jsonl").write_text("")
    recipe["data"]["train"] = str(folder / "empty.jsonl")


def without_messages(recipe, folder):
    recipe["data"]["train"] = lines(folder / "x.jsonl", {"id": "r5", "images": []})


def lost_image(recipe, folder):
    row = {"id": "r6", "images": ["lost.png"], "messages": [QUESTION, ANSWER]}
    recipe["data"]["train"] = lines(folder / "x.jsonl", row)


def occupied(recipe, folder):
    out = Path(recipe["train"]["output_dir"])
    out.mkdir()
    (out / "thesis.tex").write_text("years")


def put(section, key, value):
    def change(recipe, folder):
        recipe.setdefault(section, {})
        recipe[section][key] = value

    return change


BOTH = {
    "misspelled key in model": (put("model", "bse", "x"), "did you mean model.base?"),
    "misspelled key in data": (put("data", "trian", "x"), "did you mean data.train?"),
    "misspelled key in lora": (put("lora", "droput", 0.1), "did you mean lora.dropout?"),
    "misspelled key in train": (put("train", "max_step", 3), "did you mean train.max_steps?"),
    "misspelled section": (put("trian", "a", 1), "did you mean train?"),
    "another tool's key": (put("lora", "lora_rank", 8), "here it is lora.r"),
    "text for a number": (put("train", "learning_rate", "fast"), "a valid number, got 'fast'"),
    "refused field": (put("train", "load_best_model_at_end", True), "best_model/ is written"),
    "precision twice": (put("train", "bf16", True), "precision stands in model.dtype alone"),
    "missing data file": (put("data", "train", "none.jsonl"), "expected a data file at none.jsonl"),
    "missing validation file": (put("data", "validation", "none.jsonl"), "at none.jsonl"),
    "empty data file": (empty_file, "the file is empty"),
    "line without messages": (without_messages, "row r5: expected a list of messages"),
    "lost image": (lost_image, "row r6: expected an image at"),
    "missing base": (put("model", "base", "./no/model"), "'./no/model' is neither"),
    "base not on this machine": (put("model", "base", "some/model"), "HF_HUB_OFFLINE is set"),
    "target that matches nothing": (put("lora", "targets", ["qproj"]), "'qproj' matches none"),
    "occupied output_dir": (occupied, "to be empty"),
    "nothing to resume": (put("train", "resume_from_checkpoint", True), "found none"),
}
CASES = [(kind, name, *case) for kind in ("decoder", "siglip") for name, case in BOTH.items()] + [
    (
        "decoder",
        "misspelled key in quantization",
        put("quantization", "bitts", 4),
        "did you mean quantization.bits?",
    ),
    (
        "siglip",
        "misspelled key in contrastive",
        put("contrastive", "los", "sigmoid"),
        "did you mean contrastive.loss?",
    ),
    ("siglip", "quantized encoder", put("quantization", "bits", 4), "not trained on a 4-bit base"),
]


@pytest.mark.parametrize("way", ["check", "train", "script"])
@pytest.mark.parametrize(
    ("kind", "name", "change", "message"), CASES, ids=[f"{c[0]}-{c[1]}" for c in CASES]
)
def test_wrong_input_is_one_sentence(
    start, sections, write_recipe, tmp_path, capfd, way, kind, name, change, message
):
    recipe = sections(kind)
    if recipe.get("quantization", 0) is None:
        del recipe["quantization"]
    recipe["train"]["output_dir"] = str(tmp_path / "run")
    change(recipe, tmp_path)
    file = write_recipe(recipe)
    before = sorted(path for path in tmp_path.rglob("*"))
    assert start(way, kind, [str(file)]) == 2
    printed = capfd.readouterr().err
    errors = [line for line in printed.splitlines() if line.startswith("medft: error: ")]
    assert len(errors) == 1, printed
    assert message in errors[0]
    assert "Traceback" not in printed
    assert sorted(path for path in tmp_path.rglob("*")) == before


def test_everything_that_is_wrong_is_said_at_once(start, sections, write_recipe, capfd):
    recipe = sections("decoder")
    recipe["data"]["train"] = "none.jsonl"
    recipe["model"]["base"] = "./none"
    file = write_recipe(recipe)
    assert start("check", "decoder", [str(file), "data.validation=lost.jsonl"]) == 2
    errors = [line for line in capfd.readouterr().err.splitlines() if line.startswith("medft:")]
    assert len(errors) == 3
    for line, word in zip(errors, ["none.jsonl", "lost.jsonl", "./none"], strict=True):
        assert word in line


def test_a_good_recipe_is_shown_whole(start, sections, write_recipe, capfd):
    file = write_recipe(sections("decoder"))
    assert start("check", "decoder", [str(file), "train.gradient_accumulation_steps=2"]) == 0
    printed = capfd.readouterr().out
    assert "adapters: 28 language; " in printed
    for figures in (r"tokens a row median: \d+, p95: \d+, p99: \d+, longest: \d+", "answers cut 0"):
        assert re.search(f"train: .*{figures}", printed)
    assert re.search(r"validation: .*images a row 1: \d+", printed)
    assert ">>>" in printed
    assert "3 per device x 2 accumulation x 1 devices = 6 rows a step" in printed
    assert "adam_beta2: 0.95" in printed
    assert not (file.parent / "run").exists()


def test_mixed_image_counts_are_shown_and_fill_rounds_of_their_own(
    start, sections, write_recipe, mixed_rows, capfd
):
    file = write_recipe(sections("decoder"))
    assert start("check", "decoder", [str(file), f"data.train={mixed_rows}"]) == 0
    printed = capfd.readouterr().out
    assert "images a row 0: 5, 1: 15, 2: 7" in printed
    assert "10 an epoch" in printed  # 6 + 15 + 9 rows in batches of three


def test_captions_that_siglips_tokenizer_cannot_tell_apart_are_shown(
    start, sections, write_recipe, data, tmp_path, capfd
):
    image = next((data / "chat" / "images").iterdir())
    rows = [
        {"images": [str(image)], "messages": [QUESTION, {"role": "assistant", "content": text}]}
        for text in ("HER2+ seen.", "HER2- seen.", "A cyst.")
    ]
    path = lines(tmp_path / "x.jsonl", *rows)
    file = write_recipe(sections("siglip"))
    words = [str(file), f"data.train={path}", "data.validation=null"]
    assert start("check", "siglip", words) == 0
    printed = capfd.readouterr().out
    assert "captions with the same tokens 2; such as 'HER2+ seen.' = 'HER2- seen.'" in printed


@pytest.mark.parametrize("text", ["<|image|>", "<|image|><|image|>"])
@pytest.mark.parametrize("place", ["question", "answer"])
def test_image_tokens_hidden_in_text_are_found(
    start, sections, write_recipe, tmp_path, capfd, text, place
):
    messages = [dict(QUESTION), dict(ANSWER)]
    messages[place == "answer"]["content"] += text
    path = lines(tmp_path / "x.jsonl", {"id": "r8", "images": [], "messages": messages})
    file = write_recipe(sections("decoder"))
    assert start("check", "decoder", [str(file), f"data.train={path}"]) == 2
    told = (
        f"a turn of the {('user', 'assistant')[place == 'answer']} holds the tokenizer's <|image|>"
    )
    assert f"row r8: expected ordinary text, {told}" in capfd.readouterr().err


def test_long_prompts_are_an_error_or_dropped_and_counted(
    start, sections, write_recipe, tmp_path, capfd
):
    long = [{"role": "user", "content": "why " * 90}, ANSWER]
    rows = [
        {"id": "long", "images": [], "messages": long},
        {"id": "short", "images": [], "messages": [QUESTION, ANSWER]},
    ]
    path = lines(tmp_path / "x.jsonl", *rows)
    file = write_recipe(sections("decoder"))
    layers = r"lora.targets=model\.language_model\.layers\.0\..*_proj"
    words = [str(file), f"data.train={path}", layers]
    assert start("check", "decoder", words) == 2
    assert "row long: expected a prompt below data.max_length (96)" in capfd.readouterr().err
    assert start("check", "decoder", [*words, "data.too_long=drop"]) == 0
    assert "train: rows 2; rows kept 1; rows dropped 1" in capfd.readouterr().out


@pytest.mark.parametrize("kind", ["decoder", "siglip"])
def test_check_decodes_every_image_where_it_is_asked_to(
    start, sections, write_recipe, data, tmp_path, capfd, kind
):
    recipe = sections(kind)
    rows = [json.loads(x) for x in (data / "chat" / "train.jsonl").read_text().splitlines()[:6]]
    for number, row in enumerate(rows[:3]):
        content = (data / "chat" / row["images"][0]).read_bytes()
        row["images"] = [str(tmp_path / f"{number}.png")]
        (tmp_path / f"{number}.png").write_bytes(content)
    rows[1]["images"] = rows[0]["images"]
    for row in rows[3:]:
        row["images"] = [str(data / "chat" / row["images"][0])]
    recipe["data"]["train"] = lines(tmp_path / "x.jsonl", *rows)
    file = write_recipe(recipe)
    held_out = len((data / "chat" / "validation.jsonl").read_text().splitlines())
    assert start("check", kind, [str(file)]) == 0
    assert "decoded" not in capfd.readouterr().out
    assert start("check", kind, [str(file), "--images"]) == 0
    assert f"\nimages: {5 + held_out} decoded\n" in capfd.readouterr().out
    for number in (0, 2):
        path = tmp_path / f"{number}.png"
        path.write_bytes(path.read_bytes()[:200])  # its header is there
    assert start("check", kind, [str(file)]) == 0
    capfd.readouterr()
    assert start("check", kind, [str(file), "--images"]) == 2
    captured = capfd.readouterr()
    sentences = [x for x in captured.err.splitlines() if x.startswith("medft: error: ")]
    named = [x.removeprefix("medft: error: row ").partition(":")[0] for x in sentences]
    assert sorted(named) == sorted(row["id"] for row in rows[:3])
    assert all("expected a complete image" in sentence for sentence in sentences)
    assert "images:" not in captured.out.splitlines()[-1]
