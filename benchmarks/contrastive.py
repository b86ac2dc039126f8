"""Compares the exact batch of medft with other training loops on the same micro-batches.

    python benchmarks/contrastive.py

The same SigLIP, adapter and pairs in every variant, in micro-batches of 8:

    a    transformers.Trainer with the loss of SiglipModel: negatives of the micro-batch only
    b    open_clip's SigLipLoss in the accumulation of open_clip's training loop
    c    medft with contrastive.exact_batch
    d    the full batch in one autograd graph, in plain torch

The shapes are those of SigLIP-base with 2 layers per tower; the weights are random, those of the
adapter too. It runs on the CPU in float32 without dropout, the variants in turn. A step is forward
and backward; batches are collated before. The peak is that of the bytes that a step allocates,
divided by that of one micro-batch alone, forward and backward; counting them costs less time than a
step's time varies. Cosine and error compare the gradient of adapter, scale and bias with d's; the
adapter's error is also given alone.

In b every micro-batch adds the full gradient of scale and bias, which is therefore too large by the
number of micro-batches. b needs `pip install --no-deps open_clip_torch` and is left out without it.
Writes results/contrastive.json.
"""

import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from live_memory import PeakCounter
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import logsigmoid
from transformers import (
    SiglipConfig,
    SiglipImageProcessorPil,
    SiglipModel,
    SiglipProcessor,
    Trainer,
)

from medft.config.lora_keys import LoraSection
from medft.config.recipe import ModelSection, SiglipRecipe
from medft.demo.bases import siglip_tokenizer, tokenizer_corpus
from medft.siglip.build import build_trainer
from medft.siglip.model import scale_and_bias
from medft.siglip.prepared import prepare_siglip_data
from medft.siglip.trainer import SiglipTrainer, siglip_arguments

MICRO_BATCH = 8
ROUNDS = {64: 3, 256: 1}
"""Number of pairs of the effective batch -> repetitions."""

LOGIT_SCALE, LOGIT_BIAS = math.log(117), -12.9
RESULTS = Path(__file__).parent / "results" / "contrastive.json"

Batch = dict[str, Any]


def siglip_config(
    *, width: int = 768, layers: int = 2, heads: int = 12, image_size: int = 224
) -> SiglipConfig:
    """SigLIP-base with patches of 16, but for the number of layers."""
    tower = {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
    }
    return SiglipConfig(
        vision_config={**tower, "image_size": image_size, "patch_size": 16},
        text_config={
            **tower,
            "vocab_size": 32000,
            "max_position_embeddings": 64,
            "projection_size": width,
            "bos_token_id": None,
            "eos_token_id": 1,
            "pad_token_id": 1,
        },
    )


def write_base(folder: Path, config: SiglipConfig) -> None:
    """Write a base without weights: configuration and processor."""
    side = config.vision_config.image_size
    images = SiglipImageProcessorPil(size={"height": side, "width": side})
    SiglipProcessor(images, siglip_tokenizer(tokenizer_corpus(), folder)).save_pretrained(folder)
    config.save_pretrained(folder)


def write_rows(folder: Path, count: int, side: int) -> Path:
    """Write colored blurs, each with its own caption that fills the text positions."""
    random = np.random.default_rng(5)
    words = " ".join(tokenizer_corpus()).split()
    lines = []
    for index in range(count):
        blocks = Image.fromarray(random.integers(0, 256, (6, 6, 3), dtype=np.uint8))
        blocks.resize((side, side), Image.Resampling.BICUBIC).save(folder / f"{index}.png")
        question = [{"type": "image"}, {"type": "text", "text": "What is shown?"}]
        answer = [{"type": "text", "text": " ".join(random.choice(words, 16))}]
        messages = [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
        row = {"id": str(index), "images": [f"{index}.png"], "messages": messages}
        lines.append(json.dumps(row) + "\n")
    file = folder / "train.jsonl"
    file.write_text("".join(lines))
    return file


def exact_trainer(folder: Path, config: SiglipConfig, pairs: int, micro: int) -> SiglipTrainer:
    """The trainer of a random model with a random adapter, for exact batches of all pairs."""
    side = config.vision_config.image_size
    write_base(folder, config)
    (folder / "recipe.yaml").write_text("{}\n")
    sections = [
        f"model.base={folder}",
        "model.dtype=float32",
        f"data.train={write_rows(folder, pairs, side)}",
        f"data.image_size={side}",
        "lora.r=16",
        "lora.alpha=32",
        "lora.dropout=0",
        "lora.targets=both_no_head",
        "contrastive.positives=diagonal",
        f"train.output_dir={folder / 'run'}",
        f"train.per_device_train_batch_size={micro}",
        f"train.gradient_accumulation_steps={pairs // micro}",
        "train.use_cpu=true",
    ]
    recipe = SiglipRecipe.load(folder / "recipe.yaml", sections)
    arguments = siglip_arguments(recipe.train, dtype="float32")
    lora = recipe.lora.model_copy(update={"init_lora_weights": False})  # no recipe may say so
    sections = recipe.model, recipe.data, lora, recipe.contrastive
    prepared = prepare_siglip_data(*sections, arguments)
    base = {"base": recipe.model.base, "revision": None}
    return build_trainer(
        *sections, arguments=arguments, prepared=prepared, base=base, load=random_model
    )


def random_model(model: ModelSection, lora: LoraSection | None, *, image_size: int) -> SiglipModel:
    """A SigLIP of the base's configuration, with the scale and bias of released models."""
    torch.manual_seed(7)
    drawn = SiglipModel(SiglipConfig.from_pretrained(model.base))
    nn.init.constant_(drawn.logit_scale, LOGIT_SCALE)
    nn.init.constant_(drawn.logit_bias, LOGIT_BIAS)
    return drawn


def accumulate(trainer: Trainer, batches: Sequence[Batch]) -> float:
    """The summed loss of a step's micro-batches, which run as in Trainer's loop."""
    taken, items = trainer.get_batch_samples(map(dict, batches), len(batches), trainer.args.device)
    trainer.current_gradient_accumulation_steps = len(taken)
    return sum(trainer.training_step(trainer.model, batch, items).item() for batch in taken)


def open_clip_loss() -> nn.Module | None:
    """open_clip's SigLipLoss, loaded from its file alone, which needs only torch."""
    package = importlib.util.find_spec("open_clip")
    if package is None:
        return None
    spec = importlib.util.spec_from_file_location(
        "open_clip_loss", Path(package.origin).with_name("loss.py")
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.SigLipLoss()


def accumulate_as_open_clip(
    model: nn.Module, loss_of: nn.Module, batches: Sequence[Batch]
) -> float:
    """The last loss of a step, each micro-batch compared with the cached features of the others.

    Source: train_one_epoch with accum_freq > 1 in open_clip_train/train.py of open_clip 3.3.0.
    """
    with torch.no_grad():
        cached = [embeddings(model, batch) for batch in batches]
    for index, batch in enumerate(batches):
        features = [*cached[:index], embeddings(model, batch), *cached[index + 1 :]]
        images, texts = map(torch.cat, zip(*features, strict=True))
        scale, bias = scale_and_bias(model)
        loss = loss_of(images, texts, scale.exp(), bias)
        loss.backward()
    return loss.item()


def full_batch(model: nn.Module, whole: Batch) -> float:
    """The loss of all pairs as it is defined, in one autograd graph.

    Source: arXiv:2303.15343, algorithm 1.
    """
    images, texts = embeddings(model, whole)
    scale, bias = scale_and_bias(model)
    logits = scale.exp() * images @ texts.T + bias
    signs = 2 * torch.eye(len(images)) - 1
    loss = -logsigmoid(signs * logits).sum() / len(images)
    loss.backward()
    return loss.item()


def embeddings(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Embeddings of images and texts, of unit norm."""
    outputs = model(input_ids=batch["input_ids"], pixel_values=batch["pixel_values"])
    return outputs.image_embeds, outputs.text_embeds


class Variant:
    """One way to take a step, and the measurements of its steps."""

    def __init__(self, name: str, model: nn.Module, step: Callable[[], float]) -> None:
        self.name = name
        self.model = model
        self.step = step
        self.cpu: list[float] = []
        self.wall: list[float] = []

    def run(self) -> None:
        """Take a step and record its measurements."""
        self.model.zero_grad(set_to_none=True)
        with PeakCounter() as counter:
            wall, cpu = time.perf_counter(), time.process_time()
            self.loss = self.step()
            self.cpu.append(time.process_time() - cpu)
            self.wall.append(time.perf_counter() - wall)
        self.peak = counter.peak
        own = scale_and_bias(self.model)
        self.grad_scale, self.grad_bias = (parameter.grad.item() for parameter in own)
        self.grad_adapter = torch.cat(
            [p.grad.flatten().double() for n, p in self.model.named_parameters() if "lora_" in n]
        )

    @property
    def gradient(self) -> Tensor:
        """The gradient of all trained parameters."""
        return torch.cat([self.grad_adapter, torch.tensor([self.grad_scale, self.grad_bias])])


def error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def compare(
    folder: Path, config: SiglipConfig, *, pairs: int, micro: int, rounds: int
) -> list[dict[str, Any]]:
    """The measurements of all variants, run in turn on the same pairs.

    Args:
        folder: for base, images and rows.
        config: of the model.
        pairs: of the effective batch.
        micro: pairs of a micro-batch.
        rounds: steps of each variant.
    """
    exact = exact_trainer(folder, config, pairs, micro)
    model = exact.model
    entries = list(exact.train_dataset)
    batches = [
        exact.data_collator(entries[start : start + micro]) for start in range(0, pairs, micro)
    ]
    plain = [{key: batch[key] for key in ("input_ids", "pixel_values")} for batch in batches]
    whole = {key: torch.cat([batch[key] for batch in plain]) for key in plain[0]}
    stock = Trainer(model, exact.args)
    stock_batches = [{**batch, "return_loss": True} for batch in plain]

    loss_of = open_clip_loss()
    steps = {
        "a": partial(accumulate, stock, stock_batches),
        **({"b": partial(accumulate_as_open_clip, model, loss_of, plain)} if loss_of else {}),
        "c": partial(accumulate, exact, batches),
        "d": partial(full_batch, model, whole),
    }
    variants = [Variant(name, model, step) for name, step in steps.items()]
    alone = Variant("micro-batch", model, partial(accumulate, stock, stock_batches[:1]))
    alone.run()
    for _ in range(rounds):
        for variant in variants:
            variant.run()

    first, last = variants[0], variants[-1]
    return [
        {
            "variant": variant.name,
            "cpu_over_a": statistics.median(variant.cpu) / statistics.median(first.cpu),
            "peak_over_micro_batch": variant.peak / alone.peak,
            "cpu_seconds": statistics.median(variant.cpu),
            "wall_seconds": statistics.median(variant.wall),
            "peak_mib": variant.peak / 2**20,
            "loss": variant.loss,
            "cosine": float(torch.cosine_similarity(variant.gradient, last.gradient, dim=0)),
            "error": error(variant.gradient, last.gradient),
            "adapter_error": error(variant.grad_adapter, last.grad_adapter),
            "grad_scale": variant.grad_scale,
            "grad_bias": variant.grad_bias,
        }
        for variant in variants
    ]


def show(pairs: int, table: list[dict[str, Any]]) -> None:
    lines = [f"\n{pairs} pairs in micro-batches of {MICRO_BATCH}", "  ".join(table[0])]
    for entry in table:
        cells = [v if isinstance(v, str) else f"{v:.4g}" for v in entry.values()]
        lines.append(
            "  ".join(cell.rjust(len(name)) for cell, name in zip(cells, entry, strict=True))
        )
    sys.stdout.write("\n".join(lines) + "\n")


def main() -> None:
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    if open_clip_loss():
        versions["open_clip"] = importlib.metadata.version("open_clip_torch")
    else:
        sys.stdout.write("b is left out: open_clip_torch is not installed\n")
    tables = {}
    for pairs, rounds in ROUNDS.items():
        with tempfile.TemporaryDirectory() as folder:
            tables[f"{pairs} pairs"] = compare(
                Path(folder), siglip_config(), pairs=pairs, micro=MICRO_BATCH, rounds=rounds
            )
        show(pairs, tables[f"{pairs} pairs"])
    machine = f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores"
    facts = {"machine": machine, "threads": torch.get_num_threads(), **versions}
    record = {**facts, "micro_batch": MICRO_BATCH, "rounds": ROUNDS, **tables}
    RESULTS.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
