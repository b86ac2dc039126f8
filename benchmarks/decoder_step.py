"""Compares a training step of Llama 3.2 Vision in medft with the same step in stock TRL.

    python benchmarks/decoder_step.py [small | 11b]      (default: small)

The same row, labels, random weights and adapter in every variant, without dropout:

    a    stock TRL SFTTrainer with its own collator, labels repaired, gradient checkpointing
    a'   the same without checkpointing
    b    medft, first epoch: the tower is computed
    c    medft from the vision cache
    d    c without gradient checkpointing of the text
    d'   d with cross_attention_fix: tiles that no token may see are left out (other numerics)

A step is collation, forward and backward; the optimizer is the same everywhere. Both sizes use an
image of 4 tiles and one of 1. `small` runs on the CPU in float32, the variants in turn, and reports
medians of CPU seconds and wall seconds. `11b` is the real configuration with random NF4 weights on
a GPU, one variant after the other, first with 24 GiB of memory, then with all; it prints rows and
supervised tokens per second and peak memory.

The floor is what every exact step must compute: the text once forward and once backward, without
tower and without recomputation, which are the FLOPs counted in d. Writes results/decoder_step.json.
"""

import contextlib
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import numpy as np
import torch
import transformers
from live_memory import PeakCounter
from peft import PeftModel
from PIL import Image
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count
from transformers import (
    MllamaConfig,
    MllamaForConditionalGeneration,
    MllamaImageProcessorPil,
    MllamaProcessor,
)
from trl import SFTConfig, SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from medft.compat import (
    HookedTrainer,
    TorchDispatchMode,
    cpu_attention,
    operator_of,
    reset_accelerator,
)
from medft.config.recipe import DecoderRecipe
from medft.decoder.build import build_trainer
from medft.decoder.families.mllama import MLLAMA
from medft.decoder.prepared import prepare_decoder_data
from medft.decoder.trainer import decoder_arguments
from medft.demo.bases import decoder_tokenizer, tokenizer_corpus
from medft.models.lora import attach_adapter

TOKENS = 128
ROUNDS = 7
VARIANTS = ("a", "a'", "b", "c", "d", "d'")
CHECKPOINTED = ("a", "b", "c")
FORWARD, BACKWARD = cpu_attention()
CPU_ATTENTION = {
    FORWARD: lambda query, key, value, *_, out_val=None, **__: sdpa_flop_count(
        query.shape, key.shape, value.shape
    ),
    BACKWARD: lambda gradient, query, key, value, *_, out_val=None, **__: sdpa_backward_flop_count(
        gradient.shape, query.shape, key.shape, value.shape
    ),
}
"""FLOP formulas for the CPU's attention, which torch's registry lacks."""

RESULTS = Path(__file__).parent / "results" / "decoder_step.json"


def small_config(tokenizer: Any) -> MllamaConfig:
    """Mllama with a quarter of the real width and depth, in tower and text."""
    token = tokenizer.convert_tokens_to_ids
    return MllamaConfig(
        vision_config={
            "hidden_size": 320,
            "intermediate_size": 1280,
            "num_hidden_layers": 8,
            "num_global_layers": 2,
            "attention_heads": 16,
            "image_size": 280,
            "intermediate_layers_indices": [1, 3, 4, 5, 7],
            "vision_output_dim": 320 * 6,
        },
        text_config={
            "hidden_size": 1024,
            "intermediate_size": 3584,
            "num_hidden_layers": 10,
            "num_attention_heads": 16,
            "num_key_value_heads": 4,
            "cross_attention_layers": [3, 8],
            "vocab_size": 512,
            "pad_token_id": token("<|finetune_right_pad_id|>"),
        },
        image_token_index=token("<|image|>"),
    )


def real_config(tokenizer: Any) -> MllamaConfig:
    """Llama 3.2 11B Vision Instruct, whose values are the configuration's defaults."""
    token = tokenizer.convert_tokens_to_ids
    config = MllamaConfig(vision_config={"image_size": 560}, text_config={"pad_token_id": 128004})
    config.image_token_index = token("<|image|>")  # the small tokenizer's, which is in range
    return config


def write_base(folder: Path, config: MllamaConfig, tokenizer: Any) -> None:
    """Write a base without weights: configuration and processor."""
    tile = config.vision_config.image_size
    images = MllamaImageProcessorPil(size={"height": tile, "width": tile}, max_image_tiles=4)
    config.save_pretrained(folder)
    MllamaProcessor(images, tokenizer, chat_template=tokenizer.chat_template).save_pretrained(
        folder
    )


def write_row(folder: Path, tokenizer: Any, tile: int, tiles: int) -> Path:
    """Write one conversation of at most TOKENS tokens about an image of 4 tiles or 1."""
    side = tile * (2 if tiles == 4 else 1)
    pixels = np.random.default_rng(tiles).integers(0, 255, (side, side, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / f"{tiles}.png")

    def messages(words: int) -> list[dict[str, Any]]:
        question = [{"type": "image"}, {"type": "text", "text": "Describe this medical image."}]
        answer = [{"type": "text", "text": "the" + " left" * words}]
        return [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]

    def length(words: int) -> int:
        text = tokenizer.apply_chat_template(messages(words), tokenize=False)
        return len(tokenizer(text, add_special_tokens=False)["input_ids"])

    chosen = messages(max(w for w in range(TOKENS) if length(w) <= TOKENS))
    file = folder / f"{tiles}.jsonl"
    row = {"id": "row", "images": [f"{tiles}.png"], "messages": chosen}
    file.write_text(json.dumps(row) + "\n")
    return file


def random_model(
    config: MllamaConfig, *, dtype: torch.dtype, is_4bit: bool, device: str
) -> nn.Module:
    """The model with random weights, made on its device part by part; gates are 0.5."""
    generator = torch.Generator(device).manual_seed(7)
    with torch.device("meta"):
        model = MllamaForConditionalGeneration(config).to(dtype)
    skipped = tuple(MLLAMA.parts[part] for part in ("vision", "projector", "lm_head"))
    for name, module in list(model.named_modules()):
        if is_4bit and isinstance(module, nn.Linear) and not name.startswith(skipped):
            quantize(model, name, module, dtype, generator)
    for name, parameter in list(model.named_parameters()):
        if parameter.is_meta:
            owner = model.get_submodule(name.rpartition(".")[0])
            setattr(owner, name.rpartition(".")[2], draw(name, parameter, device, generator))
    rebuild_buffers(model, config, device)
    return model.requires_grad_(False)


def draw(name: str, like: Tensor, device: str, generator: torch.Generator) -> nn.Parameter:
    """A parameter: norm weights 1, gates 0.5, others normal with deviation 0.02."""
    value = torch.empty(like.shape, dtype=like.dtype, device=device)
    if "norm" in name and name.endswith("weight"):
        value.fill_(1.0)
    elif "gate" in name.rpartition(".")[2]:
        value.fill_(0.5)
    else:
        value.normal_(std=0.02, generator=generator)
    return nn.Parameter(value, requires_grad=False)


def quantize(
    model: nn.Module, name: str, module: nn.Linear, dtype: torch.dtype, generator: torch.Generator
) -> None:
    """Replace an empty linear layer with a random 4-bit one."""
    layer = bnb.nn.Linear4bit(
        module.in_features, module.out_features, bias=False, compute_dtype=dtype, quant_type="nf4"
    )
    weight = torch.empty(module.weight.shape, dtype=dtype, device=generator.device)
    weight.normal_(std=0.02, generator=generator)
    layer.weight = bnb.nn.Params4bit(
        weight.cpu(), requires_grad=False, quant_type="nf4", compress_statistics=True
    )
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, layer.to(generator.device))


def rebuild_buffers(model: nn.Module, config: MllamaConfig, device: str) -> None:
    """Compute the buffers (rotary frequencies), which the meta device left empty."""
    real = type(model.model.language_model.rotary_emb)(config.text_config)
    model.model.language_model.rotary_emb = real.to(device)
    empty = [name for name, buffer in model.named_buffers() if buffer.is_meta]
    if empty:
        raise SystemExit(f"expected every buffer to be computed, {empty[0]} is not")


class FlopCounter(TorchDispatchMode):
    """Counts the floating-point operations of matrix products, convolutions and attention.

    torch's own FlopCounterMode also hooks every module, and fails on one without grad.
    """

    total = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        output = function(*args, **(kwargs or {}))
        formula = (flop_registry | CPU_ATTENTION).get(operator_of(function))
        if formula:
            self.total += formula(*args, **(kwargs or {}), out_val=output)
        return output


class StockTrainer(HookedTrainer, SFTTrainer):
    """TRL's trainer with public names for its hooks."""


class Variant:
    """One way to train the row."""

    def __init__(self, name: str, base: Path, row: Path, config: MllamaConfig, size: str) -> None:
        reset_accelerator()
        torch.manual_seed(1)
        self.name = name
        is_real = size == "11b"
        dtype = "bfloat16" if is_real else "float32"
        sections = [
            f"model.base={base}",
            f"model.dtype={dtype}",
            f"model.cross_attention_fix={str(name.endswith(chr(39)) and name[0] == 'd').lower()}",
            f"model.vision_cache={base / 'cache' if name[0] in 'cd' else 'null'}",
            f"data.train={row}",
            "lora.dropout=0",
            f"train.gradient_checkpointing={str(name in CHECKPOINTED).lower()}",
            f"train.output_dir={base / 'run'}",
            "train.per_device_train_batch_size=1",
        ]
        (base / "recipe.yaml").write_text("{}\n")
        recipe = DecoderRecipe.load(base / "recipe.yaml", sections)
        arguments = decoder_arguments(recipe.train, dtype=dtype)
        prepared = prepare_decoder_data(recipe.model, recipe.data, recipe.lora, arguments)
        self.rows = [prepared.train[0]]

        def load(*_: Any, **__: Any) -> nn.Module:
            device = "cuda" if is_real else "cpu"
            weights = getattr(torch, dtype)
            return random_model(config, dtype=weights, is_4bit=is_real, device=device)

        if name[0] == "a":
            options = {"task_type": "CAUSAL_LM", "seed": arguments.seed}
            model = attach_adapter(load(), recipe.lora, MLLAMA.presets, **options)
            self.trainer = self._stock(model, prepared, arguments)
        else:
            sections = recipe.model, recipe.data, recipe.quantization, recipe.lora
            known = {"base": str(base), "revision": None}
            self.trainer = build_trainer(
                *sections, arguments=arguments, prepared=prepared, base=known, load=load
            )
        self.model: PeftModel = self.trainer.model
        torch.manual_seed(2)  # what a Trainer draws before differs between the variants
        for parameter_name, parameter in self.model.named_parameters():
            if "lora_B" in parameter_name:
                nn.init.normal_(parameter, std=0.01)
        if arguments.gradient_checkpointing:
            self.model.gradient_checkpointing_enable(arguments.gradient_checkpointing_kwargs)
        self.trainer.create_optimizer()
        self.model.train()
        self.tokens = int((self.collate()["labels"] >= 0).sum())

    def _stock(self, model: nn.Module, prepared: Any, arguments: Any) -> StockTrainer:
        stock = SFTConfig(
            arguments.output_dir,
            max_length=None,
            report_to="none",
            remove_unused_columns=False,
            per_device_train_batch_size=1,
            gradient_checkpointing=arguments.gradient_checkpointing,
            bf16=arguments.bf16,
            use_cpu=arguments.use_cpu,
        )
        collator = DataCollatorForVisionLanguageModeling(prepared.processor, max_length=None)
        encoded = prepared.collator.conversation.encode(json.loads(self.rows[0]["messages"]), "row")
        labels = torch.tensor([encoded.labels])

        def repaired(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
            images = [Image.open(image["path"]).convert("RGB") for image in rows[0]["images"]]
            messages = json.loads(rows[0]["messages"])
            batch = collator([{"messages": messages, "images": images}])
            return {**batch, "labels": labels}

        return StockTrainer(
            model,
            args=stock,
            train_dataset=prepared.train,
            data_collator=repaired,
            processing_class=prepared.processor,
        )

    def collate(self) -> dict[str, Any]:
        """The row as a batch."""
        batch = self.trainer.data_collator(self.rows)
        batch.pop("row_ids", None)
        return batch

    def step(self) -> None:
        """Collate, forward, backward."""
        self.model.zero_grad(set_to_none=True)
        self.loss().backward()

    def loss(self) -> Tensor:
        """The loss of the row, as a training step takes it."""
        batch = self.trainer.to_device(self.collate())
        with self.trainer.compute_loss_context_manager():
            return self.trainer.compute_loss(self.model, batch)

    def gradients(self) -> dict[str, Tensor]:
        """The gradients of the adapter, by parameter name."""
        return {
            n: p.grad.float().cpu() for n, p in self.model.named_parameters() if p.grad is not None
        }

    def kept_bytes(self) -> dict[str, int]:
        """Bytes that a forward keeps for its backward, in total and in the tower."""
        tower = self.model.get_base_model().model.vision_model
        inside: list[bool] = []
        handles = [
            tower.register_forward_pre_hook(lambda *_: inside.append(True)),
            tower.register_forward_hook(lambda *_: inside.clear()),
        ]
        weights = {p.untyped_storage().data_ptr() for p in self.model.parameters()}
        kept: dict[int, tuple[int, bool]] = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                kept[storage.data_ptr()] = (storage.nbytes(), bool(inside))
            return tensor

        with saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = self.loss()
        for handle in handles:
            handle.remove()
        del loss
        return {
            "all": sum(size for size, _ in kept.values()),
            "tower": sum(size for size, in_tower in kept.values() if in_tower),
        }

    def peak_bytes(self) -> int:
        """Peak bytes of the tensors that a step allocates, gradients included."""
        self.model.zero_grad(set_to_none=True)
        with PeakCounter() as counter:
            self.step()
        return counter.peak

    def flops(self) -> int:
        """Floating-point operations of a step, matrix products and attention."""
        with FlopCounter() as counter:
            self.step()
        return counter.total


def gap(left: dict[str, Tensor], right: dict[str, Tensor]) -> float:
    """The largest relative difference over all tensors."""
    if left.keys() != right.keys():
        raise SystemExit("expected the same tensors to have a gradient")
    return max(float((left[n] - right[n]).norm() / right[n].norm()) for n in left)


def compare_small(base: Path, row: Path, config: MllamaConfig) -> list[dict[str, Any]]:
    """The measurements of all variants, run in turn on the CPU."""
    variants = [Variant(name, base, row, config, "small") for name in VARIANTS]
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in VARIANTS}
    for turn in range(ROUNDS + 1):
        for variant in variants:
            wall, cpu = time.perf_counter(), time.process_time()
            variant.step()
            if turn:  # the first turn warms up and fills the cache
                taken = time.perf_counter() - wall, time.process_time() - cpu
                seconds[variant.name].append(taken)
    stock = variants[0].gradients()
    table = []
    for variant in variants:
        wall, cpu = (
            statistics.median(values) for values in zip(*seconds[variant.name], strict=True)
        )
        table.append(
            {
                "variant": variant.name,
                "cpu_seconds": cpu,
                "wall_seconds": wall,
                "gradient_gap": gap(variant.gradients(), stock),
                "peak_bytes": variant.peak_bytes(),
                "kept_bytes": variant.kept_bytes(),
                "flops": variant.flops(),
            }
        )
    first, second, floor = table[0]["cpu_seconds"], table[1]["cpu_seconds"], table[4]["flops"]
    for entry in table:
        entry["times_fewer_than_a"] = first / entry["cpu_seconds"]
        entry["times_fewer_than_a_prime"] = second / entry["cpu_seconds"]
        entry["share_of_floor"] = floor / entry["flops"]
    return table


def run_11b(base: Path, row: Path, config: MllamaConfig) -> Iterator[dict[str, Any]]:
    """The measurements of each variant alone on the GPU, with 24 GiB and with all its memory."""
    total = torch.cuda.get_device_properties(0).total_memory
    for limit in (24 * 2**30, total):
        torch.cuda.set_per_process_memory_fraction(min(limit / total, 1.0))
        for name in VARIANTS:
            entry: dict[str, Any] = {"variant": name, "limit_gib": round(limit / 2**30, 1)}
            with contextlib.suppress(torch.cuda.OutOfMemoryError):
                entry |= time_on_gpu(Variant(name, base, row, config, "11b"))
            torch.cuda.empty_cache()
            entry.setdefault("error", "out of memory" if "rows_per_second" not in entry else None)
            yield entry


def time_on_gpu(variant: Variant) -> dict[str, float]:
    """Rows and supervised tokens per second, and the peak memory of a step in GiB."""
    variant.step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    taken = []
    for _ in range(ROUNDS):
        started = time.perf_counter()
        variant.step()
        torch.cuda.synchronize()
        taken.append(time.perf_counter() - started)
    seconds = statistics.median(taken)
    return {
        "rows_per_second": 1 / seconds,
        "supervised_tokens_per_second": variant.tokens / seconds,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
    }


def show(tiles: int, table: list[dict[str, Any]]) -> None:
    columns = [name for name in table[0] if name != "kept_bytes"]
    lines = [f"\nimage of {tiles} tile{'s' if tiles > 1 else ''}", "  ".join(columns)]
    for entry in table:
        values = (entry.get(name) for name in columns)
        cells = [
            f"{value:.4g}" if isinstance(value, int | float) else str(value) for value in values
        ]
        padded = [cell.rjust(len(name)) for cell, name in zip(cells, columns, strict=True)]
        kept = entry.get("kept_bytes")
        lines.append("  ".join(padded) + (f"  kept {kept}" if kept else ""))
    sys.stdout.write("\n".join(lines) + "\n")


def main(size: str) -> None:
    tokenizer = decoder_tokenizer(tokenizer_corpus())
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    device = torch.cuda.get_device_name() if size == "11b" else platform.processor() or "CPU"
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    results[size] = {"device": device, "threads": torch.get_num_threads(), **versions}
    for tiles in (4, 1):
        with tempfile.TemporaryDirectory() as scratch:
            base = Path(scratch)
            config = small_config(tokenizer) if size == "small" else real_config(tokenizer)
            write_base(base, config, tokenizer)
            row = write_row(base, tokenizer, config.vision_config.image_size, tiles)
            compare = compare_small if size == "small" else run_11b
            table = results[size][f"{tiles} tiles"] = []
            for entry in compare(base, row, config):
                table.append(entry)
                RESULTS.write_text(json.dumps(results, indent=2) + "\n")
            show(tiles, table)


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "small")
