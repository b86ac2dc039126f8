"""Prepared data of a SigLIP run: all that is known and checked before weights are loaded."""

import logging
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import AutoModel, PreTrainedConfig, ProcessorMixin, TrainingArguments

from medft.config.recipe import ContrastiveSection, LoraSection, ModelSection, SiglipDataSection
from medft.data.overlap import check_overlap
from medft.data.rows import Row, describe_counts, fingerprint, load_rows
from medft.data.tokens import collisions, length_percentiles, token_keys
from medft.errors import DataError, ErrorCollector, RecipeError
from medft.models.adapter import find_initial
from medft.models.base import empty_model, load_config, readable_base
from medft.models.lora import ALL_WEIGHTS, plan_adapter
from medft.models.saved import SavedModel
from medft.siglip.checks import check_family, check_launch, check_sizes, check_tokens
from medft.siglip.collator import PairCollator, PairDataset, caption_of
from medft.siglip.floor import sigmoid_floor
from medft.siglip.model import PARTS, PRESETS, load_siglip_processor, splits_head
from medft.siglip.pooling_head import split_pooling_head

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchPlan:
    """How many pairs a loss compares, and its lower bound under their labels."""

    pairs_compared: int
    pairs_dropped_an_epoch: int
    """Different ones in each epoch; a smaller last batch would have fewer negatives."""

    loss_floor: float | None
    """Lower bound of the mean training loss; None for losses other than sigmoid."""

    validation_loss_floor: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class PreparedSiglipData:
    """The checked data of a SigLIP run, with collator, processor and batch plan."""

    config: PreTrainedConfig
    processor: ProcessorMixin
    collator: PairCollator
    initial: SavedModel | None
    """The adapter of `lora.init_from`."""

    adapter_plan: str
    """How many layers get an adapter, by tower, and how many parameters are trained."""

    train: PairDataset
    validation: PairDataset | None
    record: dict[str, Any]
    """Fingerprints of the files and counts of their rows, for run.json."""

    batches: BatchPlan
    """How many pairs are compared and dropped, for run.json."""

    global_batch_size: int
    """Pairs per device times devices."""

    @property
    def batch_record(self) -> dict[str, Any]:
        """Which pairs are compared, and the floor of the loss."""
        return asdict(self.batches)

    @property
    def rows_per_epoch(self) -> int:
        """Number of training pairs per epoch."""
        return len(self.train) - self.batches.pairs_dropped_an_epoch

    @property
    def batches_per_epoch(self) -> int:
        """Number of training batches of each process per epoch."""
        return math.ceil(self.rows_per_epoch / self.global_batch_size)

    def examples(self, num_rows: int = 3) -> list[str]:
        """The first captions, each with its tokens decoded again."""
        tokenizer = self.processor.tokenizer
        return [
            f"{caption!r} -> {tokenizer.decode(ids, skip_special_tokens=True)!r}"
            for caption in self.train.captions[:num_rows]
            for ids in [
                tokenizer(caption, truncation=True, max_length=self.collator.max_length)[
                    "input_ids"
                ]
            ]
        ]


def prepare_siglip_data(
    model: ModelSection,
    data: SiglipDataSection,
    lora: LoraSection | None,
    contrastive: ContrastiveSection,
    arguments: TrainingArguments,
) -> PreparedSiglipData:
    """Read the data and the base's small files, and check them against each other.

    Raises:
        MedftError: with every problem found: launcher, data files, then the base.
    """
    collector = ErrorCollector()
    with collector.gather():
        check_launch(model, arguments)
    paths = {"train": data.train, "validation": data.validation}
    files = {split: Path(path) for split, path in paths.items() if path is not None}
    pairs: dict[str, PairDataset] = {}
    for split, path in files.items():
        with collector.gather():
            pairs[split] = _read_pairs(path, split, data.caption)
    overlap: dict[str, Any] = {}
    if pairs.keys() == {"train", "validation"}:
        with collector.gather():
            sides = (pairs[split].rows for split in ("train", "validation"))
            overlap = check_overlap(*sides, is_allowed=data.allow_overlap)
    with collector.gather():
        config = load_config(model)
        check_family(config)
        check_sizes(config, data)
        processor = load_siglip_processor(
            model, image_size=data.image_size, max_length=data.max_length
        )
        initial = find_initial(lora)
        plan = _plan(model, config, lora, initial, arguments) if lora else ALL_WEIGHTS
    collector.raise_any()
    measured = {split: _measure(p, processor, data.max_length) for split, p in pairs.items()}
    for split, known in measured.items():
        check_tokens(known.tokens, config)
        logger.info("%s: %s", split, describe_counts(known.counts))
    pairs["train"].augment(data, arguments.seed)
    batches = _plan_batches(measured, contrastive, arguments)
    logger.info("batches: %s", describe_counts(asdict(batches)))
    return PreparedSiglipData(
        config=config,
        processor=processor,
        collator=PairCollator(processor, max_length=data.max_length),
        adapter_plan=plan,
        initial=initial,
        train=pairs["train"],
        validation=pairs.get("validation"),
        record={
            split: {**fingerprint(path, pairs[split].rows), **measured[split].counts}
            for split, path in files.items()
        }
        | overlap,
        batches=batches,
        global_batch_size=arguments.per_device_train_batch_size * arguments.world_size,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _MeasuredPairs:
    """The entries of a file, with tokens and counts of their captions."""

    entries: PairDataset
    tokens: list[bytes]
    """Tokens of each entry's caption, truncated, as int32 bytes."""

    counts: dict[str, Any]
    """For run.json."""

    def floor(self, batch: int, positives: str) -> float:
        """Lower bound of the sigmoid loss in batches of `batch` entries."""
        groups = self.entries.by_entry(self.entries.rows["group_id"])
        return sigmoid_floor(
            self.entries.image_keys, self.tokens, groups, batch=batch, positives=positives
        )


def _plan_batches(
    measured: Mapping[str, _MeasuredPairs],
    contrastive: ContrastiveSection,
    arguments: TrainingArguments,
) -> BatchPlan:
    pairs = len(measured["train"].entries)
    compared = arguments.per_device_train_batch_size
    dropped = 0
    if contrastive.exact_batch:
        compared *= arguments.gradient_accumulation_steps * arguments.world_size
        dropped = pairs % compared
    if dropped == pairs:
        raise RecipeError(
            f"expected pairs for one exact batch of {compared} at least, data.train has {pairs}: "
            f"lower train.per_device_train_batch_size or train.gradient_accumulation_steps"
        )
    floors: dict[str, float] = {}
    if contrastive.loss == "sigmoid":
        sizes = {split: len(known.entries) for split, known in measured.items()}
        for split, size in {**sizes, "train": compared}.items():
            floors[split] = measured[split].floor(size, contrastive.positives)
    return BatchPlan(
        pairs_compared=compared,
        pairs_dropped_an_epoch=dropped,
        loss_floor=floors.get("train"),
        validation_loss_floor=floors.get("validation"),
    )


def _plan(
    model: ModelSection,
    config: PreTrainedConfig,
    lora: LoraSection,
    initial: SavedModel | None,
    arguments: TrainingArguments,
) -> str:
    with readable_base(model):
        empty = empty_model(AutoModel, config, deepspeed_plugin=arguments.deepspeed_plugin)
    if splits_head(lora):
        split_pooling_head(empty)
    return plan_adapter(empty, lora, PRESETS, PARTS, initial)


def _read_pairs(path: Path, split: str, template: str | None) -> PairDataset:
    rows = load_rows(path, split=split)
    captions = [caption_of(Row.of(row), template) for row in rows.remove_columns("images")]
    empty = [row for row, caption in zip(rows["id"], captions, strict=True) if not caption]
    if empty:
        raise DataError(
            f"expected a caption for every row of {path}, {len(empty)} are empty, first row "
            f"{empty[0]}: correct data.caption or the rows"
        )
    pairs = PairDataset(rows, captions)
    if len(pairs) == 0:
        raise DataError(f"expected images in {path}, no row has one: give rows with images")
    return pairs


def _measure(pairs: PairDataset, processor: ProcessorMixin, max_length: int) -> _MeasuredPairs:
    keys, length_of = token_keys(dict.fromkeys(pairs.captions), processor.tokenizer, max_length)
    lengths = [length_of[caption] for caption in pairs.captions]
    images_of = Counter(pairs.by_entry(range(len(pairs.captions))))
    image_counts = Counter(images_of[row] for row in range(len(pairs.captions)))
    alike = collisions(keys)
    counts: dict[str, Any] = {
        "pairs": len(pairs),
        "captions_cut": sum(length > max_length for length in lengths),
        "tokens_a_caption": length_percentiles(lengths),
        "images_a_row": {str(count): image_counts[count] for count in sorted(image_counts)},
        "captions_with_the_same_tokens": sum(map(len, alike)),
    }
    if alike:
        counts["such_as"] = alike[0][:3]
    tokens = pairs.by_entry([keys[caption] for caption in pairs.captions])
    return _MeasuredPairs(entries=pairs, tokens=tokens, counts=counts)
