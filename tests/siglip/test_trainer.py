"""The contrastive trainer against transformers' own loss; scale, bias and captions as released."""

import itertools
import json
import math
import subprocess
import sys

import pytest
import siglip_steps
import torch
from siglip_steps import build_trainer, first_step
from transformers import AutoModel, AutoProcessor

from medft.errors import MedftError
from medft.siglip.model import scale_and_bias


@pytest.fixture
def trainer(sections, write_recipe):
    def make(changes=(), **train):
        recipe = sections("siglip")
        recipe["train"] |= {"max_steps": 1, "save_strategy": "no", **train}
        return build_trainer(write_recipe(recipe), changes)

    return make


def step_of(trainer, batches):
    """The micro-batches of a step, as Trainer's loop gets them."""
    return trainer.get_batch_samples(iter(batches), len(batches), trainer.args.device)[0]


def test_the_step_0_loss_is_transformers_own(bases, trainer):
    trained = trainer(("contrastive.positives=diagonal", "data.image_size=56"))
    entries = [trained.train_dataset[index] for index in range(7)]
    [batch] = step_of(trained, [trained.data_collator(entries)])
    loss = trained.compute_loss(trained.model, trained.to_device(batch))

    processor = AutoProcessor.from_pretrained(bases / "siglip", backend="pil")
    images = [entry.image for entry in entries]
    batch = processor(
        text=[entry.caption for entry in entries], images=images, padding="max_length",
        max_length=64, return_tensors="pt",
    )  # fmt: skip
    stock = AutoModel.from_pretrained(bases / "siglip")
    with torch.no_grad():
        expected = stock(
            input_ids=batch["input_ids"], pixel_values=batch["pixel_values"], return_loss=True
        ).loss
        short = processor(
            text=[entry.caption for entry in entries], images=images, padding=True,
            return_tensors="pt",
        )  # fmt: skip
        unpadded = stock(
            input_ids=short["input_ids"], pixel_values=short["pixel_values"], return_loss=True
        ).loss
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert abs(unpadded.item() - loss.item()) > 1e-5  # the trap: padding=True


def test_captions_are_padded_to_64_and_have_no_mask(trainer):
    trained = trainer()
    batch = trained.data_collator([trained.train_dataset[index] for index in range(3)])
    assert batch.keys() == {"input_ids", "pixel_values", "group_ids", "row_ids"}
    assert batch["input_ids"].shape == (3, 64)
    assert (batch["input_ids"][:, -1] == 1).all()
    assert batch["pixel_values"].shape == (3, 3, 84, 84)


def test_scale_and_bias_have_a_group_without_decay_at_their_own_rate(trainer):
    trained = trainer(("contrastive.scale_lr=3.0", "train.weight_decay=0.2"))
    own = {id(p) for p in scale_and_bias(trained.model)}
    groups = trained.create_optimizer().param_groups
    [group] = [g for g in groups if any(id(p) in own for p in g["params"])]
    assert {id(p) for p in group["params"]} == own
    assert group["weight_decay"] == 0
    assert group["lr"] == pytest.approx(3e-2)
    counted = [id(p) for g in groups for p in g["params"]]
    assert len(counted) == len(set(counted))
    assert set(counted) == {id(p) for p in trained.model.parameters() if p.requires_grad}
    assert any(g["weight_decay"] == 0.2 for g in groups)


def test_training_moves_adapter_scale_and_bias_alone(trainer):
    trained = trainer(max_steps=3)
    before = {name: p.detach().clone() for name, p in trained.model.named_parameters()}
    trained.train()
    for name, parameter in trained.model.named_parameters():
        assert torch.equal(parameter, before[name]) != parameter.requires_grad, name
    assert sum(p.requires_grad for p in scale_and_bias(trained.model)) == 2
    logged = trained.state.log_history[0]
    assert {"loss", "scale", "bias", "grad_norm"} <= logged.keys()


def test_validation_sees_the_split_as_one_batch(trainer):
    small, large = (trainer(per_device_eval_batch_size=size) for size in (1, 3))
    first, second = small.evaluate(), large.evaluate()
    assert first["eval_loss"] == pytest.approx(second["eval_loss"], rel=1e-6)
    entries = list(large.eval_dataset)
    [batch] = step_of(large, [large.data_collator(entries)])
    with torch.no_grad():
        expected = large.compute_loss(large.model.eval(), large.to_device(batch)).item()
    assert first["eval_loss"] == pytest.approx(expected, rel=1e-6)
    assert first["eval_pool"] == len(entries)


def test_an_evaluation_ranks_every_caption_that_is_right(step, many_rows):
    recipe = step(16, 1)
    trained = build_trainer(recipe, (f"data.validation={many_rows}", "data.allow_overlap=true"))
    found = trained.evaluate()
    whole = trained.data_collator([trained.eval_dataset[index] for index in range(70)])
    model = trained.model.eval()
    with torch.no_grad():
        outputs = model(input_ids=whole["input_ids"], pixel_values=whole["pixel_values"])
    images, texts = (
        torch.nn.functional.normalize(part.double(), dim=-1)
        for part in (outputs.image_embeds, outputs.text_embeds)
    )
    ids = whole["input_ids"]
    right = (ids[:, None] == ids).all(dim=-1)
    assert right.sum(dim=1).max() == 20  # captions that come again

    for way, similarity in (
        ("image_to_text", images @ texts.T),
        ("text_to_image", texts @ images.T),
    ):
        places = []
        for row, matches in zip(similarity, right, strict=True):
            best = row[matches].max()
            before = (row > best + 1e-6).sum()
            tied = ((row - best).abs() <= 1e-6).logical_and(~matches).sum()
            places.append(float(1 + before + tied / 2))
        places = torch.tensor(places)
        for k in (1, 5, 10):
            expected = (places <= k).double().mean().item()
            assert found[f"eval_{way}_recall@{k}"] == pytest.approx(expected)
        middle = torch.quantile(places, 0.5).item()
        assert found[f"eval_{way}_median_rank"] == pytest.approx(middle)
    missed = [math.prod((70 - m - i) / (70 - i) for i in range(5)) for m in right.sum(1).tolist()]
    assert found["eval_chance_recall@5"] == pytest.approx(1 - sum(missed) / 70)
    assert found["eval_pool"] == 70
    assert found["eval_excess"] == pytest.approx(found["eval_loss"] - found["eval_floor"])
    assert found["eval_floor"] > 0  # images come again with other captions


def test_best_model_is_the_best_by_the_metric_that_the_recipe_names(sections, write_recipe):
    recipe = sections("siglip")
    recipe["train"] |= {
        "metric_for_best_model": "eval_text_to_image_recall@1",
        "eval_strategy": "steps",
        "eval_steps": 1,
    }
    trained = build_trainer(write_recipe(recipe), ("train.max_steps=6",))
    assert trained.args.greater_is_better
    recipe["train"]["metric_for_best_model"] = "eval_text_to_image_median_rank"
    assert not build_trainer(write_recipe(recipe)).args.greater_is_better
    trained.train()
    history = [e for e in trained.state.log_history if "eval_loss" in e]
    figures = [entry["eval_text_to_image_recall@1"] for entry in history]
    assert trained.state.best_metric == max(figures)
    recipe["train"]["metric_for_best_model"] = "eval_recall"
    with pytest.raises(MedftError, match="eval_image_to_text_recall@1, "):
        build_trainer(write_recipe(recipe))


def test_a_scale_beyond_100_is_trained_and_stays_there(trainer):
    trained = trainer(max_steps=3, learning_rate=1e-3)
    with torch.no_grad():
        scale_and_bias(trained.model)[0].fill_(math.log(118.0))
    trained.train()
    scales = [entry["scale"] for entry in trained.state.log_history if "scale" in entry]
    assert all(110 < scale < 125 for scale in scales)
    assert scales[-1] != scales[0]


def test_the_log_tells_floor_excess_and_mean_logits(step):
    _, _, logged = first_step(step(16, 2))
    assert logged["excess"] == pytest.approx(logged["loss"] - logged["floor"])
    assert logged["floor"] > 0
    assert logged["positive_logit"] != logged["negative_logit"]
    _, _, softmax = first_step(step(16, 2), ("contrastive.loss=softmax",))
    assert not {"floor", "excess"} & softmax.keys()


@pytest.fixture
def many_rows(data):
    """A chat file of 70 rows: drawn images twice or more, 20 captions that come again."""
    lines = (data / "chat" / "train.jsonl").read_text().splitlines()
    rows = []
    for number in range(70):
        row = json.loads(lines[number % len(lines)])
        row["id"], row["group_id"] = f"row {number}", f"patient {number // 2}"
        row["messages"][1]["content"][0]["text"] = f"Finding {min(number, 50) * 7919} seen."
        rows.append(row)
    file = data / "chat" / "many.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture
def step(sections, write_recipe, many_rows):
    """Make one step of as many rows and micro-batches, from a random adapter."""
    numbers = itertools.count()

    def file(per_device, accumulation, **lora):
        recipe = sections("siglip")
        recipe["data"] |= {"train": str(many_rows), "validation": None}
        recipe["lora"] |= {"dropout": 0.0, "init_lora_weights": "gaussian", **lora}
        recipe["train"] |= {
            "per_device_train_batch_size": per_device,
            "gradient_accumulation_steps": accumulation,
        }
        return write_recipe(recipe, f"run{next(numbers)}")

    return file


def assert_same_gradients(left, right, relative=1e-5):
    assert left.keys() == right.keys()
    assert any("logit_scale" in name for name in left)
    for name, gradient in left.items():
        gap = (gradient - right[name]).norm()
        assert gap <= relative * right[name].norm(), (name, float(gap / right[name].norm()))


def test_eight_by_eight_is_sixty_four_and_plain_accumulation_is_not(step):
    _, whole, of_whole = first_step(step(64, 1))
    _, parts, of_parts = first_step(step(8, 8))
    assert len(whole) == 50  # 24 layers of two matrices, scale and bias
    assert of_parts["loss"] == pytest.approx(of_whole["loss"], rel=1e-6)
    assert_same_gradients(parts, whole)  # fp32, summed in another order

    _, plain, of_plain = first_step(step(8, 8), ("contrastive.exact_batch=false",))
    assert of_plain["loss"] < 0.5 * of_whole["loss"]
    assert all((plain[name] - whole[name]).norm() > 0.1 * whole[name].norm() for name in whole)


@pytest.mark.slow
def test_two_ranks_of_four_by_eight_are_sixty_four(step, tmp_path):
    _, whole, of_whole = first_step(step(64, 1))
    words = ["torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    out = tmp_path / "found.pt"
    command = [sys.executable, "-m", *words, siglip_steps.__file__, str(step(8, 4)), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = torch.load(out, weights_only=True)
    assert found["loss"] == pytest.approx(of_whole["loss"], rel=1e-6)
    assert_same_gradients(found["gradients"], whole)

    plain = [*command, "contrastive.exact_batch=false"]
    done = subprocess.run(plain, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    other = torch.load(out, weights_only=True)["gradients"]
    assert all((other[name] - whole[name]).norm() > 0.1 * whole[name].norm() for name in whole)


def remember(trained):
    """Keep the micro-batches of a step and the random state in which they are computed."""
    take = trained.get_batch_samples

    def remembering(*args):
        batches, items = take(*args)
        if batches:
            trained.seen = [dict(batch) for batch in batches]
            trained.random_state = torch.get_rng_state()
        return batches, items

    trained.get_batch_samples = remembering


@pytest.mark.parametrize("shape", [(8, 8), (16, 4), (64, 1)])
def test_dropout_is_replayed_as_in_one_graph_over_the_same_micro_batches(step, shape):
    trained, found, logged = first_step(step(*shape, dropout=0.3), prepare=remember)
    again = build_trainer(step(*shape, dropout=0.3))
    model = again.model.train()
    torch.set_rng_state(trained.random_state)
    outputs = [
        model(input_ids=b["input_ids"], pixel_values=b["pixel_values"]) for b in trained.seen
    ]
    images, texts = (
        torch.nn.functional.normalize(torch.cat(parts).double(), dim=-1)
        for parts in (
            [o.vision_model_output.pooler_output for o in outputs],
            [o.text_model_output.pooler_output for o in outputs],
        )
    )
    ids = torch.cat([b["input_ids"] for b in trained.seen])
    scale, bias = scale_and_bias(model)
    logits = scale.double().exp() * images @ texts.T + bias.double()
    matches = (ids[:, None] == ids).all(dim=-1)
    assert matches.sum() > len(ids)
    loss = torch.nn.functional.softplus(torch.where(matches, -logits, logits)).sum() / len(ids)
    loss.backward()
    expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert logged["loss"] == pytest.approx(loss.item(), rel=1e-6)
    assert_same_gradients(found, expected)
    _, other, _ = first_step(step(*shape))
    assert any((other[name] - found[name]).norm() > 0.05 * found[name].norm() for name in found)


def test_a_smaller_last_group_is_left_out_and_counted(step, caplog):
    with caplog.at_level("INFO", "medft.siglip.prepared"):
        trained, _, _ = first_step(step(8, 4))
    assert "pairs compared 32; pairs dropped an epoch 6; loss floor" in caplog.text
    loader, epochs = trained.get_train_dataloader(), []
    for epoch in range(2):
        loader.set_epoch(epoch)
        epochs.append([name for batch in loader for name in batch["row_ids"]])
    first, second = epochs
    assert len(first) == len(set(first)) == len(second) == 64
    assert set(first) != set(second)  # others in every epoch
    with pytest.raises(MedftError, match=r"batch of 128 at least, data\.train has 70"):
        first_step(step(32, 4))


def test_plain_accumulation_is_the_mean_of_its_micro_batches(trainer):
    changes = ("contrastive.exact_batch=false", "lora.dropout=0")
    plain = trainer(changes, gradient_accumulation_steps=2)
    batches = step_of(plain, list(plain.get_train_dataloader())[:2])
    with torch.no_grad():
        losses = [plain.compute_loss(plain.model.train(), b).item() for b in batches]
    plain.train()
    assert plain.state.log_history[0]["loss"] == pytest.approx(sum(losses) / 2, rel=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("data.max_length=65", "at most 64"),
        ("data.image_size=7", "at least one patch"),
        ('data.caption="{answer} {nothing}"', "nothing is none in row"),
    ],
)
def test_what_cannot_work_is_an_error_before_loading(trainer, change, message):
    with pytest.raises(MedftError, match=message):
        trainer((change,))


def test_a_decoder_is_no_encoder(trainer, bases):
    with pytest.raises(MedftError, match=r"decoder_qlora\.py"):
        trainer((f"model.base={bases / 'decoder'}",))


def test_a_caption_template_fills_from_the_row(trainer):
    trained = trainer(('data.caption="Q {question} A {answer}"',))
    assert trained.train_dataset[0].caption.startswith("Q ")
    assert " A " in trained.train_dataset[0].caption
