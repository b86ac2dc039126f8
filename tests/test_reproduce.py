"""What must hold before a run is repeated, and how two runs are compared; nothing is trained."""

import functools
import json
import shutil

import pytest
import torch
import yaml
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, BitsAndBytesConfig, TrainingArguments
from trl import SFTConfig

from medft.compat import is_lora_layer
from medft.config.recipe import DecoderRecipe
from medft.decoder.families import MLLAMA
from medft.decoder.model import bitsandbytes_config
from medft.decoder.trainer import decoder_arguments
from medft.errors import MedftError, RunError
from medft.models import resolved
from medft.models.lora import attach_adapter
from medft.models.resolved import read_recorded, recorded_fields, take_recorded
from medft.models.saved import RunLayout
from medft.reproduce import describe
from medft.reproducible import plan_reproduction
from medft.training.compare_runs import (
    compare_histories,
    compare_runs,
    compare_weights,
    first_different_step,
)


@pytest.fixture
def run(runs, tmp_path):
    """A copy of a finished decoder run, and of its checkpoints nothing."""
    copy = tmp_path / "run"
    shutil.copytree(runs / "decoder", copy, ignore=shutil.ignore_patterns("checkpoint-*"))
    return copy


def change(file, **keys):
    """Set keys of a JSON file; a dotted one is given with `__`."""
    content = json.loads(file.read_text())
    for name, value in keys.items():
        *parents, last = name.split("__")
        inner = content
        for parent in parents:
            inner = inner[parent]
        inner.pop(last) if value is KeyError else inner.__setitem__(last, value)
    file.write_text(json.dumps(content))


def refusal(run, out=None):
    """The sentence by which a run is refused, with nothing written."""
    before = sorted(path for path in run.parent.rglob("*"))
    with pytest.raises(MedftError) as found:
        plan_reproduction(run, out)
    assert sorted(path for path in run.parent.rglob("*")) == before
    (sentence,) = found.value.problems
    return sentence


def with_default(monkeypatch, config_class, **defaults):
    """Another version of a library, whose defaults are these."""
    original = config_class.__init__

    @functools.wraps(original)
    def changed(self, *words, **fields):
        original(self, *words, **{**defaults, **fields})

    monkeypatch.setattr(config_class, "__init__", changed)


def without_field(monkeypatch, config_class, name):
    """Another version of a library, whose configuration lacks a field."""
    real = resolved.inspect.signature

    def signature(called):
        found = real(called)
        if called is not config_class:
            return found
        kept = [known for known in found.parameters.values() if known.name != name]
        return found.replace(parameters=kept)

    monkeypatch.setattr(resolved.inspect, "signature", signature)


def test_a_run_can_be_repeated_where_it_was_moved_to(run):
    plan = plan_reproduction(run, None)
    assert plan.out == run.parent / "run-reproduced"
    assert not plan.out.exists()
    assert (plan.launch.strategy, plan.launch.processes) == ("single", 1)
    assert plan.threads == plan.launch.threads
    assert plan.applied == []
    assert set(plan.differs_now) <= {
        "medft had and has uncommitted changes, which are not compared"
    }
    expected = "numerically close" if plan.differs_now else "bitwise possible"
    assert f"expected: {expected}" in plan.describe()


def test_every_field_of_the_libraries_is_recorded(run):
    record = json.loads((run / "run.json").read_text())["resolved"]
    assert record["arguments"].keys() >= {"adam_epsilon", "lr_scheduler_kwargs", "optim"}
    assert record["arguments"]["adam_epsilon"] == 1e-8
    assert record["lora"].keys() == LoraConfig().to_dict().keys()
    assert (record["lora"]["r"], record["lora"]["use_rslora"]) == (4, False)
    assert record["quantization"] is None
    assert record["attention"] == {"": "sdpa", "text_config": "sdpa", "vision_config": "sdpa"}
    assert record["determinism"]["deterministic_algorithms"] is False
    # a masked value could not be applied again
    masked = {name for name, value in record["arguments"].items() if value == "***"}
    assert all(resolved.is_free("arguments", name) for name in masked)


def test_a_4_bit_run_records_its_quantization(runs):
    record = json.loads((runs / "nf4" / "run.json").read_text())["resolved"]["quantization"]
    assert (record["load_in_4bit"], record["bnb_4bit_quant_type"]) == (True, "nf4")
    assert record["bnb_4bit_quant_storage"] == "uint8"
    assert record.keys() == recorded_fields(
        BitsAndBytesConfig, read_recorded(runs / "nf4" / "run.json"), "quantization"
    ).keys()  # fmt: skip


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"status": "interrupted"}, "expected a completed run in"),
        ({"resolved": KeyError}, "to hold what the run resolved to"),
        ({"launch": KeyError}, "to say how the run was started"),
        ({"launch__processes": 0}, "could not read it (launch.processes"),
        ({"recipe__lora__r": 8}, "these keys differ: lora.r (8 -> 4)"),
        ({"recipe__data__train": "/x/***@y/rows.jsonl"}, "data.train is masked"),
        ({"data__train__sha256": "0" * 64}, "expected the 31 rows of data.train"),
        ({"data__validation__sha256": "0" * 64}, "expected the 5 rows of data.validation"),
        ({"data__train__rows_cut": 3}, "expected the data of the run"),
        ({"base__sha256": "0" * 64}, "sha256 was 000000"),
        ({"init_from": {"path": "x", "sha256": "y"}}, "expected the init_from of the run"),
        ({"resolved__arguments__lr_schedule": "linear"}, "the installed trl lacks them"),
        ({"resolved__arguments__optim": "adamw_next"}, "values that the trainer accepts"),
        ({"resolved__arguments__eos_token": "***"}, "they are masked as secrets: eos_token"),
        ({"resolved__arguments__trust_remote_code": True}, "trust_remote_code of SFTConfig"),
        ({"resolved__lora__loftq_config": {"x": 1}}, "loftq_config of LoraConfig to be unset"),
        ({"resolved__lora__future": 1}, "the installed peft lacks them: future"),
        ({"resolved__attention__text_config": "someone/kernel"}, "resolved.attention.text_config"),
        ({"resolved__determinism__environment": "LD_PRELOAD"}, "resolved.determinism.environment"),
    ],
)  # fmt: skip
def test_what_cannot_be_compared_is_one_sentence_before_anything_is_written(run, keys, sentence):
    change(run / "run.json", **keys)
    assert sentence in refusal(run)


def test_a_folder_that_is_no_run_is_one_sentence(run, tmp_path):
    assert f"give {run}" in refusal(run / "adapter")
    assert f"give {run}" in refusal(run / "best_model")
    assert "expected the record of a run at" in refusal(run / "missing")
    shutil.rmtree(run / "adapter")
    assert "expected adapter/ or model/ in the run" in refusal(run)


def test_nothing_is_written_into_the_run_or_over_other_files(run, tmp_path):
    assert "outside of the run" in refusal(run, run / "again")
    (tmp_path / "link").symlink_to(run)
    assert "outside of the run" in refusal(run, tmp_path / "link" / "again")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    assert "to be empty, it is not" in refusal(run, tmp_path / "full")


def test_a_relative_path_names_the_folder_in_which_the_run_was_started(run, monkeypatch, tmp_path):
    rows = json.loads((run / "run.json").read_text())["data"]["train"]["path"]
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    recipe["data"]["train"] = "chat/train.jsonl"
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    change(
        run / "run.json",
        recipe__data__train="chat/train.jsonl",
        data__train__path="chat/train.jsonl",
        started_in="/where/it/was",
    )
    monkeypatch.chdir(tmp_path)
    assert refusal(run) == (
        f"expected data.train of the run at chat/train.jsonl, it is not there seen from {tmp_path}"
        f": start medft reproduce in /where/it/was"
    )
    (tmp_path / "chat").symlink_to(rows.removesuffix("/train.jsonl"))
    assert plan_reproduction(run, None).recipe.data.train == "chat/train.jsonl"


def test_an_image_that_changed_is_named_with_its_row(run, data, tmp_path):
    copy = tmp_path / "chat"
    shutil.copytree(data / "chat", copy)
    text = (run / "recipe.yaml").read_text().replace(str(data / "chat"), str(copy))
    (run / "recipe.yaml").write_text(text)
    record = (run / "run.json").read_text().replace(str(data / "chat"), str(copy))
    (run / "run.json").write_text(record)
    plan_reproduction(run, None)
    row = json.loads((copy / "train.jsonl").read_text().splitlines()[4])
    other = json.loads((copy / "train.jsonl").read_text().splitlines()[5])
    shutil.copy(copy / other["images"][0], copy / row["images"][0])
    assert f"{row['images'][0]} of row {row['id']} as its name says" in refusal(run)


def test_threads_that_are_asked_for_now_are_said(run, monkeypatch):
    then = plan_reproduction(run, None).threads
    monkeypatch.setenv("MEDFT_THREADS", str(then + 1))
    plan = plan_reproduction(run, None)
    assert plan.threads == then + 1
    assert f"threads was {then} and is {then + 1}" in plan.differs_now
    assert plan.verdict == "numerically close"
    monkeypatch.setenv("MEDFT_THREADS", "many")
    assert "expected a number of threads in MEDFT_THREADS" in refusal(run)


def test_other_versions_and_hardware_are_said(run):
    change(
        run / "run.json",
        packages__torch="1.0",
        hardware__gpus=["NVIDIA H200"],
        hardware__cpu_count=999,
        medft__commit="old\x1b[2J",
        medft__dirty=False,
    )
    plan = plan_reproduction(run, None)
    assert plan.verdict == "numerically close"
    said = " ".join(plan.differs_now)
    assert f"packages.torch was 1.0 and is {torch.__version__.partition('+')[0]}" in said
    assert "hardware.gpus was ['NVIDIA H200'] and is" in said
    assert "medft.commit was old\\x1b[2J and is" in plan.describe()
    assert "\x1b" not in plan.describe()
    assert "cpu_count" not in said


def test_a_default_that_changed_is_said_and_not_used(run, monkeypatch):
    with_default(monkeypatch, SFTConfig, average_tokens_across_devices=False, seed=1)
    with_default(monkeypatch, LoraConfig, use_rslora=True)
    plan = plan_reproduction(run, None)
    assert plan.applied == [
        "SFTConfig.average_tokens_across_devices would be False now and was True, which is used",
        "LoraConfig.use_rslora would be True now and was False, which is used",
    ]
    stock = decoder_arguments(plan.recipe.train, dtype="float32")
    again = decoder_arguments(plan.recipe.train, dtype="float32", recorded=plan.recorded)
    assert not stock.average_tokens_across_devices
    assert again.average_tokens_across_devices
    assert (stock.seed, again.seed) == (17, 17)


def test_a_recorded_adapter_has_the_recorded_fields(run, monkeypatch, bases):
    with_default(monkeypatch, LoraConfig, use_rslora=True)
    recorded = read_recorded(run / "run.json")
    lora = DecoderRecipe.load(run / "recipe.yaml").lora
    scales = []
    for record in (None, recorded):
        base = AutoModelForImageTextToText.from_pretrained(bases / "decoder")
        options = {"task_type": "CAUSAL_LM", "seed": 5, "recorded": record}
        adapted = attach_adapter(base, lora, MLLAMA.presets, **options)
        layer = next(filter(is_lora_layer, adapted.modules()))
        scales.append(layer.scaling["default"])
    # alpha / sqrt(r), and alpha / r
    assert scales == [8 / 2, 8 / 4]


def test_a_recorded_quantization_has_the_recorded_fields(runs, monkeypatch):
    recorded = read_recorded(runs / "nf4" / "run.json")
    recorded.resolved.quantization["llm_int8_threshold"] = 5.0
    section = DecoderRecipe.load(runs / "nf4" / "recipe.yaml").quantization
    stock = bitsandbytes_config(section, MLLAMA, "float32")
    again = bitsandbytes_config(section, MLLAMA, "float32", recorded)
    assert (stock.llm_int8_threshold, again.llm_int8_threshold) == (6.0, 5.0)
    assert again.bnb_4bit_compute_dtype == torch.float32


def test_a_library_that_lacks_a_field_now_is_refused(run, monkeypatch):
    without_field(monkeypatch, SFTConfig, "adam_epsilon")
    assert "the installed trl lacks them: adam_epsilon: not comparable" in refusal(run)


def test_what_the_libraries_made_of_a_record_is_compared_with_it(run):
    recorded = read_recorded(run / "run.json")
    made = recorded.resolved.model_dump()
    resolved.check_applied(made, recorded)
    made["lora"]["lora_alpha"] = 9
    with pytest.raises(RunError, match=r"lora\.lora_alpha 8 as recorded .* make it 9"):
        resolved.check_applied(made, recorded)
    made["lora"] = None
    with pytest.raises(RunError, match=r"lora\.\w+ .* make it None"):
        resolved.check_applied(made, recorded)
    made = recorded.resolved.model_dump()
    made["quantization"] = {"load_in_4bit": True}
    with pytest.raises(RunError, match=r"quantization\.load_in_4bit None as recorded"):
        resolved.check_applied(made, recorded)
    made = recorded.resolved.model_dump()
    made["attention"]["text_config"] = "eager"
    with pytest.raises(RunError, match=r"attention\.text_config 'sdpa' as recorded"):
        resolved.check_applied(made, recorded)
    # where a run writes and what only the library of today knows is not the record's
    made = recorded.resolved.model_dump()
    made["arguments"] |= {"output_dir": "elsewhere", "new_field": 1}
    resolved.check_applied(made, recorded)


def test_a_record_sets_and_takes_back_what_decides_sums(run, monkeypatch):
    recorded = read_recorded(run / "run.json").resolved.determinism
    before = resolved.determinism()
    changed = recorded.model_copy(
        update={
            "deterministic_algorithms": True,
            "cudnn_benchmark": True,
            "float32_precision": {"cuda.matmul": "tf32", "os.path": "x"},
            "environment": {"MKL_CBWR": "AVX2", "LD_PRELOAD": "evil.so", "HOME": "/x"},
        }
    )
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    try:
        resolved.apply_determinism(changed)
        now = resolved.determinism()
        assert (now.deterministic_algorithms, now.cudnn_benchmark) == (True, True)
        assert now.float32_precision["cuda.matmul"] == "tf32"
    finally:
        resolved.apply_determinism(before)
    assert resolved.determinism().float32_precision == before.float32_precision
    environment = resolved.environment_of(changed)
    assert environment["MKL_CBWR"] == "AVX2"
    assert "CUBLAS_WORKSPACE_CONFIG" not in environment  # it was not set then
    assert environment.get("LD_PRELOAD") != "evil.so"
    assert environment["HOME"] != "/x"


def test_the_record_is_taken_from_a_command_line(run):
    words, recorded = take_recorded(["a.yaml", "--as-recorded", str(run / "run.json"), "x.y=1"])
    assert words == ["a.yaml", "x.y=1"]
    assert recorded.resolved.lora["r"] == 4
    assert take_recorded(["a.yaml"]) == (["a.yaml"], None)
    with pytest.raises(RunError, match="got no file"):
        take_recorded(["a.yaml", "--as-recorded"])


def test_a_recipe_other_than_the_records_is_refused(run, run_script, tmp_path):
    again = [f"train.output_dir={tmp_path / 'new'}", "--as-recorded", run / "run.json"]
    with pytest.raises(RunError, match=r"these keys differ: train\.learning_rate"):
        run_script("decoder", run / "recipe.yaml", "train.learning_rate=1e-4", *again)
    assert not (tmp_path / "new").exists()


def test_the_first_step_that_differs_is_named():
    then = [
        {"step": 1, "loss": 2.0, "grad_norm": 1.0, "rows_per_second": 5.0},
        {"step": 2, "loss": 1.5, "grad_norm": 1.0, "peak_memory_gib": 3.0},
        {"step": 2, "eval_loss": 1.25, "eval_runtime": 9.0, "eval_samples_per_second": 1.0},
        {"step": 3, "loss": 1.0, "train_runtime": 3.0},
    ]
    now = json.loads(json.dumps(then))
    now[0]["rows_per_second"] = now[1]["peak_memory_gib"] = now[2]["eval_runtime"] = 77.0
    assert compare_histories(then, now, []) == []
    now[3]["loss"] = 1.0000001
    found = compare_histories(then, now, [])
    assert found == [{"step": 3, "what": "log_history.loss", "then": 1.0, "now": 1.0000001}]
    now[2]["eval_loss"] = None
    found = compare_histories(then, now, [])
    assert found == [{"step": 2, "what": "log_history.eval_loss", "then": 1.25, "now": None}]
    assert first_different_step([{"what": "adapter"}, *found]) == 2
    # a step that only one of them has
    assert first_different_step(compare_histories(then, then[:3], [])) == 3
    assert first_different_step(compare_histories(then[:1], then, [])) == 2


def test_means_over_a_stop_are_not_compared_and_all_else_is():
    then = [{"step": s, "loss": 1.0 + s, "grad_norm": 1.0, "num_tokens": 5} for s in (4, 8, 12)]
    now = json.loads(json.dumps(then))
    now[1]["loss"], now[2]["num_tokens"] = 0.5, 9
    assert first_different_step(compare_histories(then, now, [])) == 8
    assert compare_histories(then, now, [6]) == []
    assert first_different_step(compare_histories(then, now, [4])) == 8  # a logged step: no rest
    assert first_different_step(compare_histories(then, now, [9])) == 8
    now[1]["grad_norm"] = 2.0
    assert first_different_step(compare_histories(then, now, [6])) == 8


def test_a_run_resumed_with_another_interval_of_its_log_is_compared_where_both_have_entries():
    then = [{"step": s, "loss": 1.0 + s, "grad_norm": 1.0} for s in (1, 2, 3, 4, 6, 8)]
    now = [entry | {"loss": entry["loss"] + (entry["step"] == 2)} for entry in then]
    now = [entry for entry in now if entry["step"] % 2 == 0]
    assert first_different_step(compare_histories(then, now, [])) == 1
    assert compare_histories(then, now, [4]) == []  # the mean of steps 1 and 2 is none of step 2
    now[3]["loss"] = 0.5
    assert first_different_step(compare_histories(then, now, [4])) == 8
    now[0]["grad_norm"] = 2.0
    assert first_different_step(compare_histories(then, now, [4])) == 2
    evaluated = [{"step": 3, "eval_loss": 1.0}]
    assert first_different_step(compare_histories([*then, *evaluated], now[1:], [4])) == 3


@pytest.mark.parametrize(
    "key",
    [
        "train.eval_steps",
        "train.max_steps",  # of which the interval is a share
        "train.num_train_epochs",
        "train.per_device_eval_batch_size",
        "train.save_steps",
    ],
)
def test_evaluations_are_compared_unless_a_run_went_on_with_others(run, tmp_path, key):
    again = shutil.copytree(run, tmp_path / "again")
    part = {"started": "x", "from_step": 4, "changed": {key: [1, 2]}}
    change(run / "run.json", parts=[{"started": "x", "from_step": 0}, part], best_metric=0.5)
    history = json.loads((run / "log_history.json").read_text())
    (run / "log_history.json").write_text(
        json.dumps([entry for entry in history if "eval_loss" not in entry])
    )
    found = compare_runs(RunLayout(run), RunLayout(again))
    assert bool(found) == (key == "train.save_steps")
    history[0]["loss"] += 1
    (again / "log_history.json").write_text(json.dumps(history))
    assert compare_runs(RunLayout(run), RunLayout(again))


@pytest.mark.parametrize(
    ("value", "largest"), [(0.5, 0.25), (float("nan"), None), (float("inf"), None)]
)
def test_weights_are_compared_bit_for_bit(tmp_path, value, largest):
    weights = {"a": torch.tensor([0.25, -0.0]), "b": torch.tensor([float("nan")])}
    folders = [tmp_path / "then", tmp_path / "now"]
    for folder in folders:
        folder.mkdir()
        save_file(weights, folder / "adapter_model.safetensors")
        (folder / "medft.json").write_text('{"logit_scale": 1.5}')
    assert compare_weights("adapter", *folders) == []  # NaN is NaN
    (folders[1] / "medft.json").write_text('{"logit_scale": 1.75}')
    (found,) = compare_weights("adapter", *folders)
    assert (found["first"], found["tensors"], found["of"]) == ("logit_scale", 1, 3)
    assert found["max_difference"] == 0.25
    (folders[1] / "medft.json").write_text('{"logit_scale": 1.5}')
    save_file({**weights, "a": torch.tensor([value, -0.0])}, folders[1] / "x.safetensors")
    (folders[1] / "adapter_model.safetensors").unlink()
    (found,) = compare_weights("adapter", *folders)
    assert (found["first"], found["max_difference"]) == ("a", largest)
    assert str(largest) in describe({"differs": [found], "first_different_step": None})
    for other in ({"a": torch.tensor([0.25, 0.0])}, {"a": weights["a"].half()}):  # sign, dtype
        save_file({**weights, **other}, folders[1] / "x.safetensors")
        (found,) = compare_weights("adapter", *folders)
        assert (found["first"], found["max_difference"]) == ("a", 0.0)
    save_file({"a": weights["a"]}, folders[1] / "x.safetensors")
    (found,) = compare_weights("adapter", *folders)
    assert (found["first"], found["tensors"], found["max_difference"]) == ("b", 1, None)
    (folders[1] / "x.safetensors").write_bytes(b"no weights")
    with pytest.raises(RunError, match="expected weights that can be read"):
        compare_weights("adapter", *folders)


def test_two_runs_differ_in_what_was_changed(run, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(run, other)
    layouts = RunLayout(run), RunLayout(other)
    assert compare_runs(*layouts) == []
    assert describe({"differs": []}).startswith("identical: ")
    history = json.loads((other / "log_history.json").read_text())
    next(entry for entry in history if entry["step"] == 5)["grad_norm"] += 1e-6
    (other / "log_history.json").write_text(json.dumps(history))
    change(other / "run.json", metrics__eval_loss=0.5, batch__effective=6, best_metric=0.1)
    weights = load_file(other / "adapter" / "adapter_model.safetensors")
    next(iter(weights.values()))[0, 0] += 1
    save_file(weights, other / "adapter" / "adapter_model.safetensors")
    differs = compare_runs(*layouts)
    assert [entry["what"] for entry in differs] == [
        "adapter", "log_history.grad_norm", "batch.effective", "metrics.eval_loss", "best_metric",
    ]  # fmt: skip
    assert first_different_step(differs) == 5
    text = describe({"differs": differs, "first_different_step": 5})
    assert text.startswith("different: step 5 of the log first\nadapter: 1 of ")


def test_training_arguments_of_both_kinds_can_be_rebuilt_from_their_record(runs):
    for name, kind in (("decoder", SFTConfig), ("siglip", TrainingArguments)):
        recorded = read_recorded(runs / name / "run.json")
        fields = recorded_fields(kind, recorded, "arguments")
        again = kind(output_dir="x", use_cpu=True, report_to="none", **fields)
        now = resolved.resolved_arguments(again)
        assert resolved.changed_fields("arguments", recorded.resolved.arguments, now) == []
    hidden = SFTConfig(output_dir="x", use_cpu=True, bf16=False, eos_token="<end>")
    assert hidden.to_dict()["eos_token"] == "<EOS_TOKEN>"
    assert resolved.resolved_arguments(hidden)["eos_token"] == "<end>"
