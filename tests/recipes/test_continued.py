"""Runs that end early, build on another run, or must not end with an adapter that does nothing."""

import json
import os
import shutil
import signal

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, Trainer, TrainingArguments

from medft.check import check
from medft.config.recipe import DecoderRecipe
from medft.decoder.prepared import prepare_decoder_data
from medft.decoder.trainer import decoder_arguments
from medft.errors import BaseModelError, MedftError, RecipeError, RunError
from medft.export.merge import merge
from medft.models import adapter
from medft.models.saved import find_saved_adapter
from medft.training.callbacks import UntrainedParameterCallback
from medft.training.trainer import RowTrackingTrainer

EARLY = {"early_stopping_patience": 1, "early_stopping_threshold": 100.0, "save_steps": 1}
EARLY |= {"eval_strategy": "steps", "eval_steps": 1}


@pytest.fixture
def train(sections, tmp_path, run_script):
    """Run a recipe script in this process; gives the run directory."""

    def run(name, kind="decoder", changes=(), **train):
        recipe = sections(kind)
        recipe["train"] |= {"output_dir": str(tmp_path / name), "max_steps": 4, **train}
        file = tmp_path / f"{name}.yaml"
        file.write_text(yaml.safe_dump(recipe))
        run_script(kind, file, *changes)
        return tmp_path / name

    return run


def history(run):
    return json.loads((run / "log_history.json").read_text())


def weights(folder):
    return load_file(folder / "adapter_model.safetensors")


@pytest.mark.slow
def test_early_stopping_ends_a_run_whose_metric_gets_worse(train):
    stopping = {"early_stopping_patience": 2, "early_stopping_threshold": 100.0}
    run = train("early", **stopping, max_steps=9, eval_strategy="steps", eval_steps=1)
    losses = [entry["eval_loss"] for entry in history(run) if "eval_loss" in entry]
    assert len(losses) == 3  # the first, and two that are not better by 100
    record = json.loads((run / "run.json").read_text())
    assert (record["status"], record["steps_done"]) == ("completed", 3)
    assert (run / "best_model" / "adapter_model.safetensors").is_file()
    assert (run / "recipe.yaml").read_text().count("early_stopping_patience: 2") == 1
    assert all(entry["peak_memory_gib"] > 0 for entry in history(run) if "loss" in entry)


@pytest.mark.slow
def test_patience_is_counted_on_over_a_resumed_run(train):
    options = {"early_stopping_patience": 3, "early_stopping_threshold": 100.0, "max_steps": 9}
    options |= {"eval_strategy": "steps", "eval_steps": 1, "save_steps": 1}
    whole = train("whole", **options)
    assert json.loads((whole / "run.json").read_text())["steps_done"] == 4
    for step in (3, 4):
        (whole / f"checkpoint-{step}" / "manifest.json").unlink()
    again = train("whole", **options, changes=["train.resume_from_checkpoint=true"])
    assert json.loads((again / "run.json").read_text())["resumed_from"] == "checkpoint-2"
    assert json.loads((again / "run.json").read_text())["steps_done"] == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["train.early_stopping_patience=2", "data.validation=null"], "counts evaluations"),
        (["train.early_stopping_threshold=0.1"], "needs train.early_stopping_patience"),
        (
            ["lora.init_from=x", "lora.init_lora_weights=gaussian"],
            "both give the adapter's initial",
        ),
    ],
)
def test_contradictions_are_errors(sections, write_recipe, changes, message):
    with pytest.raises(RecipeError, match=message):
        DecoderRecipe.load(write_recipe(sections("decoder")), changes)


def test_a_run_continues_from_an_adapter(train, runs):
    first = runs / "decoder"
    run = train("more", changes=[f"lora.init_from={first}"], max_steps=2, logging_steps=1)
    record = json.loads((run / "run.json").read_text())
    assert record["init_from"]["path"] == str(first / "adapter")
    started, fresh = history(run)[0]["loss"], history(first)[0]["loss"]
    assert started < fresh - 0.2  # the base's first loss is not the tuned one's
    before, after = weights(first / "adapter"), weights(run / "adapter")
    assert before.keys() == after.keys()
    assert not any(torch.equal(before[name], after[name]) for name in before)
    # the first evaluation of a run that may not move is the last one of the run before
    still = train(
        "still",
        changes=[f"lora.init_from={first}"],
        max_steps=1,
        learning_rate=0.0,
        weight_decay=0.0,
        eval_strategy="steps",
    )
    assert all(torch.equal(t, weights(still / "adapter")[n]) for n, t in before.items())
    figures = [json.loads((r / "run.json").read_text())["metrics"] for r in (first, still)]
    assert figures[0]["eval_loss"] == pytest.approx(figures[1]["eval_loss"], rel=1e-6)


@pytest.mark.slow
def test_siglip_continues_with_its_scale_and_bias_read_once(train, runs, monkeypatch):
    first, found = runs / "siglip", []

    def find(source):
        found.append(source)
        return find_saved_adapter(source)

    monkeypatch.setattr(adapter, "find_saved_adapter", find)
    run = train("more", "siglip", [f"lora.init_from={first}"], max_steps=1, learning_rate=1e-9)
    assert found == [first]
    notes = [json.loads((f / "adapter" / "medft.json").read_text()) for f in (first, run)]
    for name in ("logit_scale", "logit_bias"):
        assert notes[0][name] == pytest.approx(notes[1][name], abs=1e-6)
    assert notes[0]["logit_bias"] != -10.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("lora.r=8", r"the same lora.r, 56 tensors of"),
        ("lora.alpha=4", "expected lora.alpha: 8, as the adapter of lora.init_from was trained"),
        ("lora.use_rslora=true", "expected lora.use_rslora: False"),
        ("lora.targets=cross_attention", "sit on the same layers"),
        ("lora.init_from=nowhere", "there is no nowhere: check the path"),
    ],
)
def test_an_adapter_of_another_shape_is_refused_before_loading(
    sections, write_recipe, runs, change, message
):
    recipe = sections("decoder")
    recipe["lora"]["init_from"] = str(runs / "decoder")
    with pytest.raises(MedftError, match=message):
        check(write_recipe(recipe), [change])


def test_an_adapter_of_another_base_is_refused(sections, write_recipe, runs, bases, tmp_path):
    merge(runs / "decoder", tmp_path / "merged")
    recipe = sections("decoder")
    recipe["lora"]["init_from"] = str(runs / "decoder")
    file = write_recipe(recipe)
    check(file, [])
    with pytest.raises(BaseModelError, match=r"expected model\.base with sha256 .*merged has"):
        check(file, [f"model.base={tmp_path / 'merged'}"])


@pytest.mark.slow
def test_a_merged_model_is_a_base_like_any_other(train, runs, tmp_path):
    first = runs / "decoder"
    merge(first, tmp_path / "merged")
    changes = [f"model.base={tmp_path / 'merged'}"]
    run = train("second", changes=changes, max_steps=2, learning_rate=1e-9, eval_strategy="steps")
    figures = [json.loads((r / "run.json").read_text())["metrics"] for r in (first, run)]
    # fp32: the merged weights are base + update, rounded once
    assert figures[0]["eval_loss"] == pytest.approx(figures[1]["eval_loss"], rel=1e-5)
    base = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged")
    PeftModel.from_pretrained(base, run / "adapter")


def test_a_merged_models_flag_must_be_kept(sections, write_recipe, runs, tmp_path):
    merge(runs / "decoder", tmp_path / "merged")
    file = tmp_path / "merged" / "medft.json"
    notes = json.loads(file.read_text())
    file.write_text(json.dumps({**notes, "cross_attention_fix": True}))
    recipe = DecoderRecipe.load(
        write_recipe(sections("decoder")), [f"model.base={tmp_path / 'merged'}"]
    )
    arguments = decoder_arguments(recipe.train, dtype="float32")
    with pytest.raises(MedftError, match=r"expected model\.cross_attention_fix: true, with"):
        prepare_decoder_data(recipe.model, recipe.data, recipe.lora, arguments)
    model = recipe.model.model_copy(update={"cross_attention_fix": True})
    assert prepare_decoder_data(model, recipe.data, recipe.lora, arguments).collator.isolates_rows


@pytest.fixture
def text_rows(mixed_rows, tmp_path):
    """Five rows without images, as an override."""
    lines = [json.loads(line) for line in mixed_rows.read_text().splitlines()]
    file = tmp_path / "texts.jsonl"
    file.write_text("".join(json.dumps(r) + "\n" for r in lines if not r["images"]))
    return [f"data.train={file}", "data.validation=null"]


def test_layers_that_only_images_run_are_refused_for_rows_without(train, text_rows, tmp_path):
    message = r"14 of 28 layers need one, first model\.language_model\.layers\.1\.cross_attn"
    with pytest.raises(MedftError, match=message):
        train("texts", changes=text_rows)
    assert not (tmp_path / "texts").exists()
    layers = r"lora.targets=model\.language_model\.layers\.(0|2)\..*_proj"
    run = train("fine", changes=[*text_rows, layers], max_steps=2)
    assert (run / "adapter").is_dir()
    for idle in ("multi_modal_projector", "language_model.layers.1.mlp"):
        with pytest.raises(MedftError, match=rf"1 of 15 layers need one, first model\.\S*{idle}:"):
            train("copies", changes=[*text_rows, layers, f"lora.modules_to_save=[{idle}]"])
    assert not (tmp_path / "copies").exists()


@pytest.mark.parametrize(
    "excluded",
    [
        ["lora.targets=[q_proj]", "lora.exclude_modules=.*(cross_attn|vision).*"],
        ["lora.targets=[mlp.up_proj]", "lora.layers_to_transform=[0, 2]"],
    ],
)
def test_layers_that_are_left_out_already_are_no_reason_to_refuse(train, text_rows, excluded):
    run = train("fine", changes=[*text_rows, *excluded], max_steps=2)
    assert (run / "adapter").is_dir()


class Half(torch.nn.Module):
    """Two adapters, of which a forward runs one."""

    def __init__(self, idle="lora_idle"):
        super().__init__()
        self.lora_used = torch.nn.Linear(2, 1)
        self.add_module(idle, torch.nn.ModuleDict({"default": torch.nn.Linear(2, 1)}))

    def forward(self, x):
        return {"loss": self.lora_used(x).square().mean()}


@pytest.mark.parametrize(("steps", "stops"), [(3, False), (4, True), (9, True)])
def test_a_tensor_without_gradient_stops_the_run_after_a_whole_epoch(tmp_path, steps, stops):
    rows = [{"x": torch.randn(2)} for _ in range(8)]
    arguments = TrainingArguments(
        str(tmp_path), max_steps=steps, per_device_train_batch_size=2, use_cpu=True,
        report_to="none", save_steps=2,
    )  # fmt: skip

    def trainer_of(idle="lora_idle"):
        callbacks = [UntrainedParameterCallback()]
        return Trainer(Half(idle), arguments, train_dataset=rows, callbacks=callbacks)

    if not stops:
        trainer_of().train()
        again = trainer_of()
        again.args.max_steps = 4  # the rest of an epoch tells nothing either
        again.train(resume_from_checkpoint=f"{tmp_path}/checkpoint-2")
        return
    for idle in ("lora_idle", "modules_to_save"):
        trainer = trainer_of(idle)
        message = rf"2 got none in an epoch, first {idle}\.default\.bias"
        with pytest.raises(RunError, match=message):
            trainer.train()
        assert trainer.state.global_step == 4


def test_an_adapter_that_did_not_move_is_not_saved(train, tmp_path):
    with pytest.raises(BaseModelError, match=r"every lora_B is zero as before training"):
        train(
            "still",
            max_steps=1,
            learning_rate=0.0,
            eval_strategy="no",
            changes=["data.validation=null"],
        )
    assert not (tmp_path / "still" / "adapter").exists()
    assert (tmp_path / "still" / "checkpoint-1" / "manifest.json").is_file()


def test_dora_rslora_and_patterns_train_on_4_bit_load_and_merge(train, bases, tmp_path):
    run = train(
        "dora",
        changes=[
            "quantization={bits: 4}",
            "lora.use_dora=true",
            "lora.use_rslora=true",
            "lora.rank_pattern={o_proj: 2}",
            "lora.alpha_pattern={q_proj: 32}",
        ],
    )
    saved = weights(run / "adapter")
    assert sum("lora_magnitude_vector" in name for name in saved) == 28
    assert {w.shape[0] for n, w in saved.items() if "o_proj.lora_A" in n} == {2}
    assert {w.dtype for w in saved.values()} == {torch.float32}
    base = AutoModelForImageTextToText.from_pretrained(bases / "decoder")
    plain = PeftModel.from_pretrained(base, run / "adapter").eval()
    layer = plain.base_model.model.model.language_model.layers[0].self_attn
    assert layer.q_proj.scaling["default"] == 32 / 4**0.5  # rsLoRA divides by the root of r
    assert layer.o_proj.scaling["default"] == 8 / 2**0.5
    merge(run, tmp_path / "merged")
    merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged").eval()
    ids = torch.arange(7, 27)[None]
    with torch.no_grad():
        left, right = plain(input_ids=ids).logits, merged(input_ids=ids).logits
        with plain.disable_adapter():
            untuned = plain(input_ids=ids).logits
    assert (left - right).abs().max() < 1e-4  # DoRA's norm is summed in another order
    assert (left - untuned).abs().max() > 1e-2


def test_a_resumed_run_needs_its_source_no_more_and_keeps_its_record(train, runs, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(runs / "decoder" / "adapter", source)
    changes = [f"lora.init_from={source}"]
    run = train("run", changes=changes, save_steps=2)
    before = json.loads((run / "run.json").read_text())["init_from"]
    last = weights(run / "adapter")
    (run / "checkpoint-4" / "manifest.json").unlink()
    shutil.rmtree(source)
    train("run", changes=[*changes, "train.resume_from_checkpoint=true"], save_steps=2)
    assert json.loads((run / "run.json").read_text())["init_from"] == before
    assert all(torch.equal(w, last[name]) for name, w in weights(run / "adapter").items())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "steps"),
    [({"eval_strategy": "steps", "eval_steps": 1, "save_steps": 1}, 4), (EARLY, 2)],
)
def test_a_run_that_is_at_its_end_is_not_trained_further(train, options, steps):
    run = train("run", **options)
    with pytest.raises(RunError, match=rf"an unfinished run .*checkpoint-{steps} is its last"):
        train("run", **options, changes=["train.resume_from_checkpoint=true"])
    assert json.loads((run / "run.json").read_text())["steps_done"] == steps


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "options", "steps"), [("decoder", {}, 4), ("siglip", {}, 4), ("siglip", EARLY, 2)]
)
def test_a_result_that_was_not_written_is_written_without_training_further(
    train, kind, options, steps
):
    run = train("run", kind, **options)
    before = weights(run / "adapter")
    notes = (run / "adapter" / "medft.json").read_text()
    shutil.rmtree(run / "adapter")
    record = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**record, "status": "failed"}))
    train("run", kind, **options, changes=["train.resume_from_checkpoint=true"])
    assert all(torch.equal(w, before[name]) for name, w in weights(run / "adapter").items())
    assert (run / "adapter" / "medft.json").read_text() == notes
    record = json.loads((run / "run.json").read_text())
    assert (record["status"], record["steps_done"]) == ("completed", steps)


def test_sigterm_in_the_last_evaluation_loses_nothing(train, monkeypatch):
    evaluate = RowTrackingTrainer.evaluate

    def interrupted(trainer, *args, **kwargs):
        if trainer.state.global_step == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(trainer, *args, **kwargs)

    monkeypatch.setattr(RowTrackingTrainer, "evaluate", interrupted)
    run = train("run", eval_strategy="steps", eval_steps=2)
    assert json.loads((run / "run.json").read_text())["status"] == "completed"
    assert (run / "adapter").is_dir()


@pytest.mark.parametrize(
    ("key", "value"),
    [("init_lora_weights", "pissa"), ("init_lora_weights", "olora"), ("bias", "all")],
)
def test_an_adapter_that_changed_its_base_is_no_beginning(
    runs, tmp_path, sections, write_recipe, key, value
):
    run = shutil.copytree(runs / "decoder" / "adapter", tmp_path / "adapter")
    config = json.loads((run / "adapter_config.json").read_text())
    (run / "adapter_config.json").write_text(json.dumps(config | {key: value}))
    recipe = sections("decoder")
    recipe["lora"]["init_from"] = str(run)
    with pytest.raises(MedftError, match=f"has {key}: {value}, which changed them: merge it"):
        check(write_recipe(recipe), [])


def test_a_damaged_source_is_one_sentence(sections, write_recipe, runs, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(runs / "decoder" / "adapter", source)
    recipe = sections("decoder")
    recipe["lora"]["init_from"] = str(source)
    file = write_recipe(recipe)
    for content, message in (("{", "could not read it"), ("{}", "expected an adapter that PEFT")):
        (source / "adapter_config.json").write_text(content)
        with pytest.raises(MedftError, match=message):
            check(file, [])
    shutil.copytree(runs / "decoder" / "adapter", source, dirs_exist_ok=True)
    with pytest.raises(MedftError, match=r"expected model\.cross_attention_fix: false, with which"):
        check(file, ["model.cross_attention_fix=true"])


def test_reentrant_checkpointing_of_a_trained_mllama_tower_is_refused(
    sections, write_recipe, bases
):
    changes = ["train.gradient_checkpointing=true", "lora.targets=vision"]
    reentrant = "train.gradient_checkpointing_kwargs={use_reentrant: true}"
    file = write_recipe(sections("decoder"))
    check(file, changes)
    with pytest.raises(MedftError, match="which the tower of mllama cannot do"):
        check(file, [*changes, reentrant])
    check(file, [*changes, reentrant, f"model.base={bases / 'gemma3'}"])
