"""Everything that a decoder run can know and check before the base's weights are loaded."""

import hashlib
import logging
import math
import shutil
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from transformers import (
    AutoModelForImageTextToText,
    PreTrainedConfig,
    ProcessorMixin,
    TrainingArguments,
)

from medft.config.recipe import (
    DecoderDataSection,
    DecoderModelSection,
    LoraSection,
    QuantizationSection,
)
from medft.data.chat import (
    SHOWN_PROBLEMS,
    describe_counts,
    fingerprint,
    image_source,
    load_rows,
    messages_of,
)
from medft.data.tokens import length_percentiles
from medft.decoder.checks import (
    check_cached_tower,
    check_flags,
    check_layers_run,
    check_trained_vision,
    check_validation_batches,
    check_vocabulary,
    plan_targets,
    shards_weights,
)
from medft.decoder.collator import (
    IGNORED,
    ConversationEncoder,
    DecoderCollator,
    check_labels,
    mark_trained,
)
from medft.decoder.families import Family, family_of
from medft.decoder.sampler import RoundSampler
from medft.decoder.vision_cache import VisionCache, weights_sha256
from medft.errors import DataError, Findings
from medft.models.base import empty_model, load_config, load_processor
from medft.models.lora import ALL_WEIGHTS
from medft.provenance import package_versions

logger = logging.getLogger(__name__)

_VERSIONS = ("pillow", "torch", "transformers")
"""Packages whose versions may change the last bits of a feature."""

_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}


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
    sampler: RoundSampler
    """The order of training rows."""

    model: DecoderModelSection
    """The recipe's section."""

    num_processes: int

    record: dict[str, Any]
    """Fingerprints of the files and what became of their rows, for run.json."""

    @property
    def rows_per_epoch(self) -> int:
        """Training rows of an epoch, with those that come again."""
        return len(self.sampler)

    def open_cache(self, model: nn.Module) -> VisionCache | None:
        """The cache of what tower and projector make of images, where the recipe asks for one.

        Args:
            model: the base with its weights.
        """
        if self.model.vision_cache is None:
            return None
        key = {
            "weights": weights_sha256(model, self.family),
            "config": self.config.vision_config.to_dict(),
            "attention": model.config.vision_config._attn_implementation,
            "processor": self.processor.image_processor.to_dict(),
            "max_image_tiles": self.collator.encoder.max_image_tiles,
            "prunes": self.model.cross_attention_fix,
            "versions": {name: package_versions()[name] for name in _VERSIONS},
            "device": str(torch.accelerator.current_accelerator()),
        }
        limit = int(self.model.vision_cache_gb * 1e9) // self.num_processes
        return VisionCache(Path(self.model.vision_cache), key, limit=limit)

    def cache_plan(self) -> str | None:
        """How large the vision cache may become, where the recipe asks for one."""
        if self.model.vision_cache is None:
            return None
        splits = [rows["images"] for rows in (self.train, self.validation) if rows is not None]
        sources = [image_source(i) for images in splits for row in images for i in row]
        images = len({hashlib.sha256(s).digest() if isinstance(s, bytes) else s for s in sources})
        tiles = 1
        if self.family.has_tiles:
            limit = self.collator.encoder.max_image_tiles
            every = self.processor.image_processor.max_image_tiles
            tiles = limit if self.model.cross_attention_fix else every
        each = math.prod(self.family.feature_shape(self.config)) * _BYTES[self.model.dtype]
        folder = Path(self.model.vision_cache)
        existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        return (
            f"vision cache: at most {images:,} images x {tiles} tiles x {each / 1e6:.3g} MB = "
            f"{images * tiles * each / 1e9:.3g} GB in {folder}, which has "
            f"{shutil.disk_usage(existing).free / 1e9:,.0f} GB free and may take "
            f"{self.model.vision_cache_gb:g}; it is for thousands of images, not for millions"
        )

    def examples(self, num_rows: int = 3) -> list[str]:
        """The first rows as text, what is trained between >>> and <<<."""
        encoder, max_length = self.collator.encoder, self.collator.max_length
        rows = self.train.select(range(min(num_rows, len(self.train))))
        return [
            mark_trained(encoder.encode(messages_of(row), row["id"]), encoder, max_length)
            for row in rows.remove_columns("images")
        ]


def prepare_inputs(
    model: DecoderModelSection,
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
        check_flags(model, data, lora, family)
        processor = load_processor(model)
        encoder = ConversationEncoder(processor, family, max_image_tiles=data.max_image_tiles)
        empty = empty_model(
            AutoModelForImageTextToText, config, deepspeed_plugin=arguments.deepspeed_plugin
        )
        head_rows = empty.get_output_embeddings().out_features
        check_vocabulary(processor, empty.get_input_embeddings().num_embeddings)
        plan = plan_targets(empty, lora, family) if lora else ALL_WEIGHTS
        check_trained_vision(empty, model, family, arguments)
        if model.vision_cache:
            check_cached_tower(model.vision_cache, config)
    findings.raise_any()
    separates_rows = model.cross_attention_fix or not family.mixes_rows
    kept: dict[str, Dataset] = {}
    lengths: dict[str, list[int]] = {}
    record: dict[str, Any] = {}
    for split, (path, rows) in files.items():
        with findings.gather():
            kept[split], lengths[split], counts = _measured(rows, encoder, data, head_rows)
            if split == "validation":
                check_validation_batches(counts["images_a_row"], separates_rows, arguments)
            record[split] = {**fingerprint(path, rows), **counts}
            logger.info("%s: %s", split, describe_counts(counts))
    if lora and "train" in kept and record["train"]["images_a_row"].keys() == {"0"}:
        with findings.gather():
            unadapted = empty_model(AutoModelForImageTextToText, config)
            check_layers_run(lora, family, config, unadapted)
    findings.raise_any()
    sampler = _sampler(kept["train"], lengths["train"], separates_rows, arguments)
    if sampler.repeats:
        logger.info("train: %s rows of an epoch are repeats, to fill batches", sampler.repeats)
    return DecoderInputs(
        config=config,
        family=family,
        processor=processor,
        collator=DecoderCollator(
            encoder,
            max_length=data.max_length,
            head_rows=head_rows,
            separates_rows=separates_rows,
        ),
        adapter_plan=plan,
        train=kept["train"],
        validation=kept.get("validation"),
        sampler=sampler,
        model=model,
        num_processes=arguments.world_size,
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


def _measured(
    rows: Dataset, encoder: ConversationEncoder, data: DecoderDataSection, head_rows: int
) -> tuple[Dataset, list[int], dict[str, Any]]:
    """The rows that fit, their lengths in tokens, and counts of all: images, cut, dropped.

    Raises:
        DataError: a row cannot be encoded, or its prompt is too long and `too_long` is error.
    """
    names = ("rows_kept", "rows_dropped", "answers_cut", "tokens_cut", "tokens_trained")
    counts: dict[str, Any] = dict.fromkeys(names, 0)
    keep: list[int] = []
    lengths: list[int] = []
    kept_lengths: list[int] = []
    image_counts: Counter[int] = Counter()
    problems: list[str] = []
    never = encoder.family.never_labels(encoder.processor)
    for index, row in enumerate(rows.select_columns(["id", "messages", "images"])):
        try:
            encoded = encoder.encode(messages_of(row), row["id"])
            _check_image_tokens(row, encoded.input_ids, encoder)
            check_labels(torch.tensor([encoded.labels]), head_rows, never, [row["id"]])
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
        kept_lengths.append(len(encoded.input_ids))
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
    kept = rows if len(keep) == len(rows) else rows.select(keep)
    return kept, kept_lengths, counts


def _check_image_tokens(
    row: dict[str, Any], input_ids: list[int], encoder: ConversationEncoder
) -> None:
    wanted = len(row["images"]) * encoder.family.tokens_per_image(encoder.processor)
    found = input_ids.count(encoder.image_token_id)
    if found != wanted:
        raise DataError(
            f"row {row['id']}: expected {wanted} image tokens for its {len(row['images'])} images, "
            f"the chat template wrote {found}: put the base's own template back"
        )


def _sampler(
    train: Dataset,
    lengths: list[int],
    separates_rows: bool,
    arguments: TrainingArguments,
) -> RoundSampler:
    image_counts = [len(images) for images in train["images"]]
    mixes = separates_rows and not shards_weights(arguments)
    kinds = [min(count, 1) for count in image_counts] if mixes else image_counts
    groups = arguments.train_sampling_strategy == "group_by_length"
    return RoundSampler(
        kinds,
        round_size=arguments.per_device_train_batch_size * arguments.world_size,
        seed=arguments.seed,
        fills=arguments.world_size > 1,
        lengths=lengths if groups else None,
    )
