"""The trainer trains what was asked: against plain transformers with labels made by hand."""

import json
import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn import functional
from transformers import AutoModelForImageTextToText, AutoProcessor, TrainerCallback
from trl import SFTConfig, SFTTrainer

from medft.data.images import open_image
from medft.data.rows import image_source
from medft.decoder.families.mllama import MLLAMA
from medft.errors import MedftError, RecipeError
from medft.training import trainer as training_trainer
from medft.training.callbacks import CheckpointManifestCallback


@pytest.fixture
def trainer(sections, write_recipe, build_trainer):
    def make(changes=(), **train):
        recipe = sections("decoder")
        recipe["train"] |= {"max_steps": 1, "save_strategy": "no", **train}
        return build_trainer(write_recipe(recipe), changes, is_fresh=False)

    return make


def plain_batch(bases, rows):
    """Inputs by the stock processor and labels written by hand from the end-of-turn tokens."""
    processor = AutoProcessor.from_pretrained(bases / "decoder", backend="pil")
    answers = []
    texts = []

    for row in rows:
        messages = json.loads(row["messages"])
        texts.append(processor.apply_chat_template(messages))
        answers.append(messages[-1]["content"][0]["text"])
    images = [[open_image(image_source(image)) for image in row["images"]] for row in rows]
    batch = processor(
        images=images, text=texts, add_special_tokens=False, padding=True, return_tensors="pt"
    )
    labels = torch.full_like(batch["input_ids"], -100)
    for index, answer in enumerate(answers):
        tokens = processor.tokenizer(answer + "<|eot_id|>", add_special_tokens=False)["input_ids"]
        stop = int(batch["attention_mask"][index].sum())
        assert batch["input_ids"][index, stop - len(tokens) : stop].tolist() == tokens
        labels[index, stop - len(tokens) : stop] = torch.tensor(tokens)
    return batch, labels


def plain_model(bases, trainer):
    """The base by plain transformers with the trainer's adapter by plain PEFT."""
    model = AutoModelForImageTextToText.from_pretrained(bases / "decoder")
    config = LoraConfig(r=4, lora_alpha=8, target_modules=MLLAMA.presets["language"])
    model = get_peft_model(model, config)
    weights = {n: p for n, p in trainer.model.named_parameters() if "lora_" in n}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(weights[name])
    return model


def plain_loss(model, batch, labels, tokens=None):
    logits = model(**batch).logits[:, :-1].float()
    total = functional.cross_entropy(
        logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100, reduction="sum"
    )
    return total / (tokens or (labels[:, 1:] != -100).sum())


def test_the_step_0_loss_and_gradient_are_those_of_plain_transformers(bases, trainer):
    trained = trainer(("lora.dropout=0",))
    rows = [trained.train_dataset[index] for index in range(7)]
    inputs = trained.to_device(trained.data_collator(rows))
    assert "row_ids" not in inputs
    trained.model.train()
    loss = trained.compute_loss(trained.model, inputs)
    loss.backward()

    batch, labels = plain_batch(bases, rows)
    plain = plain_model(bases, trained)
    expected = plain_loss(plain, batch, labels)
    expected.backward()
    # fp32 sums in another order: far above the 1e-7 of one rounding, far below any wrong token
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    gradients = {n: p.grad for n, p in trained.model.named_parameters() if p.requires_grad}
    for name, parameter in plain.named_parameters():
        if parameter.requires_grad:
            gap = (gradients[name] - parameter.grad).norm() / parameter.grad.norm()
            assert gap < 1e-4, name
    wrong = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    wrong[wrong == 512] = -100
    assert abs(plain_loss(plain, batch, wrong).item() - loss.item()) > 1e-3


def test_the_logged_loss_of_the_first_step_is_the_plain_one(bases, trainer):
    trained = trainer(("lora.dropout=0",), gradient_accumulation_steps=2)
    batches = list(trained.get_train_dataloader())[:2]
    plain = plain_model(bases, trained)
    tokens = sum(int((batch["labels"] != -100).sum()) for batch in batches)
    expected = 0.0
    with torch.no_grad():
        for batch in batches:
            labels = batch.pop("labels")
            batch |= MLLAMA.stack_images([[image] for image in batch.pop("images")])
            expected += plain_loss(plain, batch, labels, tokens).item()
    trained.train()
    assert trained.state.log_history[0]["loss"] == pytest.approx(expected, rel=1e-5)


def test_validation_loss_does_not_depend_on_the_batch_size(bases, trainer):
    small, large = (trainer(per_device_eval_batch_size=size).evaluate() for size in (1, 3))
    tokens = small["eval_supervised_tokens"]
    assert small["eval_loss"] == pytest.approx(large["eval_loss"], rel=1e-6)
    assert small["eval_token_accuracy"] == large["eval_token_accuracy"]
    assert small["eval_perplexity"] == pytest.approx(math.exp(small["eval_loss"]))
    trained = trainer()
    batch, labels = plain_batch(bases, list(trained.eval_dataset))
    plain = plain_model(bases, trained).eval()
    with torch.no_grad():
        expected = plain_loss(plain, batch, labels).item()
    assert small["eval_loss"] == pytest.approx(expected, rel=1e-5)
    assert tokens == int((labels[:, 1:] != -100).sum())


def test_adapters_stay_float32_on_a_4_bit_base_where_trl_rounds_them(trainer, data):
    changes = ("quantization={bits: 4}", "model.dtype=bfloat16")
    trained = trainer(changes)
    weights = {n: p for n, p in trained.model.named_parameters() if p.requires_grad}
    assert {p.dtype for p in weights.values()} == {torch.float32}
    rounded = [p.to(torch.bfloat16).float() for p in weights.values()]
    assert any(not torch.equal(a, b) for a, b in zip(weights.values(), rounded, strict=True))
    trained.train()
    states = trained.optimizer.state.values()
    assert {s["exp_avg"].dtype for s in states} == {torch.float32}
    arguments = SFTConfig(
        "unused", max_length=None, report_to="none", remove_unused_columns=False, use_cpu=True
    )
    stock = SFTTrainer(
        trained.model, args=arguments, train_dataset=trained.train_dataset,
        data_collator=trained.data_collator, processing_class=trained.processing_class,
    )  # fmt: skip
    dtypes = {p.dtype for p in stock.model.parameters() if p.requires_grad}
    assert dtypes == {torch.bfloat16}  # the trap


def test_training_moves_the_adapter_alone(trainer):
    trained = trainer(max_steps=3)
    before = {name: p.detach().clone() for name, p in trained.model.named_parameters()}
    trained.train()
    for name, parameter in trained.model.named_parameters():
        assert torch.equal(parameter, before[name]) != parameter.requires_grad, name


@pytest.mark.parametrize(
    ("dtype", "launched", "message"),
    [
        ("float32", "bf16", "mixed_precision to be absent, it is bf16"),
        ("bfloat16", "fp16", "it is fp16"),
    ],
)
def test_a_launchers_precision_against_the_recipe_is_an_error(
    trainer, monkeypatch, dtype, launched, message
):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launched)
    with pytest.raises(RecipeError, match=message):
        trainer((f"model.dtype={dtype}",))


@pytest.mark.skipif(torch.cuda.is_available(), reason="float16 is allowed on a GPU")
def test_float16_without_gpu_is_an_error_before_loading(trainer):
    with pytest.raises(RecipeError, match="expected a GPU"):
        trainer(("model.dtype=float16",))


def test_bfloat16_runs_under_autocast_and_float32_does_not(trainer):
    assert trainer(("model.dtype=bfloat16",)).accelerator.mixed_precision == "bf16"
    assert trainer().accelerator.mixed_precision == "no"


@pytest.mark.parametrize(("name", "more"), [("perplexity", False), ("eval_token_accuracy", True)])
def test_the_direction_of_a_metric_is_known(trainer, name, more):
    made = trainer((f"train.metric_for_best_model={name}",))
    assert made.args.greater_is_better is more
    with pytest.raises(RecipeError, match="one of eval_loss, eval_perplexity"):
        trainer(("train.metric_for_best_model=foo",))


@pytest.mark.parametrize(
    "change",
    ["train.report_to=wandb", "train.lr_scheduler_kwargs={foo: 1}", "train.optim=adamm"],
)
def test_what_would_fail_after_loading_fails_before(trainer, change):
    with pytest.raises(RecipeError, match="the trainer accepts"):
        trainer((change,))


def test_a_value_that_the_trainer_refuses_is_one_sentence(trainer):
    with pytest.raises(RecipeError, match="expected values that the trainer accepts in train"):
        trainer(lr_scheduler_type="linearr")


def orders(made, **options):
    """The ids of the batches that a training takes, in its order."""
    seen, collate = [], made.data_collator

    def noted(rows):
        seen.append([row["id"] for row in rows])
        return collate(rows)

    made.data_collator = noted
    made.train(**options)
    return seen


def test_rows_of_different_image_counts_train_in_batches_of_their_own(trainer, mixed_rows):
    made = trainer(
        [f"data.train={mixed_rows}", "data.validation=null"], num_train_epochs=1, max_steps=-1
    )
    rows = {row["id"]: len(row["images"]) for row in made.train_dataset}
    seen = orders(made)
    counts = [{rows[name] for name in batch} for batch in seen]
    assert all(len(count) == 1 for count in counts)
    assert {next(iter(count)) for count in counts} == {0, 1, 2}
    assert {name for batch in seen for name in batch} == set(rows)
    assert sorted(map(len, seen)) == [1, 2, *[3] * 8]  # 5, 15 and 7 rows
    assert sum(map(len, seen)) == len(rows)


def test_mixed_rows_resume_in_the_middle_of_an_epoch(trainer, mixed_rows):
    train = {"max_steps": 16, "save_strategy": "steps", "save_steps": 13}
    whole = trainer([f"data.train={mixed_rows}", "data.validation=null"], **train)
    order = orders(whole)
    assert order[:3] != order[10:13]  # ten rounds an epoch, each epoch in an order of its own
    again = trainer([f"data.train={mixed_rows}", "data.validation=null"], **train)
    checkpoint = f"{whole.args.output_dir}/checkpoint-13"
    assert orders(again, resume_from_checkpoint=checkpoint) == order[13:]


def test_validation_rows_of_different_image_counts_need_batches_of_one(trainer, mixed_rows):
    changes = [f"data.validation={mixed_rows}", "data.allow_overlap=true"]
    with pytest.raises(MedftError, match="per_device_eval_batch_size: 1"):
        trainer(changes)
    made = trainer([*changes, "train.per_device_eval_batch_size=1"])
    assert math.isfinite(made.evaluate()["eval_loss"])


def test_the_log_tells_rows_and_tokens_a_second_and_the_share_of_waiting(trainer, monkeypatch):
    made = trainer(["data.validation=null"], max_steps=3)
    seconds, collate = iter(range(1000)), made.data_collator
    taken = []

    def noted(rows):
        batch = collate(rows)
        taken.append((batch["row_ids"], int((batch["labels"] >= 0).sum())))
        return batch

    made.data_collator = noted
    monkeypatch.setattr(training_trainer.time, "perf_counter", lambda: next(seconds))
    made.train()
    logged = [entry for entry in made.state.log_history if "loss" in entry]
    for entry, (ids, tokens) in zip(logged, taken[: len(logged)], strict=True):
        rows = entry["rows_per_second"]
        assert entry["supervised_tokens_per_second"] == pytest.approx(
            rows * tokens / len(ids), rel=1e-3
        )
        assert 0 < entry["data_wait"] < 1
    assert made.row_ids == taken[2][0]


@pytest.mark.parametrize("is_left_out", [True, False])
def test_the_seconds_of_a_save_are_none_of_training(trainer, monkeypatch, is_left_out):
    made = trainer(["data.validation=null"], max_steps=2, save_steps=1, save_strategy="steps")
    seconds = [0.0]

    def now():
        seconds[0] += 1
        return seconds[0]

    class SlowSave(TrainerCallback):
        def on_log(self, *args, **kwargs):
            seconds[0] += 1e6  # after the rates were computed, before the save

    monkeypatch.setattr(training_trainer.time, "perf_counter", now)
    monkeypatch.setattr(training_trainer.time, "monotonic", now)
    took = made.leave_out_of_rates if is_left_out else lambda seconds: None
    made.add_callback(CheckpointManifestCallback(None, took))
    made.add_callback(SlowSave())
    made.train()
    _, rate = (e["rows_per_second"] for e in made.state.log_history if "loss" in e)
    assert (rate > 1e-2) == is_left_out


def test_a_validation_batch_that_cannot_be_computed_stops_before_the_first_step(trainer):
    made = trainer(eval_strategy="epoch", eval_steps=None)
    before = {n: p.detach().clone() for n, p in made.model.named_parameters() if p.requires_grad}
    stock, rows = made.prediction_step, []

    def changed(model, inputs, *args, **options):
        assert not model.training
        rows.append(inputs["row_ids"])
        stock(model, inputs, *args, **options)
        raise TypeError("an interface that changed")

    made.prediction_step = changed
    with pytest.raises(TypeError, match="an interface that changed"):
        made.train()
    assert rows == [made.eval_dataset[:2]["id"]]
    assert made.state.global_step == 0
    after = dict(made.model.named_parameters())
    assert all(torch.equal(after[name], value) for name, value in before.items())
