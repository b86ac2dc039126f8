"""Models and runs that somebody else made: nothing of theirs runs or hangs, each is a sentence."""

import json
import os
import pickle
import shutil

import pytest
import torch
import yaml
from hostile import run_hostile
from safetensors.torch import load_file

from medft.training.checkpoints import write_manifest


class Marks:
    """Unpickling it would leave a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.fixture(scope="module")
def interrupted(sections, tmp_path_factory, run_script):
    """The recipe of a SigLIP run that stopped after its first checkpoint."""
    folder = tmp_path_factory.mktemp("interrupted")
    recipe = sections("siglip")
    recipe["train"] |= {"output_dir": str(folder / "run"), "max_steps": 4, "save_steps": 2}
    file = folder / "run.yaml"
    file.write_text(yaml.safe_dump(recipe))
    run_script("siglip", file)
    shutil.rmtree(folder / "run" / "checkpoint-4")
    shutil.rmtree(folder / "run" / "adapter")
    change_json(folder / "run" / "run.json", status="interrupted", steps_done=2)
    return file


@pytest.fixture
def resumed(interrupted, tmp_path):
    """A copy of that run and the words that would continue it."""
    shutil.copytree(interrupted.with_suffix(""), tmp_path / "run")
    place = f"train.output_dir={tmp_path / 'run'}"
    return tmp_path / "run", [interrupted, place, "train.resume_from_checkpoint=true"]


def change_json(file, **changes):
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def write_code(folder, mark):
    """A module that would leave a file if it were imported."""
    (folder / "evil.py").write_text(
        f"open({str(mark)!r}, 'w')\n"
        "class Config: pass\nclass Processor: pass\nclass Model: pass\nclass Tokenizer: pass\n"
    )


AUTO_MAP = {
    "AutoConfig": "evil.Config",
    "AutoModel": "evil.Model",
    "AutoModelForImageTextToText": "evil.Model",
    "AutoProcessor": "evil.Processor",
    "AutoImageProcessor": "evil.Processor",
    "AutoTokenizer": ["evil.Tokenizer", "evil.Tokenizer"],
}

CONFIGS = ["config.json", "processor_config.json", "preprocessor_config.json",
           "tokenizer_config.json", "generation_config.json", "video_preprocessor_config.json",
           "config.4.0.0.json"]  # fmt: skip


def with_auto_map(folder, name, mark):
    write_code(folder, mark)
    file = folder / name
    content = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps({**content, "deep": [{"auto_map": AUTO_MAP}]}))


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("kind", ["decoder", "siglip"])
def test_a_base_that_names_code_of_its_own_is_refused(
    bases, sections, write_recipe, refused, tmp_path, kind, name
):
    base = shutil.copytree(bases / kind, tmp_path / "base")
    with_auto_map(base, name, tmp_path / "mark")
    words = ["check", write_recipe(sections(kind)), f"model.base={base}"]
    assert f"code of its own, {base} names some by auto_map in {name}" in refused(words)
    assert not (tmp_path / "mark").exists()


def test_a_base_with_code_for_generation_is_refused(
    bases, sections, write_recipe, refused, tmp_path, medft
):
    base = shutil.copytree(bases / "decoder", tmp_path / "base")
    words = ["check", write_recipe(sections("decoder")), f"model.base={base}"]
    assert medft(*words) == 0
    (base / "custom_generate").mkdir()
    assert "names some by custom_generate/" in refused(words)


@pytest.mark.parametrize("use", ["predict", "evaluate", "merge", "init_from"])
@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("processor_config.json", {"auto_map": AUTO_MAP}),
        ("tokenizer_config.json", {"auto_map": AUTO_MAP}),
        (
            "adapter_config.json",
            {"auto_mapping": {"parent_library": "evil", "base_model_class": "M"}},
        ),
        ("adapter_config.json", {"megatron_config": {"a": 1}, "megatron_core": "evil"}),
        ("adapter_config.json", {"auto_map": {"parent_library": "transformers.models.x"}}),
    ],
)
def test_an_adapter_that_names_code_of_its_own_is_refused(
    given, uses, refused, tmp_path, use, name, changes
):
    run = given("decoder")
    write_code(run / "adapter", tmp_path / "mark")
    change_json(run / "adapter" / name, **changes)
    assert "code of its own" in refused(uses(run, "decoder")[use])
    assert not (tmp_path / "mark").exists()


PICKLED = ["adapter_model.bin", "pytorch_model.bin", "training_args.bin", "optimizer.pt",
           "scheduler.pt", "scaler.pt", "rng_state.pth", "model.ckpt"]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["decoder", "siglip"])
def test_pickles_beside_an_adapter_are_never_loaded(given, uses, medft, bases, tmp_path, kind):
    """Without the weights that lie beside them, they are no substitute."""
    run, mark = given(kind), tmp_path / "mark"
    for folder in (run, run / "adapter"):
        for name in PICKLED:
            (folder / name).write_bytes(pickle.dumps(Marks(mark)))
        torch.save({"a": Marks(mark)}, folder / "adapter_model.bin")
    (run / "index.npz").write_bytes(pickle.dumps(Marks(mark)))
    for words in uses(run, kind).values():
        assert medft(*words) == 0
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
    (run / "adapter" / "adapter_model.safetensors").unlink()
    for words in uses(run, kind).values():
        assert medft(*words) == 2
    assert not mark.exists()


def test_a_base_with_pickled_weights_alone_is_refused(bases, given, refused, uses, tmp_path):
    run, base = given("decoder"), shutil.copytree(bases / "decoder", tmp_path / "base")
    weights = load_file(base / "model.safetensors")
    (base / "model.safetensors").unlink()
    torch.save(weights, base / "pytorch_model.bin")
    change_json(run / "adapter" / "medft.json", base=str(base), sha256=None)
    assert "safetensors" in refused(uses(run, "decoder")["predict"])


def nested(depth):
    return "[" * depth + "]" * depth


DAMAGE = {
    "truncated": b'{"status": "comp',
    "a list": b"[]",
    "a number": b"5",
    "not UTF-8": b'{"a": "\xff\xfe"}',
    "deep": f'{{"a": {nested(100_000)}}}'.encode(),
    "empty": b"",
}


@pytest.mark.parametrize("use", ["predict", "evaluate", "merge", "init_from"])
@pytest.mark.parametrize("damage", [*DAMAGE, "pipe", "sparse", "dangling", "folder"])
@pytest.mark.parametrize(
    "name", ["run.json", "adapter/medft.json", "adapter/adapter_config.json",
             "adapter/processor_config.json", "adapter/tokenizer_config.json"]
)  # fmt: skip
def test_a_damaged_record_is_one_sentence(given, uses, refused, use, name, damage):
    run = given("siglip")
    file = run / name
    if not file.exists():
        pytest.skip("siglip has no such file")
    break_file(file, damage)
    refused(uses(run, "siglip")[use])


def break_file(file, damage):
    file.unlink()
    if damage == "pipe":
        os.mkfifo(file)
    elif damage == "sparse":
        with file.open("wb") as stream:
            stream.truncate(2**31)
    elif damage == "dangling":
        file.symlink_to("nowhere")
    elif damage == "folder":
        file.mkdir()
    else:
        file.write_bytes(DAMAGE[damage])


@pytest.mark.parametrize("damage", [*DAMAGE, "pipe", "sparse", "folder", "words"])
def test_a_damaged_log_history_is_found_before_the_model_is_loaded(given, uses, refused, damage):
    run = given("siglip")
    if damage == "words":
        (run / "log_history.json").write_text('[{"loss": "low"}]')
    elif damage == "a list":
        (run / "log_history.json").write_text("[5]")
    else:
        break_file(run / "log_history.json", damage)
    assert "expected the log of a run at" in refused(uses(run, "siglip")["evaluate"])


RUN_JSON = [
    {"data": {"train": {"path": 5, "sha256": "x"}}},
    {"data": {"train": {"path": "a\0b", "sha256": "x"}}},
    {"data": []},
    {"data": {"train": None}},
    {"status": ["completed"]},
    {"status": "\x1b[2J"},
    {"base": "x"},
    {"batch": {"steps": "1", "effective": 2}},
    {"metrics": {"eval_loss": "low"}},
    {"recipe": 3},
    {"steps_done": None},
    {"resumed": "often"},
    {"parts": "many"},
    {"parts": [{}]},
    {"parts": [{"started": "x", "from_step": "0"}]},
    {"parts": [{"started": "x", "from_step": 0, "launch": "by hand"}]},
    {"init_from": "x"},
]


@pytest.mark.parametrize("changes", RUN_JSON, ids=str)
@pytest.mark.parametrize("use", ["predict", "evaluate", "merge"])
def test_a_run_json_with_other_types_is_one_sentence(given, uses, refused, changes, use):
    run = given("siglip")
    change_json(run / "run.json", **changes)
    assert "run.json, could not read it" in refused(uses(run, "siglip")[use])


MEDFT_JSON = [
    {"base": 5},
    {"base": "a\0b"},
    {"base": "b" * 5000},
    {"image_size": 10**9},
    {"max_length": 10**12},
    {"longest_answer": 10**12},
    {"logit_scale": "high"},
    {"prompts": "one"},
    {"format": [1]},
    {"format": 10**4000},
    {"family": {"a": 1}},
]


@pytest.mark.parametrize("changes", MEDFT_JSON, ids=lambda changes: str(changes)[:40])
@pytest.mark.parametrize("use", ["predict", "evaluate", "merge", "init_from"])
def test_a_medft_json_with_other_types_or_bounds_is_one_sentence(
    given, uses, refused, changes, use
):
    run = given("siglip")
    change_json(run / "adapter" / "medft.json", **changes)
    refused(uses(run, "siglip")[use])


ADAPTER_CONFIG = [
    {"peft_type": "IA3"},
    {"peft_type": "none"},
    {"peft_type": 5},
    {"r": 10**9},
    {"r": "8"},
    {"r": -1},
    {"rank_pattern": {"q_proj": 10**9}},
    {"rank_pattern": [1]},
    {"target_modules": 5},
    {"target_modules": "(([a-z.0-9_]+)+)+!"},
    {"rank_pattern": {"(([a-z.0-9_]+)+)+!": 4}},
    {"layers_to_transform": "x"},
    {"lora_alpha": "high"},
]


@pytest.mark.parametrize("changes", ADAPTER_CONFIG, ids=str)
@pytest.mark.parametrize("use", ["predict", "merge"])
def test_an_adapter_config_with_other_types_or_bounds_is_one_sentence(
    given, uses, refused, changes, use, monkeypatch
):
    monkeypatch.setattr("medft.models.patterns.SECONDS", 0.5)
    run = given("siglip")
    change_json(run / "adapter" / "adapter_config.json", **changes)
    refused(uses(run, "siglip")[use])


def lying(shape, length):
    """A safetensors file whose header promises what its data does not hold."""
    header = {"base_model.model.x.lora_B.weight":
              {"dtype": "F32", "shape": shape, "data_offsets": [0, length]}}  # fmt: skip
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + b"\0" * 16


WEIGHTS = {
    "a lying shape": lying([10**6, 10**6], 16),
    "more data than there is": lying([10**6], 4 * 10**6),
    "a shape that overflows": lying([2**40, 2**40], 16),
    "a header of 10^18 bytes": (10**18).to_bytes(8, "little") + b"{}",
    "a negative offset": lying([4], -16),
    "a pickle": pickle.dumps([1, 2]),
    "nothing": b"",
}


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("use", ["predict", "merge", "init_from"])
def test_weights_that_lie_are_one_sentence(given, uses, refused, name, use):
    run = given("siglip")
    (run / "adapter" / "adapter_model.safetensors").write_bytes(WEIGHTS[name])
    change_json(run / "adapter" / "medft.json", weights=None)
    refused(uses(run, "siglip")[use])


@pytest.mark.parametrize("name", ["pipe.safetensors", "pipe.json", "pipe.jinja"])
@pytest.mark.parametrize("use", ["predict", "evaluate", "merge", "init_from"])
def test_a_pipe_in_a_model_folder_hangs_nothing(given, uses, refused, name, use):
    run = given("siglip")
    os.mkfifo(run / "adapter" / name)
    assert "is a pipe, a device or a link to nothing" in refused(uses(run, "siglip")[use])


@pytest.mark.parametrize("side", [10**6, 0, -5, 1.5, "wide"])
@pytest.mark.parametrize("kind", ["decoder", "siglip"])
def test_a_processor_that_makes_images_without_bound_is_one_sentence(
    bases, sections, write_recipe, refused, tmp_path, kind, side
):
    base = shutil.copytree(bases / kind, tmp_path / "base")
    for file in base.glob("*processor_config.json"):
        content = json.loads(file.read_text())
        content.get("image_processor", content)["size"] = {"height": side, "width": 56}
        file.write_text(json.dumps(content))
    refused(["check", write_recipe(sections(kind)), f"model.base={base}"])


def endless(body):
    return (
        "{% for i in range(10**5) %}{% for j in range(10**5) %}" + body + "{% endfor %}{% endfor %}"
    )


TEMPLATES = {
    "loops": endless("x"),
    "loops without output": endless(""),
    "memory": "{{ 'a' * 10**10 }}",
    "doubling": "{% set n = namespace(s='a') %}{% for i in range(40) %}"
    "{% set n.s = n.s ~ n.s %}{% endfor %}",
    "a large power": "{% set x = 9 ** (messages|length * 10**9) %}",
    "recursion": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "attributes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals": "{{ raise_exception.__globals__['os'].system('id') }}",
    "syntax": "{% for %}",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_chat_template_that_means_harm_is_one_sentence(
    bases, sections, write_recipe, refused, medft, capsys, tmp_path, monkeypatch, name
):
    # time enough to reach the end of a recursion on a busy machine; the others have none
    seconds = 5 if name == "recursion" else 0.5
    monkeypatch.setattr("medft.decoder.conversation._RENDER_SECONDS", seconds)
    base = shutil.copytree(bases / "decoder", tmp_path / "base")
    (base / "chat_template.jinja").write_text(TEMPLATES[name])
    words = ["check", write_recipe(sections("decoder")), f"model.base={base}"]
    if name in ("attributes", "globals", "syntax"):
        assert medft(*words) == 2
        assert "chat template refuses the conversation" in capsys.readouterr().err
    else:
        assert "chat template that renders a conversation in" in refused(words)


def test_a_tokenizer_whose_pattern_never_ends_is_one_sentence(
    bases, sections, write_recipe, refused, medft, tmp_path
):
    base = shutil.copytree(bases / "decoder", tmp_path / "base")
    words = ["check", write_recipe(sections("decoder")), f"model.base={base}"]
    tokenizer = json.loads((base / "tokenizer.json").read_text())
    split = {"type": "Split", "behavior": "Isolated", "invert": False}
    whole = {"type": "Sequence", "pretokenizers": [
        {**split, "pattern": {"Regex": "([^.?<]|[^.?<]+)+\\z"}}, tokenizer["pre_tokenizer"]
    ]}  # fmt: skip
    (base / "tokenizer.json").write_text(json.dumps({**tokenizer, "pre_tokenizer": whole}))
    assert "tokenizer.json above all" in refused(words)
    whole["pretokenizers"][0]["pattern"] = {"Regex": "[^.?<]+\\z"}
    (base / "tokenizer.json").write_text(json.dumps({**tokenizer, "pre_tokenizer": whole}))
    assert medft(*words) == 0


def test_the_copied_run_and_the_interrupted_one_are_good(given, uses, medft, resumed, tmp_path):
    run = given("siglip")
    for words in uses(run, "siglip").values():
        assert medft(*words) == 0
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
    _, words = resumed
    assert medft("check", *words) == 0


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_pickle_in_a_checkpoint_is_refused_before_it_is_loaded(resumed, refused, tmp_path, name):
    run, words = resumed
    torch.save({"a": Marks(tmp_path / "mark")}, run / "checkpoint-2" / name)
    write_manifest(run / "checkpoint-2", world_size=1)
    assert "expected a complete checkpoint" in refused(["check", *words])
    where = f"train.resume_from_checkpoint={run / 'checkpoint-2'}"
    assert f"{name} would run code" in refused(["check", *words[:-1], where])
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize(
    "name",
    [
        "run.json",
        "checkpoint-2/trainer_state.json",
        "checkpoint-2/manifest.json",
        "checkpoint-2/adapter_config.json",
    ],
)
@pytest.mark.parametrize("damage", [*DAMAGE, "pipe", "sparse", "dangling"])  # fmt: skip
def test_a_damaged_file_of_an_interrupted_run_is_one_sentence(resumed, refused, name, damage):
    run, words = resumed
    break_file(run / name, damage)
    if name.startswith("checkpoint") and "manifest" not in name and damage in DAMAGE:
        write_manifest(run / "checkpoint-2", world_size=1)
    refused(["check", *words])


@pytest.mark.parametrize("link", ["recipe.yaml", "curves.png", ".adapter.draft", "a/b"])
def test_a_link_out_of_a_run_is_never_written_through(resumed, refused, tmp_path, medft, link):
    run, words = resumed
    outside = tmp_path / "elsewhere"
    outside.mkdir()
    (outside / "precious").write_text("years")
    (run / link).parent.mkdir(exist_ok=True)
    (run / link).unlink(missing_ok=True)
    (run / link).symlink_to(
        outside / "precious" if "." in link[1:] and "draft" not in link else outside
    )
    assert "is a link that leaves it" in refused(["check", *words])
    assert (outside / "precious").read_text() == "years"
    (run / link).unlink()
    (run / "inner").symlink_to("checkpoint-2")
    assert medft("check", *words) == 0


NAMES = ["with a\nline", "quote\"'", "\U0001f600", b"byte\xff".decode("utf-8", "surrogateescape")]


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_odd_names_of_folders_are_read_or_refused_in_one_line(
    given, uses, medft, refused, tmp_path, name
):
    run = given("siglip").rename(tmp_path / name)
    words = uses(run, "siglip")["merge"]
    if "byte" in name:
        assert "UTF-8" in refused(words)
        return
    assert medft(*words) == 0
    (run / "adapter" / "medft.json").write_text("{")
    shutil.rmtree(tmp_path / "out")
    assert "medft.json" in refused(words)


@pytest.mark.slow
@pytest.mark.parametrize("answer", ["y\n", ""])
def test_a_yes_on_the_terminal_runs_no_code_of_a_base(
    bases, sections, write_recipe, tmp_path, answer
):
    base = shutil.copytree(bases / "decoder", tmp_path / "base")
    with_auto_map(base, "config.json", tmp_path / "mark")
    change_json(base / "config.json", auto_map=AUTO_MAP, model_type="of_my_own")
    words = ["check", write_recipe(sections("decoder")), f"model.base={base}"]
    outcome = run_hostile(words, stdin=answer, HF_HOME=str(tmp_path / "hub"))
    assert outcome.code == 2
    assert "code of its own" in outcome.sentences[0]
    assert "[y/N]" not in outcome.out + outcome.err
    assert not (tmp_path / "mark").exists()
