"""Each use of a library in compat.py has a probe of its name, red in a release without it."""

import inspect
import json
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator, DeepSpeedPlugin
from accelerate.state import AcceleratorState
from bitsandbytes.nn import Linear4bit
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader
from transformers import (
    AutoModel,
    AutoModelForImageTextToText,
    AutoProcessor,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.models.mllama.configuration_mllama import MllamaVisionConfig
from trl import SFTConfig, SFTTrainer

from medft import compat
from medft.errors import RunError

ROOT = Path(__file__).parent.parent
VERSIONS = (ROOT / "docs" / "versions.md").read_text()


def test_every_use_has_a_probe_of_its_name():
    uses = {name for name, value in vars(compat).items() if owner(name, value) == compat.__name__}
    uses -= {"TESTED", "HookedTrainer", "TokenScores"}
    uses |= {n for n in vars(compat.HookedTrainer) if not n.startswith("_")}
    uses |= {"TorchDispatchMode"}
    probes = [f"{name}_" for name in globals() if name.startswith("test_")]
    assert {"to_device", "score_labels", "MLLAMA_SEES_IMAGE", "tensors_in"} <= uses
    assert not [use for use in uses if not any(f"_{use}_" in probe for probe in probes)]


def owner(name, value):
    """The module that defines a public name of compat."""
    if name.startswith("_") or inspect.ismodule(value):
        return None
    return getattr(value, "__module__", compat.__name__ if name.isupper() else None)


def test_gather_last_batch_whole_leaves_no_remainder_to_cut():
    batches = torch.utils.data.BatchSampler(range(7), batch_size=2, drop_last=False)
    for is_whole, remainder in ((False, 1), (True, -1)):
        accelerator = Accelerator(cpu=True)
        loader = accelerator.prepare(DataLoader(torch.arange(7), batch_sampler=batches))
        if is_whole:
            compat.gather_last_batch_whole(loader)
        assert [accelerator.gradient_state.remainder for _ in loader] == [remainder] * 4
        assert sum(map(len, loader)) == 7


def test_the_tested_minors_hold_the_pinned_versions():
    pinned = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split())
    for name, minors in compat.TESTED.items():
        assert pinned[name].startswith(tuple(f"{minor}." for minor in minors)), name
        assert all(minor in VERSIONS for minor in minors if len(minors) > 1), name


@pytest.mark.parametrize(
    ("version", "is_named"), [("5.23.4", False), ("5.24.0", True), ("6", True)]
)
def test_untested_versions_are_those_of_another_minor(monkeypatch, version, is_named):
    monkeypatch.setattr(compat, "TESTED", {"transformers": ["5.17", "5.23"]})
    monkeypatch.setattr(
        compat, "package_versions", lambda: {"transformers": version, "pillow": "99.0"}
    )
    assert compat.untested_versions() == ({"transformers": version} if is_named else {})


def test_a_run_on_an_untested_version_says_so_once_and_records_it(
    monkeypatch, sections, write_recipe, run_script, caplog
):
    recipe = sections("siglip")
    recipe["train"] |= {"max_steps": 2, "save_strategy": "no", "warmup_steps": 0}
    file = write_recipe(recipe)
    monkeypatch.setattr("medft.training.parts.untested_versions", lambda: {"peft": "0.1.2"})
    run_script("siglip", file)
    [line] = [message for message in caplog.messages if "was tested with" in message]
    record = json.loads((file.with_suffix("") / "run.json").read_text())
    assert record["untested_packages"] == {"peft": "0.1.2"}
    assert line.endswith(": peft 0.1.2")


@dataclass
class Part:
    """What a batch may hold beside tensors."""

    values: torch.Tensor


class Recorded(compat.HookedTrainer):
    """A trainer of one linear layer that keeps what its hooks were called with."""

    def __init__(self, folder, **changes):
        self.seen, self.saves, self.restores, self.moved = [], [], [], []
        arguments = TrainingArguments(
            str(folder), max_steps=4, save_steps=2, per_device_train_batch_size=1, use_cpu=True,
            report_to=[], disable_tqdm=True, remove_unused_columns=False, learning_rate=0.1,
            **changes,
        )  # fmt: skip
        rows = [{"row": row} for row in range(5)]
        super().__init__(Layer(), arguments, train_dataset=rows, data_collator=self.collate)

    def collate(self, rows):
        self.seen += [row["row"] for row in rows]
        return {"inputs": torch.ones(1, 3), "part": Part(torch.ones(1))}

    def train_sampler(self):
        return [3, 1, 4, 0]

    def saved(self, folder):
        self.saves.append((folder, (folder / "model.safetensors").is_file()))

    def restored(self, folder, model):
        self.restores.append((folder, model.layer.weight.detach().clone()))

    def _prepare_input(self, data):
        self.moved += [data] if isinstance(data, Part) else []
        return super()._prepare_input(data)


class Layer(nn.Module):
    """A model of one layer, with a loss."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 1)

    def forward(self, inputs, part):
        return {"loss": (self.layer(inputs) * part.values).mean()}


@pytest.fixture
def recorded(tmp_path):
    trained = Recorded(tmp_path / "recorded")
    trained.train()
    return trained


def test_to_device_moves_what_a_dataclass_holds(recorded):
    batch = {"inputs": torch.ones(1, 3), "part": Part(torch.empty(1, device="meta"))}
    with pytest.raises(NotImplementedError, match="meta tensor"):  # cannot be moved, but is
        recorded.to_device(batch)
    part = Part(torch.ones(2))
    assert recorded.to_device({"part": part})["part"].values.tolist() == [1, 1]
    assert len(recorded.moved) >= 4  # training moves its batches this way, too


def test_train_sampler_decides_the_order(recorded, tmp_path):
    assert recorded.seen[:4] == [3, 1, 4, 0]
    without = Trainer(Layer(), recorded.args, train_dataset=[0, 1], data_collator=list)
    assert not isinstance(without.get_train_dataloader().sampler, list)


def test_saved_is_called_after_the_weights_are_written(recorded):
    run = Path(recorded.args.output_dir)
    assert recorded.saves[:2] == [(run / f"checkpoint-{step}", True) for step in (2, 4)]


def test_write_model_leaves_no_pickle_where_the_library_does(recorded, tmp_path):
    recorded.write_model(tmp_path / "ours")
    Trainer(Layer(), recorded.args, data_collator=list).save_model(str(tmp_path / "stock"))
    names = {path.name for path in (tmp_path / "stock").iterdir()}
    assert {path.name for path in (tmp_path / "ours").iterdir()} == names - {"training_args.bin"}
    assert "training_args.bin" in names
    assert recorded.saves[-1] == (tmp_path / "ours", True)
    checkpoint = Path(recorded.args.output_dir) / "checkpoint-2"
    assert "training_args.bin" not in {path.name for path in checkpoint.iterdir()}


@pytest.mark.parametrize("resumes", [True, False])
def test_restored_is_called_after_weights_are_loaded(recorded, tmp_path, resumes):
    checkpoint = Path(recorded.args.output_dir) / "checkpoint-2"
    again = Recorded(tmp_path)
    if resumes:
        again.train(resume_from_checkpoint=str(checkpoint))
    else:
        again.load_checkpoint(checkpoint)
    [(folder, weight)] = again.restores
    assert folder == checkpoint
    assert torch.equal(weight, load_file(checkpoint / "model.safetensors")["layer.weight"])
    end = recorded.model.layer.weight
    assert not torch.equal(weight, end)
    assert torch.equal(again.model.layer.weight, end) == resumes


def test_save_checkpoint_saves_what_resumes_from_it(recorded, tmp_path):
    again = Recorded(tmp_path)
    again.state = recorded.state
    again.load_checkpoint(Path(recorded.args.output_dir) / "checkpoint-4")
    again.create_optimizer_and_scheduler(num_training_steps=4)
    saved = []
    again.callback_handler.on_save = lambda *_: saved.append(True)
    again.save_checkpoint()
    [folder] = Path(again.args.output_dir).glob("checkpoint-*")
    assert folder.name == f"checkpoint-{recorded.state.global_step}"
    assert {"optimizer.pt", "scheduler.pt", "rng_state.pth"} <= {p.name for p in folder.iterdir()}
    assert saved == [True]


@pytest.mark.parametrize("stops", [True, False])
def test_make_up_for_evaluation_counts_and_may_end_training(tmp_path, stops):
    again = Recorded(tmp_path, metric_for_best_model="loss")
    again.evaluate = lambda ignore_keys: {"eval_loss": 5.0}

    class Evaluated(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            again.make_up_for_evaluation()
            control.should_training_stop = stops

    again.add_callback(Evaluated())
    again.train()
    assert again.seen == ([] if stops else [3, 1, 4, 0])
    assert again.state.best_metric == 5.0


def test_load_checkpoint_loads_the_weights(recorded, tmp_path):
    again = Recorded(tmp_path)
    assert not torch.equal(again.model.layer.weight, recorded.model.layer.weight)
    again.load_checkpoint(Path(recorded.args.output_dir) / "checkpoint-4")
    assert torch.equal(again.model.layer.weight, recorded.model.layer.weight)


@pytest.fixture(scope="module")
def decoder(bases):
    return AutoModelForImageTextToText.from_pretrained(bases / "decoder").eval()


@pytest.fixture
def token_scores(bases, tmp_path):
    """The scores of 2 rows by TRL's head, and the logits and labels of the same rows."""
    model = AutoModelForImageTextToText.from_pretrained(bases / "decoder").eval()
    inputs = {"input_ids": torch.randint(7, 99, (2, 9), generator=torch.manual_seed(1))}
    with torch.no_grad():
        logits = model(**inputs).logits
    arguments = SFTConfig(str(tmp_path), max_length=None, report_to="none", use_cpu=True,
                          remove_unused_columns=False)  # fmt: skip
    rows = Dataset.from_list([{"messages": [{"role": "user", "content": "a"}], "images": []}])
    processor = AutoProcessor.from_pretrained(bases / "decoder", backend="pil")
    SFTTrainer(model, arguments, list, train_dataset=rows, processing_class=processor)
    labels = inputs["input_ids"].clone()
    labels[:, :4] = -100
    labels[0, 6] = -100
    labels[1, 7] = logits[1, 6].argmax()
    with torch.no_grad():
        return compat.score_labels(model, {**inputs, "labels": labels}), logits, labels


def test_score_labels_of_the_fused_head_are_those_of_the_logits(token_scores):
    scores, logits, labels = token_scores
    shifted = nn.functional.pad(labels, (0, 1), value=-100)[:, 1:]  # the next token
    is_label = shifted >= 0
    every = logits.float().log_softmax(-1)
    expected = every.gather(-1, shifted.clamp(min=0)[..., None])[..., 0] * is_label
    size = scores.log_probs.shape[1]
    # float32 sums in another order
    torch.testing.assert_close(scores.log_probs, expected[:, :size], rtol=1e-5, atol=1e-5)
    top = (logits.argmax(-1) == shifted) & is_label
    assert torch.equal(scores.is_top1.bool(), top[:, :size])
    assert scores.is_top1.any()
    assert torch.equal(scores.is_supervised.bool(), is_label[:, :size])


def test_reporting_integrations_are_those_of_all(tmp_path):
    arguments = TrainingArguments(str(tmp_path), report_to="all")
    assert arguments.report_to == compat.reporting_integrations()


@pytest.mark.parametrize("name", ["eager", "sdpa"])
def test_attention_implementation_is_the_one_that_was_asked_for(bases, name):
    model = AutoModel.from_pretrained(bases / "siglip", attn_implementation=name)
    assert compat.attention_implementation(model.config.vision_config) == name


def test_resizes_by_pillow(bases):
    processor = AutoProcessor.from_pretrained(bases / "siglip", backend="pil")
    assert compat.resizes_by_pillow(processor)
    torchvision = type("SiglipImageProcessor", (), {})()
    assert not compat.resizes_by_pillow(SimpleNamespace(image_processor=torchvision))


def test_checkpointing_layers_are_those_that_are_switched_on(bases):
    model = AutoModel.from_pretrained(bases / "siglip")
    layers = compat.checkpointing_layers(model)
    towers = (model.vision_model, model.text_model)
    assert {id(x) for tower in towers for x in tower.encoder.layers} <= {id(x) for x in layers}
    assert not any(layer.gradient_checkpointing for layer in layers)
    model.gradient_checkpointing_enable()
    assert all(layer.gradient_checkpointing for layer in layers)


def test_is_lora_layer(bases):
    config = LoraConfig(r=2, target_modules=r"text_model\.encoder\.layers\.0\.self_attn\.q_proj")
    model = get_peft_model(AutoModel.from_pretrained(bases / "siglip"), config)
    found = [name for name, module in model.named_modules() if compat.is_lora_layer(module)]
    assert found == ["base_model.model.text_model.encoder.layers.0.self_attn.q_proj"]


def test_num_weights_counts_both_of_a_packed_byte():
    # sharded ones: the record of the ZeRO-3 run in recipes/test_distributed.py
    layer = Linear4bit(64, 32, bias=True, quant_type="nf4").to("cpu")
    assert layer.weight.numel() == 64 * 32 / 2
    assert [compat.num_weights(p) for p in (layer.weight, layer.bias)] == [64 * 32, 32]


def test_keep_trainable_on_cpu_sets_a_flag_that_the_layer_has():
    layer = Linear4bit(64, 32, quant_type="nf4")
    known = set(vars(layer))
    compat.keep_trainable_on_cpu(layer)
    assert set(vars(layer)) == known
    assert layer.support_avx512bf16_for_cpu is False


def test_unsharded_suspends_zero3():
    config = {"zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": 1}
    plugin = DeepSpeedPlugin(hf_ds_config=config)
    plugin.set_deepspeed_weakref()
    try:
        assert is_deepspeed_zero3_enabled()
        with compat.unsharded(plugin):
            assert not is_deepspeed_zero3_enabled()
        assert is_deepspeed_zero3_enabled()
    finally:
        with compat.unsharded(None):
            pass
    assert not is_deepspeed_zero3_enabled()


def test_reset_accelerator_forgets_the_precision():
    assert Accelerator(cpu=True, mixed_precision="bf16").mixed_precision == "bf16"
    assert AcceleratorState().mixed_precision == "bf16"
    compat.reset_accelerator()
    assert Accelerator(cpu=True).mixed_precision == "no"


def test_replace_position_embedding_is_what_the_tower_adds(bases):
    model = AutoModel.from_pretrained(bases / "siglip")
    embeddings, size = model.vision_model.embeddings, 2 * model.config.vision_config.patch_size
    weight = torch.randn(4, embeddings.embed_dim, generator=torch.manual_seed(2))
    compat.replace_position_embedding(embeddings, weight, image_size=size)
    pixels = torch.randn(1, 3, size, size, generator=torch.manual_seed(3))
    patches = embeddings.patch_embedding(pixels).flatten(2).transpose(1, 2)
    assert torch.equal(embeddings(pixels), patches + weight)
    assert model.vision_model(pixel_values=pixels).pooler_output.isfinite().all()


def test_mllama_cross_attention_layers_are_those_of_the_configuration(decoder):
    layers = decoder.model.language_model.layers
    crossed = [layers[index] for index in decoder.config.text_config.cross_attention_layers]
    assert crossed
    assert compat.mllama_cross_attention_layers(decoder) == crossed


def test_MLLAMA_SEES_IMAGE_is_a_keyword_of_those_layers(decoder):
    [layer, *_] = compat.mllama_cross_attention_layers(decoder)
    seen = []
    handle = layer.register_forward_pre_hook(
        lambda module, args, keywords: seen.append(keywords[compat.MLLAMA_SEES_IMAGE]),
        with_kwargs=True,
    )
    size, text = decoder.config.vision_config.image_size, decoder.config.text_config
    mask = torch.ones(1, 5, 1, 4)
    mask[:, :2] = 0
    with torch.no_grad():
        decoder(
            input_ids=torch.arange(7, 12)[None],
            pixel_values=torch.zeros(1, 1, 4, 3, size, size),
            aspect_ratio_ids=torch.ones(1, 1, dtype=torch.long),
            aspect_ratio_mask=torch.ones(1, 1, 4, dtype=torch.long),
            cross_attention_mask=mask,
        )
    handle.remove()
    assert text.cross_attention_layers
    assert seen[0].flatten().tolist() == [0, 0, 1, 1, 1]
    assert seen[0].dim() == 4


def test_mllama_cross_attention_mask_is_the_processors(bases, images):
    from PIL import Image

    processor = AutoProcessor.from_pretrained(bases / "decoder", backend="pil")
    opened = [[Image.open(images[0]).convert("RGB").resize((150, 60))] * n for n in (1, 2)]
    texts = ["<|image|> a b", "a <|image|> b <|image|> a"]
    batch = processor(images=opened, text=texts, return_tensors="pt", padding=True)
    tiles = processor.image_processor(opened)["num_tiles"]
    mask = compat.mllama_cross_attention_mask(
        batch["input_ids"],
        tiles,
        image_token_id=processor.image_token_id,
        max_image_tiles=processor.image_processor.max_image_tiles,
    )
    assert torch.equal(mask, batch["cross_attention_mask"])
    assert 0 < mask.float().mean() < 1


# by hand: the canvas that shrinks least, then the smallest; an image is enlarged to a tile at most
@pytest.mark.parametrize(
    ("size", "canvas", "resized"),
    [
        ((560, 560), (560, 560), (560, 560)),
        ((500, 1100), (560, 1120), (500, 1100)),
        ((2000, 1000), (1120, 560), (1120, 560)),
        ((300, 2400), (560, 2240), (280, 2240)),
    ],
)
def test_mllama_canvas_and_mllama_size_on_canvas(size, canvas, resized):
    assert compat.mllama_canvas(*size, max_image_tiles=4, tile=560) == canvas
    assert compat.mllama_size_on_canvas(*size, canvas=canvas, tile=560) == resized


def test_mllama_aspect_ratios_are_the_configurations():
    found = compat.mllama_aspect_ratios(4)
    assert [list(ratio) for ratio in found] == MllamaVisionConfig().supported_aspect_ratios


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_storage_key_is_equal_for_views_alone(device):
    whole, other = torch.empty(4, device=device), torch.empty(4, device=device)
    keys = [compat.storage_key(tensor) for tensor in (whole, whole[1:], other)]
    assert keys[0] == keys[1] != keys[2]


def test_tensors_in_nested_values():
    one, two = torch.ones(1), torch.ones(2)
    assert [len(t) for t in compat.tensors_in(({"a": [one]}, 3, None, (two,)))] == [1, 2]


def test_operator_of_and_cpu_attention_are_what_a_TorchDispatchMode_sees():
    seen = []

    class Seen(compat.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(compat.operator_of(function))
            return function(*args, **(kwargs or {}))

    heads = [torch.randn(1, 2, 5, 8, requires_grad=True) for _ in range(3)]
    with Seen():
        nn.functional.scaled_dot_product_attention(*heads).sum().backward()
    forward, backward = compat.cpu_attention()
    assert seen.index(forward) < seen.index(backward)
    assert torch.ops.aten.sum in seen


def test_names_in_pickle_lists_what_unpickling_would_import_and_nothing_of_trainer(tmp_path):
    saved = {"rng": np.random.get_state(), "generator": torch.get_rng_state()}
    torch.save(saved, tmp_path / "state.pt")
    assert compat.names_in_pickle(tmp_path / "state.pt") == []
    torch.save({**saved, "code": print, "more": [Layer]}, tmp_path / "state.pt")
    names = compat.names_in_pickle(tmp_path / "state.pt")
    assert names == ["builtins.print", f"{Layer.__module__}.Layer"]


def test_names_in_pickle_leaves_out_what_deepspeed_saves(tmp_path):
    loss_scaler = pytest.importorskip("deepspeed.runtime.fp16.loss_scaler")
    from deepspeed.runtime.zero.config import ZeroStageEnum

    dynamic = loss_scaler.DynamicLossScaler.__new__(loss_scaler.DynamicLossScaler)
    scalers = [loss_scaler.LossScaler(1.0), dynamic]
    torch.save({"scalers": scalers, "stage": ZeroStageEnum.gradients}, tmp_path / "state.pt")
    assert compat.names_in_pickle(tmp_path / "state.pt") == []
    torch.save({"scalers": loss_scaler.to_python_float}, tmp_path / "state.pt")
    [name] = compat.names_in_pickle(tmp_path / "state.pt")
    assert name.endswith("to_python_float")


def test_what_trainer_cannot_restore_is_one_sentence(recorded):
    folder = Path(recorded.args.output_dir) / "checkpoint-2"
    again = Recorded(folder.parent)
    again.train(resume_from_checkpoint=str(folder))
    for name in ("model.safetensors", "optimizer.pt", "rng_state.pth", "scheduler.pt"):
        good = (folder / name).read_bytes()
        for content in (good[:50], b""):
            (folder / name).write_bytes(content)
            with pytest.raises(RunError, match=r"it cannot be restored: .*: take another one$"):
                Recorded(folder.parent).train(resume_from_checkpoint=str(folder))
        (folder / name).write_bytes(good)
