"""Text generation with a trained decoder."""

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel
from PIL import Image
from transformers import BatchFeature, GenerationConfig, PreTrainedModel, ProcessorMixin

from medft.config.recipe import DecoderDataSection, ModelSection
from medft.config.strict_yaml import shortened
from medft.data.messages import Message
from medft.decoder.checks import check_image_size
from medft.decoder.conversation import ConversationEncoder
from medft.decoder.families import family_of
from medft.decoder.model import load_saved
from medft.errors import BaseModelError
from medft.models.adapter import without_adapter
from medft.models.base import default_device, load_processor
from medft.models.saved import SavedModel, SavedRecord, find_saved_model

logger = logging.getLogger(__name__)

_GREEDY_KEYS = {
    *("bos_token_id", "pad_token_id", "eos_token_id"),
    *("do_sample", "temperature", "top_p", "top_k"),
    *("_from_model_config", "transformers_version", "cache_implementation", "output_attentions"),
    *("output_hidden_states", "max_length", "max_new_tokens"),
}
"""Settings of a generation_config.json that greedy decoding keeps, or that cannot change it."""

BATCH_SIZE = 8
"""Maximum number of conversations in a batch."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """A conversation whose next turn is the assistant's, and its images."""

    messages: list[Message]
    images: list[Image.Image]


@dataclass(frozen=True, slots=True)
class Answer:
    """An assistant's turn."""

    text: str

    truncated: bool
    """Whether the bound on new tokens cut it before its end."""


class Generator:
    """A decoder that generates the assistant's next turn by greedy decoding."""

    def __init__(
        self,
        model: PreTrainedModel,
        processor: ProcessorMixin,
        record: SavedRecord,
    ) -> None:
        """Wrap a loaded model.

        Args:
            model: on its device, with or without adapter.
            processor: the one it was trained with.
            record: what training did to images, and how long answers and rows were.

        Raises:
            BaseModelError: its generation_config.json names tokens that it does not have, or its
                processor makes images of another size than it takes.
        """
        self.model = model.eval()
        self.record = record
        standard = DecoderDataSection.model_fields["max_image_tiles"].default
        self.conversation = ConversationEncoder(
            processor,
            family_of(record.family),
            max_image_tiles=record.max_image_tiles or standard,
        )
        self.max_new_tokens = _bound(record)
        bare = model.get_base_model() if isinstance(model, PeftModel) else model
        check_image_size(processor, bare.config)
        bare.generation_config = _greedy(bare, self.conversation.end_of_turn)

    @classmethod
    def load(cls, source: Path) -> "Generator":
        """The decoder of a run, an adapter folder or a model folder.

        Raises:
            RunError: the path is none of these.
            BaseModelError: as from `of`.
        """
        return cls.of(find_saved_model(source))

    @classmethod
    def of(cls, saved: SavedModel) -> "Generator":
        """A saved decoder; an adapter sits on its base in the precision it was trained on.

        Raises:
            BaseModelError: it cannot be loaded, or is not a decoder that medft knows.
        """
        model = load_saved(saved).to(default_device())
        return cls(model, load_processor(ModelSection(base=str(saved.folder))), saved.record)

    @contextmanager
    def without_adapter(self) -> Iterator[None]:
        """A block in which the base answers as plain transformers would compute it.

        Its adapter is disabled, and so is `cross_attention_fix`; a quantized base stays quantized.

        Raises:
            RunError: the model has no adapter.
        """
        with (
            without_adapter(self.model),
            self.conversation.family.without_isolation(self.model),
        ):
            yield

    def generate(self, requests: Sequence[Request]) -> list[Answer]:
        """The assistant's turns, in the order of the requests.

        A batch holds requests with equally many images; others might see each other's.
        """
        answers: dict[int, Answer] = {}
        order = sorted(range(len(requests)), key=lambda i: len(requests[i].images))
        while order:
            num_images = len(requests[order[0]].images)
            chosen = [i for i in order[:BATCH_SIZE] if len(requests[i].images) == num_images]
            order = order[len(chosen) :]
            turns = self._generate_batch([requests[i] for i in chosen])
            answers.update(zip(chosen, turns, strict=True))
        return [answers[index] for index in range(len(requests))]

    @torch.inference_mode()
    def _generate_batch(self, requests: Sequence[Request]) -> list[Answer]:
        encoded = [self.conversation.encode_prompt(request.messages) for request in requests]
        images = [
            [self.conversation.image_inputs(image) for image in request.images]
            for request in requests
        ]
        batch = BatchFeature(self.conversation.batch(encoded, images, padding_side="left"))
        batch.update(self.conversation.family.stack_images(images))
        del batch["labels"]
        tokens = self.model.generate(
            **batch.to(self.model.device, self.model.dtype),
            do_sample=False,
            max_new_tokens=self.max_new_tokens,
            use_cache=True,
        )
        new = tokens[:, batch["input_ids"].shape[1] :]
        decoded = self.conversation.processor.batch_decode(new, skip_special_tokens=True)
        ends = torch.tensor(self.model.generation_config.eos_token_id, device=new.device)
        ended = torch.isin(new, ends).any(dim=1).tolist()
        return [
            Answer(text.strip(), truncated=not end)
            for text, end in zip(decoded, ended, strict=True)
        ]


def _greedy(model: PreTrainedModel, end_of_turn: int) -> GenerationConfig:
    """Greedy decoding with the special tokens of the base; its other settings are not used."""
    given = model.generation_config
    ends = given.eos_token_id
    ends = list(ends) if isinstance(ends, list | tuple) else [ends]
    named = [given.bos_token_id, given.pad_token_id, *ends]
    tokens = range(len(model.get_input_embeddings().weight))  # PEFT may have wrapped the layer
    wrong = [t for t in named if t is not None and not (isinstance(t, int) and t in tokens)]
    if wrong:
        raise BaseModelError(
            f"expected tokens of the base in its generation_config.json, got {shortened(wrong[0])} "
            f"of {len(tokens)}: restore the file"
        )
    ignored = given.to_diff_dict().keys() - _GREEDY_KEYS
    if ignored:
        logger.warning(
            "settings of the base's generation_config.json are not used, answers are decoded "
            "greedily: %s",
            ", ".join(sorted(ignored)),
        )
    return GenerationConfig(
        bos_token_id=given.bos_token_id,
        pad_token_id=given.pad_token_id,
        eos_token_id=sorted({*(end for end in ends if end is not None), end_of_turn}),
    )


def _bound(record: SavedRecord) -> int:
    """Maximum number of new tokens: half as many again as the longest trained answer had."""
    if record.longest_answer is None:
        return record.max_length or 512
    return math.ceil(1.5 * record.longest_answer)
