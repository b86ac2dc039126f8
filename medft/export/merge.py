"""Merges an adapter into its base: a folder that plain transformers loads.

`original` merges into the base's own weights, in the precision they are stored in. After training
on a 4-bit base the merged model differs a little from the trained one, which saw quantized weights.
"""

import logging
from pathlib import Path
from typing import Any

from medft.config.recipe import ModelSection
from medft.decoder.model import load_saved as load_saved_decoder
from medft.errors import RunError
from medft.export.unfixed import difference_without_fix
from medft.files import check_folder_for_output, complete_folder, write_json
from medft.models.base import load_processor
from medft.models.saved import find_saved_adapter
from medft.provenance import masked
from medft.siglip.model import load_saved as load_saved_siglip
from medft.siglip.pooling_head import join_pooling_head

MERGE_FILE = "merge.json"

logger = logging.getLogger(__name__)


def merge(source: Path, out: Path, *, force: bool = False) -> Path:
    """Merge a run's adapter into the original weights of its base, and write model and processor.

    Of a model trained with `cross_attention_fix`, which plain transformers lacks, the difference of
    the logits there is written to merge.json and the log.

    Args:
        source: a run directory (its adapter/ is taken) or an adapter folder such as best_model/.
        out: folder; must be empty or not exist.
        force: write a model that plain transformers computes otherwise than it was trained.

    Returns:
        The adapter folder that was merged.

    Raises:
        RunError: the run has no finished adapter, or PEFT cannot merge it, or `out` is not empty,
            or the model was trained with `cross_attention_fix` and `force` is not given.
        BaseModelError: the base is missing or not the one that was trained.
    """
    saved = find_saved_adapter(source)
    check_folder_for_output(out)
    processor = load_processor(ModelSection(base=str(saved.folder)))
    if saved.is_encoder:
        adapted = load_saved_siglip(saved)
    else:
        adapted = load_saved_decoder(saved, as_stored=True)
    try:
        merged = adapted.merge_and_unload(safe_merge=True)
    except (RuntimeError, ValueError) as error:  # lora_bias on a layer without bias, for one
        raise RunError(
            f"expected an adapter that can be merged in {saved.folder}, PEFT says: {error}: use "
            f"it with medft as it is"
        ) from error
    if saved.record.splits_head:
        join_pooling_head(merged)
    record: dict[str, Any] = {}
    if saved.record.cross_attention_fix:
        figures = difference_without_fix(merged, processor, saved)
        if not force:
            raise RunError(
                f"expected a model that plain transformers computes as it was trained, "
                f"{saved.folder} was trained with model.cross_attention_fix: "
                f"{describe_difference(figures)}: use the adapter with medft, or merge it with "
                f"--force"
            )
        logger.warning(
            "plain transformers lacks the cross_attention_fix that the merged model was trained "
            "with: %s; medft applies it",
            describe_difference(figures),
        )
        where = {"onto": "original", "adapter": str(saved.folder), "base": saved.base.base}
        record = masked(where) | figures | {"passed": False}
    with complete_folder(out) as draft:
        merged.save_pretrained(draft)
        processor.save_pretrained(draft)
        saved.record.model_copy(update={"merged_onto": "original"}).write(draft)
        if record:
            write_json(draft / MERGE_FILE, record)
    return saved.folder


def describe_difference(figures: dict[str, Any]) -> str:
    """What `difference_without_fix` found, as a part of a sentence."""
    parts = figures["max_logit_difference_by"].items()
    by = ", ".join(f"{name.replace('_', ' ')} {largest:.3g}" for name, largest in parts)
    return (
        f"without it logits differ by {figures['mean_logit_difference']:.3g} on average and "
        f"{figures['max_logit_difference']:.3g} at most ({by}), and {figures['top1_agreement']:.1%}"
        f" of the tokens have the same most probable successor ({figures['rows']} rows, from "
        f"{figures['rows_from']})"
    )
