"""Trained models, loaded as they were trained: a decoder that answers, a SigLIP that embeds."""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from PIL import Image
from torch import nn
from transformers import AutoModel, BatchFeature, ProcessorMixin

from medft.config.recipe import DecoderDataSection, ModelSection, QuantizationSection
from medft.data.chat import Message
from medft.data.pairs import batched
from medft.decoder.collator import ConversationEncoder
from medft.decoder.families import family_of
from medft.decoder.model import load_model as load_decoder
from medft.errors import RunError
from medft.files import file_sha256
from medft.models.base import check_local_base, load_config, load_processor, load_weights
from medft.models.lora import NOTES_FILE, check_same_base, find_adapter, load_adapter, read_notes
from medft.siglip.model import (
    check_family,
    embed_images,
    embed_texts,
    load_adapted,
    load_siglip_processor,
)
from medft.siglip.prepared import caption_of

BATCH = 8
"""Pictures or conversations that go through a model together."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Trained:
    """Where a trained model lies, and what medft noted of it."""

    folder: Path
    """Of the adapter, or of the whole model."""

    notes: dict[str, Any]
    """Content of medft.json; empty for a model that medft did not write."""

    is_adapter: bool

    @property
    def base(self) -> ModelSection:
        """The model to load: an adapter's base, or the folder itself."""
        if not self.is_adapter:
            return ModelSection(base=str(self.folder))
        base = str(Path(self.notes["base"]).expanduser())
        dtype = self.notes.get("dtype", "float32")
        return ModelSection(base=base, revision=self.notes["revision"], dtype=dtype)

    @property
    def weights(self) -> str:
        """What tells its weights from others.

        A hash of an adapter; of a whole model, which is large, names, sizes and times of its files.
        """
        digest = hashlib.sha256()
        for path in sorted(self.folder.glob("*.safetensors")):
            state = path.stat()
            known = f"{path.name} {state.st_size} {state.st_mtime_ns}"
            digest.update((file_sha256(path) if self.is_adapter else known).encode())
        return digest.hexdigest()[:16]

    @property
    def is_encoder(self) -> bool:
        """Whether it is a SigLIP."""
        family = self.notes.get("family") or load_config(self.base).model_type
        return family in ("siglip", "siglip2")


def find_trained(source: Path) -> Trained:
    """The model that a run, an adapter folder or a model folder holds.

    Raises:
        RunError: the run is not finished, or the path is none of the three.
    """
    if (source / "config.json").is_file():
        folder, is_adapter = source, False
    elif (source / "run.json").is_file() and (source / "model").is_dir():
        folder, is_adapter = source / "model", False
    else:
        folder, is_adapter = find_adapter(source), True
    has_notes = is_adapter or (folder / NOTES_FILE).is_file()
    notes = read_notes(folder) if has_notes else {}
    return Trained(folder=folder, notes=notes, is_adapter=is_adapter)


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _without_adapter(model: nn.Module) -> AbstractContextManager[None]:
    if not isinstance(model, PeftModel):
        raise RunError(
            "expected an adapter, whose base can be compared with it, got a whole model: give the "
            "run that trained it"
        )
    return model.disable_adapter()


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """A conversation whose next turn is the assistant's, and its pictures."""

    messages: list[Message]
    images: list[Image.Image]


class Generator:
    """A decoder that writes the assistant's next turn, greedily."""

    def __init__(
        self, model: nn.Module, processor: ProcessorMixin, *, notes: dict[str, Any], family: str
    ) -> None:
        """Wrap a loaded model.

        Args:
            model: on its device, with or without adapter.
            processor: as it was trained with.
            notes: content of medft.json: what training did to pictures, how long rows could be.
            family: model_type of the base.
        """
        self.model = model.eval()
        limit = notes.get(
            "max_image_tiles", DecoderDataSection.model_fields["max_image_tiles"].default
        )
        self.encoder = ConversationEncoder(processor, family_of(family), max_image_tiles=limit)
        self.max_new_tokens = notes.get("max_length", 512)
        for name in ("temperature", "top_p", "top_k"):  # of sampling, which is off
            setattr(model.generation_config, name, None)
        ends = model.generation_config.eos_token_id
        ends = [ends] if isinstance(ends, int) else ends or []
        model.generation_config.eos_token_id = sorted({*ends, self.encoder.end_of_turn})

    @classmethod
    def load(cls, source: Path) -> "Generator":
        """The decoder of a run, an adapter folder or a model folder.

        An adapter sits on its base in the precision, and quantised as, it was trained on.

        Raises:
            RunError: there is none.
            BaseModelError: it cannot be loaded, or is no decoder that medft knows.
        """
        trained = find_trained(source)
        check_local_base(trained.base)
        family = family_of(load_config(trained.base).model_type)
        quantization = trained.notes.get("quantization") if trained.is_adapter else None
        if trained.is_adapter:
            check_same_base(trained.base, trained.notes)
        model: nn.Module = load_decoder(
            trained.base,
            family,
            QuantizationSection(**quantization) if quantization else None,
            dtype=trained.base.dtype if trained.is_adapter else "auto",
            cross_attention_fix=trained.notes.get("cross_attention_fix", False),
        )
        if trained.is_adapter:
            model = load_adapter(model, trained.folder)
        processor = load_processor(ModelSection(base=str(trained.folder)))
        return cls(model.to(_device()), processor, notes=trained.notes, family=family.model_type)

    def without_adapter(self) -> AbstractContextManager[None]:
        """Answers inside this block are those of the base.

        Raises:
            RunError: the model is whole, its base is not known apart.
        """
        return _without_adapter(self.model)

    def generate(self, requests: Sequence[Request]) -> list[str]:
        """The assistant's turns, in the order of the requests.

        Requests with equally many pictures share batches; others might see each other's.
        """
        answers: dict[int, str] = {}
        order = sorted(range(len(requests)), key=lambda i: len(requests[i].images))
        while order:
            images = len(requests[order[0]].images)
            chosen = [i for i in order[:BATCH] if len(requests[i].images) == images]
            order = order[len(chosen) :]
            texts = self._generate_batch([requests[i] for i in chosen])
            answers.update(zip(chosen, texts, strict=True))
        return [answers[index] for index in range(len(requests))]

    @torch.inference_mode()
    def _generate_batch(self, requests: Sequence[Request]) -> list[str]:
        encoded = [self.encoder.encode_prompt(request.messages) for request in requests]
        pictures = [[self.encoder.picture(i) for i in request.images] for request in requests]
        batch = BatchFeature(self.encoder.batch(encoded, pictures, padding_side="left"))
        batch.update(self.encoder.family.stack(pictures))
        del batch["labels"]
        tokens = self.model.generate(
            **batch.to(self.model.device, self.model.dtype),
            do_sample=False,
            max_new_tokens=self.max_new_tokens,
            use_cache=True,
        )
        new = tokens[:, batch["input_ids"].shape[1] :]
        decoded = self.encoder.processor.batch_decode(new, skip_special_tokens=True)
        return [text.strip() for text in decoded]


class Encoder:
    """A SigLIP that gives pictures and texts embeddings of length 1."""

    def __init__(
        self,
        model: nn.Module,
        processor: ProcessorMixin,
        *,
        max_length: int,
        caption: str | None = None,
    ) -> None:
        """Wrap a loaded model.

        Args:
            model: on its device, with or without adapter.
            processor: as it was trained with.
            max_length: tokens that a text is padded or cut to.
            caption: template that it was trained with, as `data.caption` in a recipe.
        """
        self.model = model.eval()
        self.processor = processor
        self.max_length = max_length
        self._caption = caption

    @classmethod
    def load(cls, source: Path) -> "Encoder":
        """The SigLIP of a run, an adapter folder or a model folder.

        Raises:
            RunError: there is none.
            BaseModelError: it cannot be loaded, or is no SigLIP of fixed resolution.
        """
        trained = find_trained(source)
        check_local_base(trained.base)
        config = load_config(trained.base)
        check_family(config)
        model: nn.Module
        if trained.is_adapter:
            check_same_base(trained.base, trained.notes)
            model = load_adapted(trained.base, trained.folder)
        else:
            model = load_weights(AutoModel, trained.base, dtype="auto")
        positions = config.text_config.max_position_embeddings
        max_length = trained.notes.get("max_length", positions)
        processor = load_siglip_processor(
            ModelSection(base=str(trained.folder)),
            image_size=trained.notes.get("image_size", config.vision_config.image_size),
            max_length=max_length,
        )
        return cls(
            model.to(_device()),
            processor,
            max_length=max_length,
            caption=trained.notes.get("caption"),
        )

    def caption_of(self, row: dict[str, Any]) -> str:
        """The caption of a row of `load_rows`, made as in training."""
        return caption_of(row, self._caption)

    def without_adapter(self) -> AbstractContextManager[None]:
        """Embeddings inside this block are those of the base.

        Raises:
            RunError: the model is whole, its base is not known apart.
        """
        return _without_adapter(self.model)

    @torch.inference_mode()
    def embed_images(self, images: Iterator[Image.Image] | Sequence[Image.Image]) -> np.ndarray:
        """[N, D] float32, every row of length 1."""
        rows = []
        for chunk in batched(images, BATCH):
            batch = self.processor.image_processor(images=chunk, return_tensors="pt")
            pixels = batch["pixel_values"].to(self.model.device, self.model.dtype)
            rows.append(embed_images(self.model, pixels))
        return _unit(rows)

    @torch.inference_mode()
    def embed_texts(self, texts: Sequence[str]) -> np.ndarray:
        """[N, D] float32, every row of length 1."""
        rows = []
        for chunk in batched(texts, BATCH):
            input_ids = self.processor.tokenizer(
                chunk,
                padding="max_length",
                truncation=True,
                max_length=self.max_length,
                return_tensors="pt",
            )["input_ids"]
            rows.append(embed_texts(self.model, input_ids.to(self.model.device)))
        return _unit(rows)


def _unit(rows: list[torch.Tensor]) -> np.ndarray:
    return nn.functional.normalize(torch.cat(rows).float(), dim=-1).cpu().numpy()
