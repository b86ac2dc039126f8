"""What a GPU does otherwise than the CPU, on tiny decoders: `make gpu` runs it."""

import json
import math

import pytest
import torch
from bitsandbytes import functional as bnb
from peft import PeftModel
from torch.utils.data import DataLoader
from transformers import AutoModelForImageTextToText, TrainerCallback

from medft.decoder.frozen_tower import IMAGES
from medft.errors import RunError
from medft.export.merge import merge
from medft.training.callbacks import NonFiniteCallback
from medft.training.overflow import OverflowCallback

pytestmark = pytest.mark.gpu

NF4 = "quantization={bits: 4}"


@pytest.fixture
def trainer(sections, write_recipe, build_trainer):
    """A trainer of some steps on one image a row."""

    def make(changes=(), **train):
        recipe = sections("decoder")
        recipe["data"]["validation"] = None
        recipe["train"] |= {"max_steps": 4, "save_strategy": "no", "warmup_steps": 0, **train}
        return build_trainer(write_recipe(recipe), changes, is_fresh=False)

    return make


def losses(trained):
    return [entry["loss"] for entry in trained.state.log_history if "loss" in entry]


def trained_weights(trained):
    return {n: p.detach().clone() for n, p in trained.model.named_parameters() if p.requires_grad}


def test_nf4_steps_move_a_float32_adapter_only(trainer):
    made = trainer(["model.dtype=bfloat16", NF4], learning_rate=1e-2, max_steps=12)
    before = trained_weights(made)
    frozen = {n: p.clone() for n, p in made.model.named_parameters() if not p.requires_grad}
    assert {p.device.type for p in made.model.parameters()} == {"cuda"}
    made.train()
    found = losses(made)
    assert sum(found[-3:]) < sum(found[:3])
    assert {p.dtype for p in before.values()} == {torch.float32}
    after = dict(made.model.named_parameters())
    assert all(not torch.equal(after[name], p) for name, p in before.items())
    assert all(torch.equal(after[name], p) for name, p in frozen.items())


def test_bfloat16_runs_under_autocast_with_float32_gradients(trainer):
    gradients = {}
    for dtype in ("float32", "bfloat16"):
        made = trainer([f"model.dtype={dtype}", "lora.dropout=0"])
        layer = made.model.get_base_model().model.language_model.layers[0].self_attn.q_proj
        seen = []
        layer.register_forward_hook(lambda module, args, output, seen=seen: seen.append(output))
        batch = made.to_device(made.data_collator([made.train_dataset[i] for i in range(3)]))
        made.model.train()
        with made.compute_loss_context_manager():
            made.compute_loss(made.model, batch).backward()
        assert {str(output.dtype) for output in seen} == {f"torch.{dtype}"}
        found = [p.grad for p in made.model.parameters() if p.grad is not None]
        assert {gradient.dtype for gradient in found} == {torch.float32}
        gradients[dtype] = torch.cat([gradient.flatten() for gradient in found])
    gap = torch.nn.functional.cosine_similarity(*gradients.values(), dim=0).item()
    assert 0.9 < gap < 1 - 1e-7  # bfloat16 has 8 bits: another gradient, the same direction


class WeightsAfterSteps(TrainerCallback):
    """Keeps one trained tensor after each step."""

    def __init__(self):
        self.kept = []

    def on_step_end(self, args, state, control, model, **kwargs):
        """Copy it."""
        first = next(p for p in model.parameters() if p.requires_grad)
        self.kept.append(first.detach().clone())


def test_float16_skips_steps_that_overflow_and_then_trains(trainer):
    made = trainer(["model.dtype=float16"], max_steps=40, learning_rate=1e-3)
    made.accelerator.scaler = torch.amp.GradScaler("cuda", init_scale=2.0**36)
    weights = WeightsAfterSteps()
    made.add_callback(weights)
    made.add_callback(NonFiniteCallback(lambda: made.row_ids))
    made.train()
    pairs = zip(weights.kept, weights.kept[1:], strict=False)
    moved = [not torch.equal(left, right) for left, right in pairs]
    assert not moved[0]  # the scale of 2**36 overflows float16
    assert moved[-1]
    assert made.accelerator.scaler.get_scale() < 2.0**36
    assert all(map(math.isfinite, losses(made)))


def test_float16_stops_where_activations_come_near_its_end(trainer, caplog):
    caplog.set_level("INFO", logger="medft")
    made = trainer(["model.dtype=float16"])
    made.add_callback(OverflowCallback())
    made.train()
    assert any(line.startswith("largest activation of the first") for line in caplog.messages)
    made = trainer(["model.dtype=float16"])
    made.add_callback(OverflowCallback())
    with torch.no_grad():
        made.model.get_base_model().model.language_model.layers[0].mlp.down_proj.weight.mul_(2e5)
    with pytest.raises(RunError, match=r"half of what float16 holds, got .*layers\.0\.mlp"):
        made.train()


def test_batches_are_pinned_and_arrive_on_the_device(trainer):
    made = trainer()
    rows = [made.train_dataset[index] for index in range(2)]
    assert made.args.dataloader_pin_memory
    [batch] = DataLoader(rows, batch_size=2, collate_fn=made.data_collator, pin_memory=True)
    assert batch["input_ids"].is_pinned()
    assert all(image.pixels.is_pinned() for image in batch[IMAGES])
    moved = made.to_device(batch)
    assert moved["labels"].is_cuda
    assert all(image.pixels.is_cuda for image in moved[IMAGES])
    assert torch.equal(moved[IMAGES][0].pixels.cpu(), batch[IMAGES][0].pixels)


@pytest.mark.parametrize("changes", [["model.dtype=bfloat16", NF4], ["model.dtype=float32"]])
def test_features_from_the_cache_train_what_computed_ones_train(trainer, tmp_path, changes):
    runs = []
    for _ in range(2):
        made = trainer([*changes, f"model.vision_cache={tmp_path / 'cache'}"], max_steps=14)
        towers = []
        tower = made.model.get_base_model().model.vision_model
        tower.register_forward_hook(lambda *_, towers=towers: towers.append(1))
        made.train()
        runs.append((losses(made), trained_weights(made), len(towers)))
    assert runs[0][2] > 0
    assert runs[1][2] == 0
    assert runs[0][0] == runs[1][0]
    assert all(torch.equal(runs[0][1][name], weight) for name, weight in runs[1][1].items())


def test_a_merged_model_is_the_adapted_one(runs, bases, tmp_path):
    merge(runs / "decoder", tmp_path / "merged")
    base = AutoModelForImageTextToText.from_pretrained(bases / "decoder")
    merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged").cuda().eval()
    ids = torch.arange(7, 40, device="cuda")[None]
    with torch.no_grad():
        untouched = base.cuda().eval()(input_ids=ids).logits
        adapted = PeftModel.from_pretrained(base, runs / "decoder" / "adapter").eval()
        found, expected = merged(input_ids=ids).logits, adapted(input_ids=ids).logits
    # float32 in another order of summation
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert (untouched - expected).abs().max() > 1e-3


def test_nf4_made_on_the_gpu_is_nf4_made_on_the_cpu():
    weight = torch.randn(256, 512, generator=torch.manual_seed(4)) * 0.02
    made = {}
    for device in ("cpu", "cuda"):
        packed, state = bnb.quantize_nf4(weight.to(device), compress_statistics=True)
        made[device] = packed.cpu(), bnb.dequantize_nf4(packed, state).cpu()
    (left, one), (right, other) = made["cpu"], made["cuda"]
    # a weight half way between two of the 16 values may go either way
    assert (left != right).float().mean() < 1e-3
    # the statistics of 64 weights are 8-bit numbers: a step is below 1 % of them
    assert (one - other).abs().mean() < 1e-2 * weight.abs().mean()
    assert (one - weight).abs().mean() > 1e-2 * weight.abs().mean()  # NF4 itself is coarser


def test_a_run_records_the_card(runs):
    record = json.loads((runs / "nf4" / "run.json").read_text())
    assert record["hardware"]["gpus"] == [torch.cuda.get_device_name(0)]
    assert record["peak_memory_bytes"]["device"] > 0
