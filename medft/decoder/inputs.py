"""Everything that a decoder run can know and check before the base's weights are loaded."""

import logging
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset
from torch import nn
from transformers import (
    AutoModelForImageTextToText,
    PreTrainedConfig,
    ProcessorMixin,
    TrainingArguments,
)

from medft.adapters import ALL_WEIGHTS, plan_adapter, target_modules
from medft.base import empty_model, load_config, load_processor
from medft.data.chat import SHOWN_PROBLEMS, describe_counts, fingerprint, load_rows, messages_of
from medft.data.tokens import length_percentiles
from medft.decoder.collator import IGNORED, ConversationEncoder, DecoderCollator, mark_trained
from medft.decoder.families import Family, family_of
from medft.decoder.sampler import ImageCountSampler
from medft.errors import BaseModelError, DataError, Findings
from medft.recipe import (
    DecoderDataSection,
    DecoderModelSection,
    LoraSection,
    ModelSection,
    QuantizationSection,
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class DecoderInputs:
    """What a decoder is trained on and with."""

    config: PreTrainedConfig
    family: Family
    processor: ProcessorMixin
    collator: DecoderCollator
    adapter_plan: str
    """How many layers get an adapter, by part, and how many parameters are trained."""

    train: Dataset
    validation: Dataset | None
    sampler: ImageCountSampler | None
    """The order of training rows, where they differ in their numbers of images."""

    record: dict[str, Any]
    """Fingerprints of the files and what became of their rows, for run.json."""

    @property
    def rows_per_epoch(self) -> int:
        """Training rows of an epoch, with those that come twice."""
        return len(self.train if self.sampler is None else self.sampler)

    def examples(self, num_rows: int = 3) -> list[str]:
        """The first rows as text, what is trained between >>> and <<<."""
        encoder, max_length = self.collator.encoder, self.collator.max_length
        rows = self.train.select(range(min(num_rows, len(self.train))))
        return [
            mark_trained(encoder.encode(messages_of(row), row["id"]), encoder, max_length)
            for row in rows.remove_columns("images")
        ]


def prepare_inputs(
    model: ModelSection,
    data: DecoderDataSection,
    lora: LoraSection | None,
    arguments: TrainingArguments,
) -> DecoderInputs:
    """Read the data and the base's small files, and check each row against them.

    Raises:
        MedftError: with every problem found: data files first, then the base.
    """
    findings = Findings()
    files: dict[str, tuple[Path, Dataset]] = {}
    for split in ("train", "validation"):
        path = getattr(data, split)
        if path is not None:
            with findings.gather():
                files[split] = (Path(path), load_rows(Path(path), split=split))
    with findings.gather():
        config = load_config(model)
        family = family_of(config.model_type)
        processor = load_processor(model)
        empty = empty_model(
            AutoModelForImageTextToText, config, deepspeed_plugin=arguments.deepspeed_plugin
        )
        head_rows = empty.get_output_embeddings().out_features
        plan = _plan(empty, lora, family) if lora else ALL_WEIGHTS
    findings.raise_any()
    encoder = ConversationEncoder(processor, family)
    kept: dict[str, Dataset] = {}
    record: dict[str, Any] = {}
    for split, (path, rows) in files.items():
        with findings.gather():
            kept[split], counts = _measured(rows, encoder, data, head_rows)
            if split == "validation":
                _check_one_image_count(counts["images_a_row"], arguments)
            record[split] = {**fingerprint(path, rows), **counts}
            logger.info("%s: %s", split, describe_counts(counts))
    findings.raise_any()
    sampler = _sampler(kept["train"], arguments)
    if sampler is not None:
        logger.info("train: %s rows come twice an epoch, to fill batches", sampler.repeats)
    return DecoderInputs(
        config=config,
        family=family,
        processor=processor,
        collator=DecoderCollator(
            encoder,
            max_length=data.max_length,
            max_image_tiles=data.max_image_tiles,
            head_rows=head_rows,
        ),
        adapter_plan=plan,
        train=kept["train"],
        validation=kept.get("validation"),
        sampler=sampler,
        record=record,
    )


def inference_notes(
    model: DecoderModelSection, data: DecoderDataSection, quantization: QuantizationSection | None
) -> dict[str, Any]:
    """What a trained adapter's user must do as training did, for medft.json."""
    return {
        "dtype": model.dtype,
        "cross_attention_fix": model.cross_attention_fix,
        "quantization": quantization and quantization.model_dump(),
        "max_length": data.max_length,
        "max_image_tiles": data.max_image_tiles,
    }


def _plan(empty: nn.Module, lora: LoraSection, family: Family) -> str:
    if family.parts["lm_head"] in target_modules(empty, lora.targets, family.presets):
        raise BaseModelError(
            "expected lora.targets without lm_head, whose weight the loss reads directly so "
            "that an adapter on it would not be trained: leave it out"
        )
    return plan_adapter(empty, lora, family.presets, family.parts)


def _measured(
    rows: Dataset, encoder: ConversationEncoder, data: DecoderDataSection, head_rows: int
) -> tuple[Dataset, dict[str, Any]]:
    """The rows that fit, and what is known of them: lengths, images, how many are cut or dropped.

    Raises:
        DataError: a row cannot be encoded, or its prompt is too long and `too_long` is error.
    """
    names = ("rows_kept", "rows_dropped", "answers_cut", "tokens_cut", "tokens_trained")
    counts: dict[str, Any] = dict.fromkeys(names, 0)
    keep: list[int] = []
    lengths: list[int] = []
    image_counts: Counter[int] = Counter()
    problems: list[str] = []
    for index, row in enumerate(rows.select_columns(["id", "messages", "images"])):
        try:
            encoded = encoder.encode(messages_of(row), row["id"])
            _check_special_tokens(row, encoded.input_ids, encoded.labels, encoder, head_rows)
        except DataError as error:
            problems.append(str(error))
            continue
        positions = [
            i for i, token in enumerate(encoded.input_ids) if token == encoder.image_token_id
        ]
        needed = max(encoded.prompt_length, *positions, 0) + 1
        lengths.append(len(encoded.input_ids))
        if needed > data.max_length:
            counts["rows_dropped"] += 1
            if data.too_long == "error":
                problems.append(
                    f"row {row['id']}: expected a prompt below data.max_length "
                    f"({data.max_length}), it has {needed - 1} tokens: raise it, or write "
                    f"data.too_long: drop"
                )
            continue
        keep.append(index)
        image_counts[len(row["images"])] += 1
        counts["answers_cut"] += len(encoded.input_ids) > data.max_length
        counts["tokens_cut"] += max(len(encoded.input_ids) - data.max_length, 0)
        labels = encoded.labels[: data.max_length]
        counts["tokens_trained"] += sum(label != IGNORED for label in labels)
    if problems:
        more = len(problems) - SHOWN_PROBLEMS
        rest = [f"{more} more rows are bad: correct them too"] if more > 0 else []
        raise DataError(*problems[:SHOWN_PROBLEMS], *rest)
    if not keep:
        raise DataError(
            f"expected rows whose prompt is below data.max_length ({data.max_length}), all "
            f"{len(rows)} are longer: raise it"
        )
    counts["rows_kept"] = len(keep)
    counts["tokens_a_row"] = length_percentiles(lengths)
    counts["images_a_row"] = {str(count): image_counts[count] for count in sorted(image_counts)}
    return (rows if len(keep) == len(rows) else rows.select(keep)), counts


def _check_special_tokens(
    row: dict[str, Any],
    input_ids: list[int],
    labels: list[int],
    encoder: ConversationEncoder,
    head_rows: int,
) -> None:
    if input_ids.count(encoder.image_token_id) != len(row["images"]):
        raise DataError(
            f"row {row['id']}: expected one image token for each of its {len(row['images'])} "
            f"images, its text holds others: remove them from the text"
        )
    if max(labels) >= head_rows:
        raise DataError(
            f"row {row['id']}: expected answers of ordinary text, one holds the token "
            f"{max(labels)}, beyond the {head_rows} rows of the output head: remove it"
        )


def _sampler(train: Dataset, arguments: TrainingArguments) -> ImageCountSampler | None:
    image_counts = [len(images) for images in train["images"]]
    round_size = arguments.per_device_train_batch_size * arguments.world_size
    if len(set(image_counts)) == 1 or round_size == 1:
        return None
    return ImageCountSampler(image_counts, round_size=round_size, seed=arguments.seed)


def _check_one_image_count(counts: dict[str, int], arguments: TrainingArguments) -> None:
    if len(counts) > 1 and arguments.per_device_eval_batch_size > 1:
        raise DataError(
            f"expected rows with equally many images in validation, got rows with "
            f"{' and '.join(counts)}, which would see each other's images in one batch: write "
            f"train.per_device_eval_batch_size: 1"
        )
