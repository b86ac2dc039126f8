"""Settings of a stranger's model: each is bounded or refused before anything is built by it."""

import json
import shutil

import pytest


def with_settings(file, changes):
    """Write changes into a JSON file, keys with dots going into its objects."""
    content = json.loads(file.read_text()) if file.exists() else {}
    for key, value in changes.items():
        inner = content
        *folders, name = key.split(".")
        for folder in folders:
            inner = inner[folder]
        inner[name] = value
    file.write_text(json.dumps(content))


@pytest.fixture
def check(bases, sections, write_recipe, tmp_path):
    """The words that check a recipe on a copy of a base with other settings."""

    def words(kind, name, changes):
        base = shutil.copytree(bases / kind, tmp_path / "base")
        with_settings(base / name, changes)
        return ["check", write_recipe(sections(kind)), f"model.base={base}"]

    return words


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("decoder", {"text_config.num_hidden_layers": 10**6}),
        ("siglip", {"text_config.num_hidden_layers": 10**6}),
        ("decoder", {"text_config.num_attention_heads": 0}),
        ("decoder", {"text_config.hidden_act": "nope"}),
        ("decoder", {"text_config.vocab_size": -1}),
        ("decoder", {"text_config.pad_token_id": 10**9}),
        ("decoder", {"text_config.hidden_size": 10**7}),
        ("decoder", {"text_config.rope_parameters": {"rope_type": "nope"}}),
        ("decoder", {"text_config.max_position_embeddings": 10**12}),
        ("decoder", {"vision_config.image_size": 10**6}),
        ("decoder", {"num_labels": 10**9}),
        ("decoder", {"_attn_implementation": "kernels-community/x"}),
        ("siglip", {"vision_config.image_size": [10**6, 10**6]}),
        ("siglip", {"vision_config.patch_size": 0}),
        ("siglip", {"vision_config.patch_size": float("nan")}),
        ("siglip", {"vision_config.hidden_act": "nope"}),
    ],
    ids=str,
)
def test_a_base_of_sizes_without_bound_or_unknown_parts_is_one_sentence(
    check, refused, kind, changes
):
    refused(check(kind, "config.json", changes))


def test_another_known_part_is_accepted(check, medft):
    changes = {"text_config.hidden_act": "relu", "text_config.num_hidden_layers": 5}
    assert medft(*check("decoder", "config.json", changes)) == 0


@pytest.mark.parametrize(
    "changes",
    [
        {"image_processor.image_mean": [1]},
        {"image_processor.image_mean": "abc"},
        {"image_processor.image_std": [0, 0, 0]},
        {"image_processor.rescale_factor": "x"},
        {"image_processor.rescale_factor": float("inf")},
        {"image_processor.resample": 99},
        {"image_processor.size": 5},
        {"image_processor.size": {"height": 8192, "width": 8192}},
        {"image_processor.max_image_tiles": 10_000},
        {"processor_class": "Nope"},
        {"processor_class": "LlamaTokenizer"},
    ],
    ids=str,
)
def test_a_processor_that_cannot_make_an_image_is_one_sentence(check, refused, changes):
    refused(check("decoder", "processor_config.json", changes))


def test_a_processor_with_another_mean_is_accepted(check, medft):
    changes = {"image_processor.image_mean": [0.1, 0.2, 0.3]}
    assert medft(*check("decoder", "processor_config.json", changes)) == 0


@pytest.mark.parametrize(
    "changes",
    [
        {"init_lora_weights": "pissa_niter_99999999"},
        {"init_lora_weights": "eva"},
        {"init_lora_weights": [1]},
        {"lora_alpha": float("inf")},
        {"alpha_pattern": {"q_proj": float("nan")}},
        {"fan_in_fan_out": True},
        {"use_qalora": True},
        {"alora_invocation_tokens": [1, 2]},
        {"layer_replication": [[0, 1], [0, 2]]},
        {"target_parameters": ["q_proj.weight"]},
        {"kasa_config": {}},
    ],
    ids=str,
)
@pytest.mark.parametrize("use", ["predict", "merge", "init_from"])
def test_an_adapter_with_settings_that_no_recipe_has_is_one_sentence(
    given, uses, refused, changes, use
):
    run = given("siglip")
    with_settings(run / "adapter" / "adapter_config.json", changes)
    refused(uses(run, "siglip")[use])


@pytest.mark.parametrize("kind", ["decoder", "siglip"])
def test_an_adapter_that_changed_its_base_is_never_compared_with_it(
    given, uses, refused, medft, tmp_path, kind
):
    run = given(kind)
    with_settings(run / "adapter" / "adapter_config.json", {"init_lora_weights": "pissa"})
    words = [*uses(run, kind)["evaluate"], "--against", "base"]
    assert medft(*uses(run, kind)["predict"]) == 0
    (tmp_path / "out.jsonl").unlink()
    assert "this one has init_lora_weights: pissa" in refused(words)
    assert medft(*uses(run, kind)["merge"]) == 0
    shutil.rmtree(tmp_path / "out")
    with_settings(run / "adapter" / "medft.json", {"base": "/nowhere", "sha256": None})
    assert "this one has init_lora_weights: pissa" in refused(words)  # before the base is loaded


@pytest.fixture
def on_base(bases, given, tmp_path):
    """A decoder's run on a base with another generation_config.json."""

    def make(changes):
        base = shutil.copytree(bases / "decoder", tmp_path / "base")
        with_settings(base / "generation_config.json", changes)
        run = given("decoder")
        with_settings(run / "adapter" / "medft.json", {"base": str(base), "sha256": None})
        return run

    return make


@pytest.mark.parametrize(
    "changes",
    [{"eos_token_id": "a"}, {"pad_token_id": 10**9}, {"bos_token_id": -1}, {"eos_token_id": [[1]]}],
    ids=str,
)
def test_generation_with_tokens_that_are_not_there_is_one_sentence(on_base, uses, refused, changes):
    refused(uses(on_base(changes), "decoder")["predict"])


@pytest.mark.parametrize(
    "changes",
    [
        {"num_beams": 10**6},
        {"prompt_lookup_num_tokens": 3},
        {"assistant_early_exit": 1},
        {"sequence_bias": {"1": 2}},
    ],
    ids=str,
)
def test_other_settings_of_generation_change_no_answer(
    on_base, uses, medft, runs, tmp_path, caplog, changes
):
    assert medft(*uses(runs / "decoder", "decoder")["predict"]) == 0
    expected = json.loads((tmp_path / "out.jsonl").read_text())["text"]
    (tmp_path / "out.jsonl").unlink()
    caplog.clear()
    assert medft(*uses(on_base(changes), "decoder")["predict"]) == 0
    assert json.loads((tmp_path / "out.jsonl").read_text())["text"] == expected
    assert any("are not used" in line and min(changes) in line for line in caplog.messages)


@pytest.mark.parametrize("use", ["predict", "evaluate", "merge", "init_from"])
def test_the_home_of_nobody_is_one_sentence(given, uses, refused, use):
    run = given("siglip")
    with_settings(run / "adapter" / "medft.json", {"base": "~nosuchuser/x", "sha256": None})
    refused(uses(run, "siglip")[use])


@pytest.mark.parametrize("use", ["predict", "evaluate"])
def test_rows_in_the_home_of_nobody_are_one_sentence(given, uses, refused, use):
    run = given("siglip")
    record = json.loads((run / "run.json").read_text())
    record["data"] = {"train": {"path": "~nosuchuser/x.jsonl", "sha256": "0" * 64}}
    (run / "run.json").write_text(json.dumps(record))
    refused(uses(run, "siglip")[use])


def honest(length):
    header = {"x": {"dtype": "U8", "shape": [length], "data_offsets": [0, length]}}
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text


@pytest.mark.parametrize("begin", [b"", b"{}" * 8, honest(4), honest(2**42)])
@pytest.mark.parametrize("use", ["predict", "evaluate", "merge", "init_from"])
def test_terabytes_beside_an_adapter_are_never_read(given, uses, refused, begin, use):
    run = given("siglip")
    with (run / "adapter" / "zz.safetensors").open("wb") as file:
        file.write(begin)
        file.truncate(len(begin) + 2**42)
    assert "expected complete safetensors" in refused(uses(run, "siglip")[use])
