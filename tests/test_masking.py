"""What looks like a secret is masked wherever it stands, and nothing else is."""

import json
import logging

import pytest

from medft.errors import DataError, run_command
from medft.masking import log_handler, masked_text
from medft.provenance import masked, masked_words

HUB = "hf_" + "aB3" * 12

SECRETS = {
    "hub": HUB,
    "github": "ghp_" + "aB3" * 12,
    "fine-grained github": "github_pat_" + "a1_" * 20,
    "openai": "sk-proj-" + "aB3-" * 10,
    "aws": "AKIA" + "ABCD1234" * 2,
    "bearer": "eyJhbGciOi.JIUzI1NiIsInR5cCI6",
    "password in a URL": "ada:pa55",
    "password with an at sign in a URL": "ada:pa@55",
    "gitlab": "glpat-" + "aB3_" * 6,
}

PLAIN = [
    "key_findings",
    "tokenizer",
    "/data/films@2x/a.png",
    "ada@ward.org",
    "https://host.org/a@b",
    "https://host.org:8080/x",
    "/models/sk-siglip-base-patch16-448-chest-xray-v2",
    "meta-llama/Llama-3.2-11B-Vision-Instruct",
    "hf_home",
    "ask-the-radiologist-about-the-small-shadow",
    "a disk-shaped-opacity-in-the-left-lower-lobe-of-the-lung",
    "5f" * 32,
    "Bearer of the ring",
    "key = {answer}",
]


def written(name, secret):
    return {
        "bearer": f"Authorization: Bearer {secret}",
        "password in a URL": f"https://{secret}@host.org/x",
        "password with an at sign in a URL": f"https://{secret}@host.org/x",
    }.get(name, f"it was {secret}, sorry")


@pytest.mark.parametrize("name", SECRETS)
def test_a_secret_is_masked_in_any_text(name):
    got = masked_text(written(name, SECRETS[name]))
    assert SECRETS[name] not in got
    assert "***" in got


@pytest.mark.parametrize("text", PLAIN)
def test_ordinary_texts_stay(text):
    assert masked_text(text) == text
    assert masked([{"caption": text}]) == [{"caption": text}]
    assert masked_words([f"data.caption={text}"]) == [f"data.caption={text}"]


def test_records_and_command_lines_hold_no_secret():
    record = {"error": f"RuntimeError: 401 for {HUB}", "recipe": {"model": {"base": HUB}}}
    assert HUB not in json.dumps(masked(record))
    assert masked({"key_findings": "a shadow"}) == {"key_findings": "a shadow"}
    words = [f"model.base={HUB}", "train.lr_scheduler_kwargs={hub_token: abc}", "lora.r=4"]
    got = ["model.base=***", "train.lr_scheduler_kwargs=***", "lora.r=4"]
    assert masked_words(words) == got


def test_an_error_shows_no_secret_and_no_control_sign(capsys):
    def fail(argv):
        raise DataError(f"expected access, got 401 for {HUB} in a\nb\x1b[2J \U0001f600: ask")

    assert run_command(fail, []) == 2
    shown = capsys.readouterr().err
    assert (
        shown == "medft: error: expected access, got 401 for *** in a\\nb\\x1b[2J \U0001f600: ask\n"
    )


def test_a_log_line_shows_no_secret(capsys):
    line = logging.LogRecord(
        "medft", logging.INFO, "x.py", 1, "read %s of %s", (HUB, "films"), None
    )
    log_handler().handle(line)
    assert capsys.readouterr().err == "read *** of films\n"


@pytest.mark.parametrize("fails", [False, True])
def test_no_file_of_a_run_holds_a_secret(sections, write_recipe, run_script, monkeypatch, fails):
    recipe = sections("siglip")
    recipe["train"] |= {"max_steps": 2, "save_steps": 1, "run_name": f"for {HUB}"}
    file = write_recipe(recipe)
    run = file.with_suffix("")
    if fails:

        def refuse(*words, **options):
            raise RuntimeError(f"401 for {HUB}")

        monkeypatch.setattr("medft.siglip.model.load_weights", refuse)
        with pytest.raises(RuntimeError, match="401"):
            run_script("siglip", file, f"train.run_name=for {HUB}")
        assert json.loads((run / "run.json").read_text())["error"] == "RuntimeError: 401 for ***"
    else:
        run_script("siglip", file, f"train.run_name=for {HUB}")
        assert (run / "checkpoint-2" / "trainer_state.json").is_file()
    files = [path for path in run.rglob("*") if path.is_file()]
    assert len(files) > 1
    assert not [path.name for path in files if HUB.encode() in path.read_bytes()]
    assert "run_name: for ***" in (run / "recipe.yaml").read_text()
