"""Everything that an encoder run can know and check before the base's weights are loaded."""

import json
import logging
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from accelerate.utils import parse_flag_from_env
from transformers import AutoModel, PreTrainedConfig, ProcessorMixin, TrainingArguments

from medft.config.recipe import ContrastiveSection, LoraSection, ModelSection, SiglipDataSection
from medft.data.chat import (
    describe_counts,
    fingerprint,
    first_texts,
    load_rows,
    messages_of,
)
from medft.data.template import fill_template, template_names
from medft.data.tokens import collisions, length_percentiles, token_keys
from medft.errors import BaseModelError, DataError, Findings, RecipeError
from medft.models.base import empty_model, load_config
from medft.models.lora import ALL_WEIGHTS, plan_adapter
from medft.siglip.collator import PairCollator, PairDataset
from medft.siglip.floor import sigmoid_floor
from medft.siglip.model import (
    PARTS,
    PRESETS,
    check_family,
    load_siglip_processor,
    splits_head,
)
from medft.siglip.pooling_head import split_pooling_head

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchPlan:
    """How many pairs a loss compares, and what of it the labels make impossible to learn."""

    pairs_compared: int
    pairs_left_out_an_epoch: int
    """Others in each epoch; a smaller last batch would have fewer negatives."""

    loss_floor: float | None
    """The mean loss of the best embeddings there can be; None but for the sigmoid loss."""

    validation_loss_floor: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class SiglipInputs:
    """What an encoder is trained on and with."""

    config: PreTrainedConfig
    processor: ProcessorMixin
    collator: PairCollator
    adapter_plan: str
    """How many layers get an adapter, by tower, and how many parameters are trained."""

    train: PairDataset
    validation: PairDataset | None
    record: dict[str, Any]
    """Fingerprints of the files and what became of their rows, for run.json."""

    batches: BatchPlan
    """Which pairs are compared with each other, for run.json."""

    @property
    def rows_per_epoch(self) -> int:
        """Training pairs of an epoch."""
        return len(self.train) - self.batches.pairs_left_out_an_epoch

    def examples(self, num_rows: int = 3) -> list[str]:
        """The first captions, as the tokenizer gives them back."""
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


def prepare_inputs(
    model: ModelSection,
    data: SiglipDataSection,
    lora: LoraSection | None,
    contrastive: ContrastiveSection,
    arguments: TrainingArguments,
) -> SiglipInputs:
    """Read the data and the base's small files, and check them against each other.

    Raises:
        MedftError: with every problem found: data files first, then the base.
    """
    findings = Findings()
    with findings.gather():
        _check_launch(model, arguments)
    files: dict[str, tuple[Path, PairDataset]] = {}
    for split in ("train", "validation"):
        path = getattr(data, split)
        if path is not None:
            with findings.gather():
                files[split] = (Path(path), _pairs(Path(path), split, data.caption))
    with findings.gather():
        config = load_config(model)
        check_family(config)
        _check_sizes(config, data)
        processor = load_siglip_processor(
            model, image_size=data.image_size, max_length=data.max_length
        )
        plan = _plan(config, lora, arguments) if lora else ALL_WEIGHTS
    findings.raise_any()
    record, tokens = {}, {}
    for split, (path, pairs) in files.items():
        tokens[split], counts = _measured(pairs, processor, data.max_length)
        _check_tokens(tokens[split], config)
        record[split] = {**fingerprint(path, pairs.rows), **counts}
        logger.info("%s: %s", split, describe_counts(counts))
    train = files["train"][1]
    train.augment(data, arguments.seed)
    batches = _plan_batches(
        {split: (pairs, tokens[split]) for split, (_, pairs) in files.items()},
        contrastive,
        arguments,
    )
    logger.info("batches: %s", describe_counts(asdict(batches)))
    return SiglipInputs(
        config=config,
        processor=processor,
        collator=PairCollator(processor, max_length=data.max_length),
        adapter_plan=plan,
        train=train,
        validation=files["validation"][1] if "validation" in files else None,
        record=record,
        batches=batches,
    )


def _check_launch(model: ModelSection, arguments: TrainingArguments) -> None:
    plugin = arguments.deepspeed_plugin
    sharded_by = "ZeRO-3" if plugin is not None and plugin.zero_stage == 3 else None
    if parse_flag_from_env("ACCELERATE_USE_FSDP"):
        sharded_by = "FSDP"
    if sharded_by:
        raise RecipeError(
            f"expected SigLIP whole on every process, {sharded_by} shards it, and the loss needs "
            f"scale, bias and the towers' first pass outside the forward: use "
            f"accelerate_configs/ddp.yaml or zero2.yaml"
        )
    if plugin is not None and model.dtype != "float32":
        raise RecipeError(
            f"expected model.dtype float32 under DeepSpeed, which would round adapter, scale and "
            f"bias to {model.dtype}: use accelerate_configs/ddp.yaml, or write float32"
        )


def _plan_batches(
    splits: dict[str, tuple[PairDataset, list[bytes]]],
    contrastive: ContrastiveSection,
    arguments: TrainingArguments,
) -> BatchPlan:
    """The plan of the splits, of which the tokens of each entry are given too."""
    pairs = len(splits["train"][0])
    compared = arguments.per_device_train_batch_size
    left_out = 0
    if contrastive.exact_batch:
        compared *= arguments.gradient_accumulation_steps * arguments.world_size
        left_out = pairs % compared
    if left_out == pairs:
        raise RecipeError(
            f"expected pairs for one exact batch of {compared} at least, data.train has {pairs}: "
            f"lower train.per_device_train_batch_size or train.gradient_accumulation_steps"
        )

    def floor(split: str, batch: int | None = None) -> float | None:
        if contrastive.loss != "sigmoid" or split not in splits:
            return None
        entries, texts = splits[split]
        groups = entries.by_entry(entries.rows["group_id"])
        return sigmoid_floor(
            entries.image_keys,
            texts,
            groups,
            batch=batch or len(entries),
            positives=contrastive.positives,
        )

    return BatchPlan(
        pairs_compared=compared,
        pairs_left_out_an_epoch=left_out,
        loss_floor=floor("train", compared),
        validation_loss_floor=floor("validation"),
    )


def _check_sizes(config: PreTrainedConfig, data: SiglipDataSection) -> None:
    positions = config.text_config.max_position_embeddings
    if data.max_length > positions:
        raise RecipeError(
            f"expected data.max_length of at most {positions}, the text positions of the base, "
            f"got {data.max_length}: lower it"
        )
    if data.max_length < positions:
        logger.warning(
            "captions are padded to %s tokens and the base learnt to pool the last of %s: embed "
            "with the processor that is saved beside the adapter",
            data.max_length,
            positions,
        )
    patch = config.vision_config.patch_size
    if data.image_size < patch:
        raise RecipeError(
            f"expected data.image_size of at least one patch of {patch} pixels, got "
            f"{data.image_size}: raise it"
        )


def _check_tokens(tokens: Iterable[bytes], config: PreTrainedConfig) -> None:
    largest = max(int(np.frombuffer(key, np.int32).max()) for key in set(tokens))
    rows = config.text_config.vocab_size
    if largest >= rows:
        raise BaseModelError(
            f"expected tokens below {rows}, the text embeddings of the base, a caption has "
            f"{largest}: the tokenizer in model.base is another model's"
        )


def _plan(config: PreTrainedConfig, lora: LoraSection, arguments: TrainingArguments) -> str:
    empty = empty_model(AutoModel, config, deepspeed_plugin=arguments.deepspeed_plugin)
    if splits_head(lora):
        split_pooling_head(empty)
    return plan_adapter(empty, lora, PRESETS, PARTS)


def _pairs(path: Path, split: str, template: str | None) -> PairDataset:
    rows = load_rows(path, split=split)
    captions = [caption_of(row, template) for row in rows.remove_columns("images")]
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


def caption_of(row: dict[str, Any], template: str | None) -> str:
    """The caption of a row of `load_rows`: a template over it, or its first assistant text.

    Raises:
        RecipeError: the template names what the row does not have.
    """
    texts = first_texts(messages_of(row))
    if template is None:
        return texts["answer"]
    values = {**json.loads(row["fields"]), **texts, "id": row["id"]}
    missing = [name for name in template_names(template) if name not in values]
    if missing:
        raise RecipeError(
            f"expected data.caption to name parts of the row, {', '.join(missing)} is none in row "
            f"{row['id']}: choose from {', '.join(sorted(values))}"
        )
    return fill_template(template, values)


def _measured(
    pairs: PairDataset, processor: ProcessorMixin, max_length: int
) -> tuple[list[bytes], dict[str, Any]]:
    """The tokens of each entry as the model sees them, and what is known of them."""
    keys, length_of = token_keys(dict.fromkeys(pairs.captions), processor.tokenizer, max_length)
    lengths = [length_of[caption] for caption in pairs.captions]
    images_of = Counter(pairs.by_entry(range(len(pairs.captions))))
    image_counts = Counter(images_of[row] for row in range(len(pairs.captions)))
    alike = collisions(keys)
    return pairs.by_entry([keys[caption] for caption in pairs.captions]), {
        "pairs": len(pairs),
        "captions_cut": sum(length > max_length for length in lengths),
        "tokens_a_caption": length_percentiles(lengths),
        "images_a_row": {str(count): image_counts[count] for count in sorted(image_counts)},
        "captions_with_the_same_tokens": sum(map(len, alike)),
        **({"such_as": alike[0][:3]} if alike else {}),
    }
