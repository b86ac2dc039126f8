"""Tiny bases pre-trained on synthetic images with captions without medical terms.

A random base gives an adapter nothing to adapt. These learn to name discs by number, size, color
and position. The decoder sees reports without images only, SigLIP only in its tokenizer's corpus.
The result depends on the code of bases, phantoms and pretrain, the versions of the libraries and
the seed, and is cached under their hash.
"""

import hashlib
import importlib.metadata
import logging
import math
import multiprocessing
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForImageTextToText,
    AutoProcessor,
    ProcessorMixin,
    get_cosine_schedule_with_warmup,
)

from medft.decoder.conversation import IGNORED
from medft.demo.bases import build_decoder, build_siglip
from medft.demo.phantoms import MODALITIES, caption, draw_phantom, render, report
from medft.files import cache_folder, complete_folder
from medft.siglip.loss import Labels, sigmoid_loss
from medft.siglip.model import embed
from medft.training.process import process_setup

IMAGE_SIZE = 56
"""Side of the bases' images in pixels."""

NUM_IMAGES = 10_000
POSITIONS = 32
"""Tokens of a text of the tiny SigLIP, half of those of the released one: reports are short."""

DECODER_STEPS = 720
SIGLIP_STEPS = 320
PROMPT = "Name what you see."

logger = logging.getLogger(__name__)


def pretrained_bases(folder: Path, *, seed: int) -> None:
    """Write the bases `decoder` and `siglip` into a folder, from the cache if it has them.

    The two are trained in parallel, each on one thread, which is the fastest on two cores.
    """
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        tasks = {name: pool.submit(_cached, name, seed) for name in ("decoder", "siglip")}
        for name, task in tasks.items():
            shutil.copytree(task.result(), folder / name)


def content_key(seed: int) -> str:
    """A hash of everything that determines the bases."""
    digest = hashlib.sha256(str(seed).encode())
    for path in sorted(Path(__file__).parent.glob("*.py")):
        if path.stem in ("bases", "phantoms", "pretrain"):
            digest.update(path.read_bytes())
    for package in ("torch", "transformers", "tokenizers", "sentencepiece", "numpy"):
        digest.update(importlib.metadata.version(package).encode())
    return digest.hexdigest()[:16]


def _cached(name: str, seed: int) -> Path:
    folder = cache_folder() / f"{name}-{content_key(seed)}"
    if not folder.is_dir():
        torch.set_num_threads(1)
        folder.parent.mkdir(parents=True, exist_ok=True)
        with process_setup(), complete_folder(folder) as draft:
            {"decoder": pretrain_decoder, "siglip": pretrain_siglip}[name](draft, seed=seed)
    return folder


def pretrain_decoder(
    folder: Path, *, seed: int, num_images: int = NUM_IMAGES, steps: int = DECODER_STEPS
) -> None:
    """Write a Mllama of two million parameters that answers PROMPT with a caption.

    Args:
        folder: created if it does not exist.
        seed: of weights, images and order.
        num_images: number of images, rendered once.
        steps: of 32 rows; every fourth one trains on reports without images.
    """
    random = np.random.default_rng(seed)
    reports = _reports(random)
    images, captions = _drawn(random, num_images)
    build_decoder(folder, seed=seed, max_tiles=1, width=128, layers=6, corpus=[*reports, *captions])
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=False)
    model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=False)
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "gate" in name.rpartition(".")[2]:
            nn.init.constant_(parameter, 1.0)
    # at the usual standard deviation of 0.02 side and level stay at chance: images are small
    nn.init.normal_(model.model.vision_model.gated_positional_embedding.embedding, std=1.5)
    pixels = _normalized(images, processor)
    rows = [_conversation(processor, text, image=True) for text in captions]
    unseen = [_conversation(processor, text, image=False) for text in reports]
    pad = processor.tokenizer.pad_token_id

    def loss(step: int) -> Tensor:
        if step % 4 == 3:
            chosen = random.integers(len(unseen), size=32)
            return model(**_padded([unseen[i] for i in chosen], pad)).loss
        chosen = random.integers(len(rows), size=32)
        batch = _padded([rows[i] for i in chosen], pad)
        seen = (batch["input_ids"] == processor.image_token_id).cumsum(1) > 0
        return model(
            **batch,
            pixel_values=pixels[chosen][:, None, None],
            aspect_ratio_ids=torch.ones(32, 1, dtype=torch.long),
            aspect_ratio_mask=torch.ones(32, 1, 1, dtype=torch.long),
            cross_attention_mask=seen[:, :, None, None].long(),
        ).loss

    _train("decoder", model, loss, steps=steps, learning_rate=2e-3)
    model.save_pretrained(folder)


def pretrain_siglip(
    folder: Path, *, seed: int, num_images: int = NUM_IMAGES, steps: int = SIGLIP_STEPS
) -> None:
    """Write a SigLIP of over a million parameters that matches images and captions.

    Args:
        folder: created if it does not exist.
        seed: of weights, images and order.
        num_images: number of images, rendered once.
        steps: of 128 pairs.
    """
    random = np.random.default_rng(seed)
    reports = _reports(random)
    images, captions = _drawn(random, num_images)
    build_siglip(
        folder,
        seed=seed,
        width=128,
        layers=4,
        positions=POSITIONS,
        corpus=[*reports, *captions],
    )
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=False)
    model = AutoModel.from_pretrained(folder, trust_remote_code=False)
    torch.manual_seed(seed)
    for embedding in (
        model.vision_model.embeddings.position_embedding,
        model.text_model.embeddings.token_embedding,
    ):
        nn.init.normal_(embedding.weight, std=1.0)
    pixels = _normalized(images, processor)
    input_ids = processor.tokenizer(
        captions, padding="max_length", max_length=POSITIONS, truncation=True, return_tensors="pt"
    )["input_ids"]

    def loss(step: int) -> Tensor:
        chosen = random.integers(len(captions), size=128)
        ids = input_ids[chosen]
        vectors = embed(model, ids, pixels[chosen])
        labels = Labels(ids, torch.arange(len(ids)), "caption").tile()
        return sigmoid_loss(*vectors, labels, model.logit_scale, model.logit_bias)

    _train("siglip", model, loss, steps=steps, learning_rate=1e-3)
    model.save_pretrained(folder)


def _drawn(random: np.random.Generator, num_images: int) -> tuple[np.ndarray, list[str]]:
    """Images [N, IMAGE_SIZE, IMAGE_SIZE, 3] uint8 of all modalities, and their captions."""
    phantoms = [
        draw_phantom(modality, random, clear=0.1)
        for modality, _ in zip(_cycle(MODALITIES), range(num_images), strict=False)
    ]
    images = [render(phantom, random, side=IMAGE_SIZE) for phantom in phantoms]
    return np.stack(images).round().astype(np.uint8), [caption(phantom) for phantom in phantoms]


def _cycle(names: Mapping[str, object]) -> Iterator[str]:
    while True:
        yield from names


def _reports(random: np.random.Generator) -> list[str]:
    return [report(draw_phantom(name, random), random) for name in MODALITIES for _ in range(500)]


def _normalized(images: np.ndarray, processor: ProcessorMixin) -> Tensor:
    """[N, 3, IMAGE_SIZE, IMAGE_SIZE] pixel values, as the base's processor normalizes them."""
    mean, std = (
        torch.tensor(getattr(processor.image_processor, name)).view(3, 1, 1)
        for name in ("image_mean", "image_std")
    )
    return (torch.from_numpy(images).permute(0, 3, 1, 2) / 255 - mean) / std


def _conversation(processor: ProcessorMixin, text: str, *, image: bool) -> tuple[list[int], int]:
    """The tokens of a question and its answer, and the number of tokens before the answer."""
    seen = [{"type": "image"}] if image else []
    turn = {"role": "user", "content": [*seen, {"type": "text", "text": PROMPT}]}
    prompt = processor.apply_chat_template([turn], tokenize=False, add_generation_prompt=True)
    tokens = processor.tokenizer(prompt, add_special_tokens=False)["input_ids"]
    answer = processor.tokenizer(f"{text}<|eot_id|>", add_special_tokens=False)["input_ids"]
    return [*tokens, *answer], len(tokens)


def _padded(rows: list[tuple[list[int], int]], pad: int) -> dict[str, Tensor]:
    length = max(len(tokens) for tokens, _ in rows)
    batch = {
        "input_ids": torch.full((len(rows), length), pad),
        "attention_mask": torch.zeros(len(rows), length, dtype=torch.long),
        "labels": torch.full((len(rows), length), IGNORED),
    }
    for index, (tokens, start) in enumerate(rows):
        batch["input_ids"][index, : len(tokens)] = torch.tensor(tokens)
        batch["attention_mask"][index, : len(tokens)] = 1
        batch["labels"][index, start : len(tokens)] = torch.tensor(tokens[start:])
    return batch


def _train(
    name: str,
    model: nn.Module,
    loss_of: Callable[[int], Tensor],
    *,
    steps: int,
    learning_rate: float,
) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.01)
    schedule = get_cosine_schedule_with_warmup(optimizer, math.ceil(steps / 20), steps)
    model.train()
    for step in range(steps):
        loss = loss_of(step)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 60 == 0 or step == steps - 1:
            logger.info("pre-training %s: step %s of %s, loss %.3f", name, step, steps, loss.item())
