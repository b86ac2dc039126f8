"""Prepared data of a decoder run: all that is known and checked before weights are loaded."""

import hashlib
import logging
import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import (
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedModel,
    ProcessorMixin,
    TrainingArguments,
)

from medft.compat import attention_implementation, num_weights
from medft.config.lora_keys import LoraSection
from medft.config.recipe import DecoderDataSection, DecoderModelSection
from medft.data.overlap import check_overlap
from medft.data.prompts import asked_prompts
from medft.data.rows import (
    Row,
    describe_counts,
    fingerprint,
    image_source,
    load_rows,
)
from medft.decoder.checks import (
    check_cached_tower,
    check_flags,
    check_image_size,
    check_layers_run,
    check_trained_vision,
    check_validation_batches,
    check_vocabulary,
    plan_targets,
    shards_weights,
)
from medft.decoder.collator import DecoderCollator
from medft.decoder.conversation import ConversationEncoder, mark_trained
from medft.decoder.families import family_of
from medft.decoder.families.base import Family
from medft.decoder.measured_rows import MeasuredRows, measure_rows
from medft.decoder.sampler import GlobalBatchSampler
from medft.decoder.vision_cache import VisionCache, tower_sha256
from medft.errors import ErrorCollector
from medft.models.adapter import find_initial
from medft.models.base import empty_model, load_config, load_processor, readable_base
from medft.models.lora import ALL_WEIGHTS
from medft.models.saved import SavedModel
from medft.provenance import package_versions

logger = logging.getLogger(__name__)

_VERSIONS = ("pillow", "torch", "transformers")
"""Packages whose versions may change the last bits of a feature."""

_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}


@dataclass(frozen=True, kw_only=True, slots=True)
class PreparedDecoderData:
    """The checked data of a decoder run, with collator, sampler and processor."""

    config: PreTrainedConfig
    family: Family
    processor: ProcessorMixin
    collator: DecoderCollator
    base_weights: int
    """Number of the base's weights."""

    adapter_plan: str
    """How many layers get an adapter, by part, and how many parameters are trained."""

    initial: SavedModel | None
    """The adapter of `lora.init_from`."""

    train: Dataset
    validation: Dataset | None
    sampler: GlobalBatchSampler
    """The order of training rows."""

    model: DecoderModelSection
    """The recipe's section."""

    num_processes: int

    record: dict[str, Any]
    """Fingerprints of the files and counts of their rows, for run.json."""

    prompts: list[str]
    """Declared prompts that training rows are asked, as templates."""

    system: str | None
    """The text of the system turn that every training row has."""

    longest_answer: int
    """Tokens of the longest trained answer, its end included."""

    @property
    def batch_record(self) -> dict[str, Any]:
        """Nothing beyond the arithmetic."""
        return {}

    @property
    def batches_per_epoch(self) -> int:
        """Number of training batches of each process per epoch."""
        return len(self.sampler) // self.num_processes

    def open_cache(self, model: PreTrainedModel) -> VisionCache | None:
        """The cache of image features, or None if the recipe asks for none.

        Args:
            model: the base with its weights.
        """
        if self.model.vision_cache is None:
            return None
        key = {
            "weights": tower_sha256(model, self.family),
            "config": self.config.vision_config.to_dict(),
            "attention": attention_implementation(model.config.vision_config),
            "processor": self.processor.image_processor.to_dict(),
            "max_image_tiles": self.collator.conversation.max_image_tiles,
            "prunes": self.model.cross_attention_fix,
            "versions": {name: package_versions()[name] for name in _VERSIONS},
            "device": str(torch.accelerator.current_accelerator()),
        }
        limit = int(self.model.vision_cache_gb * 1e9) // self.num_processes
        return VisionCache(Path(self.model.vision_cache), key, limit=limit)

    def cache_plan(self) -> str | None:
        """A sentence on the maximum size of the vision cache; None if the recipe asks for none."""
        if self.model.vision_cache is None:
            return None
        splits = [rows["images"] for rows in (self.train, self.validation) if rows is not None]
        sources = [image_source(i) for images in splits for row in images for i in row]
        images = len({hashlib.sha256(s).digest() if isinstance(s, bytes) else s for s in sources})
        tiles = 1
        if self.family.has_tiles:
            limit = self.collator.conversation.max_image_tiles
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
        """The first rows as text, trained spans between >>> and <<<."""
        conversation, max_length = self.collator.conversation, self.collator.max_length
        records = self.train.select(range(min(num_rows, len(self.train))))
        rows = map(Row.of, records.remove_columns("images"))
        encoded = (conversation.encode(row.messages, row.id) for row in rows)
        return [mark_trained(row, conversation, max_length) for row in encoded]


def prepare_decoder_data(
    model: DecoderModelSection,
    data: DecoderDataSection,
    lora: LoraSection | None,
    arguments: TrainingArguments,
) -> PreparedDecoderData:
    """Read the data and the base's small files, and check each row against them.

    Raises:
        MedftError: with every problem found: data files first, then the base.
    """
    collector = ErrorCollector()
    files: dict[str, Dataset] = {}
    for split, path in _files(data).items():
        with collector.gather():
            files[split] = load_rows(path, split=split)
    overlap: dict[str, Any] = {}
    if files.keys() == {"train", "validation"}:
        with collector.gather():
            overlap = check_overlap(*files.values(), is_allowed=data.allow_overlap)
    with collector.gather():
        base = _checked_base(model, data, lora, arguments)
    collector.raise_any()
    isolates_rows = model.cross_attention_fix or not base.family.leaks_across_batch
    measured: dict[str, MeasuredRows] = {}
    for split, rows in files.items():
        with collector.gather():
            measured[split] = measure_rows(
                rows, base.conversation, data, vocab_size=base.vocab_size
            )
            if split == "validation":
                check_validation_batches(measured[split].images_a_row, isolates_rows, arguments)
    if lora and "train" in measured and measured["train"].images_a_row.keys() == {"0"}:
        with collector.gather():
            with readable_base(model):
                unadapted = empty_model(AutoModelForImageTextToText, base.config)
            check_layers_run(lora, base.family, base.config, unadapted)
    collector.raise_any()
    for split, known in measured.items():
        logger.info("%s: %s", split, describe_counts(known.counts))
    sampler = _sampler(measured["train"], isolates_rows, arguments)
    if sampler.repeats:
        logger.info(
            "train: %s rows of an epoch are repeats, to fill batches, one row comes %s times",
            sampler.repeats,
            sampler.most_repeated,
        )
    return PreparedDecoderData(
        config=base.config,
        family=base.family,
        processor=base.conversation.processor,
        collator=DecoderCollator(
            base.conversation,
            max_length=data.max_length,
            vocab_size=base.vocab_size,
            isolates_rows=isolates_rows,
        ),
        base_weights=base.weights,
        adapter_plan=base.adapter_plan,
        initial=base.initial,
        train=measured["train"].kept,
        validation=measured["validation"].kept if "validation" in measured else None,
        sampler=sampler,
        model=model,
        num_processes=arguments.world_size,
        record={
            split: {**fingerprint(path, files[split]), **measured[split].counts}
            for split, path in _files(data).items()
        }
        | overlap,
        prompts=asked_prompts(Path(data.train), measured["train"].kept),
        system=measured["train"].system,
        longest_answer=measured["train"].longest_answer,
    )


def _files(data: DecoderDataSection) -> dict[str, Path]:
    paths = {"train": data.train, "validation": data.validation}
    return {split: Path(path) for split, path in paths.items() if path is not None}


@dataclass(frozen=True, kw_only=True, slots=True)
class _CheckedBase:
    """What is known of a base without its weights."""

    config: PreTrainedConfig
    family: Family
    conversation: ConversationEncoder
    vocab_size: int
    """Rows of the output head."""

    weights: int
    """Number of the base's."""

    adapter_plan: str
    initial: SavedModel | None


def _checked_base(
    model: DecoderModelSection,
    data: DecoderDataSection,
    lora: LoraSection | None,
    arguments: TrainingArguments,
) -> _CheckedBase:
    config = load_config(model)
    family = family_of(config.model_type)
    initial = find_initial(lora)
    check_flags(model, data, initial, family)
    if model.cross_attention_fix and lora is None:
        logger.warning(
            "model/ of this run needs model.cross_attention_fix, which medft applies and plain "
            "transformers does not have: other tools will compute something else with it"
        )
    processor = load_processor(model)
    check_image_size(processor, config)
    conversation = ConversationEncoder(processor, family, max_image_tiles=data.max_image_tiles)
    with readable_base(model):
        empty = empty_model(
            AutoModelForImageTextToText, config, deepspeed_plugin=arguments.deepspeed_plugin
        )
        vocab_size = empty.get_output_embeddings().out_features
    check_vocabulary(processor, empty.get_input_embeddings().num_embeddings)
    plan = plan_targets(empty, lora, family, initial) if lora else ALL_WEIGHTS
    check_trained_vision(empty, model, lora, family, arguments)
    if model.vision_cache:
        check_cached_tower(model.vision_cache, config)
    return _CheckedBase(
        config=config,
        family=family,
        conversation=conversation,
        vocab_size=vocab_size,
        weights=sum(map(num_weights, empty.parameters())),
        adapter_plan=plan,
        initial=initial,
    )


def _sampler(
    train: MeasuredRows, isolates_rows: bool, arguments: TrainingArguments
) -> GlobalBatchSampler:
    image_counts = [len(images) for images in train.kept["images"]]
    mixes = isolates_rows and not shards_weights(arguments)
    groups = arguments.train_sampling_strategy == "group_by_length"
    return GlobalBatchSampler(
        [min(count, 1) for count in image_counts] if mixes else image_counts,
        batch_size=arguments.per_device_train_batch_size,
        num_processes=arguments.world_size,
        seed=arguments.seed if arguments.data_seed is None else arguments.data_seed,
        lengths=train.lengths if groups else None,
    )
